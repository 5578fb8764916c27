"""Iterations of our decoders on an NVIDIA GPU. It has not been run on one yet.

    PYTHONPATH=src python benchmarks/gpu_decoder.py [--shape 8b|13b]
        [--attention kernels|gather] [--out FOLDER]

Needs torch, Triton for ``kernels``, and transformers for the comparison; says so in one
line where there is no GPU. Random weights in the shape of Llama-3.1-8B (or of a 13B-class
LLM) in bfloat16, KV pages of 2 MiB scattered over what memory is left:

1. our kernels against torch's attention over gathered pages, on ragged batches in the
   shape's own heads; their times for several tiles;
2. decode: batches of 1 to 256 with 1,024 tokens of context each (fewer where the KV cache
   is too small; said in the file), and of these how long the host prepares;
3. prefill: one prompt of 128 to 8,192 tokens in one iteration;
4. the cost model's times for the same iterations;
5. launches of an iteration, and how long the GPU is busy in it;
6. token for token against transformers: small LLMs of the same kind in float32 (greedy
   answers, prompts in chunks, pages scattered), and the large one in bfloat16 by the share
   of positions with the same likeliest token and the largest difference of a logit.

Each time is the median of 5 after 2 that do not count, the device waited for. ``--check``
runs all of it on a CPU with a tiny shape (kernels interpreted): for the script's own sake,
it writes nothing. Writes gpu_decoder-SHAPE-ATTENTION.json into benchmarks/results (or
FOLDER) after each part, with date and device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if "--check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
try:
    import torch
except ImportError:
    sys.exit("gpu_decoder: needs torch")
from gpu_record import FOLDER, Record

from foreserve.runtime.paged.attention import Ragged, Work, cache_view
from foreserve.runtime.paged.config import DecoderConfig, parse
from foreserve.runtime.paged.decoder import Decoder
from foreserve.runtime.paged.layout import lay_out
from foreserve.runtime.paged.loading import DTYPES, views

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
        self,
        raw: dict[str, Any],
        dtype: str,
        device: str,
        pages: int,
        page_bytes: int,
        *,
        kernels: bool,
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
        self.decoder = Decoder(self.config, device=device, kernels=kernels)
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
        step = self.decoder.plan(work, self.cache)
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
        context = CONTEXT if llm.device == "cuda" else 64
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
    """Add the cost model's times; where they come from."""
    from foreserve.models import catalog
    from foreserve.models.perf.model import Measured

    name = "h100"
    if torch.cuda.is_available() and "H200" in torch.cuda.get_device_name():
        name = "h200"
    llm = catalog.llm(CATALOG.get(shape, CATALOG["8b"]))
    time_ = Measured().iteration(llm, catalog.gpu(name), tp=1)
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


def agreement(llm: Llm) -> dict[str, Any]:
    """Kernels against gathered pages on one layer, ragged, with windows and caps; the
    largest differences, and those of gathering in the LLM's own format from gathering in
    float32."""
    config, found = llm.config, {}
    sizes = [(1, 0), (1, 333), (5, 40), (64, 0), (1, 1000), (130, 77)]
    if llm.device == "cpu":
        sizes = [(1, 0), (1, 33), (5, 10)]
    tables = llm.tables(len(sizes), max(map(sum, sizes)))
    work = [
        Work(tokens=[0] * count, begin=begin, table=table)
        for (count, begin), table in zip(sizes, tables, strict=True)
    ]
    heads = llm.decoder.heads
    kind = llm.cache.dtype
    total = sum(count for count, _ in sizes)
    cache = torch.randn(llm.cache[:, 0].shape, device=llm.device, dtype=kind)
    keys, values = (
        torch.randn(
            total, config.kv_heads, config.head_dim, device=llm.device, dtype=kind
        )
        for _ in range(2)
    )
    queries = torch.randn(total, heads, config.head_dim, device=llm.device, dtype=kind)
    from foreserve.runtime.paged import kernels
    from foreserve.runtime.paged.attention import attend, plan_step

    for window, cap in ((None, None), (50, None), (None, 20.0)):
        how = {"window": window, "scale": config.head_dim**-0.5, "cap": cap}
        steps = [
            plan_step(
                work,
                tokens_per_page=llm.per_page,
                group=llm.decoder.group,
                windows=[window],
                device=llm.device,
                kernels=used,
            )
            for used in (False, True)
        ]
        told = attend(queries, keys, values, cache, steps[0], **how)
        wide = attend(
            queries.float(),
            keys.float(),
            values.float(),
            cache.float(),
            steps[0],
            **how,
        )
        ours = kernels.attend(queries, cache, steps[1].how, **how)
        norm = wide.norm()
        found[f"window {window}, cap {cap}"] = {
            "kernels": float((ours.float() - wide).norm() / norm),
            "gathered": float((told.float() - wide).norm() / norm),
            "not_numbers": int((~ours.isfinite()).sum()),
        }
    return found


