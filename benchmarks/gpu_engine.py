"""Loads and switches of whole LLMs on an NVIDIA GPU. It has not been run on one yet.

    PYTHONPATH=src python benchmarks/gpu_engine.py [--gib 44] [--out FOLDER]

Our own engine's worker over a CUDA pool of ``--gib``, in one process and without HTTP; says
so in one line where there is no GPU. Two LLMs in the shape of Llama-3.1-8B, with random
weights in files of a temporary folder (16 GB, in the page cache then):

1. cold: files -> host memory -> GPU -> first token; again from host memory;
2. WARM -> ACTIVE, and to the first token; ACTIVE -> WARM; back to host memory's copy;
3. a process that is started for one LLM, from the command to its first token;
4. one LLM decodes for 16 requests while the other is loaded: time between tokens and speed
   of the load, alone, with the load at full speed, and held to a loss of 5 %.

Writes gpu_engine.json into benchmarks/results (or FOLDER) after each part, with date and
device. ``--check`` runs all of it on a CPU with tiny LLMs, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

try:
    import torch
except ImportError:
    sys.exit("gpu_engine: needs torch")
from gpu_decoder import LLAMA, SHAPES
from gpu_record import FOLDER, Record, spread, timed

from foreserve.models.cost import IterationTime
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines import tiny
from foreserve.runtime.memory.cuda import CudaMemory
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.paged.config import read_config
from foreserve.runtime.paged.jobs import Job
from foreserve.runtime.paged.layout import ITEM_BYTES, lay_out
from foreserve.runtime.paged.shards import shard
from foreserve.runtime.paged.worker import Resident, Service, Worker
from foreserve.runtime.scheduler import POLICIES
from foreserve.runtime.turns import Rules

IMPORTED_S = time.perf_counter()
"""Since the machine was started: other processes can compare."""
REPEATS = 5
GIB = 1 << 30
TIME = IterationTime(
    prefill_base_s=0.004,
    prefill_s_per_token=4e-5,
    prefill_s_per_token2=0.0,
    decode_base_s=0.006,
    decode_s_per_seq=5e-6,
    decode_s_per_context_token=4e-8,
    relative_error=1.0,
    source="about an 8B LLM on an H100",
)


def checkpoint(folder: Path, shape: str) -> Path:
    """An LLM of that shape, with tiny's tokenizer and the same numbers again and again."""
    tiny.make(folder)
    path = folder / "config.json"
    stated = json.loads(path.read_text())
    path.write_text(json.dumps({**stated, "head_dim": None, **LLAMA, **SHAPES[shape]}))
    header: dict[str, Any] = {}
    at = 0
    for piece in lay_out(read_config(folder), "bfloat16").pieces:
        size = 2 * int(np.prod(piece.shape))
        header[piece.tensor] = {
            "dtype": "BF16",
            "shape": list(piece.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    drawn = np.random.default_rng(0).standard_normal(1 << 24).astype(np.float32)
    block = ((0.02 * drawn).view(np.uint32) >> 16).astype("<u2").tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for begin in range(0, at, len(block)):
            file.write(block[: at - begin])
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """Another LLM with the same files."""
    to.mkdir()
    for file in folder.iterdir():
        os.link(file, to / file.name)
    return to


@dataclass
class Asked:
    """A listener that counts."""

    most: int
    first_s: float = 0.0
    tokens: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def token(self, token: int) -> bool:
        self.first_s = self.first_s or time.perf_counter()
        self.tokens += 1
        return False

    def end(self, reason: str) -> None:
        self.ended.set()


class Bench:
    """A worker, and when its iterations ended."""

    def __init__(self, pool_bytes: int, page_bytes: int, device: str) -> None:
        pages = pool_bytes // page_bytes
        begin_s = time.perf_counter()
        memory = (
            CudaMemory(page_bytes, pages)
            if device == "cuda"
            else PosixMemory(page_bytes, pages)
        )
        self.pool = PagePool(memory)
        self.ticks: list[float] = []
        self.died: list[BaseException] = []
        self.worker = Worker(
            self.pool,
            SystemClock(),
            POLICIES["db-mean"].make(),
            dtype="bfloat16" if device == "cuda" else "float32",
            store=HostStore(96 * GIB, shard),
            device=device,
            rules=Rules(max_prompt_tokens=512),
            most_loss=0.05,
            on_step=lambda: self.ticks.append(time.perf_counter()),
            on_death=self.died.append,
        )
        self.made_s = time.perf_counter() - begin_s
        self.asked: list[Job] = []

    def load(self, folder: Path) -> Resident:
        return self.worker.load(
            Service(
                llm=folder.name,
                folder=folder,
                time=TIME,
                reference_s=1.0,
                input_tokens=128.0,
                output_tokens=128.0,
            )
        )

    def ask(self, resident: Resident, prompt: int, most: int) -> Asked:
        assert resident.number is not None
        listener = Asked(most)
        job = Job(
            service=resident.number,
            prompt=[(7 * i) % 400 for i in range(prompt)],
            most_tokens=most,
            listener=listener,
            arrival_s=self.worker.now_s(),
        )
        self.asked.append(job)
        self.worker.ask(lambda: self.worker.group.submit(job)).result()
        return listener

    def first_token_s(self, resident: Resident) -> float:
        """Of a request of 16 tokens."""
        begin_s = time.perf_counter()
        listener = self.ask(resident, 16, 2)
        while not listener.ended.wait(1.0):
            if self.died:
                raise RuntimeError(f"an iteration failed: {self.died[0]!r}")
        return listener.first_s - begin_s

    def cancel(self) -> None:
        for job in self.asked:
            self.worker.ask(lambda job=job: self.worker.group.cancel(job)).result()
        self.asked.clear()


def cold(bench: Bench, folder: Path) -> dict[str, Any]:
    """Seconds, each step after the other; kernels are compiled at the first token."""
    found: dict[str, Any] = {"worker_s": round(bench.made_s, 3)}
    residents: list[Resident] = []
    found["files_to_gpu_s"] = timed(lambda: residents.append(bench.load(folder)))
    (resident,) = residents
    found["wake_s"] = timed(lambda: bench.worker.wake(resident))
    found["first_token_s"] = bench.first_token_s(resident)
    found["second_first_token_s"] = bench.first_token_s(resident)
    bench.worker.drop(resident)
    again = []
    for _ in range(3):
        residents.clear()
        again.append(timed(lambda: residents.append(bench.load(folder))))
        size = residents[0].layout.num_bytes
        bench.worker.drop(residents[0])
    found["host_to_gpu_s"] = spread(again)
    found["host_to_gpu_gb_per_s"] = round(size / statistics.median(again) / 1e9, 2)
    found["shard_bytes"] = size
    return found


def switching(bench: Bench, folder: Path) -> dict[str, Any]:
    """Milliseconds."""
    resident = bench.load(folder)
    times: dict[str, list[float]] = {}

    def note(name: str, action: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(timed(action))

    for _ in range(2 * REPEATS):
        begin_s = time.perf_counter()
        note("WARM to ACTIVE", lambda: bench.worker.wake(resident))
        bench.first_token_s(resident)
        times.setdefault("WARM to first token", []).append(
            bench.asked[-1].listener.first_s - begin_s  # type: ignore[attr-defined]
        )
        note("ACTIVE to WARM", lambda: bench.worker.sleep(resident))
    bench.worker.drop(resident)
    return {name: spread(taken, 1e3) for name, taken in times.items()}


def started(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Of a process of its own, from before it was started; it says its steps."""
    command = [sys.executable, __file__, "--one", str(folder), "--gib", "20"]
    command += ["--begun-s", str(time.perf_counter())]
    ran = subprocess.run(
        command + (["--check"] if given.check else []),
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr[-1500:])
    steps: dict[str, Any] = json.loads(ran.stdout)
    return steps


def one(folder: Path, given: argparse.Namespace) -> int:
    """The process that `started` starts."""
    bench = Bench(*_sizes(given))
    residents: list[Resident] = []
    load_s = timed(lambda: residents.append(bench.load(folder)))
    wake_s = timed(lambda: bench.worker.wake(residents[0]))
    first_s = bench.first_token_s(residents[0])
    steps = {
        "imports_s": IMPORTED_S - given.begun_s,
        "worker_s": bench.made_s,
        "files_to_gpu_s": load_s,
        "wake_s": wake_s,
        "first_token_s": first_s,
        "all_s": time.perf_counter() - given.begun_s,
    }
    sys.stdout.write(json.dumps({name: round(s, 3) for name, s in steps.items()}))
    sys.stdout.flush()
    os._exit(0)


def beside(bench: Bench, serving: Path, loading: Path, rest_s: float) -> dict[str, Any]:
    """Milliseconds between iterations, alone and beside loads of the other LLM."""
    resident = bench.load(serving)
    bench.worker.wake(resident)
    pacer = bench.worker.group.pacer
    rows: list[dict[str, Any]] = []
    for _ in range(3):
        for how in ("alone", "full speed", "held to 5 %"):
            listeners = [bench.ask(resident, 64, 4000) for _ in range(16)]
            while min(one.tokens for one in listeners) < 20:
                threading.Event().wait(0.01)
            bench.worker.group.pacer = pacer if how == "held to 5 %" else None
            row: dict[str, Any] = {"how": how}
            begin_s = time.perf_counter()
            if how == "alone":
                threading.Event().wait(rest_s)
            else:
                other = bench.load(loading)
                row["load_s"] = round(time.perf_counter() - begin_s, 3)
                row["gb_per_s"] = round(other.layout.num_bytes / row["load_s"] / 1e9, 2)
            ticks = [at for at in bench.ticks if at >= begin_s]
            gaps = np.diff(ticks) * 1e3
            if len(gaps):
                row |= {
                    "iterations": len(gaps),
                    "mean_ms": round(float(gaps.mean()), 4),
                    "median_ms": round(float(np.median(gaps)), 4),
                    "p99_ms": round(float(np.quantile(gaps, 0.99)), 4),
                }
            rows.append(row)
            bench.cancel()
            if how != "alone":
                bench.worker.drop(other)
            if bench.died:
                raise RuntimeError(f"an iteration failed: {bench.died[0]!r}")
    bench.worker.group.pacer = pacer
    bench.worker.drop(resident)
    means = {
        how: statistics.median(seen)
        for how in ("alone", "full speed", "held to 5 %")
        if (seen := [r["mean_ms"] for r in rows if r["how"] == how and len(r) > 3])
    }
    losses = {
        how: round(mean / means["alone"] - 1, 4)
        for how, mean in means.items()
        if "alone" in means
    }
    return {"requests": 16, "losses": losses, "rounds": rows}


def _sizes(given: argparse.Namespace) -> tuple[int, int, str]:
    if given.check:
        return 192 << 20, 1 << 16, "cpu"
    return int(given.gib * GIB), 2 << 20, "cuda"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=44.0, help="of the pool")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--begun-s", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.check and not torch.cuda.is_available():
        sys.stdout.write("gpu_engine: no CUDA GPU here; nothing was measured\n")
        return 0
    if given.one:
        return one(given.one, given)
    pool_bytes, page_bytes, device = _sizes(given)
    shape = "tiny" if given.check else "8b"
    record = Record(
        "gpu_engine",
        None if given.check else given.out,
        pool_bytes=pool_bytes,
        page_bytes=page_bytes,
        shape=shape,
        weight_bytes_of_a_number=ITEM_BYTES["bfloat16"],
    )
    with tempfile.TemporaryDirectory() as place:
        first, second = Path(place) / "first", Path(place) / "second"
        made = record.part(
            "files_written_s", lambda: timed(lambda: checkpoint(first, shape))
        )
        if made is None:
            return record.end()
        copy_of(first, second)
        benches: list[Bench] = []
        record.part(
            "worker_made_s",
            lambda: timed(
                lambda: benches.append(Bench(pool_bytes, page_bytes, device))
            ),
        )
        if benches:
            (bench,) = benches
            record.part("cold", lambda: cold(bench, first))
            record.part("switching_ms", lambda: switching(bench, first))
            record.part(
                "beside_decodes",
                lambda: beside(bench, first, second, 0.3 if given.check else 2.0),
            )
        record.part("process_started", lambda: started(first, given))
        code = record.end()
        sys.stdout.flush()
        shutil.rmtree(place, ignore_errors=True)
    # Threads and pages go with the process.
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
