"""The plan against reactive policies on equal GPUs, each with its keep-alive swept.

    python benchmarks/policy_sweep.py

Plans the shipped fleet-day sample (cpsat or milp by `auto`, wall-clock limit per epoch, so
another machine may find slightly other plans), simulates every policy on the same twelve
GPUs, and writes benchmarks/results/policy_sweep.json. Takes some minutes.
"""

from __future__ import annotations

import json

import click
from record import write_result

from foreserve.cli.common import read_scenario, read_traces
from foreserve.cli.simulate import run_policies
from foreserve.cli.solve import facts, run_solve

CASES = [
    ("planned", 30.0, (0,)),
    ("reactive", 30.0, (0,)),
    ("reactive", 300.0, (0,)),
    ("reactive-keep", 120.0, (0,)),
]


@click.command()
def main() -> None:
    """Plan once, simulate all cases, write the table."""
    scenario = read_scenario("sample:fleet-day")
    trace = read_traces(["sample:fleet-day"], {})
    planned = run_solve(scenario, trace, {}, quiet=False)
    rows = []
    for policy, keep_alive_s, seeds in CASES:
        for seed in seeds:
            (run,) = run_policies(
                planned.plan, trace, [policy], seed, keep_alive_s, quiet=False
            )
            total, outcome = run.outcome.total, run.outcome
            rows.append(
                {
                    "policy": policy,
                    "keep_alive_s": keep_alive_s,
                    "seed": seed,
                    "ttft_mean_s": round(total.ttft.mean_s, 4),
                    "ttft_p50_s": round(total.ttft.p50_s, 4),
                    "ttft_p95_s": round(total.ttft.p95_s, 4),
                    "ttft_p99_s": round(total.ttft.p99_s, 4),
                    "slo_attainment": round(total.slo_attainment, 5),
                    "gpu_hours": round(outcome.gpu_hours["total"], 1),
                    "loads": outcome.loads,
                    "cold_starts": outcome.cold_starts,
                    "warm_starts": outcome.warm_starts,
                }
            )
            click.echo(json.dumps(rows[-1]))
    plan = {
        key: value
        for key, value in facts(planned).items()
        if key in ("status", "objective", "bound", "gap", "gap_at_stake", "wall_s")
    }
    write_result("policy_sweep", {"plan": plan, "rows": rows})


if __name__ == "__main__":
    main()