def tiles(llm: Llm) -> list[dict[str, Any]]:
    """Microseconds of attention in one layer, all layers in turns so that no cache helps:
    for the tile that is used (first) and for others."""
    from foreserve.runtime.paged import kernels

    usual = kernels._tile
    heads, dim = llm.decoder.heads, llm.config.head_dim
    cases = [(1, 1024, 1), (1, 8192, 1), (32, 1024, 1), (128, 1024, 1), (1, 0, 2048)]
    decode = [(32, 4, 3), (64, 4, 3), (64, 4, 4), (64, 8, 3), (128, 4, 2), (128, 8, 3)]
    prompt = [(64, 4, 2), (64, 4, 3), (32, 4, 3), (128, 8, 2)]
    if llm.device == "cpu":
        cases, decode, prompt = [(2, 30, 1), (1, 0, 20)], [(32, 4, 2)], []
    found = []
    for batch, context, count in cases:
        tables = llm.tables(batch, context + count)
        step = llm.decoder.plan(
            [Work(tokens=[7] * count, begin=context, table=t) for t in tables],
            llm.cache,
        )
        assert isinstance(step.how, Ragged)
        n = batch * count
        queries = torch.randn(n, heads, dim, device=llm.device, dtype=llm.cache.dtype)
        mine = usual(llm.cache.dtype, step.how.rows, dim)
        for tile in [mine, *(decode if count == 1 else prompt)]:
            row: dict[str, Any] = {
                "batch": batch,
                "context": context,
                "tokens": count,
                "columns, warps, stages": tile,
            }
            found.append(row)
            kernels._tile = lambda *_, tile=tile: tile  # type: ignore[assignment]
            try:
                row["us"] = round(1e6 * _layers(llm, queries, step.how), 2)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            finally:
                kernels._tile = usual
            if count == 1 and "us" in row:
                kv = 2 * llm.decoder.kv_heads * dim * llm.cache.element_size()
                row["gb_per_s"] = round(batch * context * kv / row["us"] / 1e3, 1)
    return found


def _layers(llm: Llm, queries: torch.Tensor, how: Ragged) -> float:
    """Seconds of attention in one layer."""
    from foreserve.runtime.paged import kernels

    scale = llm.config.head_dim**-0.5
    caches = [llm.cache[:, layer] for layer in range(llm.config.layers)]

    def all_layers() -> None:
        for cache in caches:
            kernels.attend(queries, cache, how, window=None, scale=scale, cap=None)

    all_layers()
    wait(llm.device)
    if llm.device == "cuda":
        # One launch for all of them, so that the host is not what is measured.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_layers()
        run: Callable[[], None] = graph.replay
        run()
        wait(llm.device)
    else:
        run = all_layers
    begin_s = time.perf_counter()
    for _ in range(5):
        run()
    wait(llm.device)
    return (time.perf_counter() - begin_s) / (5 * len(caches))


