"""Which requests run in the next iteration: scheduling policies as pure functions.

An engine keeps one `Progress` per request it has and one `Profile` per service (an LLM
with its traffic), and calls: `Policy.arrive` once, `pick` before each iteration,
`Policy.ran` for each request of the iteration that goes on, `finished` at its end.
Nothing here changes what it is given. The rules are those of the SeaLLM-like design (our
reconstruction): the doubling budget is reported, its readings and constants are ours.

Every key is O(1) and does not change while its request waits (as long as the profiles
stay), so an engine may keep those who wait in a heap.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

from foreserve.models.errors import InvalidInput

Key = tuple[float, ...]
"""Smaller runs first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What is known of one service's requests."""

    reference_s: float
    """e_s: mean time of a request alone, at the best TP size. Never updated: a metric
    and a bound on waiting hang on it."""
    decode_s: float
    """Mean decode time of a request; `finished` keeps it up to date."""
    rate_rps: float = 1.0
    """Read by weighted keys alone."""
    counted: int = 1
    """How many requests ``decode_s`` is the mean of; a first guess may count as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One request that is not finished."""

    request: int
    """Its id; the last tie."""
    service: int
    """Index of its `Profile`."""
    arrival_s: float
    prefill_s: float
    """Time of its prompt alone; known at arrival."""
    size_s: float = math.nan
    """Its true time alone; read by oracles and nobody else."""
    attained_s: float = 0.0
    """Time of all iterations it took part in, in full (not divided by the batch)."""
    last_run_s: float | None = None
    """End of the last of them."""
    budget_s: float = math.inf
    """Its priority falls when ``attained_s`` gets here."""
    level: int = 0
    """Queue, for policies with levels."""
    place_s: float = 0.0
    """Where in the queue: smaller is further ahead."""

    @property
    def unserved_since_s(self) -> float:
        return self.arrival_s if self.last_run_s is None else self.last_run_s


