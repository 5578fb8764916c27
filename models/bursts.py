"""What a placement is short of in each scenario: the needs and means behind (O2).

ACTIVE replicas serve first. One that has its GPUs to itself counts for its instances
whatever happens. Members of a group take turns: in a scenario, one that is asked for L
requests at a time takes the part phi = min(1, L / (its instances times B)) of the group,
and those served together take at most the whole of it. What is left to need goes to WARM
replicas, as `models.recourse` activates them. Which members a group serves, where it
cannot serve all, is chosen with that in view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Problem
from foreserve.models.recourse import (
    Spare,
    covered_at_most,
    covered_instances,
    covered_value,
)
from foreserve.models.specs import GpuId

WAYS = 64
"""Combinations of what groups serve, in one scenario; beyond, each group is decided by
itself, so that a loss may be overstated."""
Need = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Weighted waiting-seconds of one scenario."""

    seconds: float
    """After an activation that can be carried out: the best, where that was found."""
    least_s: float
    """No activation leaves less."""
    missing: Need
    """Instances that are missing of each LLM, in an activation of that kind."""


@dataclass(frozen=True, slots=True)
class _Ways:
    """A scenario after its ACTIVE replicas: what may be left to need, by how groups are
    used; what is left at least; and GPUs that WARM replicas may not use."""

    needs: tuple[Need, ...]
    least: Need
    busy: frozenset[GpuId]


def instance_loss_s(problem: Problem, placement: Placement) -> Mapping[str, float]:
    """Weighted waiting-seconds of one missing instance: omega_m loss_m."""
    fleet = problem.fleet
    hosted = {copy.llm for copy in placement.hosted}
    planned = fleet.loading.host_cache == "planned"
    return {
        llm.name: llm.weight
        * (
            llm.cold_loss_s
            + (llm.storage_loss_s if planned and llm.name not in hosted else 0.0)
        )
        for llm in fleet.llms
    }


def losses(
    problem: Problem,
    epoch: int,
    placement: Placement,
    *,
    by_llm: bool = False,
    least: bool = False,
) -> list[Loss]:
    """The loss of each scenario; ``missing`` is filled in only if ``by_llm``, ``least_s``
    (else 0) only if ``least``."""
    value = instance_loss_s(problem, placement)
    ways = _Serving(problem, placement).ways(epoch, value)
    found: dict[int, Loss] = {}
    for busy in dict.fromkeys(way.busy for way in ways):
        spare = _spare(problem, placement, busy)
        mine = [s for s, way in enumerate(ways) if way.busy == busy]
        flat = [need for s in mine for need in ways[s].needs]
        saved = iter(covered_value(spare, value, flat))
        if least:
            most = covered_at_most(spare, value, [ways[s].least for s in mine])
        for i, s in enumerate(mine):
            needs = ways[s].needs
            left = [_worth(value, need) - next(saved) for need in needs]
            best = min(range(len(left)), key=left.__getitem__)
            missing: dict[str, int] = {}
            if by_llm:
                covered = covered_instances(spare, value, [needs[best]])[0]
                missing = {
                    llm: count - covered.get(llm, 0)
                    for llm, count in needs[best].items()
                }
            least_s = _worth(value, ways[s].least) - most[i] if least else 0.0
            found[s] = Loss(
                seconds=left[best],
                least_s=max(0.0, min(left[best], least_s)),
                missing=missing,
            )
    return [found[s] for s in range(len(ways))]


def _worth(value: Mapping[str, float], need: Need) -> float:
    return sum(value[llm] * count for llm, count in need.items())


def _spare(
    problem: Problem, placement: Placement, busy: frozenset[GpuId]
) -> list[Spare]:
    """WARM replicas that touch none of the ``busy`` GPUs."""
    return [
        (replica.llm, replica.gpus, _units(problem, replica))
        for replica in placement.replicas
        if replica.state == "WARM" and busy.isdisjoint(replica.gpus)
    ]


def _units(problem: Problem, replica: Replica) -> int:
    unit = problem.fleet.llm_by_name[replica.llm].instance_concurrency
    return problem.fleet.option_of(replica.llm, replica.gpus).instances(unit)


class _Serving:
    """The ACTIVE replicas of a placement: how much of each scenario they take."""

    def __init__(self, problem: Problem, placement: Placement) -> None:
        self.problem = problem
        sharing = problem.fleet.sharing
        self.lends = sharing is not None and sharing.idle_lends
        self.groups = [
            (gpus, [(member.llm, _units(problem, member)) for member in members])
            for gpus, members in placement.groups.items()
        ]
        self.alone: dict[str, int] = {}
        """Instances that are always there, where nothing is shared or lent."""
        if not self.lends:
            for _, units in self.groups:
                if len(units) == 1:
                    llm, count = units[0]
                    self.alone[llm] = self.alone.get(llm, 0) + count
            self.groups = [group for group in self.groups if len(group[1]) > 1]
        self.busy = frozenset(g for gpus in placement.groups for g in gpus)

    def ways(self, epoch: int, value: Mapping[str, float]) -> list[_Ways]:
        """Of each scenario."""
        return [
            self._scenario(need, peak, value)
            for need, peak in self.problem.moments(epoch)
        ]

    def _scenario(
        self, needed: Need, peak: Mapping[str, float], value: Mapping[str, float]
    ) -> _Ways:
        need = dict(needed)
        for llm, count in self.alone.items():
            need[llm] = max(0, need[llm] - count)
        if not self.groups:
            return _Ways((need,), need, self.busy)
        least, idle = dict(need), set[GpuId]()
        contested: list[list[tuple[tuple[str, int], ...]]] = []
        for gpus, members in self.groups:
            units = [(llm, count) for llm, count in members if peak[llm] > 0]
            if not units and self.lends:
                idle.update(gpus)
            for llm, count in units:
                least[llm] = max(0, least[llm] - count)
            ways = _largest(units, [self._part(peak, *unit) for unit in units])
            if len(ways) == 1:
                need = _less(need, ways[0])
            else:
                contested.append(ways)
        if math.prod(map(len, contested)) > WAYS:
            for ways in contested:
                best = max(ways, key=lambda way: _covers(need, way, value))
                need = _less(need, best)
            contested = []
        needs = [_less(need, sum(chosen, ())) for chosen in product(*contested)]
        distinct = {tuple(sorted(n.items())): n for n in needs}
        return _Ways(tuple(distinct.values()), least, self.busy - idle)

    def _part(self, peak: Mapping[str, float], llm: str, count: int) -> float:
        """phi of a member."""
        unit = self.problem.fleet.llm_by_name[llm].instance_concurrency
        return min(1.0, peak[llm] / (count * unit))


def _largest(
    units: Sequence[tuple[str, int]], part: Sequence[float]
) -> list[tuple[tuple[str, int], ...]]:
    """Sets of members that can be served together, without those inside others."""
    everyone = range(len(units))
    found: list[frozenset[int]] = []
    for size in reversed(range(len(units) + 1)):
        for chosen in combinations(everyone, size):
            fits = sum(part[i] for i in chosen) <= 1 + 1e-9
            if fits and not any(other.issuperset(chosen) for other in found):
                found.append(frozenset(chosen))
    return [tuple(units[i] for i in sorted(chosen)) for chosen in found]


def _less(need: Need, served: Sequence[tuple[str, int]]) -> dict[str, int]:
    left = dict(need)
    for llm, count in served:
        left[llm] = max(0, left[llm] - count)
    return left


def _covers(
    need: Need, way: Sequence[tuple[str, int]], value: Mapping[str, float]
) -> float:
    return sum(value[llm] * min(count, need[llm]) for llm, count in way)
