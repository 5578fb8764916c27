"""More LLMs than GPUs hold: what waking, tenure and turns do, on equal plans and GPUs.

    git archive 6233ea2 | tar -x -C /tmp/before
    python benchmarks/turns.py --source before=/tmp/before

Simulates the shipped fleet-day sample on its twelve GPUs and on eight of them, and
six equal LLMs with constant demand on three GPUs, under each set of rules, and likewise
with the sources of other versions, each on the plans made here. Writes
benchmarks/results/turns.json. Takes some minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.cli.common import read_scenario, read_traces
from foreserve.cli.solve import run_solve
from foreserve.models.codec import from_json, to_json
from foreserve.models.plan import Plan
from foreserve.models.serving import ServingRules
from foreserve.planner.policies import get_policy
from foreserve.planner.scenario import Scenario
from foreserve.runtime.simulated import simulate
from foreserve.traces.trace import Trace

CASES = [
    ("fleet-day, 12 GPUs", "planned", 30.0),
    ("fleet-day, 12 GPUs", "reactive", 30.0),
    ("fleet-day, 12 GPUs", "reactive", 300.0),
    ("fleet-day, 12 GPUs", "reactive-keep", 120.0),
    ("fleet-day, 8 GPUs", "planned", 30.0),
    ("fleet-day, 8 GPUs", "reactive-keep", 120.0),
    ("6 on 3, constant", "planned", 30.0),
    ("6 on 3, constant", "reactive", 30.0),
    ("6 on 3, constant", "reactive-keep", 30.0),
    ("6 on 3, slow starts", "planned", 30.0),
    ("6 on 3, slow starts", "reactive-keep", 30.0),
]
NEVER_S = 1e9
RULES: dict[str, dict[str, float]] = {
    "as shipped": {},
    "no tenure, no turns": {"tenure": 0.0, "turn_s": NEVER_S},
    "no turns": {"turn_s": NEVER_S},
    "no tenure": {"tenure": 0.0},
}
ALL_RULES = ("6 on 3, constant", "6 on 3, slow starts")
CONSTANT_S, CONSTANT_RPS, START_S = 1800.0, 0.5, 20.0


def scenarios() -> dict[str, tuple[Scenario, Trace]]:
    """Each with its requests."""
    day, requests = (
        read_scenario("sample:fleet-day"),
        read_traces(["sample:fleet-day"], {}),
    )
    (nodes,) = day.cluster.nodes
    found = {"fleet-day, 12 GPUs": (day, requests)}
    part = replace(day.cluster, nodes=(replace(nodes, count=2),))
    found["fleet-day, 8 GPUs"] = replace(day, cluster=part), requests
    (llm,) = (m for m in day.models if m.name == "llama-3.1-8b")
    alike = tuple(replace(llm, name=f"llm-{i}", llm="llama-3.1-8b") for i in range(6))
    three = replace(day.cluster, nodes=(replace(nodes, count=1, gpus=3),))
    forecast = replace(day.forecast, history=None)
    rng = np.random.default_rng(0)
    count = round(6 * CONSTANT_RPS * CONSTANT_S)
    constant = Trace(
        arrival_s=np.sort(rng.uniform(0.0, CONSTANT_S, count)),
        llm=rng.integers(0, 6, count).astype(np.int32),
        llms=tuple(m.name for m in alike),
        input_tokens=np.full(count, 500, np.int32),
        output_tokens=np.full(count, 150, np.int32),
    )
    few = replace(day, models=alike, cluster=three, forecast=forecast)
    found["6 on 3, constant"] = few, constant
    # As an engine starts that has to be a new process.
    slow = replace(few.runtime, process_start=START_S)
    found["6 on 3, slow starts"] = replace(few, runtime=slow), constant
    return found


def row(plan: Plan, trace: Trace, policy: str, keep_alive_s: float) -> dict[str, Any]:
    """One run."""
    run = simulate(
        plan.fleet,
        trace,
        get_policy(policy, plan, keep_alive_s),
        start_s=plan.start_s,
        end_s=plan.end_s,
        seed=0,
    )
    total, outcome = run.outcome.total, run.outcome
    return {
        "requests": total.requests,
        "unfinished": total.requests - total.finished,
        "ttft_mean_s": round(total.ttft.mean_s, 4),
        "ttft_p50_s": round(total.ttft.p50_s, 4),
        "ttft_p95_s": round(total.ttft.p95_s, 4),
        "ttft_p99_s": round(total.ttft.p99_s, 4),
        "ttft_max_s": round(float(np.nanmax(run.first_token_s - run.arrival_s)), 2),
        "slo_attainment": round(total.slo_attainment, 5),
        "gpu_hours": round(outcome.gpu_hours["total"], 1),
        "loads": outcome.loads,
        "activations": outcome.activations,
        "cold_starts": outcome.cold_starts,
        "warm_starts": outcome.warm_starts,
    }


def under(folder: Path, name: str) -> None:
    """All runs of one version, its rows as lines; what it does not know is left out."""
    known = {field.name for field in fields(ServingRules)}
    ours = "tenure" in known
    for case, policy, keep_alive_s in CASES:
        document = json.loads((folder / f"{case}.json").read_text())
        serving = document["fleet"]["serving"]
        for key in [key for key in serving if key not in known]:
            del serving[key]
        with np.load(folder / f"{case}.npz") as columns:
            trace = Trace(
                llms=tuple(columns["llms"].tolist()),
                **{
                    key: columns[key]
                    for key in ("arrival_s", "llm", "input_tokens", "output_tokens")
                },
            )
        plan = from_json(Plan, json.dumps(document))
        for rules, values in RULES.items() if ours else ((name, {}),):
            if values and case not in ALL_RULES:
                continue
            changed = replace(plan.fleet.serving, **values)
            fleet = replace(plan.fleet, serving=changed)
            found = row(replace(plan, fleet=fleet), trace, policy, keep_alive_s)
            about = {"case": case, "policy": policy, "keep_alive_s": keep_alive_s}
            click.echo(json.dumps({**about, "rules": rules, **found}))


def plan_all(folder: Path) -> None:
    """Plans and requests of all scenarios, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for case, (scenario, trace) in scenarios().items():
        plan = run_solve(scenario, trace, {}, quiet=True).plan
        (folder / f"{case}.json").write_text(to_json(plan))
        np.savez(
            folder / f"{case}.npz",
            llms=np.array(trace.llms),
            arrival_s=trace.arrival_s,
            llm=trace.llm,
            input_tokens=trace.input_tokens,
            output_tokens=trace.output_tokens,
        )


