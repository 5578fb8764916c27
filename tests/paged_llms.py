"""Tiny LLMs for tests of the `paged` engine, with what transformers says of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the paged engine needs torch")
transformers = pytest.importorskip(
    "transformers", reason="what the paged engine says is compared with transformers"
)

from foreserve.runtime.engines import tiny  # noqa: E402
from foreserve.runtime.memory.safetensors import Checkpoint, fill  # noqa: E402
from foreserve.runtime.paged.attention import Work, cache_view  # noqa: E402
from foreserve.runtime.paged.config import read_config  # noqa: E402
from foreserve.runtime.paged.decoder import Decoder  # noqa: E402
from foreserve.runtime.paged.layout import lay_out  # noqa: E402
from foreserve.runtime.paged.loading import views  # noqa: E402

torch.set_num_threads(1)
PAGE_BYTES = 20_000
"""Of 512 or 1024 bytes a token: it is not filled to the last byte."""


class Llm:
    """A checkpoint, its decoder in float32, and the same in transformers."""

    def __init__(self, folder: Path, family: str = "llama", **config) -> None:
        tiny.make(folder, family, seed=len(family))
        path = folder / "config.json"
        stated = json.loads(path.read_text()) | config
        path.write_text(json.dumps(stated))
        self.folder = folder
        self._told: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self.config = read_config(folder)
        self.decoder = Decoder(self.config)
        self.layout = lay_out(self.config, "float32")
        self.memory = torch.zeros(self.layout.num_bytes, dtype=torch.uint8)
        fill(self.layout, Checkpoint(folder), self.memory.numpy())
        self.weights = views(self.layout, self.memory)

    @cached_property
    def reference(self):
        transformers.utils.logging.disable_progress_bar()
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        )

    def told(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Transformers' greedy answer, whatever ends it."""
        key = (tuple(prompt), tokens)
        if key not in self._told:
            self._told[key] = self._generate(prompt, tokens)
        return self._told[key]

    def _generate(self, prompt: Sequence[int], tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        return out[0][len(prompt) :].tolist()

    def after_each(self, prompt: Sequence[int], answer: Sequence[int]) -> list[int]:
        """What transformers says after the prompt and after each token of ``answer`` but
        the last: the answer itself, if that is its greedy one. In one go, so quick."""
        known = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.inference_mode():
            logits = self.reference(known).logits[0, len(prompt) - 1 :]
        return logits.argmax(-1).tolist()

    def cache(self, pages):
        return cache_view(
            pages,
            layers=self.config.layers,
            kv_heads=self.decoder.kv_heads,
            head_dim=self.config.head_dim,
            dtype="float32",
        )


class Sequence_:
    """One answer on its way, with its pages."""

    def __init__(self, llm: Llm, prompt: Sequence[int], tokens: int) -> None:
        self.llm, self.prompt, self.wanted = llm, list(prompt), tokens
        self.known, self.computed = list(prompt), 0
        self.table: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.known) == len(self.prompt) + self.wanted

    @property
    def answer(self) -> list[int]:
        return self.known[len(self.prompt) :]


class Pages:
    """Pages that are given out in no order, and come back full of rubbish."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.bytes = torch.zeros(count, PAGE_BYTES, dtype=torch.uint8)
        self.free = list(range(count))
        self.empty = True
        """Before they are given out."""
        self.chance = np.random.default_rng(seed)

    def take(self) -> int:
        page = self.free.pop(int(self.chance.integers(len(self.free))))
        if self.empty:
            self.bytes[page] = 0
        return page

    def forget(self, sequence: Sequence_) -> None:
        """It has to compute everything again."""
        for page in sequence.table:
            self.bytes[page] = 0xFF  # not a number, in any of the formats
            self.free.append(page)
        sequence.table, sequence.computed = [], 0


def iterate(llm: Llm, pages: Pages, sequences: Sequence[Sequence_], chunk: int) -> None:
    """One iteration of sequences of one LLM, each of up to ``chunk`` tokens."""
    cache = llm.cache(pages.bytes)
    per_page = cache.shape[3]
    work = []
    for one in sequences:
        tokens = one.known[one.computed : one.computed + chunk]
        while len(one.table) * per_page < one.computed + len(tokens):
            one.table.append(pages.take())
        work.append(Work(tokens=tokens, begin=one.computed, table=one.table))
    logits = llm.decoder(llm.weights, cache, llm.decoder.plan(work, cache))
    for one, row, done in zip(sequences, logits, work, strict=True):
        one.computed += len(done.tokens)
        if one.computed == len(one.known):
            one.known.append(int(row.argmax()))
        if one.done:
            pages.forget(one)
