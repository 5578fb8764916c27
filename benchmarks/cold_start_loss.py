"""Expected cold-start loss: the solver's plans against WarmServe's greedy.

    python benchmarks/cold_start_loss.py [--solver NAME]

50 problems drawn at random (16 GPUs, four LLMs with a steady demand, the others asked for
in 15 % of the moments; five memory pressures times five burst correlations times two draws)
and 20 epochs of the fleet-day sample (ten on its twelve GPUs, ten on eight). Greedy and the
solver plan on the same moments (20, then 80: a plan can fit few moments too well); both
plans are judged by the referee on those and on 400 fresh moments of the same distribution
(of the trace: of the same forecast, drawn anew). Loss is the term (O2), weighted seconds of
waiting; the whole objective stands beside it, since that is what is minimised. Greedy is
WarmServe's with scores of our own (the expected loss that a copy covers), and the referee
picks the best of some variants and polishes it; ``published`` has WarmServe's scores.
A solve without an answer counts as greedy's plan. Intervals: 95 %, bootstrap over the
instances (pairs stay together).

Writes benchmarks/results/cold_start_loss.json and paper_figures/cold_start_loss.svg.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import click
import numpy as np
from instances.drawn import draw, of_trace, pressure
from record import write_result

from foreserve.models import referee
from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Problem
from foreserve.planner.figures import COLORS, new_figure, save_figure
from foreserve.solvers.base import SolverPool, get_solver, solve
from foreserve.solvers.prewarm import Wanted, place, scores
from foreserve.solvers.result import Schedule, SolveOptions

LLMS = (8, 12, 16, 24, 32)
CORRELATIONS = (-0.8, -0.4, 0.0, 0.4, 0.8)
DRAWS, MOMENTS, FRESH = 2, (20, 80), 400
HOURS = (4, 12, 20, 28, 36, 44, 52, 60, 68, 76)
"""Epochs of fleet-day, 15 minutes each."""
WHERE = {"own": "these", "fresh": "400 fresh moments"}
PICTURE = "paper_figures/cold_start_loss.svg"


class Case(NamedTuple):
    """A problem, the same with fresh moments, and what the picture needs to know."""

    name: str
    problem: Problem
    fresh: Problem
    llms: int
    correlation: float | None


def drawn(moments: int) -> Iterator[Case]:
    for llms, c, i in product(LLMS, CORRELATIONS, range(DRAWS)):
        # The same LLMs and demand for all correlations.
        rng = np.random.default_rng([llms, i])
        problem, fresh = draw(
            rng,
            llms,
            [8, 8],
            moments,
            busy=0.3,
            steady=4,
            asked=0.15,
            correlation=c,
            fresh=FRESH,
        )
        assert fresh is not None
        yield Case(f"drawn-{llms}-{c:g}-{i}", problem, fresh, llms, c)


def traced(moments: int) -> Iterator[Case]:
    for nodes in (3, 2):
        found = of_trace(
            "fleet-day", HOURS, scenarios=moments, fresh=FRESH, nodes=nodes
        )
        for epoch, (problem, fresh) in zip(HOURS, found, strict=True):
            llms = len(problem.fleet.llms)
            yield Case(f"fleet-day-{4 * nodes}-{epoch}", problem, fresh, llms, None)


def judged(problem: Problem, schedule: Schedule) -> tuple[float, float]:
    """(cold-start loss, whole objective) of a plan."""
    cost = referee.cost(problem, schedule)
    return cost.terms["O2"], cost.total


def published(problem: Problem, schedule: Schedule) -> Schedule:
    """WARM replicas by WarmServe's published scores beside the ACTIVE ones of a plan, on
    the GPUs that these leave free: the forecast of the mean is the demand, that of the
    peak the mean over the moments; copies have the least TP."""
    fleet, (placement,) = problem.fleet, schedule
    active = [r for r in placement.replicas if r.state == "ACTIVE"]
    serving = {gpu for replica in active for gpu in replica.gpus}
    free = {g: fleet.cluster.usable_bytes(g) for g in fleet.cluster.gpus}
    wanted = []
    for i, llm in enumerate(fleet.llms):
        options = [option for option in fleet.options if option.llm == llm.name]
        option = min(options, key=lambda option: option.tp)
        blocks = [b for o, b in fleet.candidates() if o is option]
        mean = problem.demand_rps[i][0] * option.exec_s
        peak = fmean(moment[i][0] for moment in problem.peak_load)
        unit = llm.instance_concurrency
        running = sum(
            fleet.option_of(r.llm, r.gpus).instances(unit)
            for r in active
            if r.llm == llm.name
        )
        wanted.append(
            Wanted(
                llm=llm.name,
                resident_bytes=option.resident_bytes,
                blocks=[b for b in blocks if serving.isdisjoint(b)],
                scores=scores(mean, peak, running, option.load_s, unit),
            )
        )
    warm = [
        Replica(llm=copy.llm, gpus=copy.gpus, state="WARM")
        for copy in place(wanted, free)
    ]
    found = (Placement(replicas=(*active, *warm)),)
    broken = referee.violations(problem, found)
    if broken:
        raise ValueError(f"published: {broken[0]}")
    return found


def run(case: Case, pool: SolverPool) -> dict[str, Any]:
    """Both plans of one case on both sets of moments."""
    greedy = get_solver("greedy")(case.problem, SolveOptions()).schedule
    solved = pool.solve(case.problem)
    if greedy is None:
        raise ValueError(f"{case.name}: greedy finds nothing")
    if solved.schedule is None:
        click.echo(f"{case.name}: {solved.report.message}; greedy's plan is used")
    row: dict[str, Any] = {
        "name": case.name,
        "llms": case.llms,
        "correlation": case.correlation,
        "pressure": round(pressure(case.problem), 3),
        "solver": solved.report.solver,
        "bound": solved.report.bound,
        "wall_s": round(solved.report.wall_s, 2),
        "failed": solved.schedule is None,
    }
    for who, schedule in (
        ("published", published(case.problem, greedy)),
        ("greedy", greedy),
        ("solver", solved.schedule or greedy),
    ):
        for where, problem in (("own", case.problem), ("fresh", case.fresh)):
            loss, total = judged(problem, schedule)
            row |= {f"{who}_{where}_loss": loss, f"{who}_{where}_total": total}
    return row


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean differences greedy - solver with their intervals, and who was worse how often.

    The share is of greedy's sum, so instances count by their loss; ``mean_share`` is the
    mean over instances of the share of greedy's, where greedy loses anything.
    """
    failed = sum(row["failed"] for row in rows)
    found: dict[str, Any] = {"instances": len(rows), "failed": failed}
    rng = np.random.default_rng(0)
    picks = rng.integers(len(rows), size=(10_000, len(rows)))
    for where, what in product(("own", "fresh"), ("loss", "total")):
        mine = np.array([row[f"solver_{where}_{what}"] for row in rows])
        theirs = np.array([row[f"greedy_{where}_{what}"] for row in rows])
        saved = theirs - mine
        shares = saved[picks].sum(axis=1) / theirs[picks].sum(axis=1)
        least = 1e-6 * np.maximum(1.0, theirs)
        plain = np.array([row[f"published_{where}_{what}"] for row in rows])
        some = theirs > 1e-6
        found[f"{where}_{what}"] = {
            "published_mean": round(float(plain.mean()), 3),
            "greedy_mean": round(float(theirs.mean()), 3),
            "solver_mean": round(float(mine.mean()), 3),
            "saved_mean": round(float(saved.mean()), 3),
            "saved_95": _interval(saved[picks].mean(axis=1)),
            "saved_share": round(float(saved.sum() / theirs.sum()), 4),
            "saved_share_95": _interval(shares),
            "mean_share": round(float(np.mean(saved[some] / theirs[some])), 4),
            "better": int(np.count_nonzero(saved > least)),
            "worse": int(np.count_nonzero(saved < -least)),
        }
    return found


