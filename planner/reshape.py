"""The same requests, more or fewer of them: a trace with given rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from foreserve.traces.trace import Trace

SAME = 1e-9
"""Relative difference up to which two rates are the same."""


def reshaped(
    trace: Trace,
    epoch_s: float,
    now_rps: NDArray[np.float64],
    rate_rps: NDArray[np.float64],
    rng: np.random.Generator,
) -> Trace:
    """``trace``, whose rates are ``now_rps`` [llm, epoch], with ``rate_rps`` on average;
    what comes after the last of these epochs is left out.

    Where an epoch has requests of an LLM, each is kept with the right probability, or
    comes again after a random part of the mean time between two, so that bursts stay
    bursts. Where it has none, requests like the LLM's others come at random; an LLM
    without any gets none. An epoch with the right rate is left as it is.
    """
    llms, epochs = rate_rps.shape
    cell = (trace.arrival_s // epoch_s).astype(np.int64)
    rows: list[NDArray[np.int64]] = []
    times: list[NDArray[np.float64]] = []
    for m in range(llms):
        own = np.flatnonzero(trace.llm == m)
        for e in range(epochs):
            here = own[cell[own] == e]
            start_s = e * epoch_s
            width_s = min(epoch_s, max(1.0, trace.span_s - start_s))
            if not len(here):
                number = int(rng.poisson(rate_rps[m, e] * width_s)) if len(own) else 0
                rows.append(rng.choice(own, number) if number else here)
                times.append(start_s + width_s * rng.random(number))
                continue
            factor = rate_rps[m, e] / now_rps[m, e]
            if abs(factor - 1) <= SAME:
                copies = np.ones(len(here), np.int64)
            else:
                copies = (factor + rng.random(len(here))).astype(np.int64)
            rows.append(np.repeat(here, copies))
            first = np.repeat(np.cumsum(copies) - copies, copies)
            late_s = rng.random(len(first)) * width_s / len(here)
            came_s = trace.arrival_s[rows[-1]]
            later_s = start_s + (came_s - start_s + late_s) % width_s
            times.append(np.where(np.arange(len(first)) > first, later_s, came_s))
    arrival_s, chosen = np.concatenate(times), np.concatenate(rows)
    order = np.argsort(arrival_s, kind="stable")
    chosen = chosen[order]
    return replace(
        trace,
        arrival_s=arrival_s[order],
        llm=trace.llm[chosen],
        input_tokens=trace.input_tokens[chosen],
        output_tokens=trace.output_tokens[chosen],
        prefixes=None if trace.prefixes is None else trace.prefixes.take(chosen),
    )
