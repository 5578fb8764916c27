"""Latency of LLMs that share GPUs: three estimators, from coarse to fine.

Several services run on one group of GPUs, one iteration of one of them at a time. E1 is
closed enough for a linear program, E2 knows priorities, E3 knows batching. Times in
seconds, rates per second; a service's latency is that of its mean request from arrival
to last token. An overloaded group has infinite latencies, never an exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foreserve.models.cost import IterationTime
from foreserve.models.record import Record

_DAMPING = 0.5
_MOST_ROUNDS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Service(Record):
    """One LLM on the group: its requests, its part of the rate, and its iterations."""

    rate_rps: float
    input_tokens: float
    output_tokens: float
    time: IterationTime
    kv_sequences: float = math.inf
    """Most sequences its share of the cache holds."""

    @property
    def prefill_s(self) -> float:
        return self.time.prefill_s(self.input_tokens, self.input_tokens**2)

    @property
    def context(self) -> float:
        """Tokens that a decoding sequence holds on average."""
        return self.input_tokens + self.output_tokens / 2

    def decode_s(self, batch: float) -> float:
        return self.time.decode_s(batch, batch * self.context)

    @property
    def isolated_s(self) -> float:
        """e: one request alone, ``out - 1`` decode steps (section 3)."""
        return self.time.isolated_s(self.input_tokens, self.output_tokens)

    def demand_s(self, batch: float) -> float:
        """d: the group's time for one request at decode batch ``batch`` (section 6)."""
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
    above = upto = residual = 0.0
    for rate, demand, square in zip(rates_rps, demands_s, squares_s2, strict=True):
        upto += rate * demand
        residual += rate * square / 2
        if upto >= 1:
            latencies.append(math.inf)
        else:
            wait = residual / ((1 - above) * (1 - upto))
            latencies.append(demand / (1 - above) + wait)
        above = min(upto, 1.0)
    return tuple(latencies)


def batch_aware_s(
    services: Sequence[Service], *, tolerance_s: float = 1e-6
) -> tuple[float, ...]:
    """E3: fixed point of latencies and batches under iteration-level sharing.

    A service's batch is what Little's law holds in flight (within its cache); each of
    its decode steps meets a step of every other service that has work, and prompts take
    the group's time first. O(rounds * services).
    """
    prefill = [s.prefill_s for s in services]
    busy = sum(s.rate_rps * p for s, p in zip(services, prefill, strict=True))
    if busy >= 1:
        return (math.inf,) * len(services)
    latency = [s.isolated_s for s in services]
    for _ in range(_MOST_ROUNDS):
        batch = [
            min(s.rate_rps * value, s.kv_sequences)
            for s, value in zip(services, latency, strict=True)
        ]
        after = []
        for i, service in enumerate(services):
            step_s = service.decode_s(max(batch[i], 1.0))
            for j, other in enumerate(services):
                if j == i or batch[j] <= 0:
                    continue
                active = -math.expm1(-batch[j])
                step_s += active * other.decode_s(max(1.0, batch[j] / active))
            after.append((prefill[i] + service.output_tokens * step_s) / (1 - busy))
        change = max(abs(a - b) for a, b in zip(after, latency, strict=True))
        if not math.isfinite(change) or max(after) > 1e9:
            return (math.inf,) * len(services)
        latency = [
            _DAMPING * a + (1 - _DAMPING) * b
            for a, b in zip(after, latency, strict=True)
        ]
        if change < tolerance_s:
            return tuple(latency)
    return (math.inf,) * len(services)


def best_tp(
    at_tp: Callable[[int], Service | None],
    tps: Sequence[int],
    theta: float,
    batch: float,
) -> int | None:
    """TP size of a service (section 7): shortest isolated time against GPU-seconds.

    Minimises ``e_k / e + theta * g_k / min g`` with ``g_k = k * d_k`` at ``batch``;
    ``theta`` grows with the cluster's load. Dominated sizes never win. None if no size
    is feasible (``at_tp`` answers None).
    """
    made = {k: service for k in tps if (service := at_tp(k)) is not None}
    if not made:
        return None
    isolated = {k: s.isolated_s for k, s in made.items()}
    spent = {k: k * s.demand_s(batch) for k, s in made.items()}
    fastest, cheapest = min(isolated.values()), min(spent.values())
    return min(
        made, key=lambda k: (isolated[k] / fastest + theta * spent[k] / cheapest, k)
    )
