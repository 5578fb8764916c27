"""What users got, from the requests of a run: delays, slowdowns, targets met, goodput.

Normalized latency has three definitions in use: D1, the mean over LLMs of mean latency
over isolated time; D2, the mean over requests of the same ratio; D3, seconds per output
token. All are kept, because a policy can win by one and lose by another.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreserve.models.gaps import gap_quantiles
from foreserve.models.outcome import SCALES, Latency, Ratios, Service
from foreserve.models.perf.compact import decode_many, prefill_many
from foreserve.models.problem import Fleet
from foreserve.runtime.journal import RequestEnd, RequestTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64] | NDArray[np.int32]
Mask = NDArray[np.bool_]

QUANTILES = (0.5, 0.9, 0.95, 0.99)
ROUNDING = 1e-9
"""Relative: a request that ran alone is within 1 times its isolated time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """The requests of a run in columns, one entry each."""

    llm: NDArray[np.int32]
    """Index into the fleet's LLMs."""
    arrival_s: Floats
    first_token_s: Floats
    """NaN where there was none."""
    finish_s: Floats
    """NaN where it did not finish."""
    input_tokens: Ints
    output_tokens: Ints
    """Asked for, whether they came or not."""
    left_s: Floats
    """When it ended, was given up, or the run stopped."""

    @classmethod
    def of(cls, table: RequestTable) -> Requests:
        """The whole of ``table``; shares its columns."""
        return cls(
            llm=table.llm,
            arrival_s=table.arrival_s,
            first_token_s=table.first_token_s,
            finish_s=table.finish_s,
            input_tokens=table.input_tokens,
            output_tokens=table.output_tokens,
            left_s=table.end_s,
        )


class RequestLog:
    """Ends of requests as they come, in columns: 64 bytes each. Mutable."""

    def __init__(self, llms: Sequence[str]) -> None:
        self._index = {name: index for index, name in enumerate(llms)}
        self._integers = tuple(array("q") for _ in range(4))
        self._seconds = tuple(array("d") for _ in range(4))

    def add(self, end: RequestEnd) -> None:
        first_s = math.nan if end.first_token_s is None else end.first_token_s
        finish_s = end.at_s if end.result == "finished" else math.nan
        whole = (
            end.request,
            self._index[end.llm],
            end.input_tokens,
            end.output_tokens,
        )
        for integers, number in zip(self._integers, whole, strict=True):
            integers.append(number)
        times_s = (end.arrival_s, first_s, finish_s, end.at_s)
        for seconds, value_s in zip(self._seconds, times_s, strict=True):
            seconds.append(value_s)

    def requests(self) -> Requests:
        """Those so far, in the order of their numbers; copies."""
        number, llm, given, asked = (np.array(c, np.int64) for c in self._integers)
        order = np.argsort(number, kind="stable")
        arrival_s, first_s, finish_s, left_s = (
            np.array(column, np.float64)[order] for column in self._seconds
        )
        return Requests(
            llm=llm[order].astype(np.int32),
            arrival_s=arrival_s,
            first_token_s=first_s,
            finish_s=finish_s,
            input_tokens=given[order],
            output_tokens=asked[order],
            left_s=left_s,
        )


