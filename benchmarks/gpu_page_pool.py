"""The page pool on an NVIDIA GPU: creating, mapping, loading. It has not been run yet.

    PYTHONPATH=src python benchmarks/gpu_page_pool.py [--gib 16] [--out FOLDER]

Needs numpy and cuda-bindings, and neither torch nor the package's other dependencies; says
so in one line where there is no GPU. With shards of ``--gib`` (16: Llama-3.1-8B and a bit),
each number the median of 7 and all of them in the file:

1. physical pages of 2 MiB: created, mapped and unmapped, one by one and in one batch;
2. host to GPU: one plain copy from pinned memory into mapped pages, and a load through a
   `Link` in the same run, in turns, with pages mapped ahead of the copies or all before;
   whether what arrived is what was sent, and whether other threads run meanwhile;
3. bringing back the last tenth of a shard that was dropped; pinning weights and viewing
   them (the memory's part of WARM -> ACTIVE); revoking 64 pages while a load is under way;
4. KV pages to the host and back.

Writes gpu_page_pool.json into benchmarks/results (or FOLDER) after each part, with date
and device. ``--check`` runs all of it through a made-up driver, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_record import FOLDER, Record, spread, timed

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.memory.cuda import CudaFailed, CudaMemory, load_driver
from foreserve.runtime.memory.loading import Link
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.memory.weights import Shelf, Weights

MIB, GIB = 1 << 20, 1 << 30
REPEATS = 7


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
    """GB/s."""
    size, memory = len(source), pool.memory
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
    return {
        name: spread([1 / seconds for seconds in taken], size / 1e9)
        for name, taken in times.items()
    }


def arriving(pool: PagePool, source: np.ndarray) -> str:
    """What a load brought is what was sent, read back page by page."""
    link, weights, memory = Link(SystemClock()), Weights(pool, len(source)), pool.memory
    load(weights, link, source)
    step, there = 64 * pool.page_bytes, np.empty(64 * pool.page_bytes, np.uint8)
    wrong = 0
    # Every eighth stretch, and the last.
    begins = {*range(0, len(source), 8 * step), len(source) // step * step}
    for at in begins:
        size = min(step, len(source) - at)
        with weights.slot.using(at, size) as address:
            memory.fetch(there.ctypes.data, address, size).wait()
        wrong += int((there[:size] != source[at : at + size]).sum())
    weights.close()
    link.close()
    return f"{wrong} bytes differ in {len(begins)} stretches of {step}"


def lock(pool: PagePool, source: np.ndarray) -> str:
    """Whether another thread gets on while this one waits for a copy."""
    plain, counted, done = pool.reserve(len(source)), [0], threading.Event()
    pool.map(plain, plain.num_pages)

    def count() -> None:
        while not done.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    with plain.using(0, len(source)) as address:
        counter.start()
        begun = counted[0]
        took_s = timed(
            lambda: pool.memory.copy(address, source.ctypes.data, len(source)).wait()
        )
        during = counted[0] - begun
        begun = counted[0]
        threading.Event().wait(took_s)
        after = counted[0] - begun
    done.set()
    counter.join()
    plain.release()
    return f"{during} turns of a thread during a copy, {after} during as long a sleep"


def load(weights: Weights, link: Link, source: np.ndarray) -> None:
    pages = weights.pool.books.take(weights.missing_pages, top=True)
    assert pages is not None
    loading = weights.load(link, source.ctypes.data, pages)
    loading.ended.wait()
    if loading.end != "done":
        raise RuntimeError(f"the load {loading.end}: {loading.error}")
    weights.settle()


def switching(pool: PagePool, source: np.ndarray) -> dict[str, Any]:
    """Milliseconds."""
    shelf = Shelf()
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


def measure(
    driver: Any, shard_bytes: int, page_bytes: int, record: Record
) -> dict[str, Any]:
    """Everything; ``driver``: the bindings."""
    pages = -(-shard_bytes // page_bytes)
    begin_s = time.perf_counter()
    memory = CudaMemory(page_bytes, pages + pages // 4 + 4, driver=driver)
    created_s = time.perf_counter() - begin_s
    pool = PagePool(memory)
    begin_s = time.perf_counter()
    pool.window()
    window_s = time.perf_counter() - begin_s
    source = np.empty(shard_bytes, np.uint8)
    block = np.resize(np.arange(251, dtype=np.uint8), 251 * 4096)
    for at in range(0, shard_bytes, len(block)):
        source[at : at + len(block)] = block[: shard_bytes - at]
    record.found |= {
        "page_bytes": page_bytes,
        "shard_bytes": shard_bytes,
        "create_us_per_page": round(created_s / memory.num_pages * 1e6, 3),
        "window_us_per_page": round(window_s / memory.num_pages * 1e6, 3),
    }
    record.part("mapping_us_per_page", lambda: mapping(pool, pages))
    address = source.ctypes.data
    record.part(
        "pin_host_memory_s", lambda: timed(lambda: memory.pin(address, shard_bytes))
    )
    record.part("loading_gb_per_s", lambda: loading(pool, source))
    record.part("interpreter_lock", lambda: lock(pool, source))
    record.part("bytes_arrive", lambda: arriving(pool, source))
    record.part("switching_ms", lambda: switching(pool, source))
    record.part("swapping_gb_per_s", lambda: swapping(pool, max(1, pages // 16)))
    record.part("unpin_s", lambda: timed(lambda: memory.unpin(address)))
    record.part("close_s", lambda: timed(pool.close))
    return record.found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The page pool on a GPU.")
    parser.add_argument("--gib", type=float, default=16.0, help="bytes of a shard")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.check:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from tests.fake_cuda import GRANULE, FakeCuda

        record = Record("gpu_page_pool", None)
        measure(FakeCuda(), 64 * GRANULE - 5, GRANULE, record)
        return record.end()
    try:
        driver = load_driver()
        CudaMemory(2 * MIB, 1, driver=driver).close()
    except CudaFailed as error:
        sys.stdout.write(f"skipped, no GPU to measure on: {error}\n")
        return 0
    record = Record("gpu_page_pool", chosen.out)
    measure(driver, int(chosen.gib * GIB), 2 * MIB, record)
    return record.end()


if __name__ == "__main__":
    raise SystemExit(main())
