"""A rolling horizon: look several epochs ahead, carry out the first, keep the rest.

A window is the next epochs as problems of one epoch each, with their own forecasts and
their own moments. Two solves share the time: the first epoch alone, and the window, which
is solved exactly where it is small; elsewhere the first epoch stands for it, with
switching at a part of its price, as if it paid off over the window. Of their placements,
what is there, what the last window had planned and what was found before,
`cheapest_path` takes the best sequence, each epoch and each switch at its full price by
the referee; its first step is carried out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from types import TracebackType
from typing import Self

from foreserve.models import referee
from foreserve.models.placement import HostCopy, Placement, ReplicaId
from foreserve.models.plan import CLOSED, Status, relative_gap
from foreserve.models.problem import Prices, Problem, asks_for
from foreserve.solvers.base import CARRIES, SolverPool, with_shares
from foreserve.solvers.index import candidate_count
from foreserve.solvers.result import Schedule, SolveOptions, SolveReport

KEPT = 12
"""Placements that are remembered, the latest ones."""
EXACT = ("auto", "milp", "cpsat", "highs")
"""Solvers that weigh the epochs of a problem against each other."""
EXACT_CHOICES = 6_000
"""Candidate replicas times (moments + 1), over a window, that one exact solve is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What to do in the first epoch of a window, and what is planned for the others."""

    schedule: Schedule | None
    """One placement per epoch of the window; None: no plan."""
    report: SolveReport
    """Of the first epoch; ``bound`` is one for it alone, given the placement before."""
    window_cost: float
    """Of all epochs of the window, with the switches between them."""


class Rolling:
    """Plans epoch after epoch; holds the child processes and what was found so far."""

    def __init__(self, solver: str, options: SolveOptions, horizon: int = 1) -> None:
        self._gap = options.gap
        self._exact = solver in EXACT
        self._knows_replan = "replan" in CARRIES.get(solver, ())
        if horizon > 1:
            options = replace(options, time_limit_s=options.time_limit_s / 2)
        self._near, self._far = (SolverPool(solver, options) for _ in range(2))
        self.rest: Schedule = ()
        """What the last window planned beyond its first epoch."""
        self.known: tuple[Placement, ...] = ()
        """Found so far, the latest last."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._near.close()
        self._far.close()

    def prepare(self, problem: Problem) -> None:
        """Start the child processes, and have them compile what they need, on any
        problem of the kind to come."""
        self._near.solve(problem)
        self._far.solve(problem)

    def step(self, window: Sequence[Problem], before: Placement) -> Step:
        """Plan ``window``, whose first problem has ``before`` as its ``initial``."""
        first, small = window[0], self._exact and _is_small(window)
        alone, whole = first, side_by_side(window)
        if first.prices.replan_s and not (small and self._knows_replan):
            # Left to the path; a bound without it holds all the more.
            alone, whole = (
                replace(p, prices=spread(p.prices, 1)) for p in (alone, whole)
            )
        hint = self.rest[0] if self.rest else before
        near = self._near.solve(alone, start=(hint,))
        if len(window) == 1 and alone is first:
            report, found = near.report, near.schedule
            cost = math.inf if report.objective is None else report.objective
            return Step(schedule=found, report=report, window_cost=cost)
        far = near
        if small and len(window) > 1:
            last = self.rest[-1:] * len(window)
            rest = (*self.rest, *last)[: len(window)]
            start = rest if self.rest else (before,) * len(window)
            far = self._far.solve(whole, start=start)
        elif len(window) > 1:
            patient = replace(first, prices=spread(first.prices, len(window)))
            far = self._far.solve(patient, start=near.schedule)
        pool = [*(near.schedule or ()), *(far.schedule or ())]
        self._remember(pool)
        pool += [before, *self.rest, *self.known]
        found, cost = cheapest_path(window, before, pool)
        report = _judged(first, found, near.report, self._gap)
        if found is not None:
            self.rest = found[1:]
            self._remember(found)
        return Step(schedule=found, report=report, window_cost=cost)

    def _remember(self, placements: Iterable[Placement]) -> None:
        known = {states(placement): placement for placement in self.known}
        for placement in placements:
            known.pop(states(placement), None)
            known[states(placement)] = placement
        self.known = tuple(known.values())[-KEPT:]


def spread(prices: Prices, epochs: int) -> Prices:
    """Prices of steps as if they paid off over so many epochs, and none of a change."""
    return replace(
        prices,
        load_s=prices.load_s / epochs,
        demote_s=prices.demote_s / epochs,
        replan_s=0.0,
    )