def launches(llm: Llm, batch: int) -> dict[str, Any]:
    """Of one decode: kernels, how long they took, and what took longest."""
    from torch.profiler import ProfilerActivity, profile

    context = CONTEXT if llm.device == "cuda" else 20
    work = [
        Work(tokens=[7], begin=context, table=table)
        for table in llm.tables(batch, context + 1)
    ]
    llm.iterate(work)
    wait(llm.device)
    kinds = [ProfilerActivity.CPU]
    if llm.device == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as seen:
        llm.iterate(work)
        wait(llm.device)
    events = seen.events()
    on_gpu = [e for e in events if "cuda" in str(e.device_type).lower()]
    busiest: dict[str, float] = {}
    for event in on_gpu:
        took_us = event.time_range.elapsed_us()
        busiest[event.name[:80]] = busiest.get(event.name[:80], 0.0) + took_us
    longest = sorted(busiest.items(), key=lambda item: -item[1])[:12]
    return {
        "batch": batch,
        "launched": sum("LaunchKernel" in e.name for e in events),
        "on_gpu": len(on_gpu),
        "busy_ms": round(sum(busiest.values()) / 1e3, 3),
        "longest_us": {name: round(us, 1) for name, us in longest},
        "operations": sum(e.name.startswith("aten::") for e in events),
    }


def equality(large: Llm, device: str) -> dict[str, Any]:
    import transformers

    kernels = large.decoder.kernels is not None
    small = Llm(LLAMA | SHAPES["tiny"], "float32", device, 64, 65536, kernels=kernels)
    many = 24 if device == "cuda" or not kernels else 3
    prompts = [[(31 * i + n) % 500 for n in range(5 + 29 * i)] for i in range(6)]
    answers = greedy(small, prompts, many)
    other, same = reference(small), 0
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt], device=device)
        told = other.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=many,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        same += told[0][len(prompt) :].tolist() == answer
    tokens = [(37 * n) % 400 for n in range(256 if many > 3 else 8)]
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


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=["8b", "13b"], default="8b")
    parser.add_argument("--attention", choices=["kernels", "gather"], default="kernels")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    kernels = given.attention == "kernels"
    lengths, batches = [128, 512, 2048, 8192], [1, 2, 4, 8, 16, 32, 64, 128, 256]
    if given.check:
        shape, device, dtype = "tiny", "cpu", "float32"
        pages, page_bytes = 300, 65536
        lengths, batches = [16, 64], [1, 4]
    elif not torch.cuda.is_available():
        sys.stdout.write("gpu_decoder: no CUDA GPU here; nothing was measured\n")
        return 0
    else:
        shape, device, dtype = given.shape, "cuda", "bfloat16"
        weights = lay_out(parse(LLAMA | SHAPES[shape]), dtype).num_bytes
        free, _ = torch.cuda.mem_get_info()
        # The rest is for activations, and for transformers' own.
        page_bytes = PAGE_BYTES
        pages = int(0.6 * (free - weights)) // page_bytes
    record = Record(
        f"gpu_decoder-{shape}-{given.attention}",
        None if given.check else given.out,
        shape=shape,
        attention=given.attention,
        dtype=str(DTYPES[dtype]),
        page_bytes=page_bytes,
        pages=pages,
    )
    raw = LLAMA | SHAPES[shape]
    llm = Llm(raw, dtype, device, pages, page_bytes, kernels=kernels)
    record.found["tokens_per_page"] = llm.per_page
    if kernels:
        record.part("agreement", lambda: agreement(llm))
    steps = record.part("decode", lambda: decode(llm, batches))
    prompts = record.part("prefill", lambda: prefill(llm, lengths))
    record.part("planned", lambda: planned(shape, prompts or [], steps or []))
    record.part("equality", lambda: equality(llm, device))
    few = [b for b in (1, 64) if b <= batches[-1]]
    record.part("launches", lambda: [launches(llm, batch) for batch in few])
    if kernels:
        record.part("tiles", lambda: tiles(llm))
    return record.end()


if __name__ == "__main__":
    raise SystemExit(main())
