"""Observed arrivals, and what a forecaster sees of them.

A `Trace` is single requests in columns; a `Demand` is the same past per LLM and epoch:
rates, and requests in flight (mean and peak). Both are immutable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.traces.prefixes import Prefixes, row_of_prefixes, told_apart

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Requests in order of arrival; all columns have one entry per request."""

    arrival_s: Floats
    """Seconds since the start of the trace, not decreasing, not negative."""
    llm: Ints
    """Index into ``llms``."""
    llms: tuple[str, ...]
    input_tokens: Ints
    output_tokens: Ints
    dropped: int = 0
    """Rows left out when the file was read: failed requests (no output tokens)."""
    prefixes: Prefixes | None = None
    """What prompts have in common, where the trace says."""

    def __post_init__(self) -> None:
        columns = (self.arrival_s, self.llm, self.input_tokens, self.output_tokens)
        if len({column.shape for column in columns}) != 1 or self.arrival_s.ndim != 1:
            raise InvalidInput("trace: columns of unequal length")
        if [c.dtype.name for c in columns] != ["float64", "int32", "int32", "int32"]:
            raise InvalidInput("trace: float64 arrival_s and int32 columns are needed")
        if len(set(self.llms)) != len(self.llms):
            raise InvalidInput("trace: an LLM comes twice in llms")
        if len(self.arrival_s):
            if not np.isfinite(self.arrival_s).all() or self.arrival_s[0] < 0:
                raise InvalidInput("trace: arrival_s must be finite and not negative")
            if (self.arrival_s[1:] < self.arrival_s[:-1]).any():
                raise InvalidInput("trace: arrival_s must not decrease")
            if self.llm.min() < 0 or self.llm.max() >= len(self.llms):
                raise InvalidInput("trace: llm must be an index into llms")
            if min(self.input_tokens.min(), self.output_tokens.min()) < 1:
                raise InvalidInput("trace: token counts must be at least 1")
        if self.prefixes is not None:
            if len(self.prefixes) != len(self):
                raise InvalidInput("trace: prefixes are needed of each request")
            if self.prefixes.too_many(self.input_tokens).any():
                raise InvalidInput("trace: a prompt has more blocks than it can hold")
        for column in columns:
            column.setflags(write=False)

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        """Time of the last arrival; 0 for an empty trace."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    def between(self, start_s: float, end_s: float) -> Trace:
        """The requests with ``start_s <= arrival_s < end_s``, times unchanged."""
        low, high = np.searchsorted(self.arrival_s, (start_s, end_s), side="left")
        return self.take(slice(low, high))

    def take(self, rows: slice | NDArray[np.bool_]) -> Trace:
        """Some of the requests, times unchanged."""
        return replace(
            self,
            arrival_s=self.arrival_s[rows],
            llm=self.llm[rows],
            input_tokens=self.input_tokens[rows],
            output_tokens=self.output_tokens[rows],
            prefixes=None if self.prefixes is None else self.prefixes.take(rows),
        )


def merge(traces: Sequence[Trace]) -> Trace:
    """One trace from several on the same clock; ties keep the order of ``traces``.

    Prompts of different traces have nothing in common.
    """
    llms = tuple(dict.fromkeys(name for trace in traces for name in trace.llms))
    index = {name: i for i, name in enumerate(llms)}
    codes = [
        np.array([index[name] for name in trace.llms], dtype=np.int32)[trace.llm]
        for trace in traces
    ]
    arrival_s = np.concatenate([trace.arrival_s for trace in traces])
    order = np.argsort(arrival_s, kind="stable")
    prefixes = row_of_prefixes(
        told_apart([trace.prefixes for trace in traces]),
        [len(trace) for trace in traces],
    )
    return Trace(
        arrival_s=arrival_s[order],
        llm=np.concatenate(codes)[order],
        llms=llms,
        input_tokens=np.concatenate([t.input_tokens for t in traces])[order],
        output_tokens=np.concatenate([t.output_tokens for t in traces])[order],
        dropped=sum(trace.dropped for trace in traces),
        prefixes=None if prefixes is None else prefixes.take(order),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """The past per LLM and epoch; every array is [llm, epoch], read-only."""

    epoch_s: float
    start_s: float
    """Start of the first epoch; days are counted from 0 on this clock."""
    llms: tuple[str, ...]
    rate_rps: Floats
    mean_load: Floats
    """Requests in flight, time-weighted mean."""
    peak_load: Floats
    """Requests in flight, maximum; includes those carried over from before."""
    input_tokens: Floats
    """Mean per request; 0 where there was none."""
    output_tokens: Floats

    def __post_init__(self) -> None:
        for column in self._columns():
            if column.shape != self.rate_rps.shape or column.ndim != 2:
                raise InvalidInput("demand: arrays must all be [llm, epoch]")
            if not np.isfinite(column).all() or (column < 0).any():
                raise InvalidInput("demand: values must be finite and not negative")
            column.setflags(write=False)

    def _columns(self) -> tuple[Floats, ...]:
        return (
            self.rate_rps,
            self.mean_load,
            self.peak_load,
            self.input_tokens,
            self.output_tokens,
        )

    @property
    def num_epochs(self) -> int:
        return int(self.rate_rps.shape[1])

    def upto(self, epoch: int) -> Demand:
        """Only the epochs before ``epoch``: all that may be known when it starts."""
        return self._of([column[:, :epoch] for column in self._columns()])

    def select(self, llms: Sequence[str]) -> Demand:
        """The rows of ``llms`` in that order; zeros for one that is not there."""
        rows = [self.llms.index(n) if n in self.llms else len(self.llms) for n in llms]
        padded = [
            np.vstack([column, np.zeros((1, self.num_epochs))])[rows]
            for column in self._columns()
        ]
        return replace(self._of(padded), llms=tuple(llms))

    def coarser(self, factor: int) -> Demand:
        """Epochs ``factor`` times as long: means of means, maxima of maxima. Epochs at the
        start that do not fill a long one are left out."""
        count = self.num_epochs // factor
        skip = self.num_epochs - count * factor

        def grouped(column: Floats) -> Floats:
            return column[:, skip:].reshape(len(self.llms), count, factor)

        rate = grouped(self.rate_rps)
        weight = np.maximum(rate.sum(axis=2), 1e-12)
        tokens = [
            (grouped(column) * rate).sum(axis=2) / weight
            for column in (self.input_tokens, self.output_tokens)
        ]
        peak = grouped(self.peak_load).max(axis=2)
        mean = grouped(self.mean_load).mean(axis=2)
        longer = self._of([rate.mean(axis=2), mean, peak, *tokens])
        return replace(
            longer,
            epoch_s=self.epoch_s * factor,
            start_s=self.start_s + skip * self.epoch_s,
        )

    def then(self, later: Demand) -> Demand:
        """This past followed by ``later`` (same LLMs and epochs, its clock goes on)."""
        if later.llms != self.llms or later.epoch_s != self.epoch_s:
            raise InvalidInput("demand: LLMs and epochs must be equal to be joined")
        pairs = zip(self._columns(), later._columns(), strict=True)
        return self._of([np.hstack(pair) for pair in pairs])

    def _of(self, columns: Sequence[Floats]) -> Demand:
        rate, mean, peak, inputs, outputs = columns
        return replace(
            self,
            rate_rps=rate,
            mean_load=mean,
            peak_load=peak,
            input_tokens=inputs,
            output_tokens=outputs,
        )


def bin_demand(
    trace: Trace,
    *,
    epoch_s: float,
    busy_s: Floats,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> Demand:
    """Count a trace into epochs of ``epoch_s`` seconds, from ``start_s`` to ``end_s``.

    ``busy_s`` ([request]) is how long each request is in flight, as a cost model
    estimates it. Requests from before ``start_s`` count while they are in flight, those
    from ``end_s`` on do not. The last epoch may be partial: its means are over its
    elapsed time. Without ``end_s`` the trace ends with its last arrival, or a second
    into that epoch, lest a lone request there be taken for a high rate.
    Exact, by +1/-1 events; O(n log n) per LLM.
    """
    if busy_s.shape != trace.arrival_s.shape or not (busy_s >= 0).all():
        raise InvalidInput("demand: busy_s needs a number of at least 0 per request")
    span_s = (trace.span_s if end_s is None else end_s) - start_s
    if epoch_s <= 0 or (end_s is not None and span_s <= 0):
        raise InvalidInput("demand: epoch_s and the time counted must be positive")
    count = max(1, int(np.ceil(round(span_s / epoch_s, 9))))
    edges: Floats = start_s + np.arange(count + 1, dtype=np.float64) * epoch_s
    if end_s is None:
        least_s = edges[-2] + min(1.0, epoch_s)
        end_s = float(np.nextafter(max(trace.span_s, least_s), np.inf))
    edges[-1] = end_s
    return count_demand(trace, epoch_s=epoch_s, busy_s=busy_s, edges=edges)


def count_demand(
    trace: Trace, *, epoch_s: float, busy_s: Floats, edges: Floats
) -> Demand:
    """`bin_demand` between given edges, one more than epochs.

    What an epoch comes to depends, to the last bit, only on the requests that arrive in it
    and on those from before that are still in flight when it begins.
    """
    start_s, end_s, count = float(edges[0]), float(edges[-1]), len(edges) - 1
    width = np.diff(edges)
    shape = (len(trace.llms), count)
    rate, mean, peak, inputs, outputs = (np.zeros(shape) for _ in range(5))
    for row in range(len(trace.llms)):
        mask = trace.llm == row
        mean[row], peak[row] = _in_flight(trace.arrival_s[mask], busy_s[mask], edges)
        mask &= (trace.arrival_s >= start_s) & (trace.arrival_s < end_s)
        epoch = np.searchsorted(edges, trace.arrival_s[mask], side="right") - 1
        number = np.bincount(epoch, minlength=count)
        for column, tokens in (
            (inputs, trace.input_tokens),
            (outputs, trace.output_tokens),
        ):
            total = np.bincount(epoch, weights=tokens[mask], minlength=count)
            column[row] = total / np.maximum(number, 1)
        rate[row] = number / width
    return Demand(
        epoch_s=epoch_s,
        start_s=start_s,
        llms=trace.llms,
        rate_rps=rate,
        mean_load=mean,
        peak_load=peak,
        input_tokens=inputs,
        output_tokens=outputs,
    )


def passed_s(arrival_s: Floats, busy_s: Floats, bound: float, start_s: float) -> float:
    """When, from ``start_s`` on, more than ``bound`` requests were first in flight;
    infinite if that never was so."""
    times = np.concatenate([arrival_s + busy_s, arrival_s])
    steps = np.repeat([-1.0, 1.0], len(arrival_s))
    order = np.argsort(times, kind="stable")
    times, level = times[order], np.cumsum(steps[order])
    before = level[times < start_s]
    if len(before) and before[-1] > bound:
        return start_s
    above = np.flatnonzero((level > bound) & (times >= start_s))
    return float(times[above[0]]) if len(above) else np.inf


def _in_flight(arrival: Floats, busy_s: Floats, edges: Floats) -> tuple[Floats, Floats]:
    """Time-weighted mean and maximum number in flight between consecutive edges."""
    # Marks at the edges change nothing; they make each epoch start with a known level.
    # At equal times ends come first, then an edge, then starts.
    times = np.concatenate([arrival + busy_s, edges, arrival])
    steps = np.repeat([-1.0, 0.0, 1.0], [len(arrival), len(edges), len(arrival)])
    order = np.argsort(times, kind="stable")
    times, level = times[order], np.cumsum(steps[order])
    held = np.diff(times, append=times[-1]) * level
    at = np.flatnonzero(steps[order] == 0)
    mean = np.add.reduceat(held, at)[:-1] / np.diff(edges)
    peak = np.maximum.reduceat(level, at)[:-1]
    return mean, peak