def finished(profile: Profile, decode_s: float, window: int = 1000) -> Profile:
    """``profile`` after a request whose decoding took ``decode_s``: a running mean that
    forgets beyond ``window`` requests."""
    counted = min(profile.counted + 1, window)
    mean_s = profile.decode_s + (decode_s - profile.decode_s) / counted
    return replace(profile, decode_s=mean_s, counted=counted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy(ABC):
    """An order of requests, and how serving a request changes its place in it."""

    costs: ClassVar[bool] = False
    """Whether the first part of a key is a cost above 0, of which a share makes sense."""
    keeps: ClassVar[bool] = True
    """Whether who runs ranks no lower for it until its budget is used up."""
    foresees: ClassVar[bool] = False
    """Whether it reads ``size_s``. An engine that serves batches keeps that at the attained
    time (of whole batches) plus what is left alone."""

    def arrive(self, request: Progress, profiles: Sequence[Profile]) -> Progress:
        """``request`` as it enters: with its first budget, level and place."""
        return request

    @abstractmethod
    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        """Ascending order of service at ``now_s``, without ties."""

    def ran(self, request: Progress, used_s: float, now_s: float) -> Progress:
        """An unfinished ``request`` after an iteration of ``used_s`` that ended now."""
        return replace(
            request, attained_s=request.attained_s + used_s, last_run_s=now_s
        )


class Fcfs(Policy):
    """First come, first served."""

    __slots__ = ()

    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        return request.arrival_s, request.request


class RoundRobin(Policy):
    """Longest unserved first: processor sharing, one iteration each."""

    __slots__ = ()
    keeps = False

    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        return request.unserved_since_s, request.arrival_s, request.request


class Static(Policy):
    """Services in ascending order of e_s; first come, first served inside a service."""

    __slots__ = ()
    costs = True

    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        cost_s = profiles[request.service].reference_s
        return cost_s, request.arrival_s, request.request


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlfq(Policy):
    """Skip-join multi-level feedback queue (FastServe-like): level p lasts
    ``quantum_s * 2^p``; a request joins the first level that holds its prefill, and sinks
    by one when it has used a level up. Not aware of services."""

    quantum_s: float = 0.01
    sink_to: Literal["front", "back"] = "front"
    """Of the next level; arrivals always queue at the back."""

    def __post_init__(self) -> None:
        if not self.quantum_s > 0:
            raise InvalidInput("a quantum must be above 0 s", field="quantum_s")

    def arrive(self, request: Progress, profiles: Sequence[Profile]) -> Progress:
        level = 0
        while self._lasts_s(level) < request.prefill_s:
            level += 1
        budget_s = self._lasts_s(level)
        return replace(
            request, level=level, place_s=request.arrival_s, budget_s=budget_s
        )

    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        return request.level, request.place_s, request.arrival_s, request.request

    def ran(self, request: Progress, used_s: float, now_s: float) -> Progress:
        attained_s = request.attained_s + used_s
        if attained_s < request.budget_s:
            return replace(request, attained_s=attained_s, last_run_s=now_s)
        level = request.level + 1
        return replace(
            request,
            attained_s=attained_s,
            last_run_s=now_s,
            level=level,
            place_s=-now_s if self.sink_to == "front" else now_s,
            budget_s=attained_s + self._lasts_s(level),
        )

    def _lasts_s(self, level: int) -> float:
        return math.ldexp(self.quantum_s, level)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoublingBudget(Policy):
    """A request begins with what its service needs on average; each time that is used up
    it is doubled. Read as a ``level``: least budget B first; as a ``mean``: least
    e_s * (B - attained); as a ``prod``: least B * (B - attained).

    After `ran`: attained <= B <= max(first B, 2 * attained), and a request of some size
    has been demoted at most ceil(log2(size / first B)) times.
    """

    costs = True

    reading: Literal["level", "mean", "prod"] = "mean"
    base: float = 1.0
    """First budget over the mean: above 1 fewer are demoted, but all rank later."""
    weighted: bool = False
    """Times the service's rate: the key of a mean over services, not over requests."""

    def __post_init__(self) -> None:
        if not self.base > 0:
            raise InvalidInput("a first budget must be above 0 s", field="base")

    def arrive(self, request: Progress, profiles: Sequence[Profile]) -> Progress:
        mean_s = request.prefill_s + profiles[request.service].decode_s
        if not mean_s > 0:
            raise ValueError(f"request {request.request}: expected to take {mean_s} s")
        return replace(request, budget_s=self.base * mean_s)

    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        profile = profiles[request.service]
        left_s = request.budget_s - request.attained_s
        if self.reading == "mean":
            cost = profile.reference_s * left_s
        elif self.reading == "level":
            cost = request.budget_s
        else:
            cost = request.budget_s * left_s
        return _cost_key(cost, request, profile, self.weighted)

    def ran(self, request: Progress, used_s: float, now_s: float) -> Progress:
        attained_s, budget_s = request.attained_s + used_s, request.budget_s
        while attained_s >= budget_s:
            budget_s *= 2
        return replace(
            request, attained_s=attained_s, last_run_s=now_s, budget_s=budget_s
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Oracle(Policy):
    """Knows true sizes: least factor * (size - attained), with factor the request's own
    ``size`` or its ``service``'s e_s. The latter, for equal sizes inside each of two
    services, is the optimum of the mean over requests of latency / e_s, and ``weighted``
    that of its mean over services; with three services neither always is."""

    costs = True
    foresees = True

    factor: Literal["size", "service"] = "size"
    weighted: bool = False

    def key(self, request: Progress, now_s: float, profiles: Sequence[Profile]) -> Key:
        profile = profiles[request.service]
        factor_s = request.size_s if self.factor == "size" else profile.reference_s
        # Work that is longer than foretold has no time left; it is never below that.
        left_s = max(request.size_s - request.attained_s, 0.0)
        return _cost_key(factor_s * left_s, request, profile, self.weighted)


def _cost_key(cost: float, request: Progress, profile: Profile, weighted: bool) -> Key:
    """Ties: smaller e_s first, then earlier arrival."""
    if weighted:
        cost *= profile.rate_rps
    return cost, profile.reference_s, request.arrival_s, request.request


Order = Callable[[Progress], tuple[bool, Key]]
"""Smaller runs first; False comes first of all: unserved for too long."""


def order(
    policy: Policy,
    *,
    now_s: float,
    profiles: Sequence[Profile],
    running: Collection[int] = frozenset(),
    margin: float = 0.0,
    patience: float = math.inf,
) -> Order:
    """How requests rank at ``now_s``.

    First those unserved for more than ``patience`` times their e_s, longest overdue first;
    then by key, where a request of ``running`` (ids of the last iteration's) gives way
    only to a cost below (1 - ``margin``) of its own. A policy whose keys are no `costs`
    knows no margin. ``margin`` is from 0 up to, not including, 1.
    """
    if not 0 <= margin < 1:
        raise InvalidInput("must be at least 0 and below 1", field="margin")
    keep = 1 - margin if policy.costs else 1.0

    def rank(request: Progress) -> tuple[bool, Key]:
        bound_s = patience * profiles[request.service].reference_s
        due_s = request.unserved_since_s + bound_s
        if now_s > due_s:
            return False, (due_s, request.arrival_s, request.request)
        key = policy.key(request, now_s, profiles)
        if keep < 1:
            held = request.request in running
            key = (key[0] * keep if held else key[0], not held, *key[1:])
        return True, key

    return rank


def pick(
    requests: Iterable[Progress],
    policy: Policy,
    *,
    now_s: float,
    profiles: Sequence[Profile],
    limit: int,
    running: Collection[int] = frozenset(),
    margin: float = 0.0,
    patience: float = math.inf,
) -> tuple[Progress, ...]:
    """The up to ``limit`` requests that run next, best first in `order`.
    O(n log limit)."""
    rank = order(
        policy,
        now_s=now_s,
        profiles=profiles,
        running=running,
        margin=margin,
        patience=patience,
    )
    return tuple(heapq.nsmallest(limit, requests, key=rank))


class Known(NamedTuple):
    """An entry of `POLICIES`."""

    make: Callable[[], Policy]
    about: str


POLICIES: Mapping[str, Known] = {
    "fcfs": Known(Fcfs, "first come, first served; nothing is preempted"),
    "round-robin": Known(RoundRobin, "longest unserved first: processor sharing"),
    "static": Known(Static, "services in ascending order of their mean size"),
    "mlfq": Known(Mlfq, "skip-join multi-level feedback queue, unaware of services"),
    "db-level": Known(
        lambda: DoublingBudget(reading="level"), "doubling budget: least budget first"
    ),
    "db-mean": Known(
        DoublingBudget, "doubling budget: service mean x budget left (the default)"
    ),
    "db-prod": Known(
        lambda: DoublingBudget(reading="prod"), "doubling budget: budget x budget left"
    ),
    "oracle": Known(Oracle, "knows sizes: true size x time left"),
    "oracle-service": Known(
        lambda: Oracle(factor="service"), "knows sizes: service mean x time left"
    ),
}