States = tuple[frozenset[tuple[ReplicaId, str]], tuple[HostCopy, ...]]


def states(placement: Placement) -> States:
    """Who is where in which state, and what host memory keeps: what a switch changes.
    Traffic shares do not count."""
    return frozenset((r.id, r.state) for r in placement.replicas), placement.hosted


def cheapest_path(
    window: Sequence[Problem], before: Placement, pool: Iterable[Placement]
) -> tuple[Schedule | None, float]:
    """The cheapest sequence of placements out of ``pool``, one per epoch, after ``before``.

    Each serves its epoch's demand in the best split. A label of this shortest path is a
    placement in an epoch, so a switch is priced as what it is. None where none of
    them can be held, or reached. O(epochs x pool) costs by the referee, O(pool^2) switches.
    """
    fleet = window[0].fleet
    distinct = [
        placement
        for placement in {states(placement): placement for placement in pool}.values()
        if not any(referee.fleet_violations(fleet, placement))
    ]
    prices = [
        {states(q): _switch(window[0], p, q) for q in distinct}
        for p in (*distinct, before)
    ]
    # Label -> its cost, and the schedule that reaches it.
    labels: dict[int, tuple[float, Schedule]] = {len(distinct): (0.0, ())}
    for problem in window:
        reached: dict[int, tuple[float, Schedule]] = {}
        for k, placement in enumerate(distinct):
            split = with_shares(problem, 0, placement)
            alone = referee.cost(replace(problem, initial=split), (split,)).total
            key = states(placement)
            cost, last = min(
                (total + prices[j][key], j) for j, (total, _) in labels.items()
            )
            reached[k] = cost + alone, (*labels[last][1], split)
        labels = reached
    least = (math.inf, ())
    cost, schedule = min(labels.values(), key=lambda label: label[0], default=least)
    return (schedule, cost) if cost < math.inf else (None, cost)


def _switch(problem: Problem, before: Placement, after: Placement) -> float:
    """(O4) of one switch; infinite where (C7) or (C8) does not allow it."""
    if asks_for(problem) & {"window", "keep_serving"}:
        here = replace(problem, initial=before)
        broken = referee.violations(here, (with_shares(here, 0, after),))
        if any(violation.label in ("C7", "C8") for violation in broken):
            return math.inf
    return referee.o4_switching(problem, 0, before, after)


def side_by_side(window: Sequence[Problem]) -> Problem:
    """The window as one problem of several epochs.

    A problem has one loss per LLM, so here it is the mean of the epochs'.
    """
    first = window[0]
    llms = tuple(
        replace(llm, cold_loss_s=fmean(p.fleet.llms[i].cold_loss_s for p in window))
        for i, llm in enumerate(first.fleet.llms)
    )
    return replace(
        first,
        fleet=replace(first.fleet, llms=llms),
        demand_rps=tuple(
            tuple(p.demand_rps[i][0] for p in window) for i in range(len(llms))
        ),
        peak_load=tuple(
            tuple(tuple(p.peak_load[s][i][0] for p in window) for i in range(len(llms)))
            for s in range(len(first.scenario_probability))
        ),
    )


def apart(problem: Problem) -> tuple[Problem, ...]:
    """The epochs of a problem as problems of one epoch each."""
    return tuple(
        replace(
            problem,
            demand_rps=tuple((row[t],) for row in problem.demand_rps),
            peak_load=tuple(
                tuple((row[t],) for row in rows) for rows in problem.peak_load
            ),
        )
        for t in range(problem.num_epochs)
    )


def _is_small(window: Sequence[Problem]) -> bool:
    first = window[0]
    choices = candidate_count(first.fleet) * (1 + len(first.scenario_probability))
    return choices * len(window) <= EXACT_CHOICES


def _judged(
    problem: Problem, found: Schedule | None, report: SolveReport, gap: float
) -> SolveReport:
    """The report of the first epoch as it is carried out."""
    if found is None:
        failed = report.status
        if failed.has_plan:
            failed = Status.ERROR
        return replace(report, status=failed, objective=None)
    total = referee.cost(problem, found[:1]).total
    bound = min(total, report.bound)
    closed = relative_gap(total, bound) <= max(gap, CLOSED)
    return replace(
        report,
        status=Status.OPTIMAL if closed else Status.FEASIBLE,
        objective=total,
        bound=bound,
    )
