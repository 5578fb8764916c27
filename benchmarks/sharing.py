"""Several LLMs on one group of GPUs: estimator E3 and the policies in the shared engine.

    PYTHONPATH=. python benchmarks/sharing.py

1. The check table of the SeaLLM reference, section 6: 7B, 13B and 30B at TP 2 on one group,
   prompts of 300 and 150 decode steps, 2, 1 and 0.4 requests a second times a scale; mean
   latency by E3, as stated there of another simulator, and by ours (round robin, one
   prompt an iteration, 1,500 s, mean of 3 seeds).
2. Code on a 7B and conversations on a 13B (lengths of the Azure trace of 2023, drawn with
   replacement; Poisson arrivals in its proportion of 2.57 to 5.53) on one group at TP 2,
   300 s, mean of 3 seeds, under each policy: D1, D2 (latency over the LLM's mean request
   alone), D3 (seconds per output token), each with its 99th percentile where it has one.
3. The same with seconds lost at each change of LLM, and with KV memory short.

Iteration times are fits to MuxServe's table, beyond 512 tokens extrapolated. Writes
benchmarks/results/sharing.json. Takes some minutes on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from record import write_result

from foreserve.models.lengths import Floats
from foreserve.models.sharing import batch_aware_s
from foreserve.runtime.scheduler import POLICIES, Profile, RoundRobin
from foreserve.runtime.simulated.shared import Hosted, Pool, SharedEngine, SharedJob
from foreserve.runtime.turns import Rules
from tests.test_sharing import LLAMA, services

SEEDS = range(3)
STATED = {
    0.25: (5.3, 5.9, 7.8),
    0.5: (8.3, 8.3, 9.2),
    1.0: (10.3, 10.3, 10.4),
    1.5: (12.0, 11.8, 11.9),
    2.0: (14.1, 14.4, 14.7),
    2.5: (16.8, 16.8, 17.1),
}
SCALES = (0.3, 0.5, 0.6)
MIX = {"code": ("7B", 256 << 10, 2.57), "conv": ("13B", 400 << 10, 5.53)}
"""Trace: LLM, KV bytes per token and GPU at TP 2, requests a second."""
RULES = (
    "fcfs",
    "round-robin",
    "static",
    "mlfq",
    "db-level",
    "db-mean",
    "db-prod",
    "oracle-service",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One setting of part 2 or 3."""

    policy: str
    scale: float
    eager: bool = True
    switch_s: float = 0.0
    kv_gb: float = 40.0
    link_gb_per_s: float = 24.0


CASES = [
    *(Case(policy=name, scale=scale) for scale in SCALES for name in RULES),
    *(Case(policy="db-mean", scale=scale, eager=False) for scale in SCALES),
    *(
        Case(policy=name, scale=0.5, switch_s=cost_s)
        for name in ("fcfs", "round-robin", "mlfq", "db-mean")
        for cost_s in (0.005, 0.02, 0.05)
    ),
    *(
        Case(policy=name, scale=0.5, kv_gb=8.0, link_gb_per_s=link)
        for name in ("fcfs", "mlfq", "db-mean")
        for link in (0.0, 24.0)
    ),
]


def play(engine: SharedEngine, jobs: Sequence[SharedJob]) -> Floats:
    """Seconds from arrival to end; jobs are numbered in order of arrival."""
    found = np.empty(len(jobs))
    coming = 0
    while coming < len(jobs) or engine.next_s < math.inf:
        if coming < len(jobs) and jobs[coming].arrival_s <= engine.next_s:
            engine.submit(jobs[coming], jobs[coming].arrival_s)
            coming += 1
            continue
        now_s = engine.next_s
        for job in engine.advance():
            found[job.request] = now_s - job.arrival_s
    return found


def arrivals(
    rates_rps: Sequence[float], horizon_s: float, rng: np.random.Generator
) -> list[tuple[float, int]]:
    """(second, service), Poisson."""
    return sorted(
        (float(at_s), service)
        for service, rate in enumerate(rates_rps)
        for at_s in rng.uniform(0, horizon_s, rng.poisson(rate * horizon_s))
    )


def equal_lengths(case: tuple[float, int]) -> list[float]:
    """Part 1: mean latency by LLM at (scale, seed)."""
    scale, seed = case
    mix = services(scale)
    hosted = [
        Hosted(
            time=s.time,
            kv_bytes_per_token=1,
            profile=Profile(reference_s=s.isolated_s, decode_s=1.0),
            input_tokens=s.input_tokens,
            output_tokens=s.output_tokens,
            usual_output_tokens=round(s.output_tokens),
        )
        for s in mix
    ]
    drawn = arrivals([s.rate_rps for s in mix], 1500.0, np.random.default_rng(seed))
    jobs = [
        # The prompt gives the first token, so 151 are 150 decode steps.
        SharedJob(
            request=i, service=s, arrival_s=at_s, input_tokens=300, output_tokens=151
        )
        for i, (at_s, s) in enumerate(drawn)
    ]
    pool = Pool(num_bytes=10**12, page_bytes=10**3)
    engine = SharedEngine(hosted, pool, RoundRobin(), Rules(max_prompt_tokens=300))
    found = play(engine, jobs)
    service = np.array([s for _, s in drawn])
    return [float(found[service == s].mean()) for s in range(len(mix))]