def _interval(values: Any) -> list[float]:
    return [round(float(q), 4) for q in np.quantile(values, (0.025, 0.975))]


def picture(rows: Sequence[Mapping[str, Any]]) -> None:
    """Loss saved on fresh moments: by memory pressure, and by correlation."""
    figure = new_figure(2, width=4.6, height=3.4)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, values, label in (
        (left, "llms", LLMS, "LLMs on 16 GPUs"),
        (right, "correlation", CORRELATIONS, "correlation of bursts"),
    ):
        for moments, where, color, dashes in (
            (20, "own", COLORS[1], "--"),
            (20, "fresh", COLORS[1], "-"),
            (80, "own", COLORS[0], "--"),
            (80, "fresh", COLORS[0], "-"),
        ):
            chosen = [row for row in rows if row["moments"] == moments]
            shares = [
                _share([row for row in chosen if row[key] == value], where)
                for value in values
            ]
            middle = [100 * share for share, _, _ in shares]
            axes.plot(
                list(values), middle, color=color, ls=dashes, marker="o", ms=3, lw=1.4,
                label=f"planned on {moments}, judged on {WHERE[where]}",
            )  # fmt: skip
            if where == "fresh":
                low = [100 * low for _, low, _ in shares]
                high = [100 * high for _, _, high in shares]
                axes.fill_between(
                    list(values), low, high, color=color, alpha=0.15, lw=0
                )
        axes.axhline(0, color="#59636e", lw=0.8)
        axes.set_xlabel(label)
        axes.set_xticks(list(values))
        axes.set_ylim(-20, 102)
    pressures = [
        fmean(row["pressure"] for row in rows if row["llms"] == value) for value in LLMS
    ]
    left.set_xticks(
        list(LLMS),
        [f"{n}\n({p:.0%})" for n, p in zip(LLMS, pressures, strict=True)],
    )
    left.set_xlabel("LLMs on 16 GPUs (their weights, of all memory)")
    left.set_ylabel("cold-start loss saved against greedy, %")
    left.set_title("Memory pressure")
    right.set_title("Burst correlation")
    left.legend(loc="best")
    save_figure(figure, PICTURE)


