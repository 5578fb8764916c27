"""`plan init`, `validate`, `catalog` and `trace`: look before you plan."""

from __future__ import annotations

import json
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
from foreserve.models.llm import ModelSpec
from foreserve.models.specs import GpuType


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
    from foreserve.planner.fleet import align, build_fleet, mean_lengths

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
            fleet = build_fleet(wanted, mean_lengths(wanted, trace, history))
            found["options"] = len(fleet.options)
    if as_json:
        echo_json({"valid": True, "file": path, **found})
    else:
        facts = ", ".join(
            f"{value} {key}" for key, value in found.items() if key != "kind"
        )
        click.echo(f"{path}: valid {found['kind']} ({facts})")


@click.group(epilog="Example: plan catalog show llama-3.1-8b")
def catalog() -> None:
    """LLMs and GPU types that are known by name."""


@catalog.command("list", epilog="Example: plan catalog list --json")
@json_option
def list_catalog(as_json: bool) -> None:
    """All LLMs and GPU types."""
    from rich.table import Table

    from foreserve.models.catalog import gpus, llms

    llm_rows = [
        {
            "name": llm.name,
            "params": llm.params,
            "active_params": llm.active_params,
            "weights_gib": round(llm.weight_bytes / 2**30, 2),
            "kv_kib_per_token": round(llm.kv_bytes_per_token_per_gpu(1) / 2**10, 1),
            "tp": list(llm.tp),
        }
        for llm in llms()
    ]
    gpu_rows = [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.memory_bytes / 2**30, 1),
            "hbm_tb_per_s": gpu.hbm_bytes_per_s / 1e12,
            "bf16_tflop_per_s": gpu.bf16_flop_per_s / 1e12,
            "price_usd_per_h": gpu.price_usd_per_h,
        }
        for gpu in gpus()
    ]
    if as_json:
        echo_json({"llms": llm_rows, "gpus": gpu_rows})
        return
    out, _ = consoles(quiet=False)
    for title, rows in (("LLMs", llm_rows), ("GPU types", gpu_rows)):
        table = Table(title=title, title_justify="left", box=None)
        for key in rows[0]:
            table.add_column(key, justify="left" if key == "name" else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        out.print(table)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


@catalog.command("show", epilog="Example: plan catalog show h100 --json")
@click.argument("name")
@json_option
def show_catalog(name: str, as_json: bool) -> None:
    """One LLM or GPU type, with the source of each number."""
    from foreserve.models import catalog as known
    from foreserve.models.codec import did_you_mean, to_json

    items: dict[str, ModelSpec | GpuType] = {llm.name: llm for llm in known.llms()}
    items |= {gpu.name: gpu for gpu in known.gpus()}
    if name not in items:
        hint = did_you_mean(name, list(items))
        raise InvalidInput(f"{name!r} is not in the catalogue", hint=hint)
    item = items[name]
    if as_json:
        click.echo(to_json(item), nl=False)
        return
    plain = json.loads(to_json(item))
    sources = plain.pop("sources")
    width = max(map(len, plain))
    for key, value in plain.items():
        source = sources.get(key, "")
        shown = value if isinstance(value, str) else json.dumps(value)
        click.echo(f"{key:<{width}}  {shown}" + (f"  [{source}]" if source else ""))
    if "default" in sources:
        click.echo(f"source of the rest: {sources['default']}")


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
    return f"{value:,.4g}" if isinstance(value, float) else _cell(value)
