"""Latency of LLMs that share GPUs: three estimators, from coarse to fine; the TP size.

Several services run on one group of GPUs, one iteration of one of them at a time. E1 is
close enough to linear for a solver, E2 knows priorities, E3 knows batching. Times in
seconds, rates per second; a service's latency is that of its mean request from arrival
to last token. An overloaded group has infinite latencies, never an exception. Sections
are those of the SeaLLM reference; its formulas are this project's, not SeaLLM's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foreserve.models.cost import IterationTime

_DAMPING = 0.5
_MOST_SLOWDOWN = 1e4
"""A latency beyond this multiple of the isolated time has no fixed point."""
TP_BATCH = 32
"""Decode batch at which the GPU-seconds of TP sizes are compared (section 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One LLM on the group: its requests, its part of the rate, and its iterations."""

    rate_rps: float
    input_tokens: float
    output_tokens: float
    time: IterationTime
    kv_sequences: float = math.inf
    """Most sequences its share of the cache holds."""

    @property
    def prefill_s(self) -> float:
        """P: the prompt alone."""
        return self.time.prefill_s(self.input_tokens, self.input_tokens**2)

    @property
    def context(self) -> float:
        """Tokens that a decoding sequence holds on average."""
        return self.input_tokens + self.output_tokens / 2

    def decode_s(self, batch: float) -> float:
        """One decode step of ``batch`` sequences."""
        return self.time.decode_s(batch, batch * self.context)

    @property
    def isolated_s(self) -> float:
        """e: one request alone, ``out - 1`` decode steps (section 3)."""
        return self.time.isolated_s(self.input_tokens, self.output_tokens)

    def demand_s(self, batch: float) -> float:
        """d: the group's time for one request at decode batch ``batch``; counts ``out``
        decode steps, as E3 does (section 6)."""
        return self.prefill_s + self.output_tokens * self.decode_s(batch) / batch


def processor_sharing_s(
    services: Sequence[Service], batches: Sequence[float]
) -> tuple[float, ...]:
    """E1: ``e / (1 - rho)``; all services slow down alike. O(services)."""
    rho = sum(
        s.rate_rps * s.demand_s(b) for s, b in zip(services, batches, strict=True)
    )
    if rho >= 1:
        return (math.inf,) * len(services)
    return tuple(s.isolated_s / (1 - rho) for s in services)


def preemptive_priority_s(
    rates_rps: Sequence[float],
    demands_s: Sequence[float],
    squares_s2: Sequence[float],
) -> tuple[float, ...]:
    """E2: preemptive-resume M/G/1 for services in order of priority, first highest.

    ``demands_s`` and ``squares_s2`` are first and second moments of the work of one
    request. Where the services down to i fill the group, i and those below wait for ever.
    """
    latencies = []
    above = residual = 0.0
    for rate, demand, square in zip(rates_rps, demands_s, squares_s2, strict=True):
        upto = above + rate * demand
        residual += rate * square / 2
        if upto >= 1:
            latencies.append(math.inf)
        else:
            wait = residual / ((1 - above) * (1 - upto))
            latencies.append(demand / (1 - above) + wait)
        above = upto
    return tuple(latencies)


def batch_aware_s(
    services: Sequence[Service], *, tolerance_s: float = 1e-6
) -> tuple[float, ...]:
    """E3: fixed point of latencies and batches under iteration-level sharing.

    A service's batch is what Little's law holds in flight (within its cache); each of
    its decode steps meets a step of every other service that has work, and prompts take
    the group's time first. Infinite for all where prompts alone fill the group or the
    batches grow without bound; infinite for a service whose cache holds fewer sequences
    than its rate keeps in flight, as its queue never ends. O(rounds * services).
    """
    prefill = [s.prefill_s for s in services]
    busy = sum(s.rate_rps * p for s, p in zip(services, prefill, strict=True))
    latency = [s.isolated_s for s in services]
    most_s = _MOST_SLOWDOWN * max(latency, default=0.0)
    change = math.inf
    while change >= tolerance_s:
        if busy >= 1 or max(latency, default=0.0) > most_s:
            return (math.inf,) * len(services)
        after = [
            (alone + s.output_tokens * token_s) / (1 - busy)
            for s, alone, token_s in zip(
                services, prefill, _tokens_s(services, latency), strict=True
            )
        ]
        pairs = list(zip(after, latency, strict=True))
        change = max((abs(new - old) for new, old in pairs), default=0.0)
        latency = [_DAMPING * new + (1 - _DAMPING) * old for new, old in pairs]
    return tuple(
        value if s.rate_rps * value <= s.kv_sequences else math.inf
        for s, value in zip(services, latency, strict=True)
    )


def _tokens_s(services: Sequence[Service], latency: Sequence[float]) -> list[float]:
    """R of E3: seconds from one token of a service to its next, prompts apart."""
    own, met = [], []
    for service, value in zip(services, latency, strict=True):
        batch = min(service.rate_rps * value, service.kv_sequences)
        active = -math.expm1(-batch)
        own.append(service.decode_s(max(batch, 1.0)))
        # Given that there is a batch it has batch / active sequences, at least 1.
        met.append(active * service.decode_s(batch / active) if active else 0.0)
    total = sum(met)
    return [mine + total - of_mine for mine, of_mine in zip(own, met, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class TpCost:
    """What one TP size means for a service."""

    tp: int
    isolated_s: float
    """e_k."""
    gpu_s: float
    """g_k: GPU-seconds of one request, in batches."""


def tp_costs(
    at_tp: Mapping[int, Service], batch: float = TP_BATCH
) -> tuple[TpCost, ...]:
    """``g_k = k * d_k`` and e_k of a service at its feasible TP sizes, ascending."""
    return tuple(
        TpCost(tp=tp, isolated_s=s.isolated_s, gpu_s=tp * s.demand_s(batch))
        for tp, s in sorted(at_tp.items())
    )


def pareto(costs: Sequence[TpCost]) -> tuple[TpCost, ...]:
    """Those that none beats in time and GPU-seconds; of equals the smallest TP size."""
    kept: list[TpCost] = []
    for cost in sorted(costs, key=lambda c: (c.gpu_s, c.isolated_s, c.tp)):
        if not kept or cost.isolated_s < kept[-1].isolated_s:
            kept.append(cost)
    return tuple(sorted(kept, key=lambda c: c.tp))


def best_tp(costs: Sequence[TpCost], theta: float) -> int:
    """TP size of a service (section 7): shortest isolated time against GPU-seconds.

    Minimises ``e_k / e + theta * g_k / min g`` over the Pareto set; ``theta`` grows with
    the cluster's load, 0 asks for the fastest.
    """
    fastest = min(cost.isolated_s for cost in costs)
    cheapest = min(cost.gpu_s for cost in costs)
    return min(
        pareto(costs),
        key=lambda c: (c.isolated_s / fastest + theta * c.gpu_s / cheapest, c.tp),
    ).tp
