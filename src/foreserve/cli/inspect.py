"""`plan init` and `validate`: look before you plan."""

from __future__ import annotations

from pathlib import Path

import click

from foreserve.cli.common import (
    check_parent,
    check_same_cluster,
    echo_json,
    json_option,
    read_history,
    read_scenario,
    read_traces,
)
from foreserve.models.errors import InvalidInput


@click.command(epilog="Example: plan init scenario.yaml")
@click.argument("path", default="scenario.yaml", type=click.Path())
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@json_option
def init(path: str, force: bool, as_json: bool) -> None:
    """Write a commented scenario to start from."""
    from foreserve.models.codec import read_text, write_text
    from foreserve.planner.scenarios import scenario_path

    check_parent(path)
    if Path(path).exists() and not force:
        raise InvalidInput("the file exists", file=path, hint="--force overwrites it")
    write_text(path, read_text(scenario_path("init")))
    if as_json:
        echo_json({"scenario": path})
    else:
        click.echo(f"wrote {path}; check it with `plan validate {path}`")


@click.command(epilog="Example: plan validate plan.json --scenario scenario.yaml")
@click.argument("path", metavar="PLAN.json|SCENARIO.yaml")
@click.option("--scenario", help="Also check that a plan fits this scenario's cluster.")
@click.option("--trace", "traces", multiple=True, help="Also check a scenario's trace.")
@json_option
def validate(
    path: str, scenario: str | None, traces: tuple[str, ...], as_json: bool
) -> None:
    """Check a plan (by the referee) or a scenario; exit code 2 with the reason if not."""
    from foreserve.cli.simulate import check_plan
    from foreserve.models.codec import load_plan
    from foreserve.planner.fleet import align, build_fleet, request_lengths

    if path.endswith(".json"):
        plan = load_plan(path)
        check_plan(plan, path)
        if scenario:
            check_same_cluster(plan, read_scenario(scenario), path)
        found = {
            "kind": "plan",
            "epochs": len(plan.epochs),
            "llms": len(plan.fleet.llms),
            "gpus": len(plan.fleet.cluster.gpus),
        }
    else:
        wanted = read_scenario(path)
        found = {
            "kind": "scenario",
            "llms": len(wanted.models),
            "gpus": len(wanted.cluster.cluster().gpus),
        }
        if traces:
            names = tuple(llm.name for llm in wanted.models)
            trace = align(read_traces(traces, {}), names)
            history = read_history(wanted, {})
            fleet = build_fleet(wanted, request_lengths(wanted, trace, history))
            found["options"] = len(fleet.options)
    if as_json:
        echo_json({"valid": True, "file": path, **found})
    else:
        facts = ", ".join(
            f"{value} {key}" for key, value in found.items() if key != "kind"
        )
        click.echo(f"{path}: valid {found['kind']} ({facts})")