def all_rows(folder: Path, sources: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Of each version in a process of its own."""
    rows: list[dict[str, Any]] = []
    for version, root in sources:
        environment = os.environ | {"PYTHONPATH": f"{root}/src"}
        command = [sys.executable, __file__, "--runs", str(folder)]
        with subprocess.Popen(
            [*command, "--source", f"{version}={root}"],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                click.echo(line, nl=False)
                rows.append(json.loads(line))
        if child.returncode:
            raise SystemExit(child.returncode)
    return rows


@click.command()
@click.option("--source", "sources", multiple=True, metavar="NAME=FOLDER")
@click.option(
    "--plans",
    type=click.Path(path_type=Path),
    help="Make the plans there and stop, or go on with those that are there.",
)
@click.option("--runs", type=click.Path(path_type=Path), hidden=True)
def main(sources: tuple[str, ...], plans: Path | None, runs: Path | None) -> None:
    """Plan once, simulate all cases under all rules and versions."""
    versions = [(s.partition("=")[0], s.partition("=")[2]) for s in sources]
    if runs is not None:
        under(runs, versions[0][0])
        return
    with tempfile.TemporaryDirectory() as name:
        folder = plans or Path(name)
        if plans is None or not plans.exists():
            plan_all(folder)
            if plans is not None:
                return
        own = str(Path(__file__).parents[1])
        rows = all_rows(folder, [*versions, ("as shipped", own)])
    write_result("turns", {"rows": rows})


if __name__ == "__main__":
    main()
