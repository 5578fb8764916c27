"""Requests that came to one engine (or some alike), replayed on the simulated one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreserve.models.cost import IterationTime
from foreserve.runtime.simulated.engine import EngineLimits, Engines
from foreserve.runtime.simulated.layout import FINISHED, Columns

Floats = NDArray[np.float64]

FRAMES = 2000
"""Points of the curves over the time in which requests arrive."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """What came of each request, and the engines over time."""

    first_token_s: Floats
    end_s: Floats
    preemptions: int
    t_s: Floats
    running: Floats
    waiting: Floats
    kv_used: Floats
    """Share of the blocks in use, of all engines."""


def replay(
    time: IterationTime,
    kv_tokens: int,
    limits: EngineLimits,
    requests: Sequence[tuple[float, int, int]],
    *,
    replicas: int = 1,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Replay:
    """``requests`` are (arrival_s, input tokens, output tokens), in order of arrival;
    ``replicas`` take them in turn."""
    arrival_s, given, asked = (
        np.array(column) for column in zip(*requests, strict=True)
    )
    columns = Columns(
        arrival_s.astype(np.float64),
        (np.arange(len(requests)) % replicas).astype(np.int32),
        given.astype(np.int32),
        asked.astype(np.int32),
    )
    # Each replica is an LLM of its own, so that nobody else takes its requests.
    engines = Engines(replicas, columns, columns.arrival_s[0])
    each = [engines.open(i, 0, time, kv_tokens, limits) for i in range(replicas)]
    blocks = max(1, replicas * (kv_tokens // limits.block_tokens))
    step_s = max(0.1, float(np.ptp(columns.arrival_s)) / FRAMES)
    t_s, seen = float(columns.arrival_s[0]), []
    while engines.top["ended"] < len(requests):
        while engines.run(t_s):
            engines.top["woken"] = False
        running = sum(engines.running(e) for e in each)
        waiting = sum(int(engines.row(e)["waiting"]) for e in each)
        used = sum(engines.used_blocks(e) for e in each) / blocks
        seen.append((t_s, running, waiting, used))
        progress(float(engines.top["ended"]), float(len(requests)))
        t_s += step_s
    at_s, running_n, waiting_n, kv_used = np.array(seen, dtype=np.float64).T
    state = engines.state
    failed = np.flatnonzero(state.result != FINISHED)
    if len(failed):
        raise ValueError(f"request {failed[0]}: more tokens than the KV cache has")
    return Replay(
        first_token_s=state.first_s,
        end_s=state.end_s,
        preemptions=int(state.preempted.sum()),
        t_s=at_s,
        running=running_n,
        waiting=waiting_n,
        kv_used=kv_used,
    )


def closed_loop(
    time: IterationTime,
    kv_tokens: int,
    limits: EngineLimits,
    lengths: Sequence[tuple[int, int]],
    *,
    users: int,
    duration_s: float,
) -> tuple[float, Floats]:
    """Output tokens per second and TTFTs where ``users`` each send their next request
    when the last one has ended, for ``duration_s``; ``lengths`` are taken in order, again
    from the first when they are used up."""
    # So many that a request has ended long before its row is used again.
    rows = np.array(lengths, np.int32)
    rows = np.tile(rows, (-(-users * 64 // len(rows)), 1))
    count = len(rows)
    never_s = np.full(count, np.inf)
    columns = Columns(never_s, np.zeros(count, np.int32), *rows.T)
    engines = Engines(1, columns)
    engine = engines.open(0, 0, time, kv_tokens, limits)
    sent_s = np.zeros(count)
    number, tokens, ttft_s = 0, 0, []

    def send(now_s: float) -> None:
        nonlocal number
        row = number % count
        sent_s[row] = now_s
        engines.submit(engine, row, now_s)
        number += 1

    for _ in range(users):
        send(0.0)
    while (now_s := float(engines.row(engine)["next_s"])) <= duration_s:
        for row in engines.advance(engine):
            ttft_s.append(engines.state.first_s[row] - sent_s[row])
            tokens += int(rows[row, 1])
            send(now_s)
    return tokens / duration_s, np.array(ttft_s)
