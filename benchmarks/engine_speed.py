"""Our own engine beside vLLM and transformers: the same LLMs on this machine's CPU.

    FORESERVE_VLLM_PYTHON=path/to/python PYTHONPATH=src:. python benchmarks/engine_speed.py

LLMs with random weights: 8 million in 12 layers of 256, and 33 million in 12 of 512; in
float32 all of them, one thread for arithmetic each. Engines are asked over HTTP, as `plan
serve` asks them, transformers by `generate` in this process: 1, 4 and 16 prompts of 64
tokens at once, 64 more each (tokens per second, all answers together); a prompt of 512
tokens and one more (seconds); how long until an engine answers for the first time, and,
for those that can, how long to wake it. Rounds of all engines in turn, as the machine may
drift; medians and the range. How many greedy answers are those of transformers is counted:
engines batch otherwise, and where two tokens are nearly as likely that decides.

Without the variable there is no vLLM in the table. Writes
benchmarks/results/engine_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from guess import TINY
from record import write_result

from foreserve.models.placement import replica_id
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.engines import tiny
from foreserve.runtime.engines.base import Engine
from foreserve.runtime.engines.paged import PagedEngine, PagedSettings, close_servers
from foreserve.runtime.engines.vllm import VllmEngine, VllmSettings

SHAPES = {"8m": {"hidden": 256, "layers": 12}, "33m": {"hidden": 512, "layers": 12}}
BATCHES = (1, 4, 16)
PROMPT, ANSWER, LONG_PROMPT = 64, 64, 512
KV_BYTES = 256 << 20


class Answering(Protocol):
    def answers(self, prompts: Sequence[list[int]], tokens: int) -> list[str]:
        """Greedy, all at once."""
        ...


@dataclass
class Served:
    """An engine, over HTTP."""

    engine: Engine

    def answers(self, prompts: Sequence[list[int]], tokens: int) -> list[str]:
        def ask(prompt: list[int]) -> str:
            body = {
                "model": self.engine.served_name,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            request = urllib.request.Request(
                f"{self.engine.url}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request) as told:
                return str(json.load(told)["choices"][0]["text"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(ask, prompts))


@dataclass
class Generated:
    """transformers' `generate`, in this process; prompts of the same length."""

    folder: Path
    known: Any = field(init=False)
    words: Any = field(init=False)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.known = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32
        ).eval()
        self.words = AutoTokenizer.from_pretrained(self.folder)

    def answers(self, prompts: Sequence[list[int]], tokens: int) -> list[str]:
        told = self.known.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0])),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        return [self.words.decode(one[len(prompts[0]) :].tolist()) for one in told]


def option(llm: str, shape: dict[str, int]) -> ReplicaOption:
    return ReplicaOption(
        llm=llm,
        gpu_type="core",
        tp=1,
        resident_bytes=256 << 20,
        kv_bytes=KV_BYTES,
        # 2 of 4 heads are KV heads; keys and values, of 4 bytes.
        kv_token_bytes=shape["layers"] * shape["hidden"] // 2 * 2 * 4,
        concurrency=max(BATCHES),
        rate_rps=1.0,
        exec_s=1.0,
        load_s=30.0,
        activate_s=0.1,
        ttft_s=0.1,
        tpot_s=0.1,
        input_tokens=float(PROMPT),
        output_tokens=float(ANSWER),
        time=TINY,
    )


def timed(action: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    action()
    return time.perf_counter() - began_s


def summary(found: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(found),
        "least": min(found),
        "most": max(found),
    }


def compare(name: str, folder: Path, rounds: int, python: str) -> dict[str, Any]:
    llm = tiny.make(folder / name, **SHAPES[name])
    replica = replica_id(name, (GpuId(node="n0", index=0),))
    common = {"checkpoints": {name: str(llm)}, "answers_within_s": 60.0}
    engines: dict[str, Engine] = {
        "paged": PagedEngine(
            option(name, SHAPES[name]),
            replica,
            PagedSettings(folder=folder / "paged", pool_bytes=1 << 30, **common),
        )
    }
    if python:
        engines["vllm"] = VllmEngine(
            option(name, SHAPES[name]),
            replica,
            VllmSettings(
                folder=folder / "vllm", python=python, dtype="float32", **common
            ),
        )
    found: dict[str, dict[str, Any]] = {name: {} for name in engines}
    asked: dict[str, Answering] = {}
    try:
        for kind, engine in engines.items():
            found[kind]["start_s"] = timed(engine.start)
            found[kind]["activate_s"] = timed(engine.activate)
            asked[kind] = Served(engine)
        found["transformers"] = {}
        asked["transformers"] = Generated(llm)
        rng = torch.Generator().manual_seed(0)
        prompts = torch.randint(0, 500, (max(BATCHES), PROMPT), generator=rng).tolist()
        long = torch.randint(0, 500, (1, LONG_PROMPT), generator=rng).tolist()
        said = {kind: one.answers(prompts, ANSWER) for kind, one in asked.items()}
        same = {
            kind: sum(a == b for a, b in zip(text, said["transformers"], strict=True))
            for kind, text in said.items()
        }
        rates: dict[tuple[str, int], list[float]] = {}
        firsts: dict[str, list[float]] = {}
        for turn in range(rounds):
            order = sorted(asked, key=lambda kind, turn=turn: hash((turn, kind)))
            for kind in order:
                for batch in BATCHES:
                    took_s = timed(
                        lambda kind=kind, batch=batch: asked[kind].answers(
                            prompts[:batch], ANSWER
                        )
                    )
                    rates.setdefault((kind, batch), []).append(batch * ANSWER / took_s)
                # Another first token each time, so that no cache knows the prompt.
                fresh = [[turn, *long[0][1:]]]
                firsts.setdefault(kind, []).append(
                    timed(lambda kind=kind, fresh=fresh: asked[kind].answers(fresh, 1))
                )
    finally:
        for engine in engines.values():
            engine.stop()
        close_servers(folder / "paged")
    for kind in asked:
        found[kind] |= {
            "tokens_per_s": {b: summary(rates[kind, b]) for b in BATCHES},
            "long_prompt_s": summary(firsts[kind]),
            "answers_like_transformers": f"{same[kind]} of {len(prompts)}",
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    python = os.environ.get("FORESERVE_VLLM_PYTHON", "")
    with tempfile.TemporaryDirectory() as folder:
        found = {
            shape: compare(shape, Path(folder) / shape, given.rounds, python)
            for shape in given.shapes
        }
    write_result("engine_speed", {"rounds": given.rounds, "llms": found})


if __name__ == "__main__":
    main()
