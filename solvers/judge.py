"""Judgement of what a solver hands back, by the referee alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from foreserve.models import referee
from foreserve.models.plan import Status, relative_gap
from foreserve.models.problem import Problem
from foreserve.solvers.result import Progress, Schedule, Solved, curve
from foreserve.solvers.shares import perfect_bound

TOLERANCE = 1e-6
"""Relative difference up to which two numbers are the same objective."""


def refereed(problem: Problem, solved: Solved, fallback: Schedule | None) -> Solved:
    """The answer after judgement: the only `Solved` that leaves this layer.

    Its schedule obeys every row, its objective is the referee's, and it costs no more
    than ``fallback``, which also stands in where the solver found nothing. A false claim
    of the solver's becomes Status.ERROR.
    """
    report = solved.report
    if report.status is Status.ERROR:
        return replace(solved, schedule=None)
    falsehood = _falsehood(problem, solved, fallback)
    if falsehood:
        message = f"{report.solver} {falsehood}"
        failed = replace(report, status=Status.ERROR, objective=None, message=message)
        return Solved(schedule=None, report=failed)
    in_order = bool(report.stages)
    chosen = best_of(problem, [solved.schedule, fallback], in_order=in_order)
    if chosen is None:
        return replace(solved, schedule=None)
    total = referee.cost(problem, chosen).total
    bound = min(total, max(report.bound, perfect_bound(problem)))
    proven = report.status is Status.OPTIMAL
    proven = proven or (not in_order and relative_gap(total, bound) <= TOLERANCE)
    status = Status.OPTIMAL if proven else Status.FEASIBLE
    known = (*report.progress, Progress(report.wall_s, total, bound))
    report = replace(
        report, status=status, objective=total, bound=bound, progress=curve(known)
    )
    return Solved(schedule=chosen, report=report)


def _falsehood(problem: Problem, solved: Solved, fallback: Schedule | None) -> str:
    """What the solver says that the referee knows to be wrong; "" if nothing.

    A claim may lie above the referee's cost as far as the solver's own gap goes, or as
    far as it likes if it was interrupted: the referee activates WARM replicas in the best
    way, an interrupted solver may not have.
    """
    report, reached = solved.report, []
    if solved.schedule is not None:
        broken = referee.violations(problem, solved.schedule)
        if broken:
            return f"broke a rule: {broken[0]}"
        cost = referee.cost(problem, solved.schedule).total
        claim = cost if report.objective is None else report.objective
        above = claim - cost - abs(claim) * relative_gap(claim, report.bound)
        below = cost - claim > _slack(cost)
        if below:
            most = referee.overstated(problem, solved.schedule)
            below = cost - claim - most > _slack(cost)
        if below or (report.status is Status.OPTIMAL and above > _slack(cost)):
            return f"claims {claim!r}, the referee finds {cost!r}"
        reached.append(cost)
    if (
        fallback is not None
        and in_space(problem, fallback)
        and not referee.violations(problem, fallback)
    ):
        if report.status is Status.INFEASIBLE:
            return "claims infeasible, its start is feasible"
        reached.append(referee.cost(problem, fallback).total)
    for cost in reached:
        if report.bound - cost > _slack(cost):
            return f"claims bound {report.bound!r}, reached was {cost!r}"
    return ""


def _slack(cost: float) -> float:
    return TOLERANCE * max(1.0, abs(cost))


def best_of(
    problem: Problem,
    schedules: Sequence[Schedule | None],
    *,
    in_order: bool = False,
) -> Schedule | None:
    """The cheapest feasible schedule by the referee, the first of equals; ``in_order``:
    by its terms one after another, instead of their sum."""
    best: Schedule | None = None
    least: tuple[float, ...] = ()
    for schedule in schedules:
        if schedule is None or referee.violations(problem, schedule):
            continue
        cost = referee.cost(problem, schedule)
        terms = tuple(cost.terms.values()) if in_order else (cost.total,)
        slack = TOLERANCE if in_order else 1e-9
        if best is None or _less(terms, least, slack):
            best, least = schedule, terms
    return best


def _less(one: Sequence[float], other: Sequence[float], slack: float) -> bool:
    """Whether ``one`` comes first, entries that nearly agree being equal."""
    for a, b in zip(one, other, strict=True):
        if abs(a - b) > slack * max(1.0, abs(b)):
            return a < b
    return False


def in_space(problem: Problem, schedule: Schedule) -> bool:
    """Whether a schedule uses only what the exact solvers choose from: aligned blocks,
    and one ACTIVE replica per GPU unless `Sharing` allows more."""
    for placement in schedule:
        if not all(problem.fleet.is_candidate(r.id) for r in placement.replicas):
            return False
        groups = placement.groups.values()
        if problem.fleet.sharing is None and any(len(group) > 1 for group in groups):
            return False
    return True
