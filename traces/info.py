"""A trace in numbers, for people who want to see what their traffic is like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foreserve.traces.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmInfo:
    """One LLM's requests in numbers."""

    llm: str
    requests: int
    rate_rps: float
    peak_minute_rps: float
    arrival_cv: float
    """Coefficient of variation of the gaps between arrivals; 1 is Poisson."""
    input_mean: float
    input_p50: float
    input_p90: float
    input_p99: float
    output_mean: float
    output_p50: float
    output_p90: float
    output_p99: float
    prefix_share: float | None
    """Share of the input tokens that a prefix cache without limits would find, with all
    requests in one engine one after the other: no real one finds more. None where the
    trace does not say what prompts share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceInfo:
    """A trace in numbers."""

    requests: int
    dropped: int
    span_s: float
    rate_rps: float
    distinct_times: int
    """Times at which requests came; far fewer than requests where a clock is coarse."""
    llms: tuple[LlmInfo, ...]


def describe(trace: Trace) -> TraceInfo:
    """Requests, rates, lengths and burstiness, in all and per LLM."""
    span_s = max(trace.span_s, 1e-9)
    rows = []
    for index, name in enumerate(trace.llms):
        mask = trace.llm == index
        arrival = trace.arrival_s[mask]
        if not len(arrival):
            continue
        gaps = np.diff(arrival)
        varied = len(gaps) > 1 and gaps.mean() > 0
        minutes = np.bincount((arrival // 60).astype(int))
        tokens = [c[mask] for c in (trace.input_tokens, trace.output_tokens)]
        share = None
        if trace.prefixes is not None and trace.prefixes.blocks[mask].any():
            found = trace.prefixes.take(mask).found_tokens(tokens[0])
            share = float(found.sum() / tokens[0].sum(dtype=np.int64))
        (in50, in90, in99), (out50, out90, out99) = (
            np.percentile(column, (50, 90, 99)) for column in tokens
        )
        rows.append(
            LlmInfo(
                llm=name,
                requests=len(arrival),
                rate_rps=len(arrival) / span_s,
                peak_minute_rps=float(minutes.max()) / 60,
                arrival_cv=float(gaps.std() / gaps.mean()) if varied else 0.0,
                input_mean=float(tokens[0].mean()),
                input_p50=float(in50),
                input_p90=float(in90),
                input_p99=float(in99),
                output_mean=float(tokens[1].mean()),
                output_p50=float(out50),
                output_p90=float(out90),
                output_p99=float(out99),
                prefix_share=share,
            )
        )
    return TraceInfo(
        requests=len(trace),
        dropped=trace.dropped,
        span_s=trace.span_s,
        rate_rps=len(trace) / span_s,
        distinct_times=len(np.unique(trace.arrival_s)),
        llms=tuple(rows),
    )
