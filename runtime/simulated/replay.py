"""Requests that came to one engine (or some alike), replayed on the simulated one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreserve.models.cost import IterationTime
from foreserve.runtime.simulated.engine import Engine, EngineLimits, Job

Floats = NDArray[np.float64]


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
    engines = [Engine(time, kv_tokens, limits) for _ in range(replicas)]
    ends = np.full(len(requests), math.nan)
    jobs: list[Job] = []
    seen: list[tuple[float, int, int, float]] = []

    def advance_to(limit_s: float) -> None:
        while (engine := min(engines, key=lambda e: e.next_s)).next_s <= limit_s:
            if engine.next_s == math.inf:
                return
            now_s = engine.next_s
            for job in engine.advance():
                ends[job.request] = now_s
            note(now_s)

    def note(now_s: float) -> None:
        used = sum(engine.used_blocks for engine in engines)
        seen.append(
            (
                now_s,
                sum(engine.running for engine in engines),
                sum(engine.waiting for engine in engines),
                used / max(1, sum(engine.num_blocks for engine in engines)),
            )
        )

    for number, (arrival_s, input_tokens, output_tokens) in enumerate(requests):
        advance_to(arrival_s)
        job = Job(
            request=number,
            llm="",
            arrival_s=arrival_s,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        engines[number % replicas].submit(job, arrival_s)
        jobs.append(job)
        note(arrival_s)
        progress(number + 1.0, float(len(requests)))
    advance_to(math.inf)
    t_s, running, waiting, kv_used = np.array(seen, dtype=np.float64).T
    return Replay(
        first_token_s=np.array([job.first_token_s for job in jobs], dtype=np.float64),
        end_s=ends,
        preemptions=sum(engine.preemptions for engine in engines),
        t_s=t_s,
        running=running,
        waiting=waiting,
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
    engine, number = Engine(time, kv_tokens, limits), 0
    tokens, ttft_s = 0, []

    def send(now_s: float) -> None:
        nonlocal number
        input_tokens, output_tokens = lengths[number % len(lengths)]
        engine.submit(
            Job(
                request=number,
                llm="",
                arrival_s=now_s,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
            ),
            now_s,
        )
        number += 1

    for _ in range(users):
        send(0.0)
    while engine.next_s <= duration_s:
        now_s = engine.next_s
        for job in engine.advance():
            assert job.first_token_s is not None
            ttft_s.append(job.first_token_s - job.arrival_s)
            tokens += job.output_tokens
            send(now_s)
    return tokens / duration_s, np.array(ttft_s)
