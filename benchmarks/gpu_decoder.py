"""Iterations of our decoders on an NVIDIA GPU. It has not been run on one yet.

    PYTHONPATH=src python benchmarks/gpu_decoder.py [--shape 8b|13b] [--out FILE]

Needs torch, and transformers for the comparison; says so in one line where there is no
GPU. Random weights in the shape of Llama-3.1-8B (or of a 13B-class LLM) in bfloat16, KV
pages of 2 MiB scattered over what memory is left:

1. prefill: one prompt of 128 to 8,192 tokens in one iteration;
2. decode: batches of 1 to 256 with 1,024 tokens of context each (fewer where the KV cache
   is too small; said in the file), and of these how long the host prepares;
3. the cost model's times for the same iterations, where the package's other dependencies
   are installed;
4. token for token against transformers: small LLMs of the same kind in float32 (greedy
   answers, prompts in chunks, pages scattered), and the large one in bfloat16 by the share
   of positions with the same likeliest token and the largest difference of a logit.

Each time is the median of 5 after 2 that do not count, the device waited for. ``--check``
runs all of it on a CPU with a tiny shape: for the script's own sake, it writes nothing.
Writes benchmarks/results/gpu_decoder.json with date and device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import torch
except ImportError:
    sys.exit("gpu_decoder: needs torch")

from foreserve.runtime.paged.attention import Work, cache_view, plan_step
from foreserve.runtime.paged.config import DecoderConfig, parse
from foreserve.runtime.paged.decoder import Decoder
from foreserve.runtime.paged.layout import lay_out
from foreserve.runtime.paged.loading import DTYPES, views

RESULT = Path(__file__).parent / "results" / "gpu_decoder.json"
PAGE_BYTES = 2 << 20
REPEATS, WARMUPS = 5, 2
CONTEXT = 1024
LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "intermediate_size": 13824,
    },
    "tiny": {
        "vocab_size": 500,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
    },
}
CATALOG = {"8b": "llama-3.1-8b", "13b": "llama-2-13b"}


class Llm:
    """A decoder with random weights, and pages in no order."""

    def __init__(
        self, raw: dict[str, Any], dtype: str, device: str, pages: int, page_bytes: int
    ) -> None:
        self.raw, self.device, self.dtype = raw, device, dtype
        self.config: DecoderConfig = parse(raw)
        layout = lay_out(self.config, dtype)
        memory = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device)
        self.weights = views(layout, memory)
        torch.manual_seed(0)
        for name, weight in self.weights.items():
            if "norm" in name:
                weight.fill_(1.0)
            else:
                # Sharp enough for answers to vary.
                sharp = 4 if "qkv" in name or name in ("embedding", "head") else 1
                weight.normal_(0, sharp * weight.shape[-1] ** -0.5)
        self.decoder = Decoder(self.config, device=device)
        self.pages = torch.zeros(pages, page_bytes, dtype=torch.uint8, device=device)
        self.cache = cache_view(
            self.pages,
            layers=self.config.layers,
            kv_heads=self.decoder.kv_heads,
            head_dim=self.config.head_dim,
            dtype=dtype,
        )
        self.per_page = self.cache.shape[3]
        self.order = torch.randperm(pages).tolist()

    def tables(self, sequences: int, tokens: int) -> list[list[int]]:
        """Pages for so many sequences."""
        each = -(-tokens // self.per_page)
        if sequences * each > len(self.order):
            raise ValueError("too few pages")
        return [self.order[i * each : (i + 1) * each] for i in range(sequences)]

    def iterate(self, work: Sequence[Work]) -> tuple[torch.Tensor, float]:
        """Logits, and what it took the host to prepare."""
        begin_s = time.perf_counter()
        step = plan_step(
            work,
            tokens_per_page=self.per_page,
            group=self.decoder.group,
            windows=self.decoder.windows,
            device=self.device,
        )
        prepared_s = time.perf_counter() - begin_s
        return self.decoder(self.weights, self.cache, step), prepared_s


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, action: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds; ``action`` says how much of it was preparation."""
    taken, prepared = [], []
    for _ in range(WARMUPS + REPEATS):
        wait(device)
        begin_s = time.perf_counter()
        prepared.append(1000 * action())
        wait(device)
        taken.append(1000 * (time.perf_counter() - begin_s))
    return {
        "median_ms": round(statistics.median(taken[WARMUPS:]), 3),
        "all_ms": [round(ms, 3) for ms in taken[WARMUPS:]],
        "host_ms": round(statistics.median(prepared[WARMUPS:]), 3),
    }


