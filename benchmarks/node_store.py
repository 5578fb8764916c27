"""The node's store: the first load of a shard, the second one by another process, and loads
past it.

Writes `benchmarks/results/node_store.json`. A checkpoint of one Llama-like LLM (random
bytes as bfloat16) lies on this machine's disk; shards are laid out as bfloat16, and as
float32. "Not cached": its pages were dropped from the page cache (`posix_fadvise`), which
`mincore` is asked to confirm. Each load is a process of its own that opens the shard and
copies it into a pool of 2 MiB pages, mapped for it. Medians of three,
with least and most.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines import tiny
from foreserve.runtime.engines.paged import (
    PagedSettings,
    close_servers,
    store_of,
)
from foreserve.runtime.live.pages import Held
from foreserve.runtime.memory.loading import Link
from foreserve.runtime.memory.node_store import RemoteStore
from foreserve.runtime.memory.pool import PagePool
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.streaming import Sources
from foreserve.runtime.memory.weights import Weights
from foreserve.runtime.paged.layout import Part
from foreserve.runtime.paged.shards import key_of, shard

MIB = 1024**2
PAGE = 2 * MIB
REPEATS = 3
SHAPE = {"hidden": 2048, "layers": 6}
ROOMS = {2 * 1024**3: ("first", "by another process"), 0: ("past it",)}
"""Of the store, and the loads that are made one after the other then."""


def load(socket: Path, key: str) -> dict[str, Any]:
    """In a process of its own: seconds until the shard can be copied, and until it is in
    the pool; twice, in one process."""
    num_bytes = shard(key)[0]
    memory = PosixMemory(PAGE, -(-num_bytes // PAGE))
    memory.create()
    pool = PagePool(memory)
    sources, link = Sources(RemoteStore(socket), shard, memory), Link(SystemClock())
    found: dict[str, Any] = {"bytes": num_bytes}
    for which in ("first", "again"):
        weights = Weights(pool, num_bytes)
        began_s = time.perf_counter()
        with sources.open(key, link.look, lambda: False) as source:
            found[f"{which}_open_s"] = time.perf_counter() - began_s
            pages = pool.books.take(weights.missing_pages, top=True)
            assert pages is not None
            done = weights.load(link, source, pages)
            done.ended.wait()
        found[f"{which}_s"] = time.perf_counter() - began_s
        assert done.end == "done", done.error
        found["sum"] = int(
            np.frombuffer(weights.slot.view(0, num_bytes), np.uint8).sum()
        )
        weights.settle()
        weights.close()
    link.close()
    sources.close()
    return found


def run(settings: PagedSettings, key: str) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, __file__, "--key", key, "--folder", str(settings.folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(child.stdout)
    return told


def drop(checkpoint: Path) -> int:
    """Its files from the page cache; bytes that are still there."""
    held = Held(tuple(checkpoint.glob("*.safetensors")))
    held.close(drop=True)
    return held.resident_bytes() or 0


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    checkpoint = folder / "llm"
    if not checkpoint.exists():
        tiny.make(checkpoint, "llama", **SHAPE)
        os.sync()  # What is not on the disk yet cannot be dropped.
    key = key_of(checkpoint, dtype, Part())
    times: dict[str, list[dict[str, Any]]] = {}
    left = 0
    for _ in range(REPEATS):
        for room, kinds in ROOMS.items():
            settings = PagedSettings(
                folder=folder / f"node{room}", pool_bytes=1, host_bytes=room
            )
            for cached in ("not cached", "cached"):
                store_of(settings).look(30.0)
                if cached == "not cached":
                    left = max(left, drop(checkpoint))
                for kind in kinds:
                    told = run(settings, key)
                    times.setdefault(f"{kind}, files {cached}", []).append(told)
                close_servers(settings.folder)
    # All copies are the same.
    ((num_bytes, _),) = {
        (t["bytes"], t["sum"]) for told in times.values() for t in told
    }
    rows = {}
    for name, told in times.items():
        row: dict[str, Any] = {}
        for part in ("first_open_s", "first_s", "again_s"):
            taken = sorted(one[part] for one in told)
            row[part] = [
                round(s, 3) for s in (statistics.median(taken), *taken[:: REPEATS - 1])
            ]
        row["gb_per_s"] = round(num_bytes / row["first_s"][0] / 1e9, 2)
        rows[name] = row
        click.echo(f"{dtype} {name}: {row}")
    return {"bytes": num_bytes, "left_in_page_cache_bytes": left, "loads": rows}


@click.command()
@click.option("--key", default=None, hidden=True)
@click.option("--folder", type=Path, default=None, hidden=True)
def main(key: str | None, folder: Path | None) -> None:
    if key is not None:
        assert folder is not None
        click.echo(json.dumps(load(folder / "store.sock", key)))
        return
    with tempfile.TemporaryDirectory(dir=Path.home()) as name:
        found = {dtype: measure(Path(name), dtype) for dtype in ("bfloat16", "float32")}
    write_result("node_store", found)


if __name__ == "__main__":
    main()
