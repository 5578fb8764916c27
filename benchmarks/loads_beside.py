"""What loads cost the requests beside them: time between tokens, with and without pauses.

    PYTHONPATH=src:. python benchmarks/loads_beside.py

A tiny LLM (5.0 million weights) in a worker of the paged engine decodes eight requests at a
time. Blocks of 3 s in turns, 12 rounds: alone; with loads of 512 MiB, one after the other,
that requests wait for, which nobody holds back; with loads that nobody waits for, of which
`memory.pacing.Pacer` allows as much as costs 5 %. Each block is compared with the one alone
of its round, as the machine drifts. One thread of arithmetic, so that copies have a core
of their own.

Writes benchmarks/results/loads_beside.json. Takes two minutes.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import write_result

from foreserve.models.cost import IterationTime
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines import tiny
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.memory.weights import Weights
from foreserve.runtime.paged.jobs import Job, Reason
from foreserve.runtime.paged.shards import shard
from foreserve.runtime.paged.worker import Service, Worker
from foreserve.runtime.scheduler import POLICIES

MIB = 1 << 20
PAGE, SHARD = 2 * MIB, 512 * MIB
BLOCK_S, ROUNDS = 3.0, 12
REQUESTS, PROMPT, ANSWER = 8, 32, 300
TIME = IterationTime(
    prefill_base_s=0.002,
    prefill_s_per_token=2e-5,
    prefill_s_per_token2=0.0,
    decode_base_s=0.004,
    decode_s_per_seq=2e-4,
    decode_s_per_context_token=1e-6,
    relative_error=0.0,
    source="guessed",
)


class Client:
    """Asks again as soon as it has its answer; times between its tokens."""

    def __init__(self, worker: Worker, service: int, seed: int) -> None:
        self._worker, self._service = worker, service
        self._prompt = np.random.default_rng(seed).integers(256, 540, PROMPT).tolist()
        self._last_s: float | None = None
        self.gaps_s: list[float] = []
        # So that not all end at once.
        self._ask(ANSWER // REQUESTS * (seed + 1))

    def _ask(self, most: int) -> None:
        job = Job(
            service=self._service,
            prompt=self._prompt,
            most_tokens=most,
            listener=self,
            arrival_s=self._worker.now_s(),
        )
        self._worker.ask(lambda: self._worker.group.submit(job))

    def token(self, token: int) -> bool:
        now_s = time.perf_counter()
        if self._last_s is not None:
            self.gaps_s.append(now_s - self._last_s)
        self._last_s = now_s
        return False

    def end(self, reason: Reason) -> None:
        self._last_s = None
        self._ask(ANSWER)


class Loader:
    """One load after the other, until it is stopped."""

    def __init__(self, worker: Worker, source: np.ndarray, *, urgent: bool) -> None:
        self._worker, self._source, self._urgent = worker, source, urgent
        self._stops = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.copied_bytes = 0
        self._thread.start()

    def _run(self) -> None:
        pool = self._worker.pool
        weights = Weights(pool, SHARD)
        while not self._stops.is_set():
            pages = pool.books.take(weights.missing_pages, top=True)
            assert pages is not None
            address = self._source.ctypes.data
            load = weights.load(self._worker.link, address, pages, urgent=self._urgent)
            while not load.ended.wait(0.01):
                if self._stops.is_set():
                    self._worker.link.cancel(load)
            self.copied_bytes += load.copied_bytes
            weights.drop(weights.held_pages)
        weights.close()

    def stop(self) -> int:
        self._stops.set()
        self._thread.join()
        return self.copied_bytes


def block(worker: Worker, clients: list[Client], source: np.ndarray, how: str) -> Any:
    loader = None if how == "alone" else Loader(worker, source, urgent=how == "urgent")
    for client in clients:
        client.gaps_s = []
    begin_s = time.perf_counter()
    threading.Event().wait(BLOCK_S)
    gaps_s = np.concatenate([client.gaps_s for client in clients])
    took_s = time.perf_counter() - begin_s
    copied = 0 if loader is None else loader.stop()
    return {
        "tpot_ms": round(float(gaps_s.mean()) * 1e3, 3),
        "p99_ms": round(float(np.quantile(gaps_s, 0.99)) * 1e3, 3),
        "gb_per_s": round(copied / took_s / 1e9, 3),
        "share": round(worker._pacer.share, 3),
    }


def measure(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    pool = PagePool(PosixMemory(PAGE, 2 * SHARD // PAGE))
    worker = Worker(
        pool,
        SystemClock(),
        POLICIES["fcfs"].make(),
        dtype="float32",
        store=HostStore(SHARD, shard),
    )
    resident = worker.load(
        Service(
            llm="conv",
            folder=folder,
            time=TIME,
            reference_s=1.0,
            input_tokens=PROMPT,
            output_tokens=ANSWER,
        )
    )
    worker.wake(resident)
    assert resident.number is not None
    clients = [Client(worker, resident.number, seed) for seed in range(REQUESTS)]
    source = np.random.default_rng(0).integers(0, 256, SHARD, np.uint8)
    block(worker, clients, source, "alone")
    rounds: list[dict[str, Any]] = []
    for _ in range(ROUNDS):
        hows = ("alone", "urgent", "paced")
        rounds.append({how: block(worker, clients, source, how) for how in hows})
    worker.close()
    rows: dict[str, Any] = {"rounds": rounds}
    for how in ("alone", "urgent", "paced"):
        losses = [one[how]["tpot_ms"] / one["alone"]["tpot_ms"] - 1 for one in rounds]
        middle = {
            name: statistics.median(one[how][name] for one in rounds)
            for name in ("tpot_ms", "p99_ms", "gb_per_s")
        }
        late = losses[ROUNDS // 2 :]
        rows[how] = middle | {
            "loss": round(statistics.median(losses), 4),
            "loss_late": round(statistics.median(late), 4),
            "loss_range": [round(min(losses), 4), round(max(losses), 4)],
        }
    alone = [one["alone"]["tpot_ms"] for one in rounds]
    rows["alone"]["range_ms"] = [min(alone), max(alone)]
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = tiny.make(Path(folder) / "conv", "qwen3", seed=4, hidden=256, layers=6)
        rows = measure(made)
    write_result("loads_beside", {"most_loss": 0.05} | rows)


if __name__ == "__main__":
    main()
