"""Corrections from a user's own measurements: a file of closed-loop runs, or a journal.

In a journal each request tells how long its decode steps took while the replica worked on
others: the time from its first token to its last is its steps at the mean batch and
context of that stretch, plus the prompts that were prefilled in between. Requests that
met no other prompt on the way tell the time to a first token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.models.perf.calibrate import (
    FITTED,
    Deployment,
    Slopes,
    corrections,
    fit,
    interval,
    values_of,
)
from foreserve.models.perf.measured import Corrections, MeasuredTiming
from foreserve.models.perf.shipped import family, shipped

Floats = NDArray[np.float64]
LEAST_RUNS = 5
MOST_REQUESTS = 4000
"""Of a journal, taken evenly; more would not move the fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One finished request of a journal and the replica that served it."""

    replica: tuple[str, tuple[str, ...]]
    """LLM and its GPUs."""
    arrival_s: float
    first_token_s: float
    end_s: float
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Fitted corrections by engine, and how far predictions were before and after."""

    corrections: dict[str, Corrections]
    runs: int
    groups: int
    before: dict[str, float]
    """Median absolute relative error of ``ttft`` and ``tpot`` as corrected so far."""
    after: dict[str, float]
    held_out: dict[str, float]
    """The same where each group is predicted by a fit without it; empty for one group."""


