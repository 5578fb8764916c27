"""`plan simulate validate`: a recorded run against the simulated engine."""

from __future__ import annotations

from typing import Any

import click

from foreserve.cli.common import (
    check_picture,
    consoles,
    echo_json,
    json_option,
    print_parts,
    progress_bar,
    quiet_option,
)
from foreserve.cli.perf import corrections_option, read_corrections


@click.command(
    epilog="Example: plan simulate validate --run run_requests.csv.gz --meta run_meta.json"
)
@click.option(
    "--run",
    "requests",
    required=True,
    metavar="REQUESTS.csv.gz",
    help="input_tokens, output_tokens, queued_s, first_token_s, last_token_s per request.",
)
@click.option(
    "--meta",
    required=True,
    metavar="META.json",
    help="gpu, model, and engine_kwargs as vLLM names them.",
)
@click.option(
    "--profile",
    metavar="FOLDER",
    help="Layer times of this GPU and LLM, to correct the cost model by.",
)
@corrections_option
@click.option(
    "--picture",
    metavar="FILE.svg|png|pdf",
    help="Draw running, waiting and KV cache, recorded and simulated.",
)
@quiet_option
@json_option
def validate(
    requests: str,
    meta: str,
    profile: str | None,
    corrections: str | None,
    picture: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Replay a recorded run of an engine and compare what came of it.

    The cost model is corrected by measurements of other runs or of single layers, never
    by the run itself. Memory is what the memory model says the engine had.
    """
    from foreserve.models.perf.compact import compact
    from foreserve.planner import recorded_runs
    from foreserve.runtime.simulated.engine import EngineLimits
    from foreserve.runtime.simulated.replay import replay

    check_picture(picture)
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
    with progress_bar("replaying", quiet or as_json) as update:
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
    if as_json:
        rows_json: list[dict[str, Any]] = [
            {
                **row._asdict(),
                "error": row.error,
                "target": recorded_runs.TARGETS.get(row.metric),
            }
            for row in compared
        ]
        echo_json(
            {
                "run": run.name,
                "requests": len(rows),
                "replicas": run.replicas,
                "kv_tokens": run.kv_tokens,
                "preemptions": found.preemptions,
                "corrections": source,
                "compared": rows_json,
            }
        )
        return
    out, _ = consoles(quiet)
    note = (
        f"{len(rows)} requests, {run.replicas} engine(s) of {run.kv_tokens:,} KV tokens, "
        f"{found.preemptions} preemptions; cost model: {source}"
    )
    print_parts(out, [recorded_runs.table(compared, run.name, note)])
    if picture:
        out.print(f"[dim]curves: {picture}[/]")
