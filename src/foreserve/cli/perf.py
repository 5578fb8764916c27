"""`plan perf`: what the cost model says, how far off it is, and fitting it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import (
    check_parent,
    check_picture,
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    quiet_option,
    read_scenario,
    read_traces,
)
from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from foreserve.models.lengths import Lengths
    from foreserve.models.perf.measured import Corrections
    from foreserve.planner.perf_calibration import Calibration, Served

corrections_option = click.option(
    "--corrections",
    metavar="FILE.json",
    help="Corrections of your own, as `plan perf calibrate` writes them.",
)


@click.group(epilog="Example: plan perf show llama-3.1-8b --gpu h100 --tp 1")
def perf() -> None:
    """Iteration times, capacity, memory and loading: estimates with their errors."""


@perf.command(epilog="Example: plan perf show ./config.json --gpu h100 --tp 4")
@click.argument("llm", metavar="LLM|config.json")
@click.option("--gpu", required=True, help="GPU type, e.g. h100.")
@click.option("--tp", type=int, default=1, show_default=True, help="GPUs it spans.")
@click.option(
    "--ep",
    type=int,
    default=1,
    show_default=True,
    help="Of these, GPUs that share out the experts.",
)
@click.option(
    "--engine",
    type=click.Choice(["vllm", "trtllm", "sglang"]),
    default="vllm",
    show_default=True,
)
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp8", "fp8_block", "int4", "nvfp4", "mxfp4"]),
    help="Weight type, if not as published.",
)
@click.option(
    "--input-tokens", type=click.FloatRange(1), default=1024, show_default=True
)
@click.option(
    "--output-tokens", type=click.FloatRange(1), default=256, show_default=True
)
@click.option(
    "--ttft",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    help="TTFT target, seconds.",
)
@click.option(
    "--tpot",
    type=click.FloatRange(0, min_open=True),
    default=0.1,
    show_default=True,
    help="TPOT target, seconds.",
)
@click.option(
    "--trace",
    metavar="FILE|sample:NAME",
    help="Take lengths from these requests (the LLM's own, if it is among them).",
)
@click.option("--picture", metavar="FILE.svg|png|pdf", help="Draw the curves.")
@corrections_option
@json_option
def show(
    llm: str,
    gpu: str,
    tp: int,
    ep: int,
    engine: str,
    dtype: str | None,
    input_tokens: float,
    output_tokens: float,
    ttft: float,
    tpot: float,
    trace: str | None,
    picture: str | None,
    corrections: str | None,
    as_json: bool,
) -> None:
    """What one replica takes: prefill, decode, capacity, memory, loading.

    LLM is a name of the catalogue, or the path of a config.json. Every estimate comes
    with the interval that covers nine measurements in ten; a star marks what lies
    outside the measurements.
    """
    from foreserve.models import catalog
    from foreserve.models.specs import Slo
    from foreserve.planner.perf_sheet import draw_sheet, make_sheet

    check_picture(picture)
    spec = catalog.llm(llm)
    if dtype is not None and dtype != spec.weight_dtype:
        spec = spec.quantised(dtype)  # type: ignore[arg-type]
    if tp not in spec.tp:
        raise InvalidInput(
            f"{spec.name} does not run at TP {tp}",
            field="tp",
            hint=f"it runs at {', '.join(map(str, spec.tp))}",
        )
    if ep < 1 or tp % ep or (ep > 1 and spec.moe is None):
        raise InvalidInput(
            f"EP {ep} does not divide TP {tp}, or the LLM has no experts", field="ep"
        )
    sheet = make_sheet(
        spec,
        catalog.gpu(gpu),
        tp,
        ep=ep,
        engine=engine,
        slo=Slo(ttft_s=ttft, tpot_s=tpot),
        lengths=_lengths(trace, spec.name, input_tokens, output_tokens),
        corrections=read_corrections(corrections),
    )
    if picture:
        draw_sheet(sheet, picture)
    if as_json:
        echo_json(sheet.plain())
        return
    out, _ = consoles(quiet=False)
    out.print(f"[bold]{sheet.title}[/]\n[dim]{sheet.source}[/]")
    print_parts(out, sheet.parts)
    if picture:
        out.print(f"[dim]curves: {picture}[/]")


def _lengths(
    trace: str | None, llm: str, input_tokens: float, output_tokens: float
) -> Lengths:
    """Of the trace's requests to the LLM, else of all, else as stated."""
    from foreserve.models.lengths import Lengths

    if trace is None:
        return Lengths.fixed(input_tokens, output_tokens)
    requests = read_traces([trace], {})
    rows = slice(None)
    if llm in requests.llms:
        rows = requests.llm == requests.llms.index(llm)
    return Lengths.of_requests(
        requests.input_tokens[rows], requests.output_tokens[rows]
    )


