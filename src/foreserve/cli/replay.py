"""`plan simulate validate`: recorded runs and cases against the simulated engine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from foreserve.cli.common import (
    check_picture,
    compile_simulator,
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    quiet_option,
)
from foreserve.cli.perf import corrections_option, read_corrections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foreserve.models.cost import IterationTime
    from foreserve.planner.tables import Part

    _Found = tuple[dict[str, Any], list[Part]]
    """The JSON document, and the tables for people."""


@click.command(
    epilog="Example: plan simulate validate --run run_requests.csv.gz --meta run_meta.json"
)
@click.option(
    "--run",
    "requests",
    metavar="REQUESTS.csv.gz",
    help="input_tokens, output_tokens, queued_s, first_token_s, last_token_s per request.",
)
@click.option(
    "--meta",
    metavar="META.json",
    help="gpu, model, and engine_kwargs as vLLM names them.",
)
@click.option(
    "--profile",
    metavar="FOLDER",
    help="Layer times of this GPU and LLM, to correct the cost model by.",
)
@click.option(
    "--pilot",
    metavar="FOLDER",
    help="Instead of --run: closed-loop cases, with the columns of llm_pilot.",
)
@click.option(
    "--llm", "llms", multiple=True, metavar="NAME", help="Only this LLM's cases."
)
@click.option(
    "--gpu", "gpus", multiple=True, metavar="NAME", help="Only cases on this."
)
@corrections_option
@click.option(
    "--picture",
    metavar="FILE.svg|png|pdf",
    help="Draw running, waiting and KV cache over time, or throughput by users.",
)
@quiet_option
@json_option
def validate(
    requests: str | None,
    meta: str | None,
    profile: str | None,
    pilot: str | None,
    llms: tuple[str, ...],
    gpus: tuple[str, ...],
    corrections: str | None,
    picture: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Replay what a real engine did and compare what came of it.

    With --run and --meta: one run, request by request. The cost model is corrected by
    measurements of other runs or of single layers, never by the run itself; memory is
    what the memory model says the engine had.

    With --pilot: cases in which so many users each send the next request when the last
    one has ended. The case with the fewest users calibrates, all others are predicted.
    """
    check_picture(picture)
    silent = quiet or as_json
    if pilot and not (requests or meta or profile or corrections):
        document, parts = _cases(pilot, llms, gpus, picture, silent)
    elif requests and meta and not (pilot or llms or gpus):
        document, parts = _run(requests, meta, profile, corrections, picture, silent)
    else:
        raise click.UsageError(
            "either --run and --meta (with --profile or --corrections), "
            "or --pilot (with --llm and --gpu)"
        )
    if as_json:
        echo_json(document)
        return
    out, _ = consoles(quiet)
    print_parts(out, parts)
    if picture:
        out.print(f"[dim]curves: {picture}[/]")


def _run(
    requests: str,
    meta: str,
    profile: str | None,
    corrections: str | None,
    picture: str | None,
    silent: bool,
) -> _Found:
    """One recorded run."""
    from foreserve.models.perf.compact import compact
    from foreserve.planner import recorded_runs
    from foreserve.runtime.simulated.engine import EngineLimits
    from foreserve.runtime.simulated.replay import replay

    run = recorded_runs.read_run(
        requests, meta, profile=profile, corrections=read_corrections(corrections)
    )
    limits = EngineLimits(
        max_num_batched_tokens=run.max_num_batched_tokens, max_num_seqs=run.max_num_seqs
    )
    rows = list(
        zip(
            run.queued_s.tolist(),
            run.input_tokens.astype(int).tolist(),
            run.output_tokens.astype(int).tolist(),
            strict=True,
        )
    )
    compile_simulator(silent)
    with progress_bar("replaying", silent) as update:
        found = replay(
            compact(run.timing),
            run.kv_tokens,
            limits,
            rows,
            replicas=run.replicas,
            progress=update,
        )
    compared = recorded_runs.compare(run, found.first_token_s, found.end_s)
    if picture:
        timeline = {
            name: getattr(found, name)
            for name in ("t_s", "running", "waiting", "kv_used")
        }
        recorded_runs.draw(run, timeline, picture)
    source = run.timing.corrections.source
    document = {
        "run": run.name,
        "requests": len(rows),
        "replicas": run.replicas,
        "kv_tokens": run.kv_tokens,
        "preemptions": found.preemptions,
        "corrections": source,
        "compared": [
            {
                **row._asdict(),
                "error": row.error,
                "target": recorded_runs.TARGETS.get(row.metric),
            }
            for row in compared
        ],
    }
    note = (
        f"{len(rows)} requests, {run.replicas} engine(s) of {run.kv_tokens:,} KV tokens, "
        f"{found.preemptions} preemptions; cost model: {source}"
    )
    return document, [recorded_runs.table(compared, run.name, note)]


def _cases(
    folder: str,
    llms: tuple[str, ...],
    gpus: tuple[str, ...],
    picture: str | None,
    silent: bool,
) -> _Found:
    """Closed-loop cases."""
    from foreserve.planner import recorded_pilot

    compile_simulator(silent)
    with progress_bar("simulating cases", silent) as update:
        cases, left_out = recorded_pilot.validate_pilot(
            folder, _play, llms=llms, gpus=gpus, progress=update
        )
    if picture:
        recorded_pilot.draw_pilot(cases, picture)
    document = {
        "folder": folder,
        "cases": [{**asdict(case), "error": case.error} for case in cases],
        "errors": recorded_pilot.pilot_errors(cases),
        "target": recorded_pilot.TARGET,
        "left_out": left_out,
    }
    return document, recorded_pilot.pilot_parts(cases, left_out, folder)


def _play(
    time: IterationTime,
    lengths: Sequence[tuple[int, int]],
    users: int,
    duration_s: float,
) -> float:
    from foreserve.runtime.simulated.engine import EngineLimits
    from foreserve.runtime.simulated.replay import closed_loop

    rate, _ = closed_loop(
        time,
        # No case without errors was short of memory: requests are short.
        1_000_000,
        EngineLimits(mixes=False),
        lengths,
        users=users,
        duration_s=duration_s,
    )
    return rate
