"""KV that leaves its pages, and pages that come back from loans, in the paged engine.

    PYTHONPATH=src:. python benchmarks/paged_memory.py

A tiny LLM with random weights on this machine's CPU, a loop without a worker.

1. A request is preempted, and comes back: the time from its eviction to its next token when
   its pages are swapped (as the loop decides each time) and when there is nowhere to swap
   to, so that all is computed again in chunks of 512; in turns. With them what the loop has
   learnt by then: the link, and what computing again would take.
2. Eight requests decode while weights of other LLMs hold all pages that are not used yet.
   Gaps between tokens when what is lent comes back as iterations need it, when a `Keeper`
   takes it back ahead, and when nothing is lent; in turns.

Writes benchmarks/results/paged_memory.json. Takes about a minute.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from guess import TINY
from record import write_result

from foreserve.runtime.engines import tiny
from foreserve.runtime.memory.kv import Keeper, KvNeeds, KvSpace
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.safetensors import Checkpoint, fill
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.memory.weights import Shelf, Weights
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.decoder import Decoder
from foreserve.runtime.paged.group import Group, Hosted
from foreserve.runtime.paged.jobs import Job, Reason
from foreserve.runtime.paged.layout import lay_out
from foreserve.runtime.paged.loading import tensor, views
from foreserve.runtime.scheduler import POLICIES
from foreserve.runtime.turns import Rules

PAGE = 128 * 1024
PROMPTS = (64, 256, 1024, 4096)
REPEATS = 5
ROUNDS = 3
now_s = time.perf_counter


class Heard:
    def __init__(self) -> None:
        self.at_s: list[float] = []
        self.tokens: list[int] = []
        self.over = False

    def token(self, token: int) -> bool:
        self.at_s.append(now_s())
        self.tokens.append(token)
        return False

    def end(self, reason: Reason) -> None:
        self.over = True


def llm_of(folder: Path) -> Hosted:
    config = read_config(tiny.make(folder, "qwen3", hidden=256, layers=6))
    layout = lay_out(config, "float32")
    memory = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    fill(layout, Checkpoint(folder), memory.numpy())
    return Hosted(
        llm="tiny",
        decoder=Decoder(config),
        weights=views(layout, memory),
        dtype="float32",
        time=TINY,
        needs=KvNeeds(
            llm="tiny",
            token_bytes=config.kv_token_bytes(4),
            input_tokens=100.0,
            output_tokens=100.0,
            usual_output_tokens=1,
        ),
        reference_s=0.2,
    )


def ask(group: Group, service: int, prompt: list[int], most: int) -> tuple[Job, Heard]:
    heard = Heard()
    job = Job(
        service=service,
        prompt=prompt,
        most_tokens=most,
        listener=heard,
        arrival_s=now_s(),
    )
    group.submit(job)
    return job, heard


# --- 1. swapped or computed again ------------------------------------------------------


def leaving(hosted: Hosted) -> list[dict[str, Any]]:
    pages = 8192 * hosted.needs.token_bytes // PAGE
    pool = PagePool(PosixMemory(PAGE, pages))
    window = tensor(pool.window_span()).view(pages, PAGE)
    swap = Swap(pool, pages * PAGE, now_s)
    group = Group(
        KvSpace([pool.books], PAGE),
        window,
        POLICIES["fcfs"].make(),
        now_s,
        Rules(max_prompt_tokens=512),
    )
    service = group.add(hosted)
    learnt = 0.0, 0.0
    rng, rows = np.random.default_rng(0), []
    for length in PROMPTS:
        prompt = rng.integers(256, 540, length).tolist()
        job, heard = ask(group, service, prompt, 4 * REPEATS + 8)
        times: dict[bool, list[float]] = {True: [], False: []}
        while len(heard.tokens) < 2:
            group.step()
        for _ in range(2 * REPEATS):
            swapped = len(times[True]) <= len(times[False])
            group.swap = swap if swapped else None
            learnt = swap.bytes_per_s, group._again_s(job)
            told, begin_s = len(heard.tokens), now_s()
            group._evict(job)
            assert (job.away is not None) == swapped
            while len(heard.tokens) == told:
                group.step()
            times[swapped].append(heard.at_s[-1] - begin_s)
        kv_bytes = job.table.pages * PAGE
        group.cancel(job)
        assert pool.free == pages
        assert swap.host.free == swap.host.capacity
        rows.append(
            {
                "prompt_tokens": length,
                "kv_mib": round(kv_bytes / 2**20, 2),
                "swapped_ms": spread(times[True]),
                "computed_again_ms": spread(times[False]),
                "learnt_gb_per_s": round(learnt[0] / 1e9, 2),
                "learnt_again_ms": round(learnt[1] * 1e3, 1),
            }
        )
        sys.stdout.write(f"{rows[-1]}\n")
    return rows


# --- 2. loans --------------------------------------------------------------------------


def lending(hosted: Hosted) -> dict[str, Any]:
    gaps: dict[str, list[float]] = {"as needed": [], "ahead": [], "nothing lent": []}
    for _ in range(ROUNDS):
        for how, found in gaps.items():
            found += decoding(hosted, how)
    return {
        how: {
            "gaps": len(found),
            "median_ms": round(statistics.median(found) * 1e3, 2),
            "mean_ms": round(statistics.fmean(found) * 1e3, 2),
            "p99_ms": round(float(np.quantile(found, 0.99)) * 1e3, 2),
            "most_ms": round(max(found) * 1e3, 2),
        }
        for how, found in gaps.items()
    }


def decoding(hosted: Hosted, how: str) -> list[float]:
    requests, prompt, answer = 8, 32, 200
    per_page = PAGE // hosted.needs.token_bytes
    each = -(-(prompt + answer) // per_page)
    begin = -(-(prompt + 2) // per_page)
    pages = requests * each + 8
    pool = PagePool(PosixMemory(PAGE, pages, populate=False))
    window = tensor(pool.window_span()).view(pages, PAGE)
    window[:] = 0
    shelf = Shelf()
    space = KvSpace([pool.books], PAGE, borrower=shelf)
    keeper = Keeper(space)
    group = Group(
        space,
        window,
        POLICIES["fcfs"].make(),
        now_s,
        Rules(max_prompt_tokens=512),
        None,
        keeper.want if how == "ahead" else lambda _: None,
    )
    service = group.add(hosted)
    if how != "nothing lent":
        lent = Weights(pool, (pages - requests * begin) * PAGE)
        assert pool.map(lent.slot, lent.slot.num_pages)
        lent._resident_bytes = lent.num_bytes
        touched = np.frombuffer(lent.slot.view(0, lent.slot.num_bytes), np.uint8)
        touched[::4096].sum()
        del touched
        shelf.put("lent", [lent])
    asked = [ask(group, service, [300 + n] * prompt, answer) for n in range(requests)]
    while any(len(heard.tokens) < 2 for _, heard in asked):
        group.step()
    while not all(heard.over for _, heard in asked):
        group.step()
    keeper.close()
    assert group.preemptions == 0
    times = asked[0][1].at_s[2:]
    del window
    group.remove(service)
    del group
    return np.diff(times).tolist()


def spread(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    return {
        "median": round(statistics.median(seconds) * 1e3, 2),
        "least": round(min(seconds) * 1e3, 2),
        "most": round(max(seconds) * 1e3, 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        hosted = llm_of(Path(folder) / "llm")
        found = {"page_bytes": PAGE, "token_bytes": hosted.needs.token_bytes}
        rows, loans = leaving(hosted), lending(hosted)
        sys.stdout.write(f"{loans}\n")
        write_result("paged_memory", found | {"leaving": rows, "lending": loans})


if __name__ == "__main__":
    main()
