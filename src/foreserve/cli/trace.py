"""`plan trace`: look at requests, and make traces."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import click

from foreserve.cli.common import consoles, echo_json, json_option, read_traces
from foreserve.cli.compose import compose, synth


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


trace.add_command(compose)
trace.add_command(synth)