def prefill(llm: Llm, lengths: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for length in lengths:
        (table,) = llm.tables(1, length)
        work = [Work(tokens=[i % 400 for i in range(length)], begin=0, table=table)]

        def action(work: Sequence[Work] = work) -> float:
            logits, prepared_s = llm.iterate(work)
            logits.argmax(-1).tolist()
            return prepared_s

        found.append({"tokens": length, **timed(llm.device, action)})
    return found


def decode(llm: Llm, batches: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for batch in batches:
        context = CONTEXT
        while batch * -(-(context + 1) // llm.per_page) > len(llm.order):
            context //= 2
        work = [
            Work(tokens=[7], begin=context, table=table)
            for table in llm.tables(batch, context + 1)
        ]

        def action(work: Sequence[Work] = work) -> float:
            logits, prepared_s = llm.iterate(work)
            logits.argmax(-1).tolist()
            return prepared_s

        found.append({"batch": batch, "context": context, **timed(llm.device, action)})
    return found


def planned(
    shape: str, prompts: list[dict[str, Any]], steps: list[dict[str, Any]]
) -> str:
    """Add the cost model's times; where they come from, or why there are none."""
    try:
        from foreserve.models import catalog
        from foreserve.models.perf.model import Measured

        name = "h200" if "H200" in torch.cuda.get_device_name() else "h100"
        time_ = Measured().iteration(
            catalog.llm(CATALOG[shape]), catalog.gpu(name), tp=1
        )
    except Exception as error:
        return f"none: {type(error).__name__}: {error}"
    for row in prompts:
        tokens = row["tokens"]
        row["planned_ms"] = round(1000 * time_.prefill_s(tokens, tokens**2), 3)
    for row in steps:
        batch, context = row["batch"], row["context"]
        row["planned_ms"] = round(1000 * time_.decode_s(batch, batch * context), 3)
    return f"{name}, {time_.source}"


def greedy(llm: Llm, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Answers of prompts that are computed together, 48 tokens at a time."""
    longest = max(map(len, prompts)) + tokens
    tables = llm.tables(len(prompts), longest)
    known = [list(prompt) for prompt in prompts]
    done = [0] * len(prompts)
    while True:
        busy = [i for i, p in enumerate(prompts) if len(known[i]) < len(p) + tokens]
        if not busy:
            return [
                answer[len(prompt) :]
                for answer, prompt in zip(known, prompts, strict=True)
            ]
        work = [
            Work(
                tokens=known[i][done[i] : done[i] + 48], begin=done[i], table=tables[i]
            )
            for i in busy
        ]
        best = llm.iterate(work)[0].argmax(-1).tolist()
        for i, one, token in zip(busy, work, best, strict=True):
            done[i] += len(one.tokens)
            if done[i] == len(known[i]):
                known[i].append(token)


def reference(llm: Llm) -> Any:
    """The same LLM in transformers: its parameters are these weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    known = {k: v for k, v in llm.raw.items() if k != "model_type"}
    with torch.device("meta"):
        other = LlamaForCausalLM(LlamaConfig(**known, attn_implementation="sdpa"))
    state = {}
    config, dim = llm.config, llm.config.head_dim
    state["model.embed_tokens.weight"] = llm.weights["embedding"]
    state["model.norm.weight"] = llm.weights["norm"]
    state["lm_head.weight"] = llm.weights["head"]
    for layer in range(config.layers):
        at = f"model.layers.{layer}."
        sizes = [config.heads * dim, config.kv_heads * dim, config.kv_heads * dim]
        parts = llm.weights[f"{layer}.qkv"].split(sizes)
        for name, part in zip("qkv", parts, strict=True):
            state[f"{at}self_attn.{name}_proj.weight"] = part
        gate, up = llm.weights[f"{layer}.gate_up"].chunk(2)
        state[f"{at}self_attn.o_proj.weight"] = llm.weights[f"{layer}.out"]
        state[f"{at}mlp.gate_proj.weight"] = gate
        state[f"{at}mlp.up_proj.weight"] = up
        state[f"{at}mlp.down_proj.weight"] = llm.weights[f"{layer}.down"]
        state[f"{at}input_layernorm.weight"] = llm.weights[f"{layer}.norm"]
        state[f"{at}post_attention_layernorm.weight"] = llm.weights[f"{layer}.mlp_norm"]
    other.load_state_dict(state, strict=True, assign=True)
    # What is no parameter was made on the meta device.
    rotary = type(other.model.rotary_emb)(other.config)
    other.model.rotary_emb = rotary.to(llm.device)
    return other.eval()


def equality(large: Llm, device: str) -> dict[str, Any]:
    try:
        import transformers
    except ImportError:
        return {"skipped": "no transformers"}
    small = Llm(LLAMA | SHAPES["tiny"], "float32", device, 64, 65536)
    prompts = [[(31 * i + n) % 500 for n in range(5 + 29 * i)] for i in range(6)]
    answers = greedy(small, prompts, 24)
    other, same = reference(small), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device=device)
        told = other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        same += told[0][len(prompt) :].tolist() == answer
    tokens = [(37 * n) % 400 for n in range(256)]
    (table,) = large.tables(1, len(tokens))
    ours = [
        large.iterate([Work(tokens=[token], begin=at, table=table)])[0][0]
        for at, token in enumerate(tokens)
    ]
    with torch.inference_mode():
        ids = torch.tensor([tokens], device=device)
        theirs = reference(large)(ids).logits[0].float()
    mine = torch.stack(ours)
    alike = (mine.argmax(-1) == theirs.argmax(-1)).float().mean()
    return {
        "transformers": transformers.__version__,
        "answers_equal": f"{same} of {len(prompts)} (float32, tiny)",
        "likeliest_equal": round(float(alike), 4),
        "largest_difference": round(float((mine - theirs).abs().max()), 4),
        "deviation_of_logits": round(float(theirs.std()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["8b", "13b"], default="8b")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        shape, device, dtype = "tiny", "cpu", "float32"
        pages, page_bytes = 300, 65536
        lengths, batches = [16, 64], [1, 4, 16]
    elif not torch.cuda.is_available():
        sys.exit("gpu_decoder: no CUDA GPU here; nothing was measured")
    else:
        shape, device, dtype = given.shape, "cuda", "bfloat16"
        raw = parse(LLAMA | SHAPES[shape])
        weights = lay_out(raw, dtype).num_bytes
        free, _ = torch.cuda.mem_get_info()
        # The rest is for activations, and for transformers' own.
        page_bytes = PAGE_BYTES
        pages = int(0.6 * (free - weights)) // page_bytes
        lengths = [128, 512, 2048, 8192]
        batches = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    llm = Llm(LLAMA | SHAPES[shape], dtype, device, pages, page_bytes)
    prompts, steps = prefill(llm, lengths), decode(llm, batches)
    found = {
        "command": f"python benchmarks/gpu_decoder.py --shape {given.shape}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": shape,
        "dtype": str(DTYPES[dtype]),
        "page_bytes": page_bytes,
        "pages": pages,
        "tokens_per_page": llm.per_page,
        "prefill": prompts,
        "decode": steps,
        "planned": planned(shape, prompts, steps) if device == "cuda" else "none",
        "equality": equality(llm, device),
    }
    text = json.dumps(found, indent=1) + "\n"
    if given.check:
        sys.stdout.write(text)
    else:
        given.out.parent.mkdir(exist_ok=True)
        given.out.write_text(text)


if __name__ == "__main__":
    main()
