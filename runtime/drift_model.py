"""The cost model against what was measured, as far as a journal can tell.

A journal knows of each request when it came, its first token, its end, its lengths and its
replica; not when an engine began with it. So two things can be compared honestly:

*TPOT.* Who was answered beside a request is known. Its tokens after the first should have
taken as many decode steps of the mean batch and context of that time, and the prompts whose
first tokens came meanwhile (they share its iterations). Waiting is not in it.

*TTFT* of a request that found its replica ACTIVE and without any request: its prompt alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreserve.models.cost import IterationTime
from foreserve.models.drift import Measured
from foreserve.models.perf.compact import decode_many, prefill_many

Floats = NDArray[np.float64]

AT_ONCE = 0.1
"""An answer whose tokens come in less than this share of the time of as many steps came in
one piece: there is nothing to be learnt from it."""


class Work(NamedTuple):
    """One request on a replica."""

    arrival_s: float
    first_s: float
    end_s: float
    input_tokens: int
    output_tokens: int
    counts: bool
    """Whether it is one of those to be measured: it finished, within the epoch."""
    fresh: bool
    """Its replica was ACTIVE when it came."""


def in_one_piece(
    time: IterationTime, first_s: float, end_s: float, tokens: int
) -> bool:
    """Whether an answer of ``tokens`` came all at once."""
    steps_s = (tokens - 1) * time.decode_s(1, 1)
    return tokens > 1 and end_s - first_s < AT_ONCE * steps_s


def compare(time: IterationTime, works: Sequence[Work]) -> tuple[Measured, Measured]:
    """(TTFT, TPOT) of those that count among all ``works`` of one replica, which nobody
    shares its GPUs with."""
    order = sorted(works, key=lambda work: work.arrival_s)
    arrival, first, end, given, asked, counts, fresh = (
        np.array(column) for column in zip(*order, strict=True)
    )
    known = ~np.isnan(first)
    context = given + asked / 2
    some, weight = first[known], context[known]
    moments = np.concatenate([some, end[known]])
    batch_s = _Integral(moments, np.repeat([1.0, -1.0], len(some)))
    context_s = _Integral(moments, np.concatenate([weight, -weight]))
    prompt_s = np.array(
        [time.chunk_s(float(n), float(n) ** 2) for n in given[known]], dtype=np.float64
    )
    by_first = np.argsort(some, kind="stable")
    upto = np.concatenate([[0.0], np.cumsum(prompt_s[by_first])])
    firsts = some[by_first]

    def prompts_s(begin: Floats, stop: Floats) -> Floats:
        low, high = (np.searchsorted(firsts, x, side="right") for x in (begin, stop))
        found: Floats = upto[high] - upto[low]
        return found

    steps = asked - 1
    with np.errstate(invalid="ignore"):
        long = counts & known & (steps > 0) & (end > first)
    begin, stop, steps = first[long], end[long], steps[long]
    span_s = stop - begin
    mean_batch = np.maximum(1.0, (batch_s(stop) - batch_s(begin)) / span_s)
    mean_context = (context_s(stop) - context_s(begin)) / span_s
    step_s = decode_many([time], mean_batch, mean_context)[0]
    predicted = (steps * step_s + prompts_s(begin, stop)) / steps
    alone_step_s = decode_many([time], np.ones_like(span_s), np.ones_like(span_s))[0]
    streamed = span_s >= AT_ONCE * steps * alone_step_s
    tpot = _measured(predicted[streamed], (span_s / steps)[streamed])

    last_end = np.concatenate([[-np.inf], np.maximum.accumulate(end)[:-1]])
    alone = counts & known & fresh & (last_end <= arrival)
    alone[:-1] &= arrival[1:] > arrival[:-1]
    whole = np.zeros(len(order), dtype=np.bool_)
    whole[np.flatnonzero(long)[~streamed]] = True
    alone &= ~whole
    took_s = (first - arrival)[alone]
    ttft = _measured(prefill_many(time, given[alone].astype(np.float64)), took_s)
    return ttft, tpot


class _Integral:
    """Of a level that changes by ``change`` at ``at``: how much of it was there until."""

    def __init__(self, at: Floats, change: Floats) -> None:
        order = np.argsort(at, kind="stable")
        self._at = at[order]
        level = np.cumsum(change[order])
        held = np.diff(self._at, append=self._at[-1:]) * level
        self._upto = np.concatenate([[0.0], np.cumsum(held)[:-1]])

    def __call__(self, at_s: Floats) -> Floats:
        """At moments within those of the changes."""
        if not len(self._at):
            return np.zeros_like(at_s)
        found: Floats = np.interp(at_s, self._at, self._upto)
        return found


def _measured(predicted_s: Floats, measured_s: Floats) -> Measured:
    return Measured(
        count=len(predicted_s),
        predicted_s=float(predicted_s.sum()),
        measured_s=float(measured_s.sum()),
        abs_error_s=float(np.abs(measured_s - predicted_s).sum()),
    )
