"""Two LLMs in one process of the paged engine, under several schedulers, in real time.

    PYTHONPATH=src:. python benchmarks/paged_scheduling.py [--quick]

Code on a small LLM and conversations on a larger one, both with random weights on this
machine's CPU; lengths of the Azure trace of 2023, an eighth of the prompts and a quarter of
the answers, drawn with replacement; Poisson arrivals in the trace's proportion. First each
service's requests alone (their mean is e_s), then all at once (the most this machine
answers per second). Then each scheduler gets the same requests at the same times, at
shares of that most, with up to eight in a batch: D1 (mean over services of latency / e_s),
D2 (mean over requests), 99th percentile of D2, and how often it switched and preempted.
The answers, greedy, have to be the same under all of them. The order in which schedulers
take their turn is drawn for each load and seed, as the machine may drift.

Writes benchmarks/results/paged_scheduling.json. Takes some minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from guess import TINY
from record import write_result

from foreserve.models.cost import IterationTime
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines import tiny
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.paged.jobs import Job, Reason
from foreserve.runtime.paged.shards import shard
from foreserve.runtime.paged.worker import Service, Worker
from foreserve.runtime.scheduler import POLICIES
from foreserve.runtime.turns import Rules

SAMPLE = Path("traces/samples/azure-2023.csv.gz")
LLMS = {
    "code": {"family": "llama", "hidden": 128, "layers": 4},
    "conv": {"family": "qwen3", "hidden": 256, "layers": 6},
}
NAMES = ("fcfs", "round-robin", "mlfq", "db-level", "db-mean")
SHARES, SEEDS = (0.7, 0.9), (0, 1)
RUN_S = 9.0
"""Requests in a run: what the machine answers in this time at most."""
PROMPT_SHARE, ANSWER_SHARE = 8, 4


@dataclass
class Asked:
    service: int
    prompt: list[int]
    most: int
    done: threading.Semaphore
    arrival_s: float = 0.0
    end_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    clock: SystemClock | None = None

    def token(self, token: int) -> bool:
        self.tokens.append(token)
        return False

    def end(self, reason: Reason) -> None:
        assert self.clock is not None
        self.end_s = self.clock.now_s()
        self.done.release()


@dataclass
class Mix:
    """A service: how long its requests are, and what they take alone."""

    name: str
    folder: Path
    lengths: np.ndarray
    share: float
    """Of all requests."""
    time: IterationTime = TINY
    alone_s: float = 0.2


def services(folder: Path) -> list[Mix]:
    rows = pd.read_csv(SAMPLE)
    column = next(c for c in ("llm", "model", "service") if c in rows)
    found = []
    for name, kind in LLMS.items():
        mine = rows[rows[column].str.contains(name)]
        lengths = np.column_stack(
            [
                np.maximum(mine["input_tokens"] // PROMPT_SHARE, 1),
                np.maximum(mine["output_tokens"] // ANSWER_SHARE, 1),
            ]
        )
        made = tiny.make(folder / name, seed=len(name), **kind)
        found.append(Mix(name, made, lengths, len(mine) / len(rows)))
    return found


def draw(mix: list[Mix], count: int, seed: int) -> list[Asked]:
    rng, done = np.random.default_rng(seed), threading.Semaphore(0)
    asked = []
    for service in rng.choice(len(mix), count, p=[one.share for one in mix]).tolist():
        prompt, most = (
            mix[service].lengths[rng.integers(len(mix[service].lengths))].tolist()
        )
        tokens = rng.integers(256, 540, prompt).tolist()
        asked.append(Asked(service, tokens, most, done))
    return asked


def play(
    mix: list[Mix], policy: str, asked: list[Asked], gaps_s: list[float] | None
) -> dict[str, Any]:
    """Answer all: after these gaps, or (None) each one when the last one is through."""
    clock = SystemClock()
    pool = PagePool(PosixMemory(1 << 16, 8000))
    worker = Worker(
        pool,
        clock,
        POLICIES[policy].make(),
        dtype="float32",
        store=HostStore(1 << 30, shard),
        rules=Rules(max_num_seqs=8, max_prompt_tokens=256),
    )
    numbers = []
    for one in mix:
        resident = worker.load(
            Service(
                llm=one.name,
                folder=one.folder,
                time=one.time,
                reference_s=one.alone_s,
                input_tokens=float(one.lengths[:, 0].mean()),
                output_tokens=float(one.lengths[:, 1].mean()),
                rate_rps=one.share,
            )
        )
        worker.wake(resident)
        assert resident.number is not None
        numbers.append(resident.number)
    pause = threading.Event()
    due_s = clock.now_s()
    for i, one in enumerate(asked):
        if gaps_s is not None:
            due_s += gaps_s[i]
            pause.wait(max(0.0, due_s - clock.now_s()))
        one.tokens, one.clock, one.arrival_s = [], clock, clock.now_s()
        job = Job(
            service=numbers[one.service],
            prompt=one.prompt,
            most_tokens=one.most,
            listener=one,
            arrival_s=one.arrival_s,
        )
        worker.ask(lambda job=job: worker.group.submit(job))
        if gaps_s is None:
            one.done.acquire()
    if gaps_s is not None:
        for one in asked:
            one.done.acquire()
    group = worker.group
    counts = {"iterations": group.iterations, "switches": group.switches}
    worker.close()
    return {**counts, "preemptions": group.preemptions}


def alone(mix: list[Mix], count: int) -> None:
    """Measure each service's mean request, and what an iteration takes."""
    for number, one in enumerate(mix):
        asked = [a for a in draw(mix, 8 * count, 99) if a.service == number][:count]
        short = [replace(a, most=1) for a in asked]
        play(mix, "fcfs", asked[:3], None)
        play(mix, "fcfs", asked, None)
        play(mix, "fcfs", short, None)
        whole_s = np.array([a.end_s - a.arrival_s for a in asked])
        first_s = np.array([a.end_s - a.arrival_s for a in short])
        prompts = np.array([len(a.prompt) for a in asked])
        answers = np.array([a.most for a in asked])
        slope, base = np.polyfit(prompts, first_s, 1)
        decode_s = float((whole_s - first_s).sum() / max(1, (answers - 1).sum()))
        one.alone_s = float(whole_s.mean())
        one.time = replace(
            TINY,
            prefill_base_s=max(float(base), 0.0),
            prefill_s_per_token=max(float(slope), 1e-7),
            decode_base_s=decode_s,
            decode_s_per_seq=0.0,
            source="measured alone",
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    count = 40 if given.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        mix = services(Path(folder))
        alone(mix, 8 if given.quick else 40)
        flood = draw(mix, count, 7)
        begin_s = time.perf_counter()
        play(mix, "fcfs", flood, [0.0] * count)
        most_rps = count / (time.perf_counter() - begin_s)
        if not given.quick:
            count = max(100, round(RUN_S * most_rps))
        rows = []
        rng = np.random.default_rng(0)
        for share in SHARES[:1] if given.quick else SHARES:
            for seed in SEEDS:
                gaps_s = np.random.default_rng(seed).exponential(
                    1 / (share * most_rps), count
                )
                answers = None
                for policy in rng.permutation(NAMES).tolist():
                    asked = draw(mix, count, seed)
                    counts = play(mix, policy, asked, gaps_s.tolist())
                    told = [one.tokens for one in asked]
                    answers = answers or told
                    assert told == answers
                    slow = np.array(
                        [
                            (a.end_s - a.arrival_s) / mix[a.service].alone_s
                            for a in asked
                        ]
                    )
                    which = np.array([a.service for a in asked])
                    by = [float(slow[which == i].mean()) for i in range(len(mix))]
                    row = {
                        "load": share,
                        "seed": seed,
                        "policy": policy,
                        "D1": round(float(np.mean(by)), 3),
                        "D2": round(float(slow.mean()), 3),
                        "D2_p99": round(float(np.quantile(slow, 0.99)), 3),
                        **{m.name: round(b, 3) for m, b in zip(mix, by, strict=True)},
                        **counts,
                    }
                    rows.append(row)
                    print(row, flush=True)  # noqa: T201
        found = {
            "most_rps": round(most_rps, 2),
            "requests": count,
            "alone_s": {one.name: round(one.alone_s, 4) for one in mix},
            "mean_tokens": {one.name: one.lengths.mean(0).tolist() for one in mix},
            "rows": rows,
        }
    if not given.quick:
        write_result("paged_scheduling", found)


if __name__ == "__main__":
    main()
