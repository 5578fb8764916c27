"""`plan demo`: the main job on the shipped day of twelve LLMs, start to finish."""

from __future__ import annotations

import click

from foreserve.cli.common import (
    SAMPLE,
    consoles,
    echo_json,
    fresh_folder,
    json_option,
    quiet_option,
    read_scenario,
    read_traces,
    seed_option,
)


@click.command(epilog="Example: plan demo --output foreserve-demo")
@click.option(
    "--output",
    default="foreserve-demo",
    show_default=True,
    type=click.Path(),
    help="Folder for plan.json and report.html.",
)
@click.option(
    "--sample",
    "name",
    type=click.Choice(["fleet-day", "azure-2023"]),
    default="fleet-day",
    show_default=True,
    help="Shipped trace and scenario.",
)
@click.option("--force", is_flag=True, help="Write into a folder that is not empty.")
@seed_option
@quiet_option
@json_option
def demo(
    output: str, name: str, force: bool, seed: int | None, quiet: bool, as_json: bool
) -> None:
    """Plan and simulate a shipped real trace; print the certificate, write the report.

    The same GPUs are also run without a plan (`reactive`), so the difference shows.
    """
    from foreserve.cli.simulate import outcomes, run_policies
    from foreserve.cli.solve import command_line, facts, run_solve
    from foreserve.models.codec import to_json, write_text
    from foreserve.planner.report import write_report
    from foreserve.planner.summary import summary

    folder = fresh_folder(output, force)
    scenario = read_scenario(SAMPLE + name, seed=seed)
    inputs: dict[str, str] = {}
    trace = read_traces([SAMPLE + name], inputs)
    silent = quiet or as_json
    planned = run_solve(scenario, trace, inputs, silent)
    write_text(folder / "plan.json", to_json(planned.plan))
    runs = run_policies(
        planned.plan,
        trace,
        ["planned", "reactive"],
        planned.plan.solver.seed,
        scenario.runtime.keep_alive,
        silent,
    )
    report = folder / "report.html"
    write_report(
        report,
        plan=planned.plan,
        solves=planned.solves,
        runs=runs,
        title=f"{name}: planned, and the same GPUs without a plan",
        command=command_line(),
    )
    if as_json:
        echo_json(
            {
                **facts(planned),
                "outcomes": outcomes(runs),
                "plan": str(folder / "plan.json"),
                "report": str(report),
            }
        )
        return
    out, _ = consoles(quiet)
    for part in summary(planned.plan, planned.solves, runs):
        out.print(part)
    out.print(f"plan:   {folder / 'plan.json'}\nreport: {report}", markup=False)
