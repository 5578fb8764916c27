"""Every kind of process of `plan serve` is killed once, under the load of a day.

    PYTHONPATH=.:benchmarks:benchmarks/instances python benchmarks/serve_faults.py
        [--minutes 5] [--hour 3] [--keep FOLDER]

Hours of the large day of `instances/day.py` (16 LLMs, 32 A100 in four nodes) pass sixty
times as fast, one request in `THIN`; `plan serve` plans each epoch of 15 s anew (mode
automatic), over simulated engines at their real pace. This process sends the requests,
streamed, each with a deadline of 60 s; inflicts the faults of `tests/fault_run.py`, one
about every 30 s once the cluster is whole again; and starts `plan serve` again when it was
killed, as a supervisor would. For each fault:

- ``outage_s``: of the LLMs that had an ACTIVE replica on what was taken, the longest from
  the fault until the first probe (a request for one token, every 0.25 s, that may take
  2 s) was answered after the last one that was not; 0 if all were answered;
- ``active_again_s``: by the journal, the longest from the fault until such an LLM had an
  ACTIVE replica again, 0 for one that never was without; and ``load_s``, what of this is
  the plan's time to load and activate that replica;
- ``ends``: how the requests ended that ended from then on until the next fault.

In the end the logs are checked (`runtime/live/check.py`), and what the clients saw is
compared with what the journal has. Needs the data folder beside the repository.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import getloadavg
from pathlib import Path
from time import monotonic
from typing import Any

import click
import numpy as np
from benchmarks.instances.day import large
from record import write_result

from foreserve.models.codec import to_json
from foreserve.models.problem import Fleet
from foreserve.planner.fleet import align, build_fleet, request_lengths
from foreserve.planner.scenario import Scenario
from foreserve.runtime.journal import PhaseChange, read_journal
from foreserve.runtime.live.check import check
from foreserve.traces.trace import Trace

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fault_run import FAULTS, Clients, Supervised, inflict

FASTER = 60
THIN = 60
EPOCH_S = 15.0
FIRST_S = 40.0
"""Before the first fault: two epochs are planned from what has come."""
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inflicted:
    """One fault. Times are of this process, but for ``clock_s``."""

    kind: str
    node: str
    llm: str
    at_s: float
    clock_s: float
    """Of the cluster."""
    outages: dict[str, float]
    planned_s: float | None
    """Of the solver's end: until a plan was made again."""


def thinned(
    trace: Trace, hour: float, minutes: float, rng: np.random.Generator
) -> Trace:
    """The requests of the window, sixty times as fast, one in `THIN`."""
    begin_s = hour * 3600.0
    window = trace.between(begin_s, begin_s + minutes * 60.0 * FASTER)
    chosen = window.take(rng.random(len(window)) < 1 / THIN)
    return replace(chosen, arrival_s=(chosen.arrival_s - begin_s) / FASTER)


async def play(trace: Trace, clients: Clients) -> None:
    """Send every request when it is due; returns when all have ended."""
    start_s = monotonic()
    async with asyncio.TaskGroup() as group:
        for row in range(len(trace)):
            await asyncio.sleep(start_s + float(trace.arrival_s[row]) - monotonic())
            group.create_task(
                clients.ask(
                    trace.llms[trace.llm[row]],
                    int(trace.input_tokens[row]),
                    int(trace.output_tokens[row]),
                )
            )


async def strike(
    run: Supervised, clients: Clients, kind: str, spared: set[str], busiest: list[str]
) -> Inflicted:
    """Once the cluster is whole: one fault, on the node with most LLMs that serve or on
    the busiest LLM that has a single replica, none of those that were hit before."""
    await run.whole()
    llm, _ = await run.single([name for name in busiest if name not in spared])
    serve = Counter(node for at in (await run.active()).values() for node in set(at))
    node = max(sorted(set(run.nodes()) - spared), key=lambda name: serve[name])
    clock_s, at_s = (await run.admin("status"))["now_s"], monotonic()
    scene, outages = await inflict(run, clients, kind, node, llm)
    planned_s = None
    if kind == "solver killed":
        planned_s = await _planned(run, clock_s) - clock_s
    for task in scene.later:
        await task
    return Inflicted(
        kind=kind,
        node=node,
        llm=llm,
        at_s=at_s,
        clock_s=clock_s,
        outages=outages,
        planned_s=planned_s,
    )


