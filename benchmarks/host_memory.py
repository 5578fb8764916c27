"""What it takes to bring weights into host memory, and what a load gains by it.

    python benchmarks/host_memory.py [--gigabytes 1.5] [--folder out]

A file of random bytes is dropped from the page cache, then read as `runtime.live.pages`
does, locked, looked at, and dropped again. Beside that: a copy of the whole file through a
mapping, as loaders of safetensors make it, once with nothing in memory and once with all.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
from record import write_result

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.live.pages import Held

REPEATS = 3


def seconds(act: Callable[[], object]) -> float:
    clock = SystemClock()
    act()
    return clock.now_s()


def through_a_mapping(path: Path) -> None:
    """All of it into memory of our own, in pieces of a large tensor's size."""
    with path.open("rb") as file:
        area = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        seen = np.frombuffer(area, dtype=np.uint8)
        piece = 64 * 2**20
        for begin in range(0, len(seen), piece):
            seen[begin : begin + piece].copy()
        del seen
        area.close()


def once(path: Path) -> dict[str, float]:
    def fresh() -> Held:
        held = Held([path])
        held.close(drop=True)
        assert held.resident_bytes() == 0
        return held

    fresh()
    found = {"mapped_cold_s": seconds(lambda: through_a_mapping(path))}
    held = fresh()
    found["read_s"] = seconds(lambda: held.read(lambda: False))
    found["mapped_warm_s"] = seconds(lambda: through_a_mapping(path))
    found["lock_s"] = seconds(held.lock)
    found["locked"] = float(held.locked)
    found["look_s"] = seconds(held.resident_bytes)
    found["resident_share"] = (held.resident_bytes() or 0) / held.num_bytes
    found["drop_s"] = seconds(lambda: held.close(drop=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--folder", type=Path, default=Path("out"))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    path = given.folder / "weights.safetensors"
    rng = np.random.default_rng(1)
    with path.open("wb") as file:
        for _ in range(round(given.gigabytes * 1e9 / 1e8)):
            file.write(rng.bytes(10**8))
        file.flush()
        os.fsync(file.fileno())
    try:
        runs = [once(path) for _ in range(REPEATS)]
        size = path.stat().st_size
    finally:
        path.unlink()
    middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    write_result("host_memory", {"bytes": size, "median": middle, "runs": runs})


if __name__ == "__main__":
    main()
