"""One server under a scheduling policy: what the policy does, and nothing else."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foreserve.models.lengths import Floats
from foreserve.runtime.scheduler import Key, Policy, Profile, Progress, pick


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Poisson arrivals of services with lognormal sizes; one server."""

    means_s: tuple[float, ...] = (0.3, 1.5, 6.0)
    shares: tuple[float, ...] = (0.6, 0.3, 0.1)
    cv: float
    """Of sizes inside a service; 0: all equal."""
    load: float
    prefill: float = 0.05
    """Prefill of every request, as a share of its service's mean size."""

    @property
    def rate_rps(self) -> float:
        return self.load / float(np.dot(self.means_s, self.shares))

    def profiles(self) -> tuple[Profile, ...]:
        return tuple(
            Profile(
                reference_s=mean_s,
                # With equal sizes the budget is to be the size, to the last bit.
                decode_s=mean_s - self.prefill * mean_s,
                rate_rps=self.rate_rps * share,
            )
            for mean_s, share in zip(self.means_s, self.shares, strict=True)
        )

    def draw(self, count: int, rng: np.random.Generator) -> list[Progress]:
        """``count`` requests in order of arrival; ids 0, 1, ..."""
        arrival_s = np.cumsum(rng.exponential(1 / self.rate_rps, count))
        service = rng.choice(len(self.shares), count, p=self.shares)
        sigma = math.sqrt(math.log1p(self.cv**2))
        size_s = np.array(self.means_s)[service] * rng.lognormal(
            -(sigma**2) / 2, sigma, count
        )
        rows = zip(arrival_s.tolist(), service.tolist(), size_s.tolist(), strict=True)
        return [
            Progress(
                request=i,
                service=s,
                arrival_s=at_s,
                prefill_s=self.prefill * self.means_s[s],
                size_s=size,
            )
            for i, (at_s, s, size) in enumerate(rows)
        ]


def serve(
    requests: Sequence[Progress],
    policy: Policy,
    profiles: Sequence[Profile],
    quantum_s: float = math.inf,
) -> Floats:
    """Seconds from arrival to end, by request (ids 0, 1, ... in order of arrival).

    Preemption costs nothing and happens at any time, with a ``quantum_s`` only at the
    end of a quantum, a budget or a request. O((requests + changes of key) * log n), for
    keys that stay as long as a request waits.
    """
    latency_s = np.empty(len(requests))
    waiting: list[tuple[Key, Progress]] = []
    now_s, coming = 0.0, 0
    while waiting or coming < len(requests):
        if not waiting:
            now_s = max(now_s, requests[coming].arrival_s)
        while coming < len(requests) and requests[coming].arrival_s <= now_s:
            request = policy.arrive(requests[coming], profiles)
            heapq.heappush(waiting, (policy.key(request, now_s, profiles), request))
            coming += 1
        request = heapq.heappop(waiting)[1]
        left_s = request.size_s - request.attained_s
        used_s = min(left_s, request.budget_s - request.attained_s, quantum_s)
        end_s = now_s + used_s
        if quantum_s == math.inf and coming < len(requests):
            arrival_s = requests[coming].arrival_s
            if arrival_s < end_s:
                used_s, end_s = arrival_s - now_s, arrival_s
        now_s = end_s
        if used_s == left_s:
            latency_s[request.request] = now_s - request.arrival_s
        else:
            request = policy.ran(request, used_s, now_s)
            heapq.heappush(waiting, (policy.key(request, now_s, profiles), request))
    return latency_s


def iterate(
    requests: Sequence[Progress],
    policy: Policy,
    profiles: Sequence[Profile],
    *,
    limit: int = 1,
    margin: float = 0.0,
    patience: float = math.inf,
) -> list[tuple[int, ...]]:
    """Ids of the requests that run in iteration 0, 1, ..., of one second each; sizes and
    arrivals (ascending) are whole seconds. What `pick` chooses, with its own clock."""
    coming = list(requests)
    here: dict[int, Progress] = {}
    log: list[tuple[int, ...]] = []
    while here or coming:
        now_s = float(len(log))
        while coming and coming[0].arrival_s <= now_s:
            request = policy.arrive(coming.pop(0), profiles)
            here[request.request] = request
        batch = pick(
            here.values(),
            policy,
            now_s=now_s,
            profiles=profiles,
            limit=limit,
            running=log[-1] if log else (),
            margin=margin,
            patience=patience,
        )
        log.append(tuple(request.request for request in batch))
        for request in batch:
            if request.attained_s + 1 >= request.size_s:
                del here[request.request]
            else:
                here[request.request] = policy.ran(request, 1.0, now_s + 1)
    return log