def of_engine(kind: str) -> bool:
    """Whether a fault hits one engine alone."""
    return kind.startswith("engine ") and "server" not in kind


async def _planned(run: Supervised, after_s: float) -> float:
    """When a solve that began later has come to a plan."""
    while True:
        for row in (await run.admin("status"))["proposals"]:
            if row["at_s"] > after_s and not row["failed"]:
                return float(row["at_s"] + row["took_s"])
        await asyncio.sleep(0.2)


async def faults(
    run: Supervised, clients: Clients, busiest: list[str], every_s: float
) -> list[Inflicted]:
    """All of them, one after the other."""
    start_s, found = monotonic(), []
    spared: set[str] = set()
    for number, kind in enumerate(FAULTS):
        due_s = start_s + FIRST_S + number * every_s
        await asyncio.sleep(due_s - monotonic())
        found.append(await strike(run, clients, kind, spared, busiest))
        last = found[-1]
        spared.add(last.llm if of_engine(kind) else last.node)
        spared -= {last.node} if spared >= set(run.nodes()) else set()
        click.echo(f"{last.kind}: {max(last.outages.values(), default=0.0):.2f} s")
    return found


async def served(
    folder: Path, trace: Trace, busiest: list[str], every_s: float
) -> tuple[Supervised, Clients, list[Inflicted], dict[str, float]]:
    words = ["--scenario", "scenario.json", "--engine", "simulated"]
    run = Supervised(folder, words)
    async with Clients(run.port, DEADLINE_S) as clients:
        try:
            await run.up()
            load = asyncio.create_task(play(trace, clients))
            inflicted = await faults(run, clients, busiest, every_s)
            await load
        finally:
            run.stop()
    begin_s = clients.sent[0].sent_s
    seconds = {"start": begin_s, "end": max(sent.end_s for sent in clients.sent)}
    return run, clients, inflicted, seconds


def again(
    fleet: Fleet, journal: Path, fault: Inflicted, until_s: float
) -> dict[str, tuple[float, float]]:
    """By LLM that was hit: seconds until it had an ACTIVE replica again (0: it always
    had), and what of that its load was to take."""
    active: dict[str, set[Any]] = {}
    found = {llm: (0.0, 0.0) for llm in fault.outages}
    without: set[str] = set()
    loaded: set[Any] = set()
    for event in read_journal(journal):
        if event.at_s > until_s:
            break
        if not isinstance(event, PhaseChange):
            continue
        serving = active.setdefault(event.llm, set())
        if event.phase == "LOADING" and event.at_s > fault.clock_s:
            loaded.add((event.llm, event.gpus))
        if event.phase == "ACTIVE":
            if event.llm in without and event.at_s > fault.clock_s:
                option = fleet.option_of(event.llm, event.gpus)
                takes_s = option.load_s + option.activate_s
                if (event.llm, event.gpus) not in loaded:
                    takes_s = 0.0
                found[event.llm] = (event.at_s - fault.clock_s, takes_s)
                without.discard(event.llm)
            serving.add(event.gpus)
        else:
            serving.discard(event.gpus)
            lost = event.lost and event.at_s > fault.clock_s
            if lost and not serving and found.get(event.llm) == (0.0, 0.0):
                without.add(event.llm)
    return found


def rows(
    fleet: Fleet, journal: Path, inflicted: list[Inflicted], clients: Clients
) -> Iterator[dict[str, Any]]:
    first_s = clients.sent[0].sent_s
    for fault, later in zip(inflicted, [*inflicted[1:], None], strict=True):
        end_s = 1e12 if later is None else later.at_s
        until_s = 1e12 if later is None else later.clock_s
        seen = again(fleet, journal, fault, until_s)
        slowest = max(seen.values(), default=(0.0, 0.0))
        yield {
            "fault": fault.kind,
            "at_s": round(fault.at_s - first_s, 1),
            "target": fault.llm if of_engine(fault.kind) else fault.node,
            "llms": len(fault.outages),
            "outage_s": round(max(fault.outages.values(), default=0.0), 2),
            "active_again_s": round(slowest[0], 2),
            "load_s": round(slowest[1], 2),
            "planned_again_s": fault.planned_s and round(fault.planned_s, 2),
            "ends": clients.outcomes(begin_s=fault.at_s, end_s=end_s),
            "probes": clients.outcomes(probes=True, begin_s=fault.at_s, end_s=end_s),
        }


