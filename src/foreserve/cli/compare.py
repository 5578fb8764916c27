"""`plan compare`: solvers side by side on the same problems, policies on the same plan."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    consoles,
    echo_json,
    fresh_folder,
    json_option,
    progress_bar,
    quiet_option,
    read_history,
    read_scenario,
    read_traces,
    solver_options,
)
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.problem import Problem
    from foreserve.solvers.result import Solved

FORMATS = ("md", "csv", "json")


@click.command(
    epilog="Example: plan compare --trace sample:azure-2023 --scenario "
    "sample:azure-2023 --solvers milp,cpsat,greedy --output out"
)
@click.argument("instances", nargs=-1, metavar="[PROBLEM.json]...")
@click.option("--trace", "traces", multiple=True, help="As for solve.")
@click.option("--scenario", help="As for solve.")
@click.option(
    "--solvers", default="milp,cpsat,greedy", show_default=True, help="Comma list."
)
@click.option(
    "--policies", default="", help="Comma list: also simulate these on the best plan."
)
@solver_options
@click.option("--output", type=click.Path(), help="Folder for compare.md, .csv, .json.")
@click.option("--force", is_flag=True, help="Write into a folder that is not empty.")
@quiet_option
@json_option
def compare(
    instances: tuple[str, ...],
    traces: tuple[str, ...],
    scenario: str | None,
    solvers: str,
    policies: str,
    forecast: str | None,
    time_limit: float | None,
    gap: float | None,
    seed: int | None,
    threads: int | None,
    output: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run several solvers on the same problems, with the same limits.

    Problems are files written by foreserve, or the epochs of a trace. With a trace each
    solver plans the whole trace; `--policies` then simulates them on the first plan.
    """
    from foreserve.models.codec import write_text
    from foreserve.planner.tables import render

    names = _names(solvers)
    if bool(instances) == bool(traces):
        raise click.UsageError("give problem files, or --trace with --scenario")
    if traces and not scenario:
        raise click.UsageError("--trace needs --scenario")
    folder = fresh_folder(output, force) if output else None
    limits = {"time_limit": time_limit, "gap": gap, "seed": seed, "threads": threads}
    if instances:
        rows = _problem_rows(instances, names, limits, quiet or as_json)
        run_rows: list[Mapping[str, object]] = []
    else:
        rows, run_rows = _trace_rows(
            traces,
            str(scenario),
            names,
            [name for name in policies.split(",") if name],
            {**limits, "method": forecast},
            quiet or as_json,
        )
    if folder:
        for fmt in FORMATS:
            write_text(folder / f"compare.{fmt}", render(rows, fmt))
            if run_rows:
                write_text(folder / f"policies.{fmt}", render(run_rows, fmt))
    if as_json:
        echo_json({"solvers": rows, "policies": run_rows})
        return
    out, _ = consoles(quiet)
    for table in (rows, run_rows):
        if table:
            out.print(render(table, "md"), markup=False, soft_wrap=True)
    if folder:
        out.print(f"written to {folder}/compare.md, .csv and .json", markup=False)


def _names(solvers: str) -> list[str]:
    from foreserve.models.codec import did_you_mean
    from foreserve.solvers.base import SOLVERS

    names = [name.strip() for name in solvers.split(",") if name.strip()]
    for name in names:
        if name not in SOLVERS:
            hint = did_you_mean(name, list(SOLVERS))
            raise InvalidInput(f"unknown solver {name!r}", field="--solvers", hint=hint)
    if not names:
        raise InvalidInput("no solver given", field="--solvers")
    return names


def _problem_rows(
    files: tuple[str, ...],
    solvers: list[str],
    limits: Mapping[str, object],
    quiet: bool,
) -> list[Mapping[str, object]]:
    from foreserve.models.codec import from_json, read_text
    from foreserve.models.problem import Problem
    from foreserve.planner.scenario import SolverPart
    from foreserve.solvers.base import SolverPool
    from foreserve.solvers.result import SolveOptions

    given = {key: value for key, value in limits.items() if value is not None}
    part = SolverPart(**given)  # type: ignore[arg-type]
    options = SolveOptions(
        time_limit_s=part.time_limit, gap=part.gap, seed=part.seed, threads=part.threads
    )
    problems = [(file, from_json(Problem, read_text(file), file)) for file in files]
    rows: list[Mapping[str, object]] = []
    with progress_bar("solving", quiet) as update:
        for (file, problem), name in product(problems, solvers):
            # A process of its own for each: nobody pays or gains from another's start.
            with SolverPool(name, options) as pool:
                solved = pool.solve(problem)
            rows.append(_row(Path(file).stem, name, problem, solved))
            update(len(rows), len(solvers) * len(problems))
    return rows


def _row(
    instance: str, name: str, problem: Problem, solved: Solved
) -> Mapping[str, object]:
    from foreserve.planner.pipeline import certify

    report, schedule = solved.report, solved.schedule
    found = None if schedule is None else certify(problem, schedule, report)
    return {
        "instance": instance,
        "solver": name,
        "status": str(report.status),
        "objective": found and found.objective,
        "bound": report.bound,
        "gap": found and found.gap,
        "gap_at_stake": found and found.gap_at_stake,
        "first_plan_s": _rounded(report.time_to_first_s),
        "wall_s": _rounded(report.wall_s),
        "version": report.version,
        "seed": report.seed,
        "threads": report.threads,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _trace_rows(
    traces: tuple[str, ...],
    scenario: str,
    solvers: list[str],
    policies: list[str],
    overrides: Mapping[str, object],
    quiet: bool,
) -> tuple[list[Mapping[str, object]], list[Mapping[str, object]]]:
    from foreserve.cli.simulate import run_policies
    from foreserve.cli.solve import facts
    from foreserve.planner.pipeline import Planned, plan_trace
    from foreserve.planner.tables import outcome_row

    inputs: dict[str, str] = {}
    trace = read_traces(traces, inputs)
    rows: list[Mapping[str, object]] = []
    plans: list[Planned] = []
    for name in solvers:
        wanted = read_scenario(scenario, name=name, **overrides)
        history = read_history(wanted, inputs)
        with progress_bar(f"solving with {name}", quiet) as update:
            planned = plan_trace(
                wanted, trace, history=history, inputs=inputs, progress=update
            )
        plans.append(planned)
        stated = facts(planned)
        rows.append(
            {
                "instance": scenario.removeprefix("sample:"),
                "solver": name,
                **{
                    key: stated[key]
                    for key in (
                        "status",
                        "objective",
                        "bound",
                        "gap",
                        "gap_at_stake",
                        "time_to_first_plan_s",
                        "wall_s",
                        "gpu_hours",
                        "version",
                        "seed",
                        "threads",
                    )
                },
            }
        )
    runs = run_policies(
        plans[0].plan,
        trace,
        policies,
        plans[0].plan.solver.seed,
        wanted.runtime.keep_alive,
        quiet,
    )
    return rows, [outcome_row(run.outcome) for run in runs]
