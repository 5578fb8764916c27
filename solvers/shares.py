"""Mean demand over given replicas: the best split, and what a perfect one would cost."""

from __future__ import annotations

from dataclasses import replace

from foreserve.models import referee
from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Problem
from foreserve.models.specs import GpuId
from foreserve.solvers.result import Schedule


def with_shares(problem: Problem, epoch: int, placement: Placement) -> Placement:
    """``placement`` with the best split of mean demand over its ACTIVE replicas.

    Where each ACTIVE replica has its GPUs to itself, the fastest ones (`exec_s`) are
    filled first; a replica so slow that refusing costs less (O3 against O1) gets nothing.
    Where groups share GPUs this is a good split, not the best: LLM by LLM in the fleet's
    order, each into the room that those before leave.
    """
    fleet, sharing = problem.fleet, problem.fleet.sharing
    shares: dict[Replica, float] = {}
    most = 1.0 if sharing is None else sharing.most_booked
    booked: dict[tuple[GpuId, ...], float] = {}
    for index, llm in enumerate(fleet.llms):
        demand_rps = left_rps = problem.demand_rps[index][epoch]
        options = [
            (fleet.option_of(replica.llm, replica.gpus), replica)
            for replica in placement.of(llm.name, "ACTIVE")
        ]
        # Python's sort is stable: ties keep the canonical order.
        for option, replica in sorted(options, key=lambda pair: pair[0].exec_s):
            if left_rps <= 0 or problem.slower_s(option) > llm.unserved_s:
                break
            room = max(0.0, most - booked.get(replica.gpus, 0.0))
            served_rps = min(left_rps, option.rate_rps * room)
            if sharing is not None:
                slowest = sharing.slowdown(1.0)
                held = option.held_tokens(1.0, slowest)
                served_rps = min(served_rps, option.reserved_tokens / held)
                part = served_rps / option.rate_rps
                booked[replica.gpus] = booked.get(replica.gpus, 0.0) + part
            # Exactly all that is left, not all but a rounding error.
            left_rps = 0.0 if served_rps == left_rps else left_rps - served_rps
            shares[replica] = min(1.0, served_rps / demand_rps)
    return Placement(
        replicas=tuple(
            replace(r, traffic_share=shares.get(r, 0.0)) for r in placement.replicas
        ),
        hosted=placement.hosted,
    )


def perfect_bound(problem: Problem) -> float:
    """Cost of a system that rents GPUs by the request and never switches or misses.

    A valid bound: each request either is refused (O1) or takes its time (O3) and its part
    of a GPU group that it cannot share beyond the group's rate (O5).
    """
    fleet, prices = problem.fleet, problem.prices
    total = 0.0
    for index, llm in enumerate(fleet.llms):
        least_s = llm.weight * llm.unserved_s
        for option in fleet.options:
            if option.llm == llm.name:
                usd_per_h = fleet.cluster.type_by_name[option.gpu_type].price_usd_per_h
                gpu_s = option.tp / option.rate_rps
                rent_s = usd_per_h * gpu_s / 3600 * prices.usd_s
                slower_s = llm.weight * problem.slower_s(option)
                least_s = min(least_s, slower_s + rent_s)
        total += least_s * sum(problem.demand_rps[index]) * problem.epoch_s
    return total


def resplit(problem: Problem, schedule: Schedule) -> Schedule | None:
    """The same replicas with the best split of each epoch's demand, which may have
    changed since; None where they do not suit this problem."""
    if len(schedule) != problem.num_epochs:
        return None
    for placement in schedule:
        if any(referee.fleet_violations(problem.fleet, placement)):
            return None
    return tuple(
        with_shares(problem, epoch, placement)
        for epoch, placement in enumerate(schedule)
    )
