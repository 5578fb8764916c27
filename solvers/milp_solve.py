"""Searches the MILP of `foreserve.solvers.milp` with HiGHS: as a whole, with its terms one
after another, or of schedules that hold one replica."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import Any

import pyomo.environ as pyo

from foreserve.models.placement import ReplicaId
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers import highs
from foreserve.solvers.index import Index, Key, decode, encode, index
from foreserve.solvers.milp import build
from foreserve.solvers.result import (
    Schedule,
    Solved,
    SolveOptions,
    SolveReport,
    Stage,
)
from foreserve.solvers.rows import at_least, at_most, linear
from foreserve.solvers.shares import perfect_bound

KEPT = 1e-7
"""Part of a term's value by which later terms may spoil it (`--lexicographic`)."""


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Build the model, let HiGHS search from ``start``, read its best answer."""
    began_s = perf_counter()
    p = index(problem)
    m = build(p)
    if options.lexicographic:
        return _in_order(p, m, options, start, began_s)
    return _search(p, m, options, start, began_s)


def _in_order(
    p: Index, m: Any, options: SolveOptions, start: Schedule | None, began_s: float
) -> Solved:
    """Minimise (O1), then (O2) among the best, and so on: each term, once found, may not
    get worse. The time that is left is shared by the terms that are left."""
    end_s = began_s + options.time_limit_s
    stages: list[Stage] = []
    solved = Solved(
        schedule=None, report=SolveReport(status=Status.TIME_LIMIT, solver="milp")
    )
    m.found = pyo.ConstraintList()
    every = True
    for number, (label, (pairs, constant)) in enumerate(m.terms.items()):
        m.del_component(m.cost)
        m.cost = pyo.Objective(expr=linear(pairs, constant))
        now_s = perf_counter()
        share_s = max(0.01, (end_s - now_s) / (len(m.terms) - number))
        limits = replace(options, time_limit_s=share_s, gap=min(options.gap, KEPT))
        latest = _search(p, m, limits, start, now_s)
        if latest.schedule is None or latest.report.objective is None:
            if solved.schedule is None:
                return latest
            every = False
            break
        solved, start = latest, latest.schedule
        every = every and latest.report.status is Status.OPTIMAL
        value, bound = latest.report.objective, latest.report.bound
        stages.append(Stage(label=label, value=value, bound=bound))
        if pairs:
            m.found.add(at_most(pairs, value - constant + KEPT * max(1.0, abs(value))))
    report = SolveReport(
        status=Status.OPTIMAL if every else Status.FEASIBLE,
        solver="milp",
        bound=perfect_bound(p.problem),
        stages=tuple(stages),
        message="in order: "
        + ", ".join(f"{s.label} {s.value:.6g} (bound {s.bound:.6g})" for s in stages),
    )
    return Solved(schedule=solved.schedule, report=report)


def solve_with(
    problem: Problem, options: SolveOptions, replica: ReplicaId, epoch: int = 0
) -> Solved:
    """As `solve`, of schedules that hold ``replica`` in ``epoch``, in either state
    (WARM only where a scenario asks for its LLM: elsewhere that is worth nothing).

    INFEASIBLE where it is no candidate. Runs where it is called, and is not refereed.
    """
    began_s = perf_counter()
    p = index(problem)
    m = build(p)
    held = [
        x
        for r, (option, block) in enumerate(p.replicas)
        if (option.llm, block) == (replica.llm, replica.gpus)
        for x in m.x[r, epoch]
    ]
    if not held:
        report = SolveReport(status=Status.INFEASIBLE, solver="milp")
        return Solved(schedule=None, report=report)
    m.held = pyo.Constraint(expr=at_least([(1, x) for x in held], 1))
    return _search(p, m, options, None, began_s)


def _search(
    p: Index, m: Any, options: SolveOptions, start: Schedule | None, began_s: float
) -> Solved:
    chosen = None if start is None else encode(p, start)
    hints = [] if chosen is None else _hints(m, *chosen)
    run = highs.run(m, options, hints, began_s)
    schedule = None
    if run.objective is not None:
        active = {key for key, a in m.a.items() if a.value > 0.5}
        warm = {key for key, y in m.y.items() if y.value > 0.5}
        schedule = decode(p, active, warm, served(m, p), kept(m))
    report = SolveReport(
        status=run.status,
        solver="milp",
        objective=run.objective,
        bound=run.bound,
        time_to_first_s=run.time_to_first_s,
        progress=run.progress,
        message=run.message,
    )
    return Solved(schedule=schedule, report=report)


def served(m: Any, p: Index) -> dict[Key, float] | None:
    """Rates of the answer; None where the best split is known without."""
    if p.sharing is None:
        return None
    rates: dict[Key, float] = {}
    for (r, _, t), q in m.q.items():
        rates[r, t] = rates.get((r, t), 0.0) + q.value
    return rates


def kept(m: Any) -> set[tuple[str, int, int]]:
    """(node, m, t) that the answer keeps in host memory."""
    return {key for key, h in m.h.items() if h.value > 0.5}


def _hints(m: Any, active: set[Key], warm: set[Key]) -> list[tuple[Any, float]]:
    """Values of all first-stage choices; HiGHS finds the rest, which they imply."""
    hints = [(a, float(key in active)) for key, a in m.a.items()]
    return hints + [(y, float(key in warm)) for key, y in m.y.items()]
