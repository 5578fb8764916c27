"""`plan init`, `validate` and `trace`: look before you plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from foreserve.cli.common import (
    check_parent,
    check_same_cluster,
    consoles,
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


@click.group(epilog="Example: plan trace info sample:azure-2023")
def trace() -> None:
    """Look at traces."""


@trace.command("info", epilog="Example: plan trace info requests.csv.gz --json")
@click.argument("traces", nargs=-1, required=True)
@json_option
def info(traces: tuple[str, ...], as_json: bool) -> None:
    """Requests, rates, lengths and burstiness per LLM."""
    from rich.table import Table

    from foreserve.traces.info import describe

    found = describe(read_traces(traces, {}))
    plain = asdict(found)
    if as_json:
        echo_json(plain)
        return
    out, _ = consoles(quiet=False)
    rows = plain.pop("llms")
    out.print(", ".join(f"{key}: {_number(value)}" for key, value in plain.items()))
    table = Table(box=None, padding=(0, 1, 0, 0))
    shown = [key for key in rows[0] if not key.endswith("_p90")]  # a narrow terminal
    for key in shown:
        label = key.replace("input_", "in ").replace("output_", "out ")
        justify: Literal["left", "right"] = "left" if key == "llm" else "right"
        table.add_column(label.replace("_", " "), justify=justify, no_wrap=key == "llm")
    for row in rows:
        table.add_row(*(_number(row[key]) for key in shown))
    out.print(table)


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
