"""`plan simulate`: run a plan, and other policies beside it, against a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    check_parent,
    check_same_cluster,
    consoles,
    echo_json,
    json_option,
    progress_bar,
    quiet_option,
    read_scenario,
    read_traces,
)

if TYPE_CHECKING:
    from foreserve.models.outcome import Run
    from foreserve.models.plan import Plan
    from foreserve.traces.trace import Trace

KEEP_ALIVE_S = 30.0


@click.command(
    epilog="Example: plan simulate plan.json --trace sample:fleet-day "
    "--policy planned --policy reactive --seed 1"
)
@click.argument("plan_file", metavar="PLAN")
@click.option("--trace", "traces", multiple=True, required=True, help="As for solve.")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("planned",),
    show_default=True,
    help="planned, reactive or reactive-keep; repeat to compare on equal GPUs.",
)
@click.option("--scenario", help="Check that the plan fits this scenario's cluster.")
@click.option("--seed", type=int, default=0, show_default=True, help="Load-time noise.")
@click.option(
    "--keep-alive",
    type=click.FloatRange(0),
    default=KEEP_ALIVE_S,
    show_default=True,
    metavar="S",
    help="How long a replica started on demand stays ACTIVE without requests.",
)
@click.option(
    "--journal",
    type=click.Path(),
    help="Write every event as JSON lines (.jsonl or .jsonl.gz); one policy only.",
)
@click.option("--report", type=click.Path(), help="Write an HTML report here.")
@quiet_option
@json_option
def simulate(
    plan_file: str,
    traces: tuple[str, ...],
    policies: tuple[str, ...],
    scenario: str | None,
    seed: int,
    keep_alive: float,
    journal: str | None,
    report: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run a plan against a trace in virtual time. Same seed, same bytes."""
    from foreserve.cli.solve import command_line
    from foreserve.models.codec import load_plan
    from foreserve.planner.report import write_report
    from foreserve.planner.summary import run_summary

    check_parent(journal, report)
    if journal and len(policies) > 1:
        raise click.UsageError("--journal takes one --policy, not several")
    plan = load_plan(plan_file)
    check_plan(plan, plan_file)
    if scenario:
        check_same_cluster(plan, read_scenario(scenario), plan_file)
    trace = read_traces(traces, {})
    runs = run_policies(
        plan, trace, policies, seed, keep_alive, quiet or as_json, journal
    )
    if report:
        write_report(
            report,
            plan=plan,
            solves=(),
            runs=runs,
            title=f"Simulation of {Path(plan_file).name}",
            command=command_line(),
        )
    if as_json:
        echo_json({"seed": seed, "outcomes": outcomes(runs), "report": report})
        return
    out, _ = consoles(quiet)
    for part in run_summary(plan, runs):
        out.print(part)


def run_policies(
    plan: Plan,
    trace: Trace,
    policies: Sequence[str],
    seed: int,
    keep_alive_s: float,
    quiet: bool,
    journal: str | None = None,
) -> tuple[Run, ...]:
    """One simulated run per policy, on the plan's fleet and over the plan's span."""
    from foreserve.planner.fleet import align
    from foreserve.planner.policies import get_policy
    from foreserve.runtime.simulated import simulate as run

    names = tuple(llm.name for llm in plan.fleet.llms)
    trace = align(trace, names)
    chosen = [get_policy(name, plan, keep_alive_s) for name in policies]
    runs = []
    for policy in chosen:
        with progress_bar(f"simulating {policy.name}", quiet) as update:
            runs.append(
                run(
                    plan.fleet,
                    trace,
                    policy,
                    start_s=plan.start_s,
                    end_s=plan.end_s,
                    seed=seed,
                    load_bin_s=plan.epochs[0].end_s - plan.epochs[0].start_s,
                    journal=journal,
                    progress=update,
                )
            )
    return tuple(runs)


def outcomes(runs: Sequence[Run]) -> list[object]:
    """The runs' outcomes as plain data."""
    import json

    from foreserve.models.codec import to_json

    return [json.loads(to_json(run.outcome)) for run in runs]


def check_plan(plan: Plan, file: str) -> None:
    """Every placement must pass the referee's rows that need no demand."""
    from foreserve.models.errors import InvalidInput
    from foreserve.models.referee import fleet_violations

    for index, epoch in enumerate(plan.epochs):
        found = list(fleet_violations(plan.fleet, epoch.placement))
        if found:
            label, message = found[0]
            raise InvalidInput(
                f"({label}) {message}",
                file=file,
                field=f"epochs.{index}.placement",
                hint=f"{len(found)} rows are broken in this epoch; solve again",
            )
