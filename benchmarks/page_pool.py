"""The page pool on this machine: mapping, copying, revoking, and what one pool holds.

    python benchmarks/page_pool.py

1. Pages of 2 MiB mapped and unmapped one by one, and 512 in one call, in one run or
   scattered; before and after something was written to them; with and without page tables
   filled at once. Median of 7.
2. A shard of 512 MiB from the store's shared memory into a slot, through a `Link`, beside
   one memcpy of as many bytes; into pages mapped for the first time, or with page tables
   filled. Median of 7 (the plain copies in between).
3. Granting a KV page; taking 64 of 2 MiB back from weights, while a load is under way and
   without; pinning an LLM and making a view of it.
4. Two services of the Azure trace of 2023, code on Llama-2-7B and conversations on
   Llama-2-13B, that share 40 GiB of KV memory or have a part of it each. Requests are
   admitted in the order of arrival with pages for their prompt and the median output, get
   20 tokens a second each from then on, and are sent back to the queue when pages run out,
   the last to join first. No cost model: what is counted is how many requests are held.

Writes benchmarks/results/page_pool.json; with ``--part`` only what that part found, beside
what the file has of the others. Takes some minutes.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.models import catalog
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.memory.books import Books
from foreserve.runtime.memory.kv import KvNeeds, KvSpace, KvTable
from foreserve.runtime.memory.loading import Link
from foreserve.runtime.memory.pool import PagePool, Slot
from foreserve.runtime.memory.posix import PosixMemory
from foreserve.runtime.memory.rules import first_quotas, tail_waste
from foreserve.runtime.memory.store import HostStore
from foreserve.runtime.memory.weights import Shelf, Weights
from foreserve.traces.formats import read_trace

MIB, GIB = 1 << 20, 1 << 30
PAGE = 2 * MIB
REPEATS = 7
PARTS = ("mapping", "copying", "granting", "held")
LIBC = ctypes.CDLL(None)
LIBC.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def timed(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def pool_of(pages: int, *, populate: bool = False) -> PagePool:
    memory = PosixMemory(PAGE, pages, populate=populate)
    memory.create()
    return PagePool(memory)


# --- 1. mapping ------------------------------------------------------------------------


def mapping(populate: bool) -> list[dict[str, Any]]:
    """Microseconds per page."""
    pages = 512
    pool = pool_of(pages, populate=populate)
    slot = pool.reserve(pages * PAGE)
    order = np.random.default_rng(0).permutation(pages)
    rows = []
    for how in ("one by one", "one run", "scattered"):
        for touched in (False, True):
            times: list[tuple[float, float]] = []
            for _ in range(REPEATS):
                mapped_s = timed(lambda how=how: _map(pool, slot, how, order))
                if touched:
                    np.frombuffer(slot.view(0, pages * PAGE), np.uint8)[::4096] = 1
                unmapped_s = timed(lambda how=how: _unmap(pool, slot, how))
                times.append((mapped_s, unmapped_s))
            map_s, unmap_s = (statistics.median(t) for t in zip(*times, strict=True))
            rows.append(
                {
                    "how": how,
                    "populate": populate,
                    "touched": touched,
                    "map_us_per_page": round(map_s / pages * 1e6, 2),
                    "unmap_us_per_page": round(unmap_s / pages * 1e6, 2),
                }
            )
            click.echo(rows[-1])
    pool.close()
    return rows


def _map(pool: PagePool, slot: Slot, how: str, order: np.ndarray) -> None:
    if how == "one by one":
        while pool.free:
            pool.map(slot, 1)
    elif how == "one run":
        pool.map(slot, pool.free)
    else:
        pages = pool.books.take(pool.free)
        assert pages is not None
        # Only here are pages put into an order that the books would not give.
        pages._numbers = [pages.numbers[i] for i in order]
        slot.map(pages)


def _unmap(pool: PagePool, slot: Slot, how: str) -> None:
    while slot.mapped:
        pool.unmap(slot, 1 if how == "one by one" else slot.mapped)


# --- 2. copying ------------------------------------------------------------------------


def copying() -> list[dict[str, Any]]:
    """GB/s."""
    size = 512 * MIB
    store = HostStore(2 * size, lambda _: (size, _fill))
    shared = store.open("shard")
    assert shared is not None
    shared.filling.wait(shared.num_bytes - 1)
    target = PosixMemory(PAGE, size // PAGE)
    there = target.reserve(size)
    target.map(there, [(0, size // PAGE)])
    LIBC.memcpy(there, shared.address, size)
    pools = {flag: pool_of(size // PAGE, populate=flag) for flag in (False, True)}
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        plain = timed(lambda: LIBC.memcpy(there, shared.address, size))
        times.setdefault("plain memcpy, mapped and touched before", []).append(plain)
        for chunk in (2, 8, 32):
            for flag, pool in pools.items():
                link = Link(SystemClock(), chunk_bytes=chunk * MIB)
                weights = Weights(pool, size)
                took_s = timed(lambda w=weights, k=link: _load(w, k, shared.address))
                name = f"load, chunks of {chunk} MiB" + (", populated" if flag else "")
                times.setdefault(name, []).append(took_s)
                weights.close()
                link.close()
    rows = []
    for name, taken in times.items():
        rate = size / statistics.median(taken) / 1e9
        rows.append({"what": name, "gb_per_s": round(rate, 2)})
        click.echo(rows[-1])
    shared.close()
    store.close()
    target.close()
    for pool in pools.values():
        pool.close()
    return rows


def _fill(memory: np.ndarray, begin: int, stop: Callable[[], bool]) -> None:
    memory[:] = np.resize(np.arange(251, dtype=np.uint8), len(memory))


def _load(weights: Weights, link: Link, source: int) -> None:
    pages = weights.pool.books.take(weights.missing_pages, top=True)
    assert pages is not None
    weights.load(link, source, pages).ended.wait()
    weights.settle()


# --- 3. small things -------------------------------------------------------------------


def granting() -> dict[str, Any]:
    """Microseconds, medians and 99th percentiles of 2,000, and milliseconds of 40."""
    pool, shelf = pool_of(1024), Shelf()
    space = KvSpace([pool.books], PAGE, borrower=shelf)
    service = space.add(_needs("llm", PAGE // 16, 100.0, 10.0, 10))
    pool.window()
    grants = []
    for _ in range(40):
        table = space.open(service)
        for tokens in range(16, 16 * 51, 16):
            grants.append(timed(lambda t=table, n=tokens: t.grow(n)) * 1e6)
        table.release()
    store = HostStore(GIB, lambda _: (512 * MIB, _fill))
    shared = store.open("shard")
    assert shared is not None
    shared.filling.wait(shared.num_bytes - 1)
    link, weights = Link(SystemClock()), Weights(pool, 512 * MIB)
    shelf.put("warm", [weights])
    found: dict[str, list[float]] = {"resident": [], "while it loads": []}
    pins, books = [], pool.books
    for _ in range(20):
        _load(weights, link, shared.address)
        pins.append(timed(lambda: _pin(weights)) * 1e6)
        found["resident"].append(timed(lambda: shelf.revoke(books, 64)) * 1e3)
        weights.drop(weights.held_pages)
        pages = books.take(weights.missing_pages, top=True)
        assert pages is not None
        load = weights.load(link, shared.address, pages)
        while load.copied_bytes < 64 * MIB:
            time.perf_counter()
        found["while it loads"].append(timed(lambda: shelf.revoke(books, 64)) * 1e3)
        weights.drop(weights.held_pages)
    link.close()
    shared.close()
    pool.close()
    result = {
        "grant_us": _two(grants),
        "pin_and_view_us": _two(pins),
        **{f"revoke_64_pages_ms, {name}": _two(t) for name, t in found.items()},
    }
    click.echo(result)
    return result


def _pin(weights: Weights) -> None:
    weights.pin()
    weights.view()
    weights.unpin()


def _two(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "p99": round(float(np.quantile(values, 0.99)), 3),
        "most": round(max(values), 3),
    }


# --- 4. one pool or several ------------------------------------------------------------

KV_BYTES = 40 * GIB
TOKENS_PER_S = 20.0
STEP_S = 0.25
LLMS = {"code": "llama-2-7b", "conv": "llama-2-13b"}


def _needs(
    llm: str, token_bytes: int, mean_in: float, mean_out: float, usual: int, **more: Any
) -> KvNeeds:
    return KvNeeds(
        llm=llm,
        token_bytes=token_bytes,
        input_tokens=mean_in,
        output_tokens=mean_out,
        usual_output_tokens=usual,
        **more,
    )


@dataclass(slots=True, eq=False)
class Held:
    """One request on its way."""

    llm: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    given: float = 0.0
    table: KvTable | None = None


@dataclass(slots=True)
class Sums:
    held: float = 0.0
    used: float = 0.0
    tail: float = 0.0
    last: float = 0.0
    free_while_waiting: float = 0.0
    preempted: int = 0
    ended: int = 0


def play(
    spaces: list[tuple[KvSpace, int]], requests: list[Held], horizon_s: float
) -> Sums:
    """``spaces``: by LLM, the space it takes pages of and its number there."""
    queues: tuple[deque[Held], ...] = tuple(deque() for _ in spaces)
    running: list[Held] = []
    coming = deque(requests)
    total, pools = Sums(), {id(s.pools[0]): s.pools[0] for s, _ in spaces}
    capacity = sum(pool.capacity for pool in pools.values())
    page = spaces[0][0].page_bytes
    steps = int(horizon_s / STEP_S)
    for step in range(steps):
        now_s = step * STEP_S
        while coming and coming[0].arrival_s <= now_s:
            queues[coming[0].llm].append(coming.popleft())
        _admit(spaces, queues, running)
        for one in tuple(running):
            if one.table is None:
                continue
            one.given = min(one.given + TOKENS_PER_S * STEP_S, one.output_tokens)
            while not one.table.grow(one.input_tokens + int(one.given)):
                last = next(
                    x for x in reversed(running) if x.table and _meet(spaces, x, one)
                )
                _send_back(last, queues, running)
                total.preempted += 1
                if last is one:
                    break
            if one.table is not None and one.given >= one.output_tokens:
                one.table.release()
                running.remove(one)
                total.ended += 1
        total.held += len(running) / steps
        for one in running:
            assert one.table is not None
            space, service = spaces[one.llm]
            token = space._needs[service].token_bytes
            tokens = one.input_tokens + int(one.given)
            own = one.table.pages * page
            total.used += tokens * token / (capacity * page) / steps
            tail = one.table.pages * tail_waste(page, token) * page
            total.tail += tail / (capacity * page) / steps
            total.last += (own - tail - tokens * token) / (capacity * page) / steps
        if any(queues):
            free = sum(pool.free for pool in pools.values())
            total.free_while_waiting += free / capacity / steps
    return total


def _meet(spaces: list[tuple[KvSpace, int]], one: Held, other: Held) -> bool:
    return spaces[one.llm][0] is spaces[other.llm][0]


def _admit(
    spaces: list[tuple[KvSpace, int]],
    queues: tuple[deque[Held], ...],
    running: list[Held],
) -> None:
    """In the order of arrival over all LLMs; who does not fit bars those of his pool."""
    shut: set[int] = set()
    while True:
        heads = [(q[0].arrival_s, i) for i, q in enumerate(queues) if q]
        heads = [(at, i) for at, i in heads if id(spaces[i][0]) not in shut]
        if not heads:
            return
        llm = min(heads)[1]
        space, service = spaces[llm]
        one = queues[llm][0]
        tokens = one.input_tokens + int(one.given)
        promise = space.promise(service, one.input_tokens)
        booked = sum(
            max(x.table.promise, x.table.pages)
            for x in running
            if x.table and x.table.space is space
        )
        if booked + promise > space.pages():
            shut.add(id(space))
            continue
        table = space.open(service)
        table.promise = promise
        if not table.grow(tokens):
            table.release()
            shut.add(id(space))
            continue
        one.table = table
        running.append(queues[llm].popleft())


def _send_back(one: Held, queues: tuple[deque[Held], ...], running: list[Held]) -> None:
    assert one.table is not None
    one.table.release()
    one.table = None
    running.remove(one)
    queues[one.llm].appendleft(one)


def waste(
    scale: float, page_bytes: int, scheme: str, horizon_s: float
) -> dict[str, Any]:
    trace = read_trace("traces/samples/azure-2023.csv.gz")
    names = [str(name) for name in trace.llms]
    listed = []
    needs: list[KvNeeds] = []
    for number, service in enumerate(names):
        mine = trace.llm == number
        output = trace.output_tokens[mine]
        spec = catalog.llm(LLMS[service])
        needs.append(
            _needs(
                service,
                spec.kv_bytes_per_token_per_gpu(1),
                float(trace.input_tokens[mine].mean()),
                float(output.mean()),
                int(np.median(output)),
                rate_rps=float(mine.sum()) / 3600,
            )
        )
    rows = zip(
        trace.llm.tolist(),
        (trace.arrival_s / scale).tolist(),
        trace.input_tokens.tolist(),
        trace.output_tokens.tolist(),
        strict=True,
    )
    listed = [Held(*row) for row in rows if row[1] < horizon_s]
    pages = KV_BYTES // page_bytes
    if scheme == "one pool":
        space = KvSpace([Books(pages)], page_bytes)
        spaces = [(space, space.add(own)) for own in needs]
    else:
        shares = _shares(scheme, pages, needs, page_bytes)
        spaces = []
        for own, share in zip(needs, shares, strict=True):
            space = KvSpace([Books(share)], page_bytes)
            spaces.append((space, space.add(own)))
    total = play(spaces, listed, horizon_s)
    return {
        "scheme": scheme,
        "page_mib": page_bytes // MIB,
        "scale": scale,
        "requests": len(listed),
        "held": round(total.held, 1),
        "ended": total.ended,
        "preempted": total.preempted,
        "tokens_share": round(total.used, 4),
        "page_tail_share": round(total.tail, 4),
        "last_page_share": round(total.last, 4),
        "free_while_waiting_share": round(total.free_while_waiting, 4),
    }


def _shares(
    scheme: str, pages: int, needs: list[KvNeeds], page_bytes: int
) -> list[int]:
    """Pages of each LLM."""
    if scheme == "halves":
        return [pages // len(needs)] * len(needs)
    space = KvSpace([Books(pages)], page_bytes)
    numbers = [space.add(own) for own in needs]
    inflow = {
        s: own.rate_rps * own.token_bytes * (own.input_tokens + own.output_tokens)
        for s, own in zip(numbers, needs, strict=True)
    }
    if scheme == "by time held":
        # What a request holds, times how long it does.
        for s, own in zip(numbers, needs, strict=True):
            inflow[s] *= own.output_tokens / TOKENS_PER_S
    quotas = first_quotas(pages, {s: space.floor(s) for s in numbers}, inflow)
    return [int(quotas[s]) for s in numbers]


@click.command()
@click.option("--horizon-s", default=1200.0, show_default=True)
@click.option("--part", type=click.Choice(PARTS), multiple=True, default=PARTS)
def main(horizon_s: float, part: tuple[str, ...]) -> None:
    """Print and write everything."""
    parts: dict[str, Callable[[], Any]] = {
        "mapping": lambda: [*mapping(False), *mapping(True)],
        "copying": copying,
        "granting": granting,
        "held": lambda: holding(horizon_s),
    }
    file = Path("benchmarks/results/page_pool.json")
    before = json.loads(file.read_text()) if file.exists() else {}
    kept = {name: before[name] for name in parts if name in before}
    write_result("page_pool", {**kept, **{name: parts[name]() for name in part}})


def holding(horizon_s: float) -> list[dict[str, Any]]:
    rows = []
    schemes = ("one pool", "by rate x bytes", "by time held", "halves")
    for scale in (0.5, 1.0, 1.5):
        for scheme in schemes:
            rows.append(waste(scale, 8 * MIB, scheme, horizon_s))
            click.echo(rows[-1])
    for page_mib in (2, 16):
        rows.append(waste(1.0, page_mib * MIB, "one pool", horizon_s))
        click.echo(rows[-1])
    return rows


if __name__ == "__main__":
    main()