def conserved(clients: Clients, folder: Path) -> dict[str, Any]:
    """What the separate check says of the logs, and the clients' sums beside it."""
    command = [sys.executable, "-m", "foreserve.runtime.live.check", str(folder)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    found = check(folder)
    ends = Counter(sent.outcome for sent in clients.sent)
    ok, gone = ends["ok"], ends["broken"] + ends["refused"]
    return {
        "check": checked.stdout.strip(),
        "faults": found.faults,
        "peak_share_of_a_gpu": round(max(found.peak.values()), 4),
        "sent": len(clients.sent),
        "answered": ok,
        "errors": len(clients.sent) - ok - gone,
        "connections_broken_or_refused": gone,
        "silent": sum(sent.silent for sent in clients.sent),
        "accepted": found.requests,
        "without_an_end": found.unfinished,
        "ends": dict(found.ends),
        "adds_up": not found.faults
        and not found.unfinished
        and ok <= found.ends["finished"] <= ok + gone
        and len(clients.sent) - gone <= found.requests <= len(clients.sent),
    }


def setting(shared: Path, hour: float, minutes: float) -> tuple[Scenario, Trace]:
    scenario, day, _ = large(shared)
    whole = align(day, tuple(llm.name for llm in scenario.models))
    trace = thinned(whole, hour, minutes, np.random.default_rng(0))
    lengths = request_lengths(scenario, whole, None).values()
    parts = (
        replace(part, input_tokens=own.mean_input, output_tokens=own.mean_output)
        for part, own in zip(scenario.models, lengths, strict=True)
    )
    return replace(
        scenario,
        epoch=EPOCH_S,
        forecast=replace(scenario.forecast, method="last"),
        solver=replace(scenario.solver, name="scale", time_limit=2.0),
        models=tuple(parts),
    ), trace


@click.command()
@click.option("--minutes", default=5.0)
@click.option("--hour", default=3.0)
@click.option("--every", default=29.0, help="Seconds between faults.")
@click.option("--shared", default="../shared", type=click.Path(path_type=Path))
@click.option("--keep", type=click.Path(path_type=Path), help="Leave the files here.")
def main(
    minutes: float, hour: float, every: float, shared: Path, keep: Path | None
) -> None:
    """Write benchmarks/results/serve_faults.json."""
    scenario, trace = setting(shared, hour, minutes)
    nobody = trace.between(0.0, 0.0)
    fleet = build_fleet(scenario, request_lengths(scenario, nobody, None))
    folder = keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenario.json").write_text(to_json(scenario))
    counts = Counter(trace.llm.tolist())
    busiest = [trace.llms[index] for index, _ in counts.most_common()]
    load = getloadavg()
    run, clients, inflicted, seconds = asyncio.run(
        served(folder, trace, busiest, every)
    )
    raw = (inflicted, clients.sent, seconds)
    (folder / "raw.pickle").write_bytes(pickle.dumps(raw))
    ttft_s = [
        sent.first_s - sent.sent_s
        for sent in clients.sent
        if sent.outcome == "ok" and not sent.probe and sent.first_s is not None
    ]
    found = {
        "minutes": minutes,
        "hour": hour,
        "one_request_in": THIN,
        "seconds": round(seconds["end"] - seconds["start"], 1),
        "load_average": [load, getloadavg()],
        "outcomes": clients.outcomes(),
        "probes": clients.outcomes(probes=True),
        "ttft_s": {
            f"p{q}": round(float(np.percentile(ttft_s, q)), 3) for q in (50, 90, 99)
        },
        "faults": list(rows(fleet, run.state / "journal.jsonl", inflicted, clients)),
        "conservation": conserved(clients, run.state),
    }
    write_result("serve_faults", found)
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
