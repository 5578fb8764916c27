"""How far the rolling horizon is from the best replacement intervals.

    python benchmarks/replacement_interval.py [--work FOLDER] [--seconds N]

A day of 24 hourly epochs, six LLMs on eight GPUs (a part of `instances/day.py`'s large
day), small enough for exact solves. The day is taken as its forecasts of one epoch ahead
say, one loss per LLM; every way below is judged by the referee on it. A change of the
placement is charged what its loads take, and ``REPLAN_S`` on top.

The reference is a shortest path over the boundaries between runs without a change:

- *bound*: run [a, b) costs at least the bound of its best static plan without the loads
  into it (with them in the first run, whose placement before is known), and the charge of
  a change. Runs of more than ``LONGEST`` epochs cost no less than their halves. Any
  schedule is a sequence of runs, so the cheapest sequence bounds all.
- *reference*: what switching costs depends on the plan before, so its labels carry a
  placement: `cheapest_path` over the static plans of all runs and all ways' placements.
  Then its boundaries are kept and all its runs are solved anew, together. It is a
  schedule, hence no bound; the best one lies between the two.

Rolling solves H epochs ahead, told what comes (``told``), or by the forecasts of the
moment (``forecast``). A run goes on where the last one stopped; results in
benchmarks/results/replacement_interval.json.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from os import getloadavg
from pathlib import Path
from tempfile import gettempdir
from time import perf_counter
from typing import Any

import click
from instances.day import small
from record import write_result
from rolling_day import made

from foreserve.models import referee
from foreserve.models.placement import Placement, diff
from foreserve.models.plan import relative_gap
from foreserve.models.problem import Problem
from foreserve.planner.intervals import cheapest_runs, histogram, intervals
from foreserve.planner.pipeline import Problems
from foreserve.planner.rolling import Rolling, apart, cheapest_path, side_by_side
from foreserve.solvers.base import get_solver, with_shares
from foreserve.solvers.direct import solve_runs
from foreserve.solvers.result import Schedule, SolveOptions

EPOCH_S, MOMENTS = 3600.0, 6
REPLAN_S = (0.0, 10.0, 40.0)
HORIZONS = (1, 2, 4)
SOLVER, LIMIT_S = "highs", 2.0
LONGEST = 8
"""Epochs of the longest runs that are solved; beside them the static day."""
EXACT = SolveOptions(time_limit_s=20.0, gap=1e-3)


class Day:
    """The day as one problem, and what is known of its runs so far."""

    def __init__(self, problems: Problems, file: Path) -> None:
        self.problems, self.file = problems, file
        nothing = Placement()
        self.whole = side_by_side(
            [problems.at(i, nothing) for i in range(problems.count)]
        )
        self.epochs = apart(self.whole)
        self.known: dict[Any, Any] = (
            pickle.loads(file.read_bytes()) if file.exists() else {}
        )

    def run(self, a: int, b: int) -> tuple[float, Placement | None]:
        """Bound and placement of the best static plan of epochs a to before b, without
        the loads into it unless it is the first; solved once."""
        if (a, b) not in self.known:
            part = side_by_side(self.epochs[a:b])
            free = replace(part.prices, load_s=0.0, demote_s=0.0)
            if a:
                part = replace(part, prices=free)
            solved = solve_runs(part, EXACT, None, runs=(b - a,))
            placement = solved.schedule[0] if solved.schedule else None
            gap = solved.report.gap
            self.known[a, b] = solved.report.bound, placement, gap
        bound, placement, _ = self.known[a, b]
        return bound, placement

    def least(self, a: int, b: int) -> float:
        """What those epochs cost at least while nothing changes: a long run no less than
        its halves, each at its best."""
        if b - a <= LONGEST:
            return self.run(a, b)[0]
        return self.least(a, (a + b) // 2) + self.least((a + b) // 2, b)

    def save(self) -> None:
        self.file.write_bytes(pickle.dumps(self.known))


def priced(problem: Problem, replan_s: float) -> Problem:
    return replace(problem, prices=replace(problem.prices, replan_s=replan_s))


def rolled(day: Day, horizon: int, replan_s: float, told: bool) -> list[Placement]:
    """Every epoch of the day on a rolling horizon."""
    before, found = Placement(), []
    options = SolveOptions(time_limit_s=LIMIT_S, gap=1e-3)
    with Rolling(SOLVER, options, horizon) as rolling:
        for t in range(len(day.epochs)):
            window = list(day.epochs[t : t + horizon])
            if not told:
                later = day.problems.window(t, before)[1:horizon]
                own = day.whole.fleet
                window[1:] = [replace(p, fleet=own) for p in later]
            step = rolling.step(
                [replace(priced(p, replan_s), initial=before) for p in window], before
            )
            assert step.schedule is not None, step.report.message
            before = step.schedule[0]
            found.append(before)
    return found


def judged(day: Day, schedule: Sequence[Placement], replan_s: float) -> dict[str, Any]:
    """Cost and intervals of a schedule."""
    cost = referee.cost(priced(day.whole, replan_s), schedule)
    changed = [t for t, (p, q) in enumerate(pairwise(schedule), start=1) if diff(p, q)]
    lengths = intervals(changed, len(schedule))
    return {
        "cost": round(cost.total, 3),
        "terms": {label: round(value, 2) for label, value in cost.terms.items()},
        "changes": len(changed),
        "intervals": {str(k): n for k, n in histogram(lengths).items()},
        "mean_interval": round(len(schedule) / len(lengths), 2),
    }


def reference(
    day: Day, ways: Sequence[Sequence[Placement]], replan_s: float
) -> tuple[float, Schedule, bool]:
    """Bound on all schedules, the reference, and whether its last solve improved it."""
    count = len(day.epochs)
    costs = {
        (a, b): day.least(a, b) + (replan_s if a else 0.0)
        for b in range(1, count + 1)
        for a in range(b)
    }
    # The cluster is empty before the first epoch, so filling it is a change, too.
    bound = cheapest_runs(costs, count)[0] + replan_s
    solved_runs = [pair for pair in costs if pair in day.known]
    pool = [p for a, b in solved_runs if (p := day.run(a, b)[1]) is not None]
    pool += [placement for way in ways for placement in way]
    problem = priced(day.whole, replan_s)
    found, cost = cheapest_path(apart(problem), Placement(), pool)
    assert found is not None
    changed = [t for t in range(1, count) if diff(found[t - 1], found[t])]
    runs = intervals(changed, count)
    plain = replace(problem, prices=replace(problem.prices, replan_s=0.0))
    solved = solve_runs(plain, replace(EXACT, time_limit_s=60.0), found, runs=runs)
    if solved.schedule is not None:
        again = referee.cost(problem, solved.schedule).total
        if again < cost - 1e-6:
            return bound, solved.schedule, True
    return bound, found, False


@click.command()
@click.option("--shared", default="../shared", type=click.Path(path_type=Path))
@click.option(
    "--work",
    default=Path(gettempdir()) / "rolling_day",
    type=click.Path(path_type=Path),
)
@click.option("--seconds", default=270.0, show_default=True)
def main(shared: Path, work: Path, seconds: float) -> None:
    """Solve runs while there is time, then compare."""
    began_s = perf_counter()
    work.mkdir(exist_ok=True)
    scenario, trace, history = small(made(shared, work), EPOCH_S, MOMENTS)
    problems = Problems(scenario, trace, history=history, horizon=max(HORIZONS))
    day = Day(problems, work / "runs.pkl")
    count = len(day.epochs)

    def late() -> bool:
        if perf_counter() - began_s > seconds:
            day.save()
            return True
        return False

    for b in range(1, count + 1):
        for a in range(max(0, b - LONGEST), b):
            day.run(a, b)
        if late():
            click.echo(f"runs up to epoch {b} of {count}")
            return
    rows = []
    for replan_s in REPLAN_S:
        ways: dict[str, Sequence[Placement]] = {}
        for told in (True, False):
            for horizon in HORIZONS[0 if told else 1 :]:
                name = f"{'told' if told else 'forecast'}-{horizon}"
                key = name, replan_s
                if key not in day.known:
                    day.known[key] = rolled(day, horizon, replan_s, told)
                ways[name] = day.known[key]
                if late():
                    click.echo(f"{name} at {replan_s:g}")
                    return
        ways["greedy"] = greedy(day, replan_s)
        first = day.run(0, count)[1]
        assert first is not None
        ways["static"] = [with_shares(p, 0, first) for p in day.epochs]
        bound, best, again = reference(day, list(ways.values()), replan_s)
        stated = judged(day, best, replan_s)
        row: dict[str, Any] = {
            "replan_s": replan_s,
            "bound": round(bound, 3),
            "reference": stated
            | {"gap": round(relative_gap(stated["cost"], bound), 4)},
            "solved_again_helped": again,
        }
        for name, schedule in ways.items():
            own = judged(day, schedule, replan_s)
            ratio = own["cost"] / stated["cost"]
            row[name] = own | {"ratio": round(ratio, 4)}
        rows.append(row)
        click.echo(f"{replan_s:g}: reference {stated}, bound {bound:.1f}")
        for name in ways:
            click.echo(f"   {name}: {row[name]}")
    day.save()
    gaps = [found[2] for key, found in day.known.items() if isinstance(key[0], int)]
    write_result(
        "replacement_interval",
        {
            "epochs": count,
            "largest_gap_of_a_run": max(gaps),
            "load_average": round(getloadavg()[0], 1),
            "rows": rows,
        },
    )


def greedy(day: Day, replan_s: float) -> list[Placement]:
    """Greedy's answer epoch by epoch."""
    before, found = Placement(), []
    for problem in day.epochs:
        here = replace(priced(problem, replan_s), initial=before)
        schedule = get_solver("greedy")(here, EXACT).schedule
        assert schedule is not None
        before = schedule[0]
        found.append(before)
    return found


if __name__ == "__main__":
    main()
