"""Brute force over tiny problems, resting on nothing but the referee.

Every set of replicas on aligned blocks is tried, with every way of filling an LLM's ACTIVE
replicas one after another (the best split is one of those); and with every choice of what
host memory keeps, where the plan decides that. Where LLMs may share GPUs each has one
replica at most: its split is then how much of it is served, and of a group at a level of
load the best is to serve first what saves most per part of the group.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations, permutations
from math import inf

from foreserve.models import referee
from foreserve.models.placement import HostCopy, Placement, Replica
from foreserve.models.problem import Problem
from foreserve.solvers.result import Schedule

MONOTONE = ("plan", "C1", "C2", "C3", "C4")
"""Rows that a further replica never repairs."""


class TooLarge(Exception):
    """More placements than were asked for."""


def best(problem: Problem, most: int = 2_000) -> tuple[float, Schedule] | None:
    """The least cost and a schedule of it; None if no schedule is feasible.

    Raises `TooLarge` with more than ``most`` placements per epoch.
    """
    feasible = placements(problem, most)
    costs: dict[Placement, tuple[float, Schedule]] = {}
    for epoch in range(problem.num_epochs):
        # What an epoch costs beside switching does not depend on the one before.
        own = []
        for bare in feasible:
            placement = split(problem, epoch, bare)
            terms = ("O1", "O2", "O3", "O5")
            cost = sum(
                referee.TERMS[label](problem, epoch, bare, placement) for label in terms
            )
            own.append((cost, placement))
        before = [(problem.initial, (0.0, ()))]
        if epoch:
            before = sorted(costs.items(), key=lambda pair: pair[1][0])
        now: dict[Placement, tuple[float, Schedule]] = {}
        least = inf
        for cost, placement in own:
            if epoch < problem.num_epochs - 1:
                least = inf  # of this placement; in the last epoch of all
            for last, (spent, schedule) in before:
                if spent + cost >= least:
                    break  # Nor is what follows: switching costs nothing at best.
                if any(
                    any(row(problem, epoch, last, placement))
                    for row in referee.MOVING_ROWS.values()
                ):
                    continue
                switching = referee.o4_switching(problem, epoch, last, placement)
                assert switching >= 0
                if spent + cost + switching < least:
                    least = spent + cost + switching
                    now[placement] = (least, (*schedule, placement))
        costs = now
    if not costs:
        return None
    total, schedule = min(costs.values(), key=lambda pair: pair[0])
    assert referee.violations(problem, schedule) == ()
    assert abs(referee.cost(problem, schedule).total - total) <= 1e-6 * max(1, total)
    return total, schedule


def placements(problem: Problem, most: int) -> list[Placement]:
    """Every feasible set of replicas and host copies, without traffic."""
    fleet = problem.fleet
    choices = [
        Replica(llm=option.llm, gpus=block, state=state)
        for option, block in fleet.candidates()
        for state in ("ACTIVE", "WARM")
    ]
    found: list[tuple[Replica, ...]] = []

    def extend(chosen: tuple[Replica, ...], rest: list[Replica]) -> None:
        found.append(chosen)
        if len(found) > most:
            raise TooLarge
        for i, replica in enumerate(rest):
            if all(replica.id != other.id for other in chosen):
                placement = Placement(replicas=(*chosen, replica))
                labels = [
                    label for label, _ in referee.fleet_violations(fleet, placement)
                ]
                shared = fleet.sharing is None and any(
                    len(group) > 1 for group in placement.groups.values()
                )
                if not shared and not any(label in MONOTONE for label in labels):
                    extend((*chosen, replica), rest[i + 1 :])

    extend((), choices)
    copies: list[HostCopy] = []
    if fleet.loading.host_cache == "planned":
        copies = [
            HostCopy(node=node.name, llm=llm.name)
            for node in fleet.cluster.nodes
            for llm in fleet.llms
        ]
    if len(found) << len(copies) > 4 * most:
        raise TooLarge
    every = (
        Placement(replicas=chosen, hosted=kept)
        for chosen in found
        for count in range(len(copies) + 1)
        for kept in combinations(copies, count)
    )
    return [p for p in every if not any(referee.fleet_violations(fleet, p))]


def split(problem: Problem, epoch: int, placement: Placement) -> Placement:
    """The placement with the traffic shares that cost least."""
    if problem.fleet.sharing is not None:
        return _split_groups(problem, epoch, placement)

    @cache
    def fill(llm: str, active: tuple[Replica, ...]) -> tuple[Replica, ...]:
        index = [m.name for m in problem.fleet.llms].index(llm)
        demand_rps = problem.demand_rps[index][epoch]

        def cost(replicas: tuple[Replica, ...]) -> float:
            alone = Placement(replicas=replicas)
            return referee.o1_unserved(
                problem, epoch, alone, alone
            ) + referee.o3_slowdown(problem, epoch, alone, alone)

        ways = [active]
        for order in permutations(active):
            left, filled = 1.0, list(order)
            for i, replica in enumerate(order):
                option = problem.fleet.option_of(llm, replica.gpus)
                share = min(left, option.rate_rps / demand_rps) if demand_rps else 0.0
                filled[i] = replace(replica, traffic_share=share)
                left = max(0.0, left - share)
                ways.append(tuple(filled))
        return min(ways, key=cost)

    replicas = [r for r in placement.replicas if r.state == "WARM"]
    for llm in problem.fleet.llms:
        replicas += fill(llm.name, placement.of(llm.name, "ACTIVE"))
    return Placement(replicas=tuple(replicas), hosted=placement.hosted)


def _split_groups(problem: Problem, epoch: int, placement: Placement) -> Placement:
    fleet, sharing = problem.fleet, problem.fleet.sharing
    assert sharing is not None
    number = {llm.name: index for index, llm in enumerate(fleet.llms)}
    replicas = [r for r in placement.replicas if r.state == "WARM"]
    for gpus, members in placement.groups.items():
        ways = []
        for level in sharing.levels:
            slowdown = 1 / (1 - level)
            room = min(1.0, level / sharing.booked_load)
            rows = []
            for member in members:
                assert len(placement.of(member.llm, "ACTIVE")) == 1
                llm = fleet.llm_by_name[member.llm]
                option = fleet.option_of(member.llm, gpus)
                saved_s = llm.unserved_s - problem.slower_s(option, slowdown)
                gain = llm.weight * saved_s * option.rate_rps
                rows.append((gain, member, option))
            filled = []
            for gain, member, option in sorted(rows, key=lambda row: -row[0]):
                demand_rps = problem.demand_rps[number[member.llm]][epoch]
                held = option.held_tokens(1.0, slowdown)
                most_rps = min(
                    demand_rps, option.rate_rps * room, option.reserved_tokens / held
                )
                if gain <= 0 or demand_rps <= 0:
                    most_rps = 0.0
                room -= most_rps / option.rate_rps
                share = most_rps / demand_rps if demand_rps else 0.0
                filled.append(replace(member, traffic_share=min(1.0, share)))
            ways.append(tuple(filled))

        def cost(group: tuple[Replica, ...]) -> float:
            alone = Placement(replicas=group)
            return referee.o1_unserved(
                problem, epoch, alone, alone
            ) + referee.o3_slowdown(problem, epoch, alone, alone)

        replicas += min(ways, key=cost)
    return Placement(replicas=tuple(replicas), hosted=placement.hosted)
