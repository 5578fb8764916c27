"""`plan solve`: from a trace and a scenario to a plan with a certificate."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import (
    check_parent,
    consoles,
    echo_json,
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
    from foreserve.planner.pipeline import NoPlan, Planned
    from foreserve.planner.scenario import Scenario
    from foreserve.traces.trace import Trace


@click.command(
    epilog="Example: plan solve --trace sample:azure-2023 --scenario sample:azure-2023 "
    "--solver milp -o plan.json --report report.html"
)
@click.option(
    "--trace",
    "traces",
    multiple=True,
    required=True,
    help="Requests: CSV, JSONL (.gz) or sample:NAME; repeat to merge several.",
)
@click.option("--scenario", required=True, help="Scenario YAML, or sample:NAME.")
@click.option(
    "--solver",
    type=click.Choice(["auto", "milp", "highs", "cpsat", "scale", "greedy"]),
    help="Default: the scenario's.",
)
@solver_options
@click.option(
    "--horizon",
    type=click.IntRange(1),
    metavar="N",
    help="Epochs that each solve looks ahead.  [default: the scenario's]",
)
@click.option(
    "--lexicographic",
    is_flag=True,
    default=None,
    help="Take the objective's terms in order (O1 first) instead of their sum; milp.",
)
@click.option(
    "-o", "--plan", "plan_path", type=click.Path(), help="Write the plan here."
)
@click.option("--report", type=click.Path(), help="Write an HTML report here.")
@click.option(
    "--write-model",
    "model_path",
    type=click.Path(),
    metavar="FILE.lp|.mps",
    help="Write the MILP of one epoch here.",
)
@click.option(
    "--epoch",
    "model_epoch",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Of --write-model, counted from 0.",
)
@quiet_option
@json_option
def solve(
    traces: tuple[str, ...],
    scenario: str,
    solver: str | None,
    forecast: str | None,
    time_limit: float | None,
    gap: float | None,
    seed: int | None,
    threads: int | None,
    horizon: int | None,
    lexicographic: bool | None,
    plan_path: str | None,
    report: str | None,
    model_path: str | None,
    model_epoch: int,
    quiet: bool,
    as_json: bool,
) -> int:
    """Plan every epoch of a trace: what goes where, how good it is, what it costs.

    Each epoch is planned from what was known before it began. Exit code 3: no
    plan; where the rules cannot hold together, those that conflict are printed.
    """
    from foreserve.cli import EXIT_NO_PLAN
    from foreserve.models.codec import to_json, write_text
    from foreserve.planner.pipeline import NoPlan
    from foreserve.planner.report import write_report
    from foreserve.planner.summary import summary

    check_parent(plan_path, report, model_path)
    inspect = None if model_path is None else model_writer(model_path, model_epoch)
    wanted = read_scenario(
        scenario,
        name=solver,
        time_limit=time_limit,
        gap=gap,
        seed=seed,
        threads=threads,
        horizon=horizon,
        lexicographic=lexicographic,
        method=forecast,
    )
    inputs: dict[str, str] = {}
    trace = read_traces(traces, inputs)
    try:
        planned = run_solve(wanted, trace, inputs, quiet or as_json, inspect)
    except NoPlan as failure:
        no_plan(failure, wanted, trace, as_json)
        return EXIT_NO_PLAN
    if model_path and model_epoch >= len(planned.plan.epochs):
        hint = f"--epoch 0 to {len(planned.plan.epochs) - 1}"
        raise InvalidInput(f"no epoch {model_epoch}", field="--epoch", hint=hint)
    if plan_path:
        write_text(plan_path, to_json(planned.plan))
    if report:
        write_report(
            report,
            plan=planned.plan,
            solves=planned.solves,
            runs=(),
            title=f"Plan for {scenario.removeprefix('sample:')}",
            command=command_line(),
        )
    if as_json:
        files = {"plan": plan_path, "report": report, "model": model_path}
        echo_json({**facts(planned), **files})
        return 0
    out, _ = consoles(quiet)
    for part in summary(planned.plan, planned.solves, ()):
        out.print(part)
    for label, path in (("plan", plan_path), ("report", report), ("model", model_path)):
        if path:
            out.print(f"{label}: {path}")
    return 0


def run_solve(
    scenario: Scenario,
    trace: Trace,
    inputs: dict[str, str],
    quiet: bool,
    inspect: Callable[[int, Problem], None] | None = None,
) -> Planned:
    """Plan ``trace`` with a progress bar; ``inspect`` as for `plan_trace`."""
    from foreserve.planner.pipeline import plan_trace

    history = read_history(scenario, inputs)
    with progress_bar("solving epochs", quiet) as update:
        return plan_trace(
            scenario,
            trace,
            history=history,
            inputs=inputs,
            progress=update,
            inspect=inspect,
        )


def model_writer(path: str, epoch: int) -> Callable[[int, Problem], None]:
    """Writes the MILP of the problem of ``epoch``."""
    from foreserve.solvers.export import check_suffix, write_model

    check_suffix(path)

    def inspect(index: int, problem: Problem) -> None:
        if index == epoch:
            write_model(problem, path)

    return inspect


def no_plan(failure: NoPlan, scenario: Scenario, trace: Trace, as_json: bool) -> None:
    """Say why: for an infeasible epoch the rules in conflict, and what would help."""
    from dataclasses import asdict

    from foreserve.models.plan import Status
    from foreserve.planner.conflict import conflict, unfixed_tp
    from foreserve.planner.explain_tables import conflict_lines
    from foreserve.planner.pipeline import solve_options

    click.echo(f"no plan: {failure}", err=True)
    status, found = failure.report.status, None
    if status is Status.INFEASIBLE:
        history = read_history(scenario, {})
        found = conflict(
            failure.problem,
            solve_options(scenario),
            unfixed_tp(scenario, trace, history),
        )
        for line in conflict_lines(found):
            click.echo(line, err=True)
    if as_json:
        echo_json(
            {
                "status": str(status),
                "epoch": failure.epoch,
                "message": str(failure),
                "conflict": found and asdict(found),
            }
        )


def facts(planned: Planned) -> Mapping[str, Any]:
    """What every solve states, for ``--json``."""
    from dataclasses import asdict

    from foreserve.models.codec import digest
    from foreserve.planner.facts import plan_facts
    from foreserve.planner.intervals import changes

    plan, solves = planned.plan, planned.solves
    firsts = [s.time_to_first_s for s in solves if s.time_to_first_s is not None]
    stated = asdict(plan_facts(plan)) | asdict(plan.solver)
    return {key: value for key, value in stated.items() if key != "gap"} | {
        "status": str(stated["status"]),
        "gap": plan_facts(plan).gap,
        "gap_asked": plan.solver.gap,
        "solver": plan.solver.name,
        "epochs": len(plan.epochs),
        "changes_at": [asdict(change) for change in changes(plan)],
        "plan_sha256": digest(plan),
        "wall_s": round(sum(s.wall_s for s in solves), 3),
        "slowest_epoch_s": round(max(s.wall_s for s in solves), 3),
        "time_to_first_plan_s": round(max(firsts), 3) if firsts else None,
    }


def command_line() -> str:
    """The command as typed, for the report's provenance."""
    return " ".join(["plan", *sys.argv[1:]])
