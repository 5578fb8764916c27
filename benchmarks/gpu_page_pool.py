"""The page pool on an NVIDIA GPU: creating, mapping, loading. It has not been run yet.

    PYTHONPATH=src python benchmarks/gpu_page_pool.py [--gib 16] [--out FILE]

Needs numpy and cuda-bindings, and neither torch nor the package's other dependencies; says
so in one line where there is no GPU. With shards of ``--gib`` (16: Llama-3.1-8B and a bit),
each number the median of 7 and all of them in the file:

1. physical pages of 2 MiB: created, mapped and unmapped, one by one and in one batch;
2. host to GPU: one plain copy from pinned memory into mapped pages, and a load through a
   `Link` in the same run, in turns, with pages mapped ahead of the copies or all before;
3. bringing back the last tenth of a shard that was dropped; pinning weights and viewing
   them (the memory's part of WARM -> ACTIVE); revoking 64 pages while a load is under way;
4. KV pages to the host and back.

Writes benchmarks/results/gpu_page_pool.json with date and device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.memory.cuda import CudaFailed, CudaMemory, load_driver
from foreserve.runtime.memory.loading import Link
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.memory.weights import Shelf, Weights

MIB, GIB = 1 << 20, 1 << 30
REPEATS = 7
RESULT = Path(__file__).parent / "results" / "gpu_page_pool.json"


def timed(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def spread(seconds: list[float], factor: float) -> dict[str, Any]:
    values = [value * factor for value in seconds]
    return {
        "median": round(statistics.median(values), 4),
        "all": [round(value, 4) for value in values],
    }


def mapping(pool: PagePool, pages: int) -> dict[str, Any]:
    """Microseconds per page."""
    slot = pool.reserve(pages * pool.page_bytes)
    found: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for how, step in (("one by one", 1), ("batch", pages)):
            times = {"map": 0.0, "unmap": 0.0}
            while slot.mapped < pages:
                times["map"] += timed(lambda n=step: pool.map(slot, n))
            while slot.mapped:
                times["unmap"] += timed(lambda n=step: pool.unmap(slot, n))
            for what, seconds in times.items():
                found.setdefault(f"{what}, {how}", []).append(seconds)
    slot.release()
    return {name: spread(times, 1e6 / pages) for name, times in found.items()}


def loading(pool: PagePool, source: np.ndarray) -> dict[str, Any]:
    """GB/s for the copies, milliseconds for the rest."""
    size, memory = len(source), pool.memory
    begin_s = time.perf_counter()
    memory.pin(source.ctypes.data, size)
    pinned_s = time.perf_counter() - begin_s
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        plain = pool.reserve(size)
        mapped_s = timed(lambda s=plain: pool.map(s, s.num_pages))
        with plain.using(0, size) as address:
            copied_s = timed(
                lambda a=address: memory.copy(a, source.ctypes.data, size).wait()
            )
        times.setdefault("plain pinned copy", []).append(copied_s)
        times.setdefault("map all, then copy", []).append(mapped_s + copied_s)
        plain.release()
        for chunk in (8, 32, 128):
            link = Link(SystemClock(), chunk_bytes=chunk * MIB)
            weights = Weights(pool, size)
            took_s = timed(lambda w=weights, k=link: load(w, k, source))
            times.setdefault(f"load, chunks of {chunk} MiB", []).append(took_s)
            weights.close()
            link.close()
    rates = {
        name: spread([1 / seconds for seconds in taken], size / 1e9)
        for name, taken in times.items()
    }
    memory.unpin(source.ctypes.data)
    return {"gb_per_s": rates, "pin_host_memory_s": round(pinned_s, 3)}


def load(weights: Weights, link: Link, source: np.ndarray) -> None:
    pages = weights.pool.books.take(weights.missing_pages, top=True)
    assert pages is not None
    loading = weights.load(link, source.ctypes.data, pages)
    loading.ended.wait()
    if loading.end != "done":
        raise SystemExit(f"the load {loading.end}: {loading.error}")
    weights.settle()


def switching(pool: PagePool, source: np.ndarray) -> dict[str, Any]:
    """Milliseconds."""
    memory, shelf = pool.memory, Shelf()
    memory.pin(source.ctypes.data, len(source))
    link, weights = Link(SystemClock()), Weights(pool, len(source))
    shelf.put("warm", [weights])
    times: dict[str, list[float]] = {}
    revoked = min(64, pool.pages_for(len(source)) // 2)
    for _ in range(REPEATS):
        load(weights, link, source)
        weights.drop(max(1, weights.slot.mapped // 10))
        times.setdefault("the last tenth again", []).append(
            timed(lambda: load(weights, link, source))
        )

        def activate() -> None:
            weights.pin()
            weights.view()
            weights.unpin()

        times.setdefault("pin and view", []).append(timed(activate))
        weights.drop(weights.held_pages)
        pages = pool.books.take(weights.missing_pages, top=True)
        assert pages is not None
        under_way = weights.load(link, source.ctypes.data, pages)
        while under_way.copied_bytes < len(source) // 4:
            pass
        name = f"revoke {revoked} pages during a load"
        times.setdefault(name, []).append(
            timed(lambda: shelf.revoke(pool.books, revoked))
        )
        weights.drop(weights.held_pages)
    link.close()
    shelf.take("warm")
    memory.unpin(source.ctypes.data)
    return {name: spread(taken, 1e3) for name, taken in times.items()}


def swapping(pool: PagePool, pages: int) -> dict[str, Any]:
    """GB/s."""
    size = pages * pool.page_bytes
    swap = Swap(pool, size, time.perf_counter)
    times: dict[str, list[float]] = {"out": [], "back": []}
    for _ in range(REPEATS):
        held = pool.books.take(pages)
        assert held is not None
        begin_s = time.perf_counter()
        there = swap.out(held.numbers)
        times["out"].append(time.perf_counter() - begin_s)
        assert there is not None
        numbers = held.numbers
        times["back"].append(timed(lambda t=there, n=numbers: swap.back(t, n)))
        held.release()
    swap.close()
    return {
        name: spread([1 / seconds for seconds in taken], size / 1e9)
        for name, taken in times.items()
    }


def measure(driver: Any, shard_bytes: int, page_bytes: int) -> dict[str, Any]:
    """Everything; ``driver``: the bindings."""
    pages = -(-shard_bytes // page_bytes)
    begin_s = time.perf_counter()
    memory = CudaMemory(page_bytes, pages + pages // 4 + 4, driver=driver)
    created_s = time.perf_counter() - begin_s
    pool = PagePool(memory)
    pool.window()
    source = np.empty(shard_bytes, np.uint8)
    source[:] = np.resize(np.arange(251, dtype=np.uint8), shard_bytes)
    found = {
        "page_bytes": page_bytes,
        "shard_bytes": shard_bytes,
        "create_us_per_page": round(created_s / memory.num_pages * 1e6, 3),
        "mapping_us_per_page": mapping(pool, pages),
        "loading": loading(pool, source),
        "switching_ms": switching(pool, source),
        "swapping_gb_per_s": swapping(pool, max(1, pages // 16)),
    }
    pool.close()
    return found


def device_name(driver: Any) -> str:
    error, name = driver.cuDeviceGetName(96, 0)
    return name.split(b"\0")[0].decode() if int(error) == 0 else "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The page pool on a GPU.")
    parser.add_argument("--gib", type=float, default=16.0, help="bytes of a shard")
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args(arguments)
    try:
        driver = load_driver()
        CudaMemory(2 * MIB, 1, driver=driver).close()
    except CudaFailed as error:
        sys.stdout.write(f"skipped, no GPU to measure on: {error}\n")
        return 0
    found = measure(driver, int(chosen.gib * GIB), 2 * MIB)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    document = {
        "command": f"python benchmarks/gpu_page_pool.py --gib {chosen.gib:g}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "device": device_name(driver),
        **found,
    }
    chosen.out.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
