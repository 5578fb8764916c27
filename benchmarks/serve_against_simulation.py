"""What `plan serve` measures against what `plan simulate` predicts: one plan, one trace.

    PYTHONPATH=. python benchmarks/serve_against_simulation.py [--minutes 5] [--hour 9]

Hours of the large day of `instances/day.py` (16 LLMs, 32 A100 in four nodes) pass sixty
times as fast, one request in sixty: rates are those of the day, and change as quickly as
minutes. Each epoch of 15 s is planned from the one before. `plan serve` follows that plan
with simulated engines at their real pace, mode observe, while this process sends the
requests over HTTP, streamed, as token ids, ready to wait. Then `plan simulate` runs the
same plan on the requests at the times at which the gateway says it got them. Delays are
the gateway's. Needs the data folder beside the repository.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from os import getloadavg
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import aiohttp
import click
import numpy as np
from benchmarks.instances.day import large
from record import write_result

from foreserve.models.codec import to_json
from foreserve.planner.fleet import align, request_lengths
from foreserve.planner.pipeline import plan_trace
from foreserve.planner.scenario import Scenario
from foreserve.traces.trace import Trace

FASTER = 60
EPOCH_S = 15.0
FIRST_S = 30.0
"""From the start of the cluster's clock to the first request: all is in place by then."""
QUANTILES = (0.5, 0.9, 0.99)


def thinned(
    trace: Trace, hour: float, minutes: float, rng: np.random.Generator
) -> Trace:
    """The requests of the window, sixty times as fast, one in sixty."""
    begin_s = hour * 3600.0
    window = trace.between(begin_s, begin_s + minutes * 60.0 * FASTER)
    chosen = window.take(rng.random(len(window)) < 1 / FASTER)
    return replace(chosen, arrival_s=(chosen.arrival_s - begin_s) / FASTER)


async def play(trace: Trace, port: int, start_s: float) -> Counter[str]:
    """Send every request when it is due, and read its answer: outcomes by kind."""
    seen: Counter[str] = Counter()
    timeout = aiohttp.ClientTimeout(total=300.0)
    connector = aiohttp.TCPConnector(limit=0)
    patient = {"x-foreserve-max-wait": "300"}
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=patient
    ) as session:

        async def one(row: int) -> None:
            body = {
                "model": trace.llms[trace.llm[row]],
                "prompt": [1] * int(trace.input_tokens[row]),
                "max_tokens": int(trace.output_tokens[row]),
                "stream": True,
            }
            url = f"http://127.0.0.1:{port}/v1/completions"
            try:
                async with session.post(url, json=body) as answer:
                    data = await answer.read()
                    whole = answer.status == 200 and data.endswith(b"[DONE]\n\n")
                    seen["ok" if whole else f"{answer.status}"] += 1
            except (aiohttp.ClientError, TimeoutError) as error:
                seen[type(error).__name__] += 1

        tasks = []
        for row in range(len(trace)):
            due_s = start_s + float(trace.arrival_s[row]) - monotonic()
            if due_s > 0:
                await asyncio.sleep(due_s)
            tasks.append(asyncio.create_task(one(row)))
        await asyncio.gather(*tasks)
    return seen


def served(scenario: Scenario, plan: str, trace: Trace, folder: Path) -> dict[str, Any]:
    """Outcomes and the journal's path of a run of `plan serve`."""
    (folder / "plan.json").write_text(plan)
    (folder / "scenario.json").write_text(to_json(scenario))
    words = "serve --scenario scenario.json --plan plan.json --mode observe --port 0"
    words += " --engine simulated --state st"
    process = subprocess.Popen(
        [sys.executable, "-m", "foreserve", *words.split()], cwd=folder
    )
    about = folder / "st/admin.json"
    while not about.exists():
        Event().wait(0.1)
        if process.poll() is not None:
            raise SystemExit("plan serve has ended")
    port = json.loads(about.read_text())["port"]
    seen = asyncio.run(play(trace, port, monotonic() + FIRST_S))
    process.send_signal(signal.SIGTERM)
    process.wait(60.0)
    return dict(seen)


def quantiles(delays_s: list[float]) -> dict[str, float]:
    return {
        f"p{100 * q:g}_s": round(float(np.quantile(delays_s, q)), 4) for q in QUANTILES
    } | {"mean_s": round(float(np.mean(delays_s)), 4)}


def ends(path: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, path.read_text().splitlines())
    return [line for line in lines if line["event"] == "request"]


def ttft(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the requests that were answered, in all and by LLM."""
    done = [r for r in rows if r["first_token_s"] is not None]
    by_llm = {
        llm: quantiles(
            [r["first_token_s"] - r["arrival_s"] for r in done if r["llm"] == llm]
        )
        for llm in sorted({r["llm"] for r in done})
    }
    every = quantiles([r["first_token_s"] - r["arrival_s"] for r in done])
    return {"requests": len(rows), "answered": len(done), **every, "by_llm": by_llm}


@click.command()
@click.option("--minutes", default=5.0)
@click.option("--hour", default=9.0)
@click.option("--shared", default="../shared", type=click.Path(path_type=Path))
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the files here.")
def main(minutes: float, hour: float, shared: Path, keep: Path | None) -> None:
    scenario, day, _ = large(shared)
    whole = align(day, tuple(llm.name for llm in scenario.models))
    trace = thinned(whole, hour, minutes, np.random.default_rng(0))
    scenario = replace(
        scenario,
        epoch=EPOCH_S,
        forecast=replace(scenario.forecast, method="last"),
        solver=replace(scenario.solver, name="scale", time_limit=2.0),
        models=tuple(
            replace(
                part,
                input_tokens=lengths.mean_input,
                output_tokens=lengths.mean_output,
            )
            for part, lengths in zip(
                scenario.models,
                request_lengths(scenario, whole, None).values(),
                strict=True,
            )
        ),
    )
    # The plan's first epochs are over before the first request comes.
    ahead = replace(trace, arrival_s=trace.arrival_s + FIRST_S)
    planned = plan_trace(scenario, ahead)
    folder = keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    load = getloadavg()
    outcomes = served(scenario, to_json(planned.plan), trace, folder)
    real = ends(folder / "st/journal.jsonl")
    words = "simulate plan.json --trace st/journal.jsonl --policy planned"
    words += " --journal simulated.jsonl --quiet"
    subprocess.run(
        [sys.executable, "-m", "foreserve", *words.split()], cwd=folder, check=True
    )
    found = {
        "outcomes": outcomes,
        "serve": ttft(real),
        "simulate": ttft(ends(folder / "simulated.jsonl")),
        "load_average": [load, getloadavg()],
        "minutes": minutes,
        "hour": hour,
    }
    write_result("serve_against_simulation", found)
    for name in ("serve", "simulate"):
        row = {k: v for k, v in found[name].items() if k != "by_llm"}
        click.echo(f"{name}: {row}")
    click.echo(f"outcomes: {outcomes}")


if __name__ == "__main__":
    main()
