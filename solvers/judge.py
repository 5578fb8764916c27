"""Judgement of what a solver hands back, by the referee alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from foreserve.models import referee
from foreserve.models.plan import Status, relative_gap
from foreserve.models.problem import Problem
from foreserve.solvers.result import Schedule, Solved
from foreserve.solvers.shares import perfect_bound

TOLERANCE = 1e-6
"""Relative difference up to which two numbers are the same objective."""


def refereed(problem: Problem, solved: Solved, fallback: Schedule | None) -> Solved:
    """The answer after judgement: the only `Solved` that leaves this layer.

    The schedule obeys every row and its objective is the referee's. A claim below the
    referee's cost, an "optimal" one above it, or a bound above a cost reached is
    Status.ERROR. (An interrupted solver may claim more than the referee finds: the
    referee activates WARM replicas in the best way.) The answer never costs more than
    ``fallback``, a feasible schedule that stands in where the solver found none.
    """
    report = solved.report
    if report.status is Status.ERROR:
        return replace(solved, schedule=None)
    own = solved.schedule

    def error(text: str) -> Solved:
        failed = replace(report, status=Status.ERROR, objective=None, message=text)
        return Solved(schedule=None, report=failed)

    if own is not None:
        broken = referee.violations(problem, own)
        if broken:
            return error(f"{report.solver} broke a rule: {broken[0]}")
        cost = referee.cost(problem, own).total
        claim = cost if report.objective is None else report.objective
        slack = TOLERANCE * max(1.0, abs(cost))
        # Optimal within a gap: the claim may lie above by that much, never below.
        above = report.status is Status.OPTIMAL
        above_by = slack + abs(claim) * max(0.0, relative_gap(claim, report.bound))
        if claim < cost - slack or (above and claim > cost + above_by):
            return error(
                f"{report.solver} claims {claim!r}, the referee finds {cost!r}"
            )
        if report.bound > cost + slack:
            return error(f"{report.solver} claims bound {report.bound!r} over {cost!r}")
    chosen = best_of(problem, [own, fallback])
    if chosen is None:
        return replace(solved, schedule=None)
    total = referee.cost(problem, chosen).total
    if chosen is not own:
        if report.status is Status.INFEASIBLE:
            return error(f"{report.solver} claims infeasible, the start is feasible")
        slack = TOLERANCE * max(1.0, abs(total))
        if report.bound > total + slack and in_space(problem, chosen):
            return error(
                f"{report.solver} claims bound {report.bound!r} over {total!r}"
            )
    bound = min(total, max(report.bound, perfect_bound(problem)))
    gap = relative_gap(total, bound)
    proven = gap <= TOLERANCE or (report.status is Status.OPTIMAL and chosen is own)
    done = replace(
        report,
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        objective=total,
        bound=bound,
    )
    return Solved(schedule=chosen, report=done)


def best_of(problem: Problem, schedules: Sequence[Schedule | None]) -> Schedule | None:
    """The cheapest feasible schedule by the referee, the first of equals."""
    best, least = None, math.inf
    for schedule in schedules:
        if schedule is None or referee.violations(problem, schedule):
            continue
        total = referee.cost(problem, schedule).total
        if best is None or total < least - 1e-9 * max(1.0, abs(least)):
            best, least = schedule, total
    return best


def in_space(problem: Problem, schedule: Schedule) -> bool:
    """Whether a schedule uses only what the exact solvers choose from: aligned blocks,
    and one ACTIVE replica per GPU."""
    allowed = {(option.llm, block) for option, block in problem.fleet.candidates()}
    for placement in schedule:
        if any((r.llm, r.gpus) not in allowed for r in placement.replicas):
            return False
        for replicas in placement.by_gpu.values():
            if sum(r.state == "ACTIVE" for r in replicas) > 1:
                return False
    return True
