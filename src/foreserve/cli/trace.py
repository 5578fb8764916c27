"""`plan trace`: look at requests, and make traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import click

from foreserve.cli.common import (
    check_parent,
    consoles,
    echo_json,
    file_digest,
    json_option,
    progress_bar,
    quiet_option,
    sample,
)
from foreserve.cli.compose import compose, synth
from foreserve.models.errors import InvalidInput

COUNTED = ("rows", "dropped", "series", "windows")

from_option = click.option(
    "--from",
    "kind",
    metavar="FORMAT",
    help="Format of the sources; else told by headers.",
)
llm_option = click.option(
    "--llm",
    metavar="NAME",
    help="Whose requests they are, where the source has no name.",
)
failed_option = click.option(
    "--keep-failed", is_flag=True, help="Keep failed requests, with one token."
)


@click.group(epilog="Example: plan trace info sample:azure-2023")
def trace() -> None:
    """Look at traces, convert them, and make new ones."""


@trace.command("info", epilog="Example: plan trace info requests.csv.gz --json")
@click.argument("traces", nargs=-1, required=True)
@from_option
@llm_option
@failed_option
@json_option
def info(
    traces: tuple[str, ...],
    kind: str | None,
    llm: str | None,
    keep_failed: bool,
    as_json: bool,
) -> None:
    """Requests, rates, lengths and burstiness per LLM."""
    from rich.table import Table

    from foreserve.traces.formats import read_trace
    from foreserve.traces.info import describe
    from foreserve.traces.trace import merge

    found = describe(
        merge(
            [
                read_trace(sample(name), format=kind, llm=llm, keep_failed=keep_failed)
                for name in traces
            ]
        )
    )
    plain = asdict(found)
    if as_json:
        echo_json(plain)
        return
    out, _ = consoles(quiet=False)
    rows = plain.pop("llms")
    out.print(", ".join(f"{key}: {_number(value)}" for key, value in plain.items()))
    table = Table(box=None, padding=(0, 1, 0, 0))
    narrow = ("_p90", "_share")  # are left out, for a narrow terminal
    shown = [key for key in rows[0] if not key.endswith(narrow)]
    for key in shown:
        label = key.replace("input_", "in ").replace("output_", "out ")
        justify: Literal["left", "right"] = "left" if key == "llm" else "right"
        table.add_column(label.replace("_", " "), justify=justify, no_wrap=key == "llm")
    for row in rows:
        table.add_row(*(_number(row[key]) for key in shown))
    out.print(table)
    if shares := [
        f"{llm.llm} {llm.prefix_share:.1%}"
        for llm in found.llms
        if llm.prefix_share is not None
    ]:
        out.print(
            "Input tokens that a prefix cache without limits would find (no real one "
            f"finds more): {', '.join(shares)}"
        )
    if found.distinct_times < found.requests / 2:
        out.print(
            f"{found.requests:,} requests came at {found.distinct_times:,} times: the "
            "clock was coarse, so CVs and rates over short times say little."
        )


@trace.command(
    "convert", epilog="Example: plan trace convert BurstGPT_1.csv requests.csv.gz"
)
@click.argument("sources", nargs=-1, required=True)
@click.argument("out")
@click.option(
    "--format",
    "target",
    type=click.Choice(["canonical", "azure", "mooncake"]),
    default="canonical",
    show_default=True,
    help="Format to write.",
)
@from_option
@llm_option
@failed_option
@json_option
@quiet_option
def convert(
    sources: tuple[str, ...],
    out: str,
    target: str,
    kind: str | None,
    llm: str | None,
    keep_failed: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read requests or counts, and write them in another format.

    Requests of several sources are merged on one clock. OUT is CSV or JSONL (.gz) or
    Parquet, by its name; counts become a rate table. OUT.meta.json says what it is from.
    """
    from foreserve.traces.formats import write_meta
    from foreserve.traces.rates import is_rates

    check_parent(out)
    paths = [sample(name) for name in sources]
    if Path(out).exists() and any(
        Path(out).samefile(path) for path in paths if path.exists()
    ):
        raise InvalidInput("is a source, and would be overwritten", file=out)
    if kind is None and any([is_rates(path) for path in paths]):
        found = _convert_counts(paths, out, target)
    else:
        options = {"format": kind, "llm": llm, "keep_failed": keep_failed}
        found = _convert_requests(paths, out, target, options, quiet or as_json)
    write_meta(out, found)
    if as_json:
        echo_json(found)
        return
    console, _ = consoles(quiet)
    for source in found["sources"]:
        numbers = [f"{source[key]:,} {key}" for key in COUNTED if key in source]
        console.print(f"{source['file']}: {source['format']}, {', '.join(numbers)}")
    console.print(f"{out}: {target}, {found['rows']:,} rows")
    for lost in found["lost"]:
        console.print(f"not kept: {lost}")


