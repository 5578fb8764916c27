"""What `plan serve` measures against what `plan simulate` predicts: one plan, one trace.

    export PYTHONPATH=.
    for hour in $(seq 1 19); do
        python benchmarks/serve_against_simulation.py predict $hour out
    done
    python benchmarks/serve_against_simulation.py choose out
    python benchmarks/serve_against_simulation.py serve 9 out

Five hours of the large day of `instances/day.py` (16 LLMs, 32 A100 in four nodes) pass
sixty times as fast, one request in sixty: rates are those of the day, and change as quickly
as minutes. Each epoch of 15 s is planned from the one before; the plan has seen the half
minute before the window.

``predict`` plans the window from one hour on, and has `plan simulate` serve it with ten
seeds of load times. ``choose`` names windows by these predictions alone, before any is
served: where a plan can serve (`SERVES`), and ten seeds agree on what is to be compared
(`AGREE`), the one with most requests; the one with most requests of all; and the one that
is served worst. ``serve`` follows the plan with simulated engines at their real pace, mode
observe, and sends the requests when they are due on the cluster's clock, from a process of
its own, over HTTP, streamed, as token ids, ready to wait. What it plans meanwhile, and
does not use, is left to the quickest solver. Delays are the gateway's, but for those
said to be clients'. Needs the data folder beside the repository, but for ``serve``.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
import subprocess
import sys
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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

from foreserve.cli.common import read_traces
from foreserve.cli.simulate import KEEP_ALIVE_S, run_policy
from foreserve.models.codec import load_plan, to_json
from foreserve.models.observed import HOLDS_KV
from foreserve.models.plan import Plan
from foreserve.planner.fleet import align, request_lengths
from foreserve.planner.pipeline import plan_trace
from foreserve.planner.scenario import Scenario
from foreserve.traces.trace import Trace

FASTER = 60
MINUTES = 5.0
EPOCH_S = 15.0
FIRST_S = 30.0
"""Of the cluster's clock, until the first request: the plan's first epochs."""
SEEDS = 10
QUANTILES = (0.5, 0.9, 0.99)
ON_ITS_WAY_S = 0.2
"""From an order to the phase that shows it, at most."""
TAKES = HOLDS_KV | {"LOADING"}
Replica = tuple[str, tuple[str, ...]]
SERVES = 0.95
"""Attainment in the simulation of a window in which the plan is able to serve."""
AGREE = 1.15
"""Of ten seeds the largest P99 is at most so many times the least."""


def setting(shared: Path) -> tuple[Scenario, Trace]:
    """What is planned, and the whole day."""
    scenario, day, _ = large(shared)
    whole = align(day, tuple(llm.name for llm in scenario.models))
    lengths = request_lengths(scenario, whole, None)
    models = tuple(
        replace(
            part,
            input_tokens=lengths[part.name].mean_input,
            output_tokens=lengths[part.name].mean_output,
        )
        for part in scenario.models
    )
    return replace(
        scenario,
        epoch=EPOCH_S,
        forecast=replace(scenario.forecast, method="last"),
        solver=replace(scenario.solver, name="scale", time_limit=2.0),
        models=models,
    ), whole


def window(whole: Trace, hour: float) -> Trace:
    """Its requests on the cluster's clock, and those of the `FIRST_S` before it, which
    only the plan sees."""
    begin_s = hour * 3600.0 - FIRST_S * FASTER
    found = whole.between(begin_s, hour * 3600.0 + MINUTES * 60.0 * FASTER)
    chosen = found.take(np.random.default_rng(0).random(len(found)) < 1 / FASTER)
    return replace(chosen, arrival_s=(chosen.arrival_s - begin_s) / FASTER)


# --- the load -----------------------------------------------------------------------------


@dataclass(slots=True)
class Told:
    """What a client knows of its request, on its own clock."""

    outcome: str
    late_s: float
    """It was sent so long after it was due."""
    first_s: float | None = None
    """From sending it to the first piece of its answer."""


async def play(trace: Trace, port: int, start_s: float) -> list[Told]:
    """Send every request when it is due, and read its answer."""
    timeout = aiohttp.ClientTimeout(total=300.0)
    connector = aiohttp.TCPConnector(limit=0)
    patient = {"x-foreserve-max-wait": "300"}
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=patient
    ) as session:

        async def one(row: int, due_s: float) -> Told:
            body = {
                "model": trace.llms[trace.llm[row]],
                "prompt": [1] * int(trace.input_tokens[row]),
                "max_tokens": int(trace.output_tokens[row]),
                "stream": True,
            }
            sent_s = monotonic()
            told, last = Told("", sent_s - due_s), b""
            try:
                async with session.post(url, json=body) as answer:
                    async for part in answer.content.iter_any():
                        if told.first_s is None:
                            told.first_s = monotonic() - sent_s
                        last = (last + part)[-14:]
                    whole = answer.status == 200 and last == b"data: [DONE]\n\n"
                    told.outcome = "ok" if whole else f"{answer.status}"
            except (aiohttp.ClientError, TimeoutError) as error:
                told.outcome = type(error).__name__
            return told

        tasks = []
        for row in range(len(trace)):
            due_s = start_s + float(trace.arrival_s[row])
            if due_s > monotonic():
                await asyncio.sleep(due_s - monotonic())
            tasks.append(asyncio.create_task(one(row, due_s)))
        return await asyncio.gather(*tasks)


def cluster_s(about: Mapping[str, Any]) -> float:
    """The cluster's clock."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{about['admin_port']}/admin/v1/status",
        headers={"authorization": f"Bearer {about['token']}"},
    )
    with urllib.request.urlopen(request, timeout=10.0) as answer:
        return float(json.load(answer)["now_s"])