def _share(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[float, float, float]:
    """Share of greedy's loss that is saved, with its bootstrap interval."""
    mine = np.array([row[f"solver_{where}_loss"] for row in rows])
    theirs = np.array([row[f"greedy_{where}_loss"] for row in rows])
    picks = np.random.default_rng(0).integers(len(rows), size=(4000, len(rows)))
    shares = 1 - mine[picks].sum(axis=1) / theirs[picks].sum(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(1 - mine.sum() / theirs.sum()), float(low), float(high)


@click.command()
@click.option("--solver", default="scale", show_default=True)
@click.option("--time-limit", default=3.0, show_default=True, help="Seconds a solve.")
def main(solver: str, time_limit: float) -> None:
    """Solve all cases, judge, write the tables and the picture."""
    options = SolveOptions(time_limit_s=time_limit, gap=1e-3)
    # Compiles what is to be compiled, and leaves it in the cache on disk.
    first = next(drawn(MOMENTS[0])).problem
    solve(first, solver, replace(options, time_limit_s=60, gap=0.5))
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for moments in MOMENTS:
        for kind, cases in (("drawn", drawn(moments)), ("traced", traced(moments))):
            with SolverPool(solver, options) as pool:
                mine = [run(case, pool) | {"moments": moments} for case in cases]
            rows += mine
            found[f"{kind}, {moments} moments"] = summary(mine)
            click.echo(
                f"{kind}, {moments} moments: {found[f'{kind}, {moments} moments']}"
            )
    picture([row for row in rows if row["correlation"] is not None])
    write_result(
        "cold_start_loss",
        {
            "command": "python benchmarks/cold_start_loss.py "
            f"--solver {solver} --time-limit {time_limit:g}",
            "solver": solver,
            "time_limit_s": time_limit,
            "load_average_15_min": round(os.getloadavg()[2], 2),
            "summary": found,
            "rows": [
                {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            ],
        },
    )


if __name__ == "__main__":
    main()