def _convert_counts(paths: Sequence[Path], out: str, target: str) -> dict[str, Any]:
    from foreserve.traces.rates import read_rates, write_rates
    from foreserve.traces.writers import check_target

    if len(paths) > 1:
        raise InvalidInput("counts are converted one by one", file=str(paths[1]))
    if target != "canonical":
        raise InvalidInput(
            f"holds counts, which the format {target} cannot",
            file=str(paths[0]),
            hint="without --format it becomes a rate table",
        )
    check_target(out, "rates")
    rates = read_rates(paths[0])
    facts = {
        "format": "counts",
        "series": len(rates.names),
        "windows": rates.num_windows,
    }
    return {
        "sources": [_source(paths[0], facts)],
        "rows": write_rates(rates, out),
        "lost": [],
    }


def _convert_requests(
    paths: Sequence[Path],
    out: str,
    target: str,
    options: Mapping[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    from foreserve.traces.formats import open_trace, read_meta
    from foreserve.traces.writers import check_target, merge_rows, write_rows

    check_target(out, target)
    with progress_bar("convert", quiet) as update:
        done = dict.fromkeys(range(len(paths)), 0)
        readings = []
        for index, path in enumerate(paths):

            def watch(bytes_read: int, index: int = index) -> None:
                done[index] = bytes_read
                update(sum(done.values()), max(total, 1))

            readings.append(open_trace(path, watch=watch, **options))
        total = sum(path.stat().st_size for path in paths)
        chunks = [reading.chunks for reading in readings]
        merged = merge_rows(chunks) if len(chunks) > 1 else chunks[0]
        first = next(merged)  # with it the date of second 0 is read, if there is one
        start = None
        if len(paths) == 1:
            start = readings[0].start or read_meta(paths[0]).get("start")
        written = write_rows(
            chain([first], merged),
            out,
            target,
            start=start,
            gzip_level=6,  # half the time of 9, for 1.5 % more bytes
        )
    lost = written.lost(target)
    for path, reading in zip(paths, readings, strict=True):
        if len(readings) > 1 and reading.format == "azure":
            lost.append(f"the date at which {path.name} begins: all begin at 0")
        lost += [f"column {column!r} of {path.name}" for column in reading.left_out]
    return {
        "start": start,
        "sources": [
            _source(
                path,
                {"format": r.format, "rows": r.read, "dropped": r.dropped},
            )
            for path, r in zip(paths, readings, strict=True)
        ],
        "rows": written.rows,
        "lost": lost,
    }


def _source(path: Path, facts: Mapping[str, object]) -> dict[str, object]:
    """What the sidecar says of a source; what its own sidecar says goes with it."""
    from foreserve.traces.formats import read_meta

    found: dict[str, object] = {"file": path.name, **facts}
    if path.is_file():
        found["sha256"] = file_digest(path)
    if meta := read_meta(path):
        found["meta"] = meta
    return found


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


trace.add_command(compose)
trace.add_command(synth)