def calibrate_deployments(
    deployments: Sequence[Deployment],
    known: Corrections | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Fit closed-loop runs, each (GPU, LLM) pair a group.

    What they do not tell stays as ``known``, else as shipped for most of them.
    """
    _check_enough(len(deployments), "closed-loop runs")
    known = known or _typical(d.timing for d in deployments)
    return _calibrate(Slopes.of(deployments, progress), known)


def calibrate_requests(
    timings: Callable[[tuple[str, tuple[str, ...]]], MeasuredTiming],
    requests: Iterable[Served],
    known: Corrections | None = None,
) -> Calibration:
    """Fit the requests of a journal, each replica a group; ``known`` as above."""
    by_replica: dict[tuple[str, tuple[str, ...]], list[Served]] = defaultdict(list)
    for request in requests:
        if request.output_tokens > 1 and request.end_s > request.first_token_s:
            by_replica[request.replica].append(request)
    total = sum(map(len, by_replica.values()))
    _check_enough(total, "finished requests of more than one token")
    keep = max(1, -(-total // MOST_REQUESTS))
    ordered = sorted(by_replica.items())
    found = [timings(replica) for replica, _ in ordered]
    parts = [
        slopes_of_replica(group, timing, served, keep)
        for group, (timing, (_, served)) in enumerate(zip(found, ordered, strict=True))
    ]
    engines = tuple(sorted({part.engines[0] for part in parts}))
    return _calibrate(_joined(parts, engines), known or _typical(found))


def _typical(timings: Iterable[MeasuredTiming]) -> Corrections:
    """What is shipped for the kind of LLM and the engine of most ``timings``."""
    kinds: dict[tuple[str, str], list[MeasuredTiming]] = defaultdict(list)
    for timing in timings:
        kinds[family(timing.llm), timing.engine].append(timing)
    one = max(kinds.values(), key=len)[0]
    return shipped(one.llm, one.engine)


def _check_enough(found: int, what: str) -> None:
    if found < LEAST_RUNS:
        raise InvalidInput(
            f"{found} {what} are too few to calibrate",
            hint=f"at least {LEAST_RUNS} are needed",
        )


def slopes_of_replica(
    group: int, timing: MeasuredTiming, served: Sequence[Served], keep: int
) -> Slopes:
    """One row of the linear system for every ``keep``-th request of a replica."""
    first = np.array([r.first_token_s for r in served])
    end = np.array([r.end_s for r in served])
    arrival = np.array([r.arrival_s for r in served])
    inputs = np.array([r.input_tokens for r in served], dtype=np.float64)
    outputs = np.array([r.output_tokens for r in served], dtype=np.float64)
    # Integrals over time of the decoding sequences and of their tokens, at any moment.
    times = np.concatenate([first, end])
    order = np.argsort(times, kind="stable")
    times = times[order]
    batch = np.cumsum(np.repeat([1.0, -1.0], len(served))[order])
    held = inputs + outputs / 2
    context = np.cumsum(np.concatenate([held, -held])[order])
    gaps = np.diff(times, append=times[-1])
    batch_s = np.concatenate([[0.0], np.cumsum(batch * gaps)])
    context_s = np.concatenate([[0.0], np.cumsum(context * gaps)])
    rows = np.arange(0, len(served), keep)
    span = end[rows] - first[rows]

    def mean(integral: Floats) -> Floats:
        at_end = np.searchsorted(times, end[rows])
        at_first = np.searchsorted(times, first[rows])
        return np.asarray((integral[at_end] - integral[at_first]) / span)

    mean_batch = np.maximum(1.0, mean(batch_s))
    mean_context = np.maximum(1.0, mean(context_s) / mean_batch)
    pure = replace(timing, corrections=_PURE)
    decode_s = pure.decode(mean_batch, mean_context).seconds
    typical = float(np.median(mean_batch))
    beside = pure.decode(typical, float(np.median(mean_context))).seconds
    mixed = pure.mixed(typical, float(np.median(mean_context)), inputs).seconds
    prompt_s = np.maximum(mixed - beside, 0.0)
    # Prompts of others that were finished while a request decoded.
    by_first = np.argsort(first, kind="stable")
    done = np.concatenate([[0.0], np.cumsum(prompt_s[by_first])])
    sorted_first = first[by_first]
    others_s = done[np.searchsorted(sorted_first, end[rows], side="right")]
    others_s -= done[np.searchsorted(sorted_first, first[rows], side="right")]
    steps = outputs[rows] - 1
    n, m = len(rows), len(FITTED) + 1
    tpot_by, ttft_by = np.zeros((n, m)), np.zeros((n, m))
    layers = timing.llm.layers
    # In the order of `FITTED`: kernels, prefill, layers, steps, request; admission.
    tpot_by[:, 0], tpot_by[:, 1] = decode_s, others_s / steps
    tpot_by[:, 2], tpot_by[:, 3] = layers, 1.0
    waits = np.searchsorted(np.sort(arrival), first[rows], side="left")
    waits = waits - np.searchsorted(sorted_first, arrival[rows], side="right")
    ttft_by[:, 1] = pure.prefill(inputs[rows]).seconds
    ttft_by[:, 2], ttft_by[:, 3], ttft_by[:, 4] = layers, 1.0, 1.0
    ttft_by[:, 0] = np.where(mean_batch > 1.5, decode_s / 2, 0.0)
    ttft_by[:, 5] = span / steps
    ttft = first[rows] - arrival[rows]
    # Whoever met another prompt on the way says nothing clear about the TTFT: such a row
    # is met exactly by its own constant.
    alone = (waits <= 1) & (ttft > 0)
    ttft_by[~alone] = 0.0
    ttft_at = np.where(alone, 0.0, np.maximum(ttft, 1e-6))
    return Slopes(
        engines=(timing.engine,),
        groups=np.full(n, group, dtype=np.int64),
        ttft_s=np.maximum(ttft, 1e-6),
        tpot_s=span / steps,
        ttft_at=ttft_at,
        tpot_at=np.zeros(n),
        ttft_by=ttft_by,
        tpot_by=tpot_by,
    )


_PURE = Corrections(layer_s=0.0, step_s=0.0, request_s=0.0)


def _joined(parts: Sequence[Slopes], engines: tuple[str, ...]) -> Slopes:
    """The rows of all parts, each with a column for every engine's admission."""

    def wide(part: Slopes, by: Floats) -> Floats:
        whole = np.zeros((len(by), len(FITTED) + len(engines)))
        whole[:, : len(FITTED)] = by[:, : len(FITTED)]
        whole[:, len(FITTED) + engines.index(part.engines[0])] = by[:, -1]
        return whole

    def column(name: str) -> Floats:
        return np.concatenate([getattr(part, name) for part in parts])

    return Slopes(
        engines=engines,
        groups=np.concatenate([part.groups for part in parts]),
        ttft_s=column("ttft_s"),
        tpot_s=column("tpot_s"),
        ttft_at=column("ttft_at"),
        tpot_at=column("tpot_at"),
        ttft_by=np.concatenate([wide(part, part.ttft_by) for part in parts]),
        tpot_by=np.concatenate([wide(part, part.tpot_by) for part in parts]),
    )


def _calibrate(slopes: Slopes, known: Corrections) -> Calibration:
    found = fit(slopes, known)
    groups = np.unique(slopes.groups)
    errors = [slopes.log_errors(found)]
    if len(groups) > 1:
        errors = []
        for group in groups:
            here = slopes.groups == group
            others = fit(slopes.select(~here), known)
            errors.append(slopes.select(here).log_errors(others))
    ttft, tpot = (np.concatenate(parts) for parts in zip(*errors, strict=True))
    made = corrections(
        slopes,
        found,
        ttft_interval=interval(ttft, max(2, len(groups))),
        tpot_interval=interval(tpot, max(2, len(groups))),
        source=f"own measurements: {len(slopes.tpot_s)} runs of {len(groups)} groups",
    )
    held_out = (
        {} if len(groups) == 1 else {"ttft": _median(ttft), "tpot": _median(tpot)}
    )
    return Calibration(
        corrections=made,
        runs=len(slopes.tpot_s),
        groups=len(groups),
        before=_errors(slopes, values_of(known, slopes.engines)),
        after=_errors(slopes, found),
        held_out=held_out,
    )


def _errors(slopes: Slopes, values: Floats) -> dict[str, float]:
    ttft, tpot = slopes.log_errors(values)
    # Rows that say nothing about the TTFT are met exactly (`slopes_of_replica`).
    said = (slopes.ttft_by != 0).any(axis=1)
    return {"ttft": _median(ttft[said]), "tpot": _median(tpot)}


def _median(log_errors: Floats) -> float:
    if not len(log_errors):
        return 0.0
    return float(np.median(np.abs(np.expm1(log_errors))))
