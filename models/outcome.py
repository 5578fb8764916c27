"""What a run came to, from its journal; simulated and real runs are comparable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreserve.models.faults import Fault
from foreserve.models.observed import Phase
from foreserve.models.record import Record
from foreserve.models.specs import GpuId


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency(Record):
    """One stretch of one replica's life: who was on which GPUs, doing what."""

    llm: str
    gpus: tuple[GpuId, ...]
    phase: Phase
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency(Record):
    """Mean and quantiles of one measure; all 0 where ``count`` is 0.

    TTFT, E2E and normalized latency are over all requests: one that got no first token, or
    no end, counts with the time from its arrival to the end of the run, so that a policy
    cannot look better by never serving. TPOT is over finished requests of at least two
    tokens. ITL is over single gaps between tokens of a request, whatever became of it; its
    quantiles are those of a histogram, right within 1 % (`models.gaps`).
    """

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios(Record):
    """Mean and quantiles of a measure without a unit; all 0 where ``count`` is 0."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(Record):
    """What the users of one LLM (or of all) got."""

    requests: int
    finished: int
    """Requests answered in full; the others were waiting or running at the end of the run,
    or failed because no replica has a KV cache of their size."""
    ttft: Latency
    tpot: Latency
    itl: Latency
    e2e: Latency
    slo_attainment: float
    """Share of all requests that finished within TTFT and TPOT targets; 1 if none came."""
    input_tokens: int
    """Of the finished requests, like ``output_tokens``."""
    output_tokens: int
    normalized: Latency
    """E2E per output token of each request (seconds per token). Its mean is D3."""
    slowdown: Ratios
    """E2E over ``e_m``, the isolated execution time of the LLM's mean request on its
    fastest option (`Fleet.reference_s`), whatever the placement. Its mean is D2."""
    d1: float
    """Mean over the LLMs that got requests of each one's mean slowdown: LLMs count alike,
    however many requests they get. 0 if none came."""
    attainment_at: Mapping[str, float]
    """By scale (`SCALES`): share of all requests that finished within that many times
    what the request itself takes alone on the fastest option; 1 if none came."""
    goodput_rps: float
    """Requests within their targets (as for ``slo_attainment``) per second of the run's
    span, in which requests arrive."""
    goodput_tokens_per_s: float
    """Output tokens of those requests per second."""


SCALES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort(Record):
    """What the replicas of one LLM took; `Outcome` has the same of all, and adds up."""

    gpu_hours: float
    """Each GPU's time goes to the LLMs that are in its most active phase, in equal
    parts."""
    loads: int
    loaded_bytes: int
    moved_bytes: int
    wasted_bytes: int
    unused_bytes: int
    activations: int
    warm_starts: int
    cold_starts: int
    storage_loads: int = 0
    revoked: int = 0
    preemptions: int = 0
    found_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome(Record):
    """Result of one run of one policy."""

    policy: str
    start_s: float
    end_s: float
    """Requests arrive and GPU time is counted from ``start_s`` until ``end_s``; the run
    goes on for a while so that the last requests can end."""
    total: Service
    by_llm: Mapping[str, Service]
    gpu_hours: Mapping[str, float]
    """By phase of the most active replica on the GPU, and ``total``: GPUs that hold
    anything."""
    cost_usd: float
    loads: int
    loaded_bytes: int
    """What the loads made resident: weights, and what each process keeps beside them."""
    moved_bytes: int
    """Weights alone: what went over the links. A load counts when it begins, in full."""
    wasted_bytes: int
    """Of them, those that were dropped (or whose load was cancelled) before any request
    was worked on there. Not those lost in a crash."""
    unused_bytes: int
    """Of them, those still there at the end without having been worked with."""
    activations: int
    warm_starts: int
    """Activations whose weights were already resident when they were called for."""
    cold_starts: int
    """Activations that had to wait for weights."""
    storage_loads: int = 0
    """Loads that read storage, because host memory did not have the weights."""
    faults: int = 0
    """Faults that began."""
    restarted: int = 0
    """Requests that start anew because a fault took their replica; each time counts."""
    revoked: int = 0
    """Replicas that were thrown out of memory that had been lent to them."""
    preemptions: int = 0
    """Requests that had to give up their place in the KV cache; each time counts."""
    found_tokens: int = 0
    """Of prompts, not computed because an earlier request's had been."""
    effort: Mapping[str, Effort]
    """By LLM."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One run in full: its outcome and the series behind it (for pictures and tables)."""

    outcome: Outcome
    residency: tuple[Residency, ...]
    llms: tuple[str, ...]
    llm: NDArray[np.int32]
    """[request] index into ``llms``; the arrays below run in the same order."""
    arrival_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    """NaN where the run ended before."""
    finish_s: NDArray[np.float64]
    """NaN where the run ended before."""
    left_s: NDArray[np.float64]
    """When it ended, was given up, or the run stopped."""
    output_tokens: NDArray[np.int32] | NDArray[np.int64]
    """Asked for, whether they came or not."""
    load_bin_s: float
    mean_load: NDArray[np.float64]
    """[llm, bin] requests in the system (waiting and running), mean over the bin."""
    peak_load: NDArray[np.float64]
    """[llm, bin] the same, maximum in the bin."""
    itl: NDArray[np.int64]
    """[llm, bin] gaps between tokens, in the bins of `models.gaps`."""
    itl_s: NDArray[np.float64]
    """[llm] sum of these gaps."""
    faults: tuple[Fault, ...] = ()
    """Those that began."""

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """[request] as for `Latency`: without a first token, until the end of the run."""
        ended_s = self.left_s.max(initial=self.outcome.end_s)
        found: NDArray[np.float64] = self.first_token_s - self.arrival_s
        return np.where(np.isnan(found), ended_s - self.arrival_s, found)