def served(trace: Trace, folder: Path) -> list[Told]:
    """What the clients of a run of `plan serve` were told."""
    words = "serve --scenario scenario.json --plan plan.json --mode observe --port 0"
    words += " --engine simulated --state st"
    process = subprocess.Popen(
        [sys.executable, "-m", "foreserve", *words.split()], cwd=folder
    )
    path = folder / "st/admin.json"
    while not path.exists():
        Event().wait(0.1)
        if process.poll() is not None:
            raise SystemExit("plan serve has ended")
    about = json.loads(path.read_text())
    tries = [(monotonic(), cluster_s(about), monotonic()) for _ in range(5)]
    before_s, now_s, after_s = min(tries, key=lambda t: t[2] - t[0])
    start_s = (before_s + after_s) / 2 - now_s
    if monotonic() - start_s > EPOCH_S:
        raise SystemExit("plan serve was not up before its first replicas were due")
    told = asyncio.run(play(trace, about["port"], start_s))
    process.send_signal(signal.SIGTERM)
    process.wait(60.0)
    return told


# --- what came of it ----------------------------------------------------------------------


def quantiles(delays_s: Iterable[float]) -> dict[str, float]:
    values = list(delays_s)
    found = {f"p{100 * q:g}_s": float(np.quantile(values, q)) for q in QUANTILES}
    found["mean_s"] = float(np.mean(values))
    return {name: round(value, 4) for name, value in found.items()}


def lines(path: Path, event: str) -> list[dict[str, Any]]:
    found = map(json.loads, path.read_text().splitlines())
    return [line for line in found if line["event"] == event]