@perf.command(epilog="Example: plan perf validate --json > errors.json")
@click.option(
    "--data",
    metavar="FILE.csv|FOLDER",
    help="Closed-loop runs with the columns of silicon_e2e, or a folder of data sets; "
    "without it, the measurements that the package ships.",
)
@click.option(
    "--picture", metavar="FILE.svg|png|pdf", help="Draw predicted against measured."
)
@click.option("--markdown", metavar="FILE.md", help="Write the table of all errors.")
@corrections_option
@quiet_option
@json_option
def validate(
    data: str | None,
    picture: str | None,
    markdown: str | None,
    corrections: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare the cost model with measurements that it was not fitted to.

    Corrections are refitted leaving out the (GPU, LLM) pair that is predicted; the other
    parts were not fitted to anything that is shown.
    """
    from foreserve.models.codec import write_text
    from foreserve.planner.perf_report import Validation, draw, markdown_table, run

    check_picture(picture)
    check_parent(markdown)
    own = read_corrections(corrections)
    with progress_bar("comparing", quiet or as_json) as update:
        found: Validation = run(data, own, update)
    if picture:
        draw(found, picture)
    if markdown:
        write_text(markdown, markdown_table(found))
    if as_json:
        echo_json(found.plain())
        return
    out, _ = consoles(quiet)
    print_parts(out, found.tables())
    for path in filter(None, (picture, markdown)):
        out.print(f"[dim]wrote {path}[/]")


@perf.command(epilog="Example: plan perf calibrate --from runs.csv --output mine.json")
@click.option(
    "--from",
    "source",
    required=True,
    metavar="FILE.csv|JOURNAL.jsonl.gz",
    help="Closed-loop runs with the columns of silicon_e2e, or a run's journal.",
)
@click.option(
    "--scenario", metavar="FILE.yaml", help="The scenario of the journal's run."
)
@click.option("--output", default="corrections.json", show_default=True)
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@quiet_option
@json_option
def calibrate(
    source: str,
    scenario: str | None,
    output: str,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fit the corrections to your own measurements; --corrections uses them elsewhere."""
    from foreserve.models.codec import write_text

    check_parent(output)
    if Path(output).exists() and not force:
        raise InvalidInput("the file exists", file=output, hint="--force overwrites it")
    journal = ".jsonl" in Path(source).suffixes
    with progress_bar("fitting", quiet or as_json) as update:
        if journal:
            if scenario is None:
                raise InvalidInput(
                    "a journal does not say which LLMs and GPUs it is about",
                    file=source,
                    hint="name its scenario with --scenario",
                )
            found = _calibrate_journal(source, scenario)
        else:
            found = _calibrate_runs(source, update)
    document = {
        "corrections": {
            name: asdict(known) for name, known in found.corrections.items()
        },
        "runs": found.runs,
        "groups": found.groups,
        "median_error_before": found.before,
        "median_error_after": found.after,
        "median_error_held_out": found.held_out,
    }
    write_text(output, json.dumps(document, indent=1, sort_keys=True) + "\n")
    if as_json:
        echo_json({**document, "output": output})
        return
    out, _ = consoles(quiet)
    _print_calibration(out, found, output)


def _print_calibration(out: Console, found: Calibration, output: str) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("median error", "before", "after", "held out"):
        table.add_column(
            column, justify="left" if column == "median error" else "right"
        )
    for metric in ("tpot", "ttft"):
        held_out = found.held_out.get(metric)
        table.add_row(
            metric.upper(),
            f"{found.before[metric]:.1%}",
            f"{found.after[metric]:.1%}",
            "-" if held_out is None else f"{held_out:.1%}",
        )
    out.print(f"{found.runs} measurements of {found.groups} groups")
    out.print(table)
    for engine, known in found.corrections.items():
        out.print(
            f"{engine}: kernels x {known.kernel_factor:g}, prefill x "
            f"{known.prefill_factor:g}, {known.layer_s * 1e6:.3g} us a layer, "
            f"{known.step_s * 1e3:.3g} ms a step, {known.request_s * 1e3:.3g} ms a request"
        )
    if not found.held_out:
        out.print("[dim]one group only: the error on others is not known[/]")
    out.print(f"[dim]wrote {output}; use it with --corrections {output}[/]")


def _calibrate_runs(source: str, update: Any) -> Calibration:
    from foreserve.planner.deployments import read_deployments
    from foreserve.planner.perf_calibration import calibrate_deployments

    runs = read_deployments(source).deployments
    total = max(1, len(runs))
    return calibrate_deployments(runs, progress=lambda done: update(done, total))


def _calibrate_journal(source: str, scenario: str) -> Calibration:
    from foreserve.models.perf.measured import MeasuredTiming
    from foreserve.models.perf.model import Measured
    from foreserve.models.specs import GpuId
    from foreserve.planner.perf_calibration import calibrate_requests

    wanted = read_scenario(scenario)
    specs = {part.name: part.model_spec() for part in wanted.models}
    cluster = wanted.cluster.cluster()

    def timing(replica: tuple[str, tuple[str, ...]]) -> MeasuredTiming:
        llm, gpus = replica
        if llm not in specs:
            raise InvalidInput(
                f"LLM {llm!r} is not in the scenario", file=source, field="llm"
            )
        ids = [GpuId.parse(gpu) for gpu in gpus]
        if not ids or not all(cluster.has(gpu) for gpu in ids):
            raise InvalidInput(
                f"GPUs {', '.join(gpus)} are not in the scenario's cluster",
                file=source,
                field="gpus",
            )
        found = Measured().timing(specs[llm], cluster.type_of(ids[0]), len(ids))
        if found is None:
            raise InvalidInput(
                f"GPU type {cluster.type_of(ids[0]).name!r} has no kernel tables"
            )
        return found

    return calibrate_requests(timing, _served(source))


def _served(source: str) -> list[Served]:
    """Finished requests of a journal."""
    from foreserve.planner.perf_calibration import Served
    from foreserve.runtime.journal import RequestEnd, read_journal

    return [
        Served(
            replica=(event.llm, tuple(map(str, event.gpus))),
            arrival_s=event.arrival_s,
            first_token_s=event.first_token_s,
            end_s=event.at_s,
            input_tokens=event.input_tokens,
            output_tokens=event.output_tokens,
        )
        for event in read_journal(source)
        if isinstance(event, RequestEnd)
        and event.result == "finished"
        and event.first_token_s is not None
        and event.gpus
    ]


def read_corrections(path: str | None) -> dict[str, Corrections] | None:
    if path is None:
        return None
    from foreserve.models.codec import read_text, structure
    from foreserve.models.perf.measured import Corrections

    text = read_text(path)
    try:
        plain = json.loads(text)
        engines = dict(plain["corrections"])
    except (ValueError, KeyError, TypeError):
        raise InvalidInput(
            "not a file of corrections",
            file=path,
            hint="`plan perf calibrate` writes one",
        ) from None
    return {
        str(engine): structure(Corrections, values, text="", file=path)
        for engine, values in engines.items()
    }
