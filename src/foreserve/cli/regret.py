"""`plan regret`: what a plan costs where it was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from foreserve.cli.common import (
    compile_simulator,
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    quiet_option,
    read_history,
    read_scenario,
    read_traces,
)
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from foreserve.models.outcome import Outcome
    from foreserve.models.plan import Plan
    from foreserve.planner.regret import Regret
    from foreserve.planner.tables import Part
    from foreserve.traces.trace import Trace

FACTORS = (1.25, 1.5)


@click.command(
    epilog="Example: plan regret plan.json --trace sample:azure-2023 --scenario "
    "sample:azure-2023 --factor 1.25 --factor 1.5"
)
@click.argument("path", metavar="PLAN.json", type=click.Path())
@click.option(
    "--trace", "traces", multiple=True, required=True, help="It was made from."
)
@click.option("--scenario", required=True, help="It was made from.")
@click.option(
    "--factor",
    "factors",
    multiple=True,
    type=click.FloatRange(1, min_open=True),
    help="How far off; repeat. Default: 1.25 and 1.5.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, min_open=True),
    metavar="S",
    help="Seconds per epoch of each new solve; default: the plan's.",
)
@click.option(
    "--simulate", is_flag=True, help="Also run each plan against each world's requests."
)
@quiet_option
@json_option
def regret(
    path: str,
    traces: tuple[str, ...],
    scenario: str,
    factors: tuple[float, ...],
    time_limit: float | None,
    simulate: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """The plan where latencies, loads, demand or forecasts are worse than planned.

    Beside it, in the same worlds: greedy's plan from the same forecasts, and a plan made
    for that world (foresight). Exit code 3: in one of the worlds there is no plan.
    """
    from dataclasses import asdict

    from foreserve.cli import EXIT_NO_PLAN
    from foreserve.cli.simulate import run_policy
    from foreserve.models.codec import load_plan
    from foreserve.planner.again import problem_again, problems_again
    from foreserve.planner.pipeline import NoPlan
    from foreserve.planner.regret import regret as regrets
    from foreserve.solvers.result import SolveOptions

    plan, wanted = load_plan(path), read_scenario(scenario)
    trace, history = read_traces(traces, {}), read_history(wanted, {})
    try:
        problems = problems_again(plan, wanted, trace, history)
        for epoch in range(len(plan.epochs)):
            problem_again(plan, problems, epoch)
    except InvalidInput as error:
        raise error.at(file=scenario) from None
    made_by = plan.solver
    options = SolveOptions(
        time_limit_s=time_limit or made_by.time_limit_s,
        gap=made_by.gap,
        seed=made_by.seed,
        threads=made_by.threads,
    )
    keep_s = wanted.runtime.keep_alive

    def run(there: Plan, requests: Trace) -> Outcome:
        return run_policy(there, requests, "planned", made_by.seed, keep_s).outcome

    silent = quiet or as_json
    if simulate:
        compile_simulator(silent)
    try:
        with progress_bar("solving worlds", silent) as update:
            rows = regrets(
                plan,
                problems,
                factors or FACTORS,
                wanted.solver.name,
                options,
                update,
                trace,
                run if simulate else None,
            )
    except NoPlan as failure:
        click.echo(f"no plan: {failure}", err=True)
        if as_json:
            echo_json({"status": str(failure.report.status), "message": str(failure)})
        return EXIT_NO_PLAN
    if as_json:
        worlds = [
            asdict(row)
            | {"plan_regret": row.plan_regret, "greedy_regret": row.greedy_regret}
            for row in rows
        ]
        echo_json({"file": path, "worlds": worlds})
        return 0
    out, _ = consoles(quiet)
    print_parts(out, [_part(rows), *([_simulated(rows)] if simulate else [])])
    return 0


def _part(rows: tuple[Regret, ...]) -> Part:
    from foreserve.planner.tables import Part

    return Part(
        "cost of the whole plan, weighted seconds of delay",
        ["world", "off", "plan", "greedy", "foresight", "plan's regret", "greedy's"],
        [
            (
                row.world,
                f"{row.factor:g}x",
                f"{row.plan:.1f}",
                f"{row.greedy:.1f}",
                f"{row.foresight:.1f}",
                f"{row.plan_regret:+.1f}",
                f"{row.greedy_regret:+.1f}",
            )
            for row in rows
        ],
        "foresight: planned for that world, epoch by epoch; not the best over all epochs",
    )


def _simulated(rows: tuple[Regret, ...]) -> Part:
    from foreserve.planner.regret import PLANS
    from foreserve.planner.tables import Part

    return Part(
        "simulated: within SLO, %; of the LLM served worst; P99 TTFT, s",
        ["world", "off", "requests", *PLANS],
        [
            (
                row.world,
                f"{row.factor:g}x",
                str(row.simulated["plan"].requests),
                *(
                    f"{100 * got.slo_attainment:.2f}  {100 * got.worst_attainment:5.1f}"
                    f"  {got.ttft_p99_s:6.2f}"
                    for got in (row.simulated[name] for name in PLANS)
                ),
            )
            for row in rows
        ],
        "with the controller's on-demand rule; requests of the world, its latencies",
    )