def mixed(case: tuple[Case, int]) -> dict[str, float]:
    """Parts 2 and 3: the measures of one run."""
    setting, seed = case
    hosted, lengths = [], []
    for name, (llm, kv_bytes, rate) in MIX.items():
        table = pd.read_csv(
            Path("..") / f"shared/data/azure_llm_2023/{name}.csv.gz",
            usecols=["input_tokens", "output_tokens"],
        )
        rows = np.maximum(table.to_numpy(), 1)
        lengths.append(rows)
        time, (prompt, output) = LLAMA[llm][2], rows.mean(axis=0)
        alone_s = float(np.mean([time.isolated_s(i, o) for i, o in rows.tolist()]))
        prefill_s = float(np.mean([time.prefill_s(i, i**2) for i in rows[:, 0]]))
        hosted.append(
            Hosted(
                time=time,
                kv_bytes_per_token=kv_bytes,
                profile=Profile(
                    reference_s=alone_s,
                    decode_s=alone_s - prefill_s,
                    rate_rps=rate * setting.scale,
                ),
                input_tokens=float(prompt),
                output_tokens=float(output),
                usual_output_tokens=int(np.median(rows[:, 1])),
            )
        )
    rng = np.random.default_rng(seed)
    drawn = arrivals([h.profile.rate_rps for h in hosted], 300.0, rng)
    jobs = []
    for i, (at_s, s) in enumerate(drawn):
        prompt, output = lengths[s][rng.integers(len(lengths[s]))].tolist()
        jobs.append(
            SharedJob(
                request=i,
                service=s,
                arrival_s=at_s,
                input_tokens=prompt,
                output_tokens=output,
            )
        )
    pool = Pool(
        num_bytes=round(setting.kv_gb * 1e9),
        page_bytes=8 << 20,
        link_bytes_per_s=setting.link_gb_per_s * 1e9,
    )
    engine = SharedEngine(
        hosted,
        pool,
        POLICIES[setting.policy].make(),
        Rules(eager=setting.eager),
        setting.switch_s,
    )
    latency_s = play(engine, jobs)
    service = np.array([s for _, s in drawn])
    slow = latency_s / np.array([h.profile.reference_s for h in hosted])[service]
    per_token_s = latency_s / np.array([job.output_tokens for job in jobs])
    by_llm = [float(slow[service == s].mean()) for s in range(len(hosted))]
    return {
        "d1": float(np.mean(by_llm)),
        "code": by_llm[0],
        "conv": by_llm[1],
        "d2": float(slow.mean()),
        "d2_p99": float(np.quantile(slow, 0.99)),
        "d3_s": float(per_token_s.mean()),
        "d3_p99_s": float(np.quantile(per_token_s, 0.99)),
        "switches": engine.turns,
        "preemptions": engine.preemptions,
        "swaps": engine.swaps,
    }


@click.command()
def main() -> None:
    """Print and write all cells."""
    table: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(2) as pool:
        runs = [(scale, seed) for scale in STATED for seed in SEEDS]
        means = np.array(list(pool.map(equal_lengths, runs))).reshape(
            len(STATED), len(SEEDS), -1
        )
        for (scale, stated), found in zip(STATED.items(), means, strict=True):
            row = {
                "scale": scale,
                "e3_s": [round(s, 2) for s in batch_aware_s(services(scale))],
                "stated_s": list(stated),
                "engine_s": [round(float(s), 2) for s in found.mean(axis=0)],
                "engine_over_stated": [
                    round(float(s), 3) for s in found.mean(axis=0) / stated
                ],
            }
            table.append(row)
            click.echo(str(row))
        cases = [(case, seed) for case in CASES for seed in SEEDS]
        measured = list(pool.map(mixed, cases))
    for i, case in enumerate(CASES):
        few = measured[i * len(SEEDS) : (i + 1) * len(SEEDS)]
        row = {
            "policy": case.policy,
            "scale": case.scale,
            "eager": case.eager,
            "switch_s": case.switch_s,
            "kv_gb": case.kv_gb,
            "link_gb_per_s": case.link_gb_per_s,
            **{key: float(f"{np.mean([m[key] for m in few]):.4g}") for key in few[0]},
        }
        rows.append(row)
        click.echo(" ".join(str(value) for value in row.values()))
    command = "PYTHONPATH=. python benchmarks/sharing.py"
    found = {"command": command, "seeds": len(SEEDS), "e3": table, "rows": rows}
    write_result("sharing", found)


if __name__ == "__main__":
    main()
