"""A whole day on a rolling horizon: 288 epochs of 300 s, 16 LLMs, 32 GPUs.

    python benchmarks/rolling_day.py [--shared ../shared] [--work FOLDER] [--seconds N]

The day is `instances/day.py`'s: sixteen real clients of ServeGen, forecast by `auto` from
the week before. Ways to plan it, each on the cluster as its own plans left it, all judged
by the referee epoch by epoch on the same forecasts:

- ``rolling-H``: `planner.rolling` with H epochs ahead, `scale` with ``LIMIT_S`` seconds;
- ``warm``: the same with one epoch ahead, started from the placement before;
- ``cold``: as ``warm``, but without that start;
- ``greedy``: greedy's answer in every epoch;
- ``keep``: the first placement of ``warm``, kept for ever.

In hindsight stands beside them the cheapest sequence out of all placements that any way
had (`cheapest_path`, all forecasts known): a reference, not a bound.

The ways take turns, epoch by epoch, so that what else runs on the machine hits all alike;
``wall_s`` is what an epoch takes from its forecast to its answer (the child processes have
been started before). A run goes on where the last one stopped, and stops after
``--seconds``; the one that comes to the end writes benchmarks/results/rolling_day.json
and docs/rolling.png.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from os import getloadavg
from pathlib import Path
from statistics import fmean, median
from tempfile import gettempdir
from time import perf_counter
from typing import Any

import click
import numpy as np
from instances.day import Day, large
from record import write_result

from foreserve.models.placement import Placement, diff
from foreserve.models.plan import Status
from foreserve.planner.figures import COLORS, new_figure, save_figure
from foreserve.planner.intervals import histogram, intervals, share_changed
from foreserve.planner.pipeline import Problems, certify
from foreserve.planner.rolling import Rolling, Step, cheapest_path, states
from foreserve.solvers.base import SolverPool, get_solver, with_shares
from foreserve.solvers.result import SolveOptions, SolveReport

SOLVER, LIMIT_S, HORIZONS = "scale", 2.5, (6,)
OPTIONS = SolveOptions(time_limit_s=LIMIT_S, gap=1e-3)
WAYS = (*(f"rolling-{h}" for h in HORIZONS), "warm", "cold", "greedy", "keep")
PICTURE = "docs/rolling.png"


class Ways:
    """The ways to plan, ready to take one epoch each."""

    def __init__(self, problems: Problems, stack: ExitStack) -> None:
        self.problems = problems
        self.rolling = {
            f"rolling-{h}": stack.enter_context(Rolling(SOLVER, OPTIONS, h))
            for h in HORIZONS
        }
        self.rolling["warm"] = stack.enter_context(Rolling(SOLVER, OPTIONS))
        self.cold = stack.enter_context(SolverPool(SOLVER, OPTIONS))
        self.greedy = get_solver("greedy")

    def prepare(self) -> float:
        """Start the children and let them compile; how long that took."""
        began_s = perf_counter()
        window = self.problems.window(0, Placement())[:1]
        for rolling in self.rolling.values():
            rolling.prepare(window[0])
        self.cold.solve(window[0])
        return perf_counter() - began_s

    def take(self, way: str, epoch: int, state: dict[str, Any]) -> dict[str, Any]:
        """Plan ``epoch`` after the last placement of this way; one row of the results."""
        before = state["placements"][-1] if state["placements"] else Placement()
        began_s = perf_counter()
        horizon = int(way.partition("-")[2] or 1)
        window = self.problems.window(epoch, before)[:horizon]
        problem = window[0]
        if way in self.rolling:
            rolling = self.rolling[way]
            rolling.rest = state.get("rest", ())
            rolling.known = state.get("known", ())
            step = rolling.step(window, before)
            state |= {"rest": rolling.rest, "known": rolling.known}
        elif way == "keep" and epoch:
            kept = with_shares(problem, 0, before)
            report = SolveReport(status=Status.FEASIBLE, solver="keep")
            step = Step(schedule=(kept,), report=report, window_cost=0.0)
        else:
            solved = (
                self.greedy(problem, OPTIONS)
                if way == "greedy"
                else self.cold.solve(problem)
            )
            step = Step(schedule=solved.schedule, report=solved.report, window_cost=0.0)
        wall_s = perf_counter() - began_s
        if step.schedule is None:
            raise ValueError(f"{way}, epoch {epoch}: {step.report.message}")
        placement = step.schedule[0]
        found = certify(problem, (placement,), step.report)
        state["placements"].append(placement)
        return {
            "wall_s": wall_s,
            "terms": dict(found.terms),
            "cost": found.objective,
            "bound": found.bound,
            "gap": found.gap,
            "gap_at_stake": found.gap_at_stake,
            "without_warm": found.without_warm,
            "changed": share_changed(before, placement),
            "loads": sum(a.kind == "load" for a in diff(before, placement)),
            "load_average": getloadavg()[0],
        }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one way over the day; the first epoch, which fills the cluster, counts too."""
    walls = [row["wall_s"] for row in rows]
    cost, bound = (sum(row[key] for row in rows) for key in ("cost", "bound"))
    without = sum(row["without_warm"] for row in rows)
    gaps = [row["gap_at_stake"] for row in rows]
    changed = [t for t, row in enumerate(rows) if t and row["changed"]]
    lengths = intervals(changed, len(rows))
    terms = {k: sum(row["terms"][k] for row in rows) for k in rows[0]["terms"]}
    stake = max(without - bound, cost - bound)
    return {
        "cost": round(cost, 1),
        "terms": {label: round(value, 1) for label, value in terms.items()},
        "bound_sum": round(bound, 1),
        "gap_of_sums": round((cost - bound) / cost, 4),
        "gap_at_stake_of_sums": round((cost - bound) / stake, 4),
        "gap_at_stake_median": round(median(gaps), 4),
        "gap_at_stake_90": round(float(np.quantile(gaps, 0.9)), 4),
        "wall_s_mean": round(fmean(walls), 3),
        "wall_s_99": round(float(np.quantile(walls, 0.99)), 3),
        "wall_s_max": round(max(walls), 3),
        "epochs_over_5_s": sum(wall > 5 for wall in walls),
        "changes": len(changed),
        "mean_interval": round(len(rows) / len(lengths), 2),
        "intervals": {str(k): n for k, n in histogram(lengths).items()},
        "loads": sum(row["loads"] for row in rows),
        "per_epoch": {
            key: [round(row[key], 4) for row in rows]
            for key in ("cost", "gap", "gap_at_stake", "wall_s", "changed")
        },
        "load_average": [
            round(f(row["load_average"] for row in rows), 1) for f in (min, max)
        ],
    }


