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
    problem: Problem, epoch: int, placement: Placement, *, by_llm: bool = False
) -> list[Loss]:
    """The loss of each scenario; ``missing`` is filled in only if ``by_llm``."""
    value = instance_loss_s(problem, placement)
    ways = [
        _ways(problem, epoch, placement, s, value)
        for s in range(len(problem.scenario_probability))
    ]
    found: dict[int, Loss] = {}
    for busy in dict.fromkeys(way.busy for way in ways):
        spare = _spare(problem, placement, busy)
        mine = [s for s, way in enumerate(ways) if way.busy == busy]
        flat = [need for s in mine for need in ways[s].needs]
        saved = covered_value(spare, value, flat)
        most = covered_at_most(spare, value, [ways[s].least for s in mine])
        at = 0
        for s, at_most in zip(mine, most, strict=True):
            needs = ways[s].needs
            left = [
                _worth(value, need) - covered
                for need, covered in zip(
                    needs, saved[at : at + len(needs)], strict=True
                )
            ]
            at += len(needs)
            best = min(range(len(left)), key=left.__getitem__)
            missing: dict[str, int] = {}
            if by_llm:
                covered = covered_instances(spare, value, [needs[best]])[0]
                missing = {
                    llm: count - covered.get(llm, 0)
                    for llm, count in needs[best].items()
                }
            least_s = max(0.0, _worth(value, ways[s].least) - at_most)
            found[s] = Loss(
                seconds=left[best], least_s=min(left[best], least_s), missing=missing
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


def _ways(
    problem: Problem,
    epoch: int,
    placement: Placement,
    scenario: int,
    value: Mapping[str, float],
) -> _Ways:
    fleet = problem.fleet
    peak = {
        llm.name: problem.peak_load[scenario][i][epoch]
        for i, llm in enumerate(fleet.llms)
    }
    need = {
        llm.name: problem.need(scenario, i, epoch) for i, llm in enumerate(fleet.llms)
    }
    lends = fleet.sharing is not None and fleet.sharing.idle_lends
    busy: set[GpuId] = set()
    contested: list[list[tuple[tuple[str, int], ...]]] = []
    least = dict(need)
    for gpus, members in placement.groups.items():
        asked = [member for member in members if peak[member.llm] > 0]
        if asked or not lends:
            busy.update(gpus)
        units = [(member.llm, _units(problem, member)) for member in asked]
        for llm, count in units:
            least[llm] = max(0, least[llm] - count)
        part = [
            min(1.0, peak[llm] / (count * fleet.llm_by_name[llm].instance_concurrency))
            for llm, count in units
        ]
        ways = _largest(units, part)
        if len(ways) == 1:
            for llm, count in ways[0]:
                need[llm] = max(0, need[llm] - count)
        else:
            contested.append(ways)
    if math.prod(map(len, contested)) > WAYS:
        for ways in contested:
            best = max(ways, key=lambda way: _covers(need, way, value))
            need = _less(need, best)
        contested = []
    needs = [_less(need, sum(chosen, ())) for chosen in product(*contested)]
    distinct = {tuple(sorted(n.items())): n for n in needs}
    return _Ways(tuple(distinct.values()), least, frozenset(busy))


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
