"""Where the distance between a perfect system and a plan comes from.

A chain of problems, each the one before with one more thing that is true of real systems,
so each costs no less. Every one is solved with a bound; the parts are differences of
neighbours and add up to the whole distance exactly:

1. *perfect*: GPUs by the request at their true rates; no bursts, no switching, no waste.
2. *booked*: the same at the rates that a plan may book (rho_max).
3. *whole*: only whole replicas, as many GPUs as one likes, wherever they are.
4. *packed*: this cluster, with all rows; mean demand alone, switching for nothing.
5. *switched*: and (O4), from what is there.
6. *foreseen*: and (O2), of scenarios that one knows before one places: the mean over the
   scenarios of each one's own best plan (wait and see).
7. *best*: the problem itself, one placement for all scenarios.
8. *plan*: what it is compared with.

The optimum of a step is between the bound and the best plan found for it. A plan of a later
step is one of each earlier step for no more, and a bound of an earlier step holds for all
later ones, so the intervals are narrowed by their neighbours'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from foreserve.models import referee
from foreserve.models.problem import Problem
from foreserve.solvers.base import SolverPool
from foreserve.solvers.result import Schedule, Solved, SolveOptions
from foreserve.solvers.shares import perfect_bound

PARTS = (
    "headroom",
    "integrality",
    "packing",
    "switching",
    "bursts",
    "uncertainty",
    "open",
)
MOST_NODES = 50_000
"""Counts of one LLM that are looked at, before its step is left with an interval."""


class NoStep(Exception):
    """A step of the chain came without a plan; its report says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One problem of the chain, and between what its optimum lies."""

    name: str
    least: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GapPart:
    """What one more thing costs, in weighted seconds of delay."""

    name: str
    value: float
    """By the best plans found; values add up to the distance."""
    least: float
    """The true part lies between, by the bounds of both steps."""
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GapSplit:
    """The chain and its parts."""

    steps: tuple[Step, ...]

    @property
    def parts(self) -> tuple[GapPart, ...]:
        return tuple(
            GapPart(
                name=name,
                value=after.most - before.most,
                least=max(0.0, after.least - before.most),
                most=max(0.0, after.most - before.least),
            )
            for name, (before, after) in zip(PARTS, pairwise(self.steps), strict=True)
        )

    @property
    def distance(self) -> float:
        """The plan's cost beyond a perfect system's."""
        return self.steps[-1].most - self.steps[0].most


def gap_split(
    problem: Problem,
    schedule: Schedule,
    options: SolveOptions,
    *,
    solver: str = "auto",
    max_load: float = 1.0,
    bound: float = -math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GapSplit:
    """Split the distance from a perfect system to ``schedule``, which is feasible.

    ``max_load`` is rho_max, the share of a replica's rate that the problem's options book;
    ``bound`` any bound already known. Each step is given ``options``' time; the scenarios
    of *foreseen* share theirs. Raises `NoStep` where a solver fails.
    """
    calm = replace(problem, scenario_probability=(), peak_load=())
    free = replace(problem.prices, load_s=0.0, demote_s=0.0, replan_s=0.0)
    scenarios = distinct_scenarios(problem)
    total = 3 + len(scenarios)
    with SolverPool(solver, options) as pool:
        packed = _solved(pool, replace(calm, prices=free), schedule)
        progress(1, total)
        switched = _solved(pool, calm, schedule)
        progress(2, total)
        best = _solved(pool, problem, schedule)
        progress(3, total)
    foreseen = (0.0, 0.0) if scenarios else switched
    each = replace(options, time_limit_s=options.time_limit_s / max(1, len(scenarios)))
    with SolverPool(solver, each) as pool:
        for done, (probability, known) in enumerate(scenarios):
            least, most = _solved(pool, known, schedule)
            foreseen = (
                foreseen[0] + probability * least,
                foreseen[1] + probability * most,
            )
            progress(4 + done, total)
    cost = referee.cost(problem, schedule).total
    perfect, booked = perfect_bound(_at_rates(calm, 1 / max_load)), perfect_bound(calm)
    # Groups that LLMs share may be fuller than those of any one of them.
    counted = (booked, math.inf) if problem.fleet.sharing else whole(problem)
    return _narrowed(
        [
            Step(name="perfect", least=perfect, most=perfect),
            Step(name="booked", least=booked, most=booked),
            Step(name="whole", least=counted[0], most=counted[1]),
            Step(name="packed", least=packed[0], most=packed[1]),
            Step(name="switched", least=switched[0], most=switched[1]),
            Step(name="foreseen", least=foreseen[0], most=foreseen[1]),
            Step(name="best", least=max(best[0], bound), most=best[1]),
            Step(name="plan", least=cost, most=cost),
        ]
    )


def distinct_scenarios(problem: Problem) -> list[tuple[float, Problem]]:
    """Probability and problem of each scenario alone; those that need the same instances
    are one."""
    llms, epochs = range(len(problem.fleet.llms)), range(problem.num_epochs)
    found: dict[object, tuple[float, int]] = {}
    for s, probability in enumerate(problem.scenario_probability):
        need = tuple(problem.need(s, m, t) for m in llms for t in epochs)
        known, first = found.get(need, (0.0, s))
        found[need] = (known + probability, first)
    return [
        (
            probability,
            replace(
                problem, scenario_probability=(1.0,), peak_load=(problem.peak_load[s],)
            ),
        )
        for probability, s in found.values()
    ]


def _solved(
    pool: SolverPool, problem: Problem, schedule: Schedule
) -> tuple[float, float]:
    """Bound and objective, from the plan as the start."""
    found: Solved = pool.solve(problem, schedule)
    if found.report.objective is None:
        raise NoStep(f"{found.report.status} {found.report.message}".strip())
    return found.report.bound, found.report.objective


def _at_rates(problem: Problem, factor: float) -> Problem:
    """The problem with all rates ``factor`` times as high."""
    faster = (replace(o, rate_rps=o.rate_rps * factor) for o in problem.fleet.options)
    return replace(problem, fleet=replace(problem.fleet, options=tuple(faster)))


def whole(problem: Problem) -> tuple[float, float]:
    """Between what the cost of whole replicas lies: (O1), (O3) and (O5) of the cheapest
    counts of ACTIVE replicas, LLM by LLM and epoch by epoch; exact but for huge counts."""
    least = most = 0.0
    types, hours = problem.fleet.cluster.type_by_name, problem.epoch_s / 3600
    usd_s = problem.prices.usd_s
    for llm, row in zip(problem.fleet.llms, problem.demand_rps, strict=True):
        lost_s = llm.weight * llm.unserved_s * problem.epoch_s
        options = [
            (
                option.rate_rps,
                llm.weight * problem.slower_s(option) * problem.epoch_s,
                option.tp * types[option.gpu_type].price_usd_per_h * hours * usd_s,
            )
            for option in problem.fleet.options
            if option.llm == llm.name
        ]
        for demand_rps in row:
            low, high = whole_counts(demand_rps, options, lost_s)
            least, most = least + low, most + high
    return least, most


def whole_counts(
    demand: float, options: Sequence[tuple[float, float, float]], lost: float
) -> tuple[float, float]:
    """(bound, value) of the cheapest counts; options as (rate, cost per rate served, cost
    of each). Branch and bound: the least slow options are filled first, whatever the
    counts, so they are counted first."""
    useful = sorted((slow, rate, rent) for rate, slow, rent in options if slow < lost)
    # What a unit of demand costs at least with the options from k on.
    unit = [lost]
    for slow, rate, rent in reversed(useful):
        unit.append(min(unit[-1], slow + rent / rate))
    unit.reverse()
    best, nodes = demand * lost, 0

    def look(k: int, left: float, spent: float) -> None:
        nonlocal best, nodes
        nodes += 1
        best = min(best, spent + left * lost)
        if k == len(useful) or left <= 0 or nodes > MOST_NODES:
            return
        slow, rate, rent = useful[k]
        # A count that just does not leave demand over is often the best: try it early.
        for count in range(math.ceil(left / rate - 1e-9), -1, -1):
            served = min(left, count * rate)
            then = spent + count * rent + served * slow
            if then + (left - served) * unit[k + 1] < best - 1e-12 * max(1.0, best):
                look(k + 1, left - served, then)

    look(0, demand, 0.0)
    return (best if nodes <= MOST_NODES else demand * unit[0]), best


def _narrowed(steps: list[Step]) -> GapSplit:
    """Bounds hold for all later steps, values for all earlier ones."""
    least, most = -math.inf, math.inf
    for i, step in enumerate(steps):
        least = max(least, step.least)
        steps[i] = replace(step, least=least)
    for i in reversed(range(len(steps))):
        most = min(most, steps[i].most)
        # Solver and referee add in another order.
        steps[i] = replace(steps[i], least=min(steps[i].least, most), most=most)
    return GapSplit(steps=tuple(steps))