def hindsight(problems: Problems, states_of: Mapping[str, Any]) -> dict[str, Any]:
    """The cheapest sequence out of all placements that any way had, all epochs known."""
    nothing = Placement()
    day = [problems.at(t, nothing) for t in range(problems.count)]
    pool = {states(p): p for own in states_of.values() for p in own["placements"]}
    schedule, cost = cheapest_path(day, nothing, pool.values())
    assert schedule is not None
    changed = [t for t, pair in enumerate(pairwise(schedule), start=1) if diff(*pair)]
    lengths = intervals(changed, len(schedule))
    return {
        "cost": round(cost, 1),
        "placements": len(pool),
        "changes": len(changed),
        "mean_interval": round(len(schedule) / len(lengths), 2),
        "intervals": {str(k): n for k, n in histogram(lengths).items()},
    }


def draw(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Gap, time, changes and cost over the day."""
    main = WAYS[0]
    shown = {main: COLORS[0], "warm": COLORS[1], "cold": COLORS[2]}
    hours = np.arange(len(rows[main])) * 300 / 3600
    figure = new_figure(1, 4, width=9.0, height=1.9)
    gap, wall, change, cost = figure.subplots(4, 1, sharex=True)
    for way, color in shown.items():
        for axes, key, scale in ((gap, "gap_at_stake", 100), (wall, "wall_s", 1)):
            values = [scale * row[key] for row in rows[way]]
            axes.plot(hours, values, color=color, lw=0.9, label=way)
    gap.set_title(
        "Gap of each epoch, % of the value at stake, given the placement before"
    )
    gap.set_ylim(0, 100)
    wall.axhline(5, color="black", lw=0.7, ls="--")
    wall.set_ylim(0, 5.5)
    wall.set_title("Seconds from forecast to answer; 5 s is the limit")
    shares = [100 * row["changed"] for row in rows[main]]
    shares[0] = 0.0
    change.bar(hours, shares, width=300 / 3600, align="edge", color=COLORS[0])
    change.set_title(f"Replicas that change at the start of an epoch, %: {main}")
    for way, color in {**shown, "greedy": COLORS[3]}.items():
        total = np.cumsum([row["cost"] for row in rows[way]])
        cost.plot(hours, total, color=color, lw=1.1, label=way)
    cost.set_ylim(bottom=0)
    cost.set_title("Cost so far, weighted seconds (keep is far above)")
    cost.set_xlabel("hour of the day")
    cost.set_xlim(0, hours[-1])
    gap.legend(ncols=3, loc="upper right")
    cost.legend(ncols=4, loc="lower right")
    save_figure(figure, PICTURE)


def made(shared: Path, work: Path) -> Day:
    """The day, made once for all runs."""
    file = work / "day.pkl"
    if not file.exists():
        file.write_bytes(pickle.dumps(large(shared)))
    day: Day = pickle.loads(file.read_bytes())
    return day


@click.command()
@click.option(
    "--shared", default="../shared", show_default=True, type=click.Path(path_type=Path)
)
@click.option(
    "--work",
    default=Path(gettempdir()) / "rolling_day",
    type=click.Path(path_type=Path),
)
@click.option("--seconds", default=280.0, show_default=True)
@click.option("--epochs", type=int, help="Stop there, and write nothing.")
def main(shared: Path, work: Path, seconds: float, epochs: int | None) -> None:
    """Take turns until the day or the time is over."""
    end_s = perf_counter() + seconds
    work.mkdir(exist_ok=True)
    scenario, trace, history = made(shared, work)
    file = work / "state.pkl"
    states_of: dict[str, dict[str, Any]] = (
        pickle.loads(file.read_bytes()) if file.exists() else {}
    )
    for way in WAYS:
        states_of.setdefault(way, {"rows": [], "placements": []})
    problems = Problems(scenario, trace, history=history, horizon=max(HORIZONS))
    with ExitStack() as stack:
        ways = Ways(problems, stack)
        done = min(len(state["rows"]) for state in states_of.values())
        last = epochs or problems.count
        if done < last:
            click.echo(f"children started in {ways.prepare():.1f} s")
        for epoch in range(done, last):
            for way, state in states_of.items():
                if len(state["rows"]) > epoch:
                    continue
                if way == "keep" and not epoch:
                    first = states_of["warm"]
                    state |= {key: first[key][:1] for key in ("rows", "placements")}
                else:
                    state["rows"].append(ways.take(way, epoch, state))
            file.write_bytes(pickle.dumps(states_of))
            if perf_counter() > end_s:
                click.echo(f"{epoch + 1} of {problems.count} epochs")
                return
    if epochs:
        return
    rows = {way: states_of[way]["rows"] for way in WAYS}
    found: dict[str, Any] = {way: summary(rows[way]) for way in WAYS}
    found["hindsight"] = hindsight(problems, states_of)
    for way in (*WAYS, "hindsight"):
        found[way]["ratio_to_hindsight"] = round(
            found[way]["cost"] / found["hindsight"]["cost"], 4
        )
        told = {k: v for k, v in found[way].items() if k != "per_epoch"}
        click.echo(f"{way}: {told}")
    draw(rows)
    write_result(
        "rolling_day",
        {
            "epochs": problems.count,
            "solver": SOLVER,
            "time_limit_s": LIMIT_S,
            "ways": found,
        },
    )


if __name__ == "__main__":
    main()