def services(
    fleet: Fleet,
    requests: Requests,
    *,
    gaps: NDArray[np.int64],
    gaps_s: Floats,
    span_s: float,
    ended_s: float,
) -> tuple[Service, Mapping[str, Service]]:
    """What all users got, and those of each LLM.

    ``gaps``: [llm, bin] those between tokens (`models.gaps`), ``gaps_s``: [llm] their sum;
    ``span_s``: seconds in which requests arrived; ``ended_s``: when the run stopped, which
    is how long requests without an answer count as waiting.
    """
    finished = ~np.isnan(requests.finish_s)
    ttft_s, tpot_s, e2e_s = delays(requests, ended_s)
    slo = np.array([(x.slo.ttft_s, x.slo.tpot_s) for x in fleet.llms])[requests.llm]
    kept = finished & (ttft_s <= slo[:, 0]) & ~(tpot_s > slo[:, 1])
    reference_s = np.array([fleet.reference_s(x.name) for x in fleet.llms])
    slowdown = e2e_s / reference_s[requests.llm]
    alone_s = isolated_s(fleet, requests) * (1 + ROUNDING)
    within = {scale: finished & (e2e_s <= scale * alone_s) for scale in SCALES}
    normalized_s = e2e_s / np.maximum(requests.output_tokens, 1)
    own = [requests.llm == index for index in range(len(fleet.llms))]

    def share(met: Mask, which: Mask) -> float:
        return float(met[which].mean()) if which.any() else 1.0

    def service(which: Mask, llms: slice) -> Service:
        done, good = which & finished, which & kept
        means = [slowdown[part].mean() for one in own if (part := one & which).any()]
        return Service(
            requests=int(which.sum()),
            finished=int(done.sum()),
            ttft=latency(ttft_s[which]),
            tpot=latency(tpot_s[which]),
            itl=gap_latency(gaps[llms].sum(axis=0), float(gaps_s[llms].sum())),
            e2e=latency(e2e_s[which]),
            slo_attainment=share(kept, which),
            input_tokens=int(requests.input_tokens[done].sum()),
            output_tokens=int(requests.output_tokens[done].sum()),
            normalized=latency(normalized_s[which]),
            slowdown=ratios(slowdown[which]),
            d1=float(np.mean(means)) if means else 0.0,
            attainment_at={str(k): share(met, which) for k, met in within.items()},
            goodput_rps=float(good.sum() / span_s),
            goodput_tokens_per_s=float(requests.output_tokens[good].sum() / span_s),
        )

    by_llm = {
        x.name: service(one, slice(index, index + 1))
        for index, (x, one) in enumerate(zip(fleet.llms, own, strict=True))
    }
    return service(np.ones(len(requests.llm), dtype=bool), slice(None)), by_llm


def delays(requests: Requests, ended_s: float) -> tuple[Floats, Floats, Floats]:
    """[request] TTFT, TPOT, E2E. What never came counts until ``ended_s`` (`Latency`);
    TPOT is NaN for requests of one token and for unfinished ones."""
    arrival_s, first_s = requests.arrival_s, requests.first_token_s
    finish_s, tokens = requests.finish_s, requests.output_tokens
    waited_s = ended_s - arrival_s
    ttft_s = np.where(np.isnan(first_s), waited_s, first_s - arrival_s)
    e2e_s = np.where(np.isnan(finish_s), waited_s, finish_s - arrival_s)
    gaps = np.where(tokens > 1, tokens - 1, np.nan)
    return ttft_s, (finish_s - first_s) / gaps, e2e_s


def isolated_s(fleet: Fleet, requests: Requests) -> Floats:
    """[request] its time alone on its LLM's fastest option (`IterationTime.isolated_s`)."""
    found = np.full(len(requests.llm), np.inf)
    for index, llm in enumerate(fleet.llms):
        own = requests.llm == index
        prompt = requests.input_tokens[own].astype(np.float64)
        answer = requests.output_tokens[own].astype(np.float64)
        steps = np.maximum(answer - 1, 0)
        for time in (o.time for o in fleet.options if o.llm == llm.name):
            step_s = decode_many([time], np.ones_like(prompt), prompt + answer / 2)[0]
            alone_s = prefill_many(time, prompt) + steps * step_s
            found[own] = np.minimum(found[own], alone_s)
    return found


def latency(delay_s: Floats) -> Latency:
    """NaN values are left out."""
    found = ratios(delay_s)
    return Latency(
        count=found.count,
        mean_s=found.mean,
        p50_s=found.p50,
        p90_s=found.p90,
        p95_s=found.p95,
        p99_s=found.p99,
    )


def gap_latency(counts: NDArray[np.int64], sum_s: float) -> Latency:
    """Of the gaps counted in ``counts`` [bin], which last ``sum_s`` together."""
    count = int(counts.sum())
    if not count:
        return latency(np.empty(0))
    p50_s, p90_s, p95_s, p99_s = gap_quantiles(counts, QUANTILES)
    return Latency(
        count=count,
        mean_s=sum_s / count,
        p50_s=p50_s,
        p90_s=p90_s,
        p95_s=p95_s,
        p99_s=p99_s,
    )


def ratios(values: Floats) -> Ratios:
    """NaN values are left out."""
    known = values[~np.isnan(values)]
    if not known.size:
        return Ratios(count=0, mean=0, p50=0, p90=0, p95=0, p99=0)
    p50, p90, p95, p99 = (float(q) for q in np.quantile(known, QUANTILES))
    return Ratios(
        count=known.size, mean=float(known.mean()), p50=p50, p90=p90, p95=p95, p99=p99
    )