def ttft(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the requests that were answered, in all and by LLM."""
    delays_s: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["first_token_s"] is not None:
            delays_s[row["llm"]].append(row["first_token_s"] - row["arrival_s"])
    every = [delay_s for own in delays_s.values() for delay_s in own]
    return {
        "requests": len(rows),
        "answered": len(every),
        **quantiles(every),
        "by_llm": {llm: quantiles(own) for llm, own in sorted(delays_s.items())},
    }


def effort(journal: Path) -> dict[str, Any]:
    """Phases that were entered, and how long loads and activations took."""
    entered: Counter[str] = Counter()
    since: dict[tuple[str, str], tuple[str, float]] = {}
    took_s: dict[str, list[float]] = defaultdict(list)
    for line in lines(journal, "phase"):
        key, phase = (line["llm"], str(line["gpus"])), line["phase"] or "gone"
        before, at_s = since.get(key, ("", 0.0))
        if (before, phase) in (("LOADING", "WARM"), ("ACTIVATING", "ACTIVE")):
            took_s[before].append(line["at_s"] - at_s)
        since[key] = phase, line["at_s"]
        entered[phase] += 1
    return {
        "entered": dict(sorted(entered.items())),
        "took": {phase: quantiles(own) for phase, own in sorted(took_s.items())},
    }


def promotions(state: Path) -> dict[str, Any]:
    """From a request that finds its LLM asleep, one of its replicas WARM, to the order that
    activates that one. ``free``: nobody else held KV memory on its GPUs, or loaded there,
    or was told to from then on; else others came first, or had to end first."""
    phases: dict[Replica, list[tuple[float, str | None]]] = defaultdict(list)
    for line in lines(state / "journal.jsonl", "phase"):
        key = line["llm"], tuple(line["gpus"])
        phases[key].append((line["at_s"], line["phase"]))
    arrivals: dict[str, list[float]] = defaultdict(list)
    for line in lines(state / "journal.jsonl", "request"):
        arrivals[line["llm"]].append(line["arrival_s"])
    orders = lines(state / "controller.log", "intent")

    def at(key: Replica, time_s: float) -> str | None:
        known = [phase for since_s, phase in phases[key] if since_s <= time_s]
        return known[-1] if known else None

    def served_until(llm: str, before_s: float) -> float:
        """When a replica of it was ACTIVE, or about to be, last; infinity: one is."""
        ends_s = [0.0]
        for (name, _), story in phases.items():
            past = (
                [step for step in story if step[0] <= before_s] if name == llm else []
            )
            for (_, phase), (end_s, _) in pairwise([*past, (math.inf, None)]):
                if phase in ("ACTIVATING", "ACTIVE"):
                    ends_s.append(end_s)
        return max(ends_s)

    waits_s: dict[str, list[float]] = {"free": [], "others": []}
    until_active_s = []
    for order in orders:
        if order["kind"] != "activate":
            continue
        key, ordered_s = (order["llm"], tuple(order["gpus"])), order["at_s"]
        asleep_s = served_until(key[0], ordered_s)
        came_s = [
            s
            for s in arrivals[key[0]]
            if asleep_s < s <= ordered_s and at(key, s) == "WARM"
        ]
        if not came_s:
            continue
        needed_s, gpus = min(came_s), set(key[1])
        rivals = [k for k in phases if k[0] != key[0] and gpus.intersection(k[1])]
        taken = any(at(k, needed_s) in TAKES for k in rivals) or any(
            other["kind"] in ("load", "activate")
            and other["llm"] != key[0]
            and needed_s - ON_ITS_WAY_S <= other["at_s"] <= ordered_s
            and gpus.intersection(other["gpus"])
            for other in orders
        )
        waits_s["others" if taken else "free"].append(ordered_s - needed_s)
        serves_s = [s for s, p in phases[key] if p == "ACTIVE" and s > ordered_s]
        if serves_s and not taken:
            until_active_s.append(serves_s[0] - needed_s)
    found: dict[str, Any] = {
        name: {"promotions": len(own), "most_s": round(max(own), 4), **quantiles(own)}
        for name, own in waits_s.items()
        if own
    }
    if until_active_s:
        found["free_until_active"] = quantiles(until_active_s)
    return found


def predicted(plan: Plan, trace: Trace, journal: Path) -> dict[str, Any]:
    """`plan simulate`: seed 0 with its journal, and the range over all seeds."""
    runs = [
        run_policy(
            plan,
            trace,
            "planned",
            seed,
            KEEP_ALIVE_S,
            None if seed else str(journal),
        ).outcome.total
        for seed in range(SEEDS)
    ]
    spread = {
        name: [
            round(value, 4)
            for value in sorted(getattr(run.ttft, name) for run in runs)[:: SEEDS - 1]
        ]
        for name in ("p50_s", "p90_s", "p99_s", "mean_s")
    }
    return {
        **ttft(lines(journal, "request")),
        "slo_attainment": round(runs[0].slo_attainment, 4),
        "least_and_most_of_seeds": spread,
        "effort": effort(journal),
    }


def choose(windows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Hours to serve, by what was predicted."""

    def agree(window: Mapping[str, Any]) -> bool:
        least_s, most_s = window["least_and_most_of_seeds"]["p99_s"]
        return bool(most_s <= AGREE * least_s)

    def busiest(found: Sequence[Mapping[str, Any]]) -> float:
        return float(max(found, key=lambda w: w["requests"])["hour"])

    able = [w for w in windows if w["slo_attainment"] >= SERVES]
    return {
        "served, and foreseeable": busiest([w for w in able if agree(w)]),
        "served": busiest(able),
        "worst": float(min(windows, key=lambda w: w["slo_attainment"])["hour"]),
    }


@click.group()
def main() -> None:
    pass


folder_argument = click.argument("folder", type=click.Path(path_type=Path))


@main.command()
@click.argument("hour", type=float)
@folder_argument
@click.option("--shared", default="../shared", type=click.Path(path_type=Path))
def predict(hour: float, folder: Path, shared: Path) -> None:
    """Plan one window, unless that was done, and simulate it."""
    folder = folder / f"{hour:g}"
    folder.mkdir(parents=True, exist_ok=True)
    scenario, whole = setting(shared)
    trace = window(whole, hour)
    if not (folder / "plan.json").exists():
        (folder / "plan.json").write_text(to_json(plan_trace(scenario, trace).plan))
    # What is planned while it is served is of no use.
    quick = replace(scenario, solver=replace(scenario.solver, name="greedy"))
    (folder / "scenario.json").write_text(to_json(quick))
    plan = load_plan(folder / "plan.json")
    sent = trace.take(trace.arrival_s >= FIRST_S)
    found = {
        "hour": hour,
        "output_tokens_per_s": round(sent.output_tokens.sum() / (60 * MINUTES)),
        **predicted(plan, sent, folder / "simulated.jsonl"),
    }
    (folder / "predicted.json").write_text(json.dumps(found))
    say("predicted", found)


@main.command("choose")
@folder_argument
def choose_windows(folder: Path) -> None:
    """Name the windows to be served, of those that were predicted."""
    found = [json.loads(path.read_text()) for path in folder.glob("*/predicted.json")]
    found.sort(key=lambda window: window["hour"])
    rows = [
        {k: v for k, v in row.items() if k not in ("by_llm", "effort")} for row in found
    ]
    chosen = choose(rows)
    write_result("serve_windows", {"chosen": chosen, "windows": rows})
    click.echo(f"{chosen}")


@main.command("serve")
@click.argument("hour", type=float)
@folder_argument
def serve_window(hour: float, folder: Path) -> None:
    """Serve a window that was predicted, and compare."""
    folder = folder / f"{hour:g}"
    prediction = json.loads((folder / "predicted.json").read_text())
    # A journal's requests are a trace.
    plan = load_plan(folder / "plan.json")
    trace = align(
        read_traces([str(folder / "simulated.jsonl")], {}),
        tuple(llm.name for llm in plan.fleet.llms),
    )
    load = getloadavg()
    told = served(trace, folder)
    measured = ttft(lines(folder / "st/journal.jsonl", "request"))
    measured["effort"] = effort(folder / "st/journal.jsonl")
    found = {
        "promotions": promotions(folder / "st"),
        "outcomes": dict(Counter(own.outcome for own in told)),
        "measured": measured,
        "predicted": prediction,
        "measured_by_predicted": {
            name: round(measured[name] / prediction[name], 3)
            for name in ("p50_s", "p90_s", "p99_s", "mean_s")
        },
        "clients": {
            "ttft": quantiles(t.first_s for t in told if t.first_s is not None),
            "sent_late": quantiles(t.late_s for t in told),
        },
        "load_average": [load, getloadavg()],
    }
    old = Path("benchmarks/results/serve_against_simulation.json")
    windows = json.loads(old.read_text()).get("windows", {}) if old.exists() else {}
    windows[f"{prediction['hour']:g}"] = found
    write_result("serve_against_simulation", {"windows": windows})
    say("predicted", prediction)
    say("measured", measured)
    click.echo(f"{found['measured_by_predicted']} {found['outcomes']}")


def say(name: str, found: Mapping[str, Any]) -> None:
    row = {k: v for k, v in found.items() if k not in ("by_llm", "effort")}
    click.echo(f"{name}: {row}")


if __name__ == "__main__":
    main()
