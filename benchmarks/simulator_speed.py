"""Requests per second of the simulator, on a fleet that switches all the time.

    PYTHONPATH=. python benchmarks/simulator_speed.py

Sixteen LLMs on 64 H100 (8 nodes), each with a rhythm of its own around the clock of an
hour, lengths as in Azure's conversation service (sampled from the shipped hour). The hour
is planned once, greedily, from the true rates, in epochs of five minutes, and the plan is
repeated for as long as requests come. Each size runs in a process of its own, on one core;
the time is that of the whole `simulate` call, outcome included, its peak memory that of the
process. Then one engine alone: the compiled core against the reference that takes every
iteration and every token in turn, on the same requests. Writes
benchmarks/results/simulator_speed.json.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.cli.common import read_scenario, read_traces
from foreserve.cli.solve import run_solve
from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan
from foreserve.runtime.simulated import simulate
from foreserve.runtime.simulated.engine import EngineLimits
from foreserve.runtime.simulated.replay import replay
from foreserve.traces.trace import Trace
from tests.per_token import Job, per_token

HOUR_S, EPOCH_S = 3600.0, 300.0
RATE_RPS = 160.0
LLMS = {
    "llama-3.1-8b": 5,
    "qwen2.5-7b": 5,
    "mistral-7b-v0.3": 4,
    "qwen3-8b": 4,
    "llama-2-7b": 2,
    "deepseek-v2-lite": 3,
    "qwen3-30b-a3b": 3,
    "gpt-oss-20b": 3,
    "qwen2.5-14b": 2,
    "phi-4": 2,
    "llama-2-13b": 1,
    "mistral-small-24b": 1,
    "gemma-3-27b": 1,
    "qwen2.5-32b": 1,
    "qwen3-32b": 1,
    "llama-3.1-70b": 1,
}
"""Shares of the requests."""
SCENARIO = """
epoch: 5m
cluster: {nodes: [{name: n, count: 8, gpu: h100, gpus: 8}]}
models: [%s]
forecast: {method: perfect}
solver: {name: greedy}
objective: {usd_s: 0.1}
"""


@dataclass
class Repeated:
    """The hour's plan, again and again."""

    plan: Plan
    name: str = "repeated"

    def decide(self, now_s: float, observed: Observed) -> Placement:
        epoch = int(now_s % HOUR_S // EPOCH_S)
        return self.plan.epochs[epoch].placement

    def next_review_s(self, now_s: float) -> float:
        return (now_s // EPOCH_S + 1) * EPOCH_S


def arrivals(span_s: float, seed: int) -> Trace:
    """About ``span_s * RATE_RPS`` requests. Each LLM's rate goes up and down fivefold with
    a period of an hour, at a phase of its own; Poisson within each second."""
    rng = np.random.default_rng(seed)
    second = np.arange(int(span_s))
    shares = np.array([*LLMS.values()]) / sum(LLMS.values())
    phases = rng.permutation(len(LLMS)) / len(LLMS)
    waves = 1 + 2 / 3 * np.sin(2 * np.pi * (second / HOUR_S + phases[:, None]))
    counts = rng.poisson(RATE_RPS * shares[:, None] * waves)
    llm = np.repeat(np.arange(len(LLMS)), counts.sum(axis=1)).astype(np.int32)
    arrival_s = np.concatenate([np.repeat(second, row) for row in counts])
    arrival_s = arrival_s + rng.random(len(arrival_s))
    order = np.argsort(arrival_s, kind="stable")
    recorded = read_traces(["sample:azure-2023"], {})
    own = np.flatnonzero(recorded.llm == recorded.llms.index("conv"))
    which = rng.choice(own, len(order))
    return Trace(
        arrival_s=arrival_s[order],
        llm=llm[order],
        llms=tuple(LLMS),
        input_tokens=recorded.input_tokens[which],
        output_tokens=recorded.output_tokens[which],
    )


def hour_plan() -> Plan:
    models = ", ".join(f"{{name: {name}}}" for name in LLMS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scenario.yaml"
        file.write_text(SCENARIO % models)
        scenario = read_scenario(str(file))
    return run_solve(scenario, arrivals(HOUR_S, 0), {}, quiet=True).plan


def one(requests: int) -> dict[str, Any]:
    """One run; the core is compiled and loaded before the clock starts."""
    plan, trace = hour_plan(), arrivals(requests / RATE_RPS, 1)
    rehearsal = arrivals(30.0, 2)
    before = peak_mib()
    simulate(plan.fleet, rehearsal, Repeated(plan), start_s=0.0, end_s=30.0, seed=0)
    begin = time.perf_counter()
    end_s = requests / RATE_RPS
    run = simulate(
        plan.fleet,
        trace,
        Repeated(plan),
        start_s=0.0,
        end_s=end_s,
        seed=0,
        initial=plan.epochs[0].placement,
    )
    seconds = time.perf_counter() - begin
    total, outcome = run.outcome.total, run.outcome
    return {
        "requests": len(trace),
        "finished": total.finished,
        "simulated_s": end_s,
        "wall_s": round(seconds, 2),
        "requests_per_s": round(len(trace) / seconds),
        "us_per_request": round(seconds / len(trace) * 1e6, 2),
        "output_tokens_per_s": round(total.output_tokens / seconds),
        "loads": outcome.loads,
        "activations": outcome.activations,
        "slo_attainment": round(total.slo_attainment, 4),
        "p99_ttft_s": round(total.ttft.p99_s, 3),
        "trace_mib": round(len(trace) * 20 / 2**20, 1),
        "peak_mib": round(peak_mib()),
        "peak_mib_before": round(before),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def against_reference(count: int) -> dict[str, Any]:
    """One Llama-3.1-8B on one H100 near its limit."""
    plan = hour_plan()
    option = next(o for o in plan.fleet.options if o.llm == "llama-3.1-8b")
    trace = arrivals(count / RATE_RPS * 4, 3)
    gaps_s = np.random.default_rng(0).exponential(1 / 12, count)
    rows = list(
        zip(
            np.cumsum(gaps_s).tolist(),
            trace.input_tokens[:count].tolist(),
            trace.output_tokens[:count].tolist(),
            strict=True,
        )
    )
    kv_tokens = option.kv_bytes // option.kv_token_bytes
    replay(option.time, kv_tokens, EngineLimits(), rows[:10])
    begin = time.perf_counter()
    found = replay(option.time, kv_tokens, EngineLimits(), rows)
    compiled_s = time.perf_counter() - begin
    jobs = [Job(i, *row) for i, row in enumerate(rows)]
    begin = time.perf_counter()
    ends = per_token(option.time, kv_tokens, jobs, EngineLimits())
    reference_s = time.perf_counter() - begin
    expected = np.array([ends[i] for i in range(count)])
    return {
        "requests": count,
        "output_tokens": int(trace.output_tokens[:count].sum()),
        "compiled_s": round(compiled_s, 4),
        "reference_s": round(reference_s, 2),
        "ratio": round(reference_s / compiled_s),
        "largest_difference_s": float(np.abs(found.end_s - expected).max()),
    }


@click.command()
@click.option("--requests", type=int, help="Run one size only and print it.")
def main(requests: int | None) -> None:
    """Run all sizes, then the reference, and write the result."""
    if requests:
        sys.stdout.write(json.dumps(one(requests)) + "\n")
        return
    rows = []
    for size in (10**5, 10**6, 10**7):
        command = [sys.executable, __file__, "--requests", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        click.echo(rows[-1])
    costs = [row["us_per_request"] for row in rows]
    found = {"rows": rows, "cost_ratio": round(max(costs) / min(costs), 2)}
    found["reference"] = against_reference(4000)
    click.echo(found["reference"])
    write_result("simulator_speed", found)


if __name__ == "__main__":
    main()
