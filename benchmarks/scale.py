"""How far the solvers get from 32 to 10,000 GPUs: plans, bounds, gaps, times.

    python benchmarks/scale.py [--size NAME ...] [--seeds N]

Instances are drawn from a seed: LLMs of the catalogue on nodes of 8 H100, their memory,
rates and loading times by the cost model. Half of the LLMs are in steady demand, which
takes about ``BUSY`` of the GPUs; their loads in the scenarios are bursts around that. The
others are asked for in a part of the scenarios only. Bursts share a factor over all LLMs
and one per family of LLMs, so they tend to come together. Every answer is judged by the
referee.

Limits are wall-clock time. Where other work takes part of the machine, ``--stretch``
multiplies them, and ``cpu_s`` says how much processor time the solve had in the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from os import getloadavg
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from record import write_result

from foreserve.models import catalog, referee
from foreserve.models.errors import InvalidInput
from foreserve.models.lengths import Lengths
from foreserve.models.placement import Placement
from foreserve.models.plan import gap_at_stake, relative_gap
from foreserve.models.problem import Fleet, Prices, Problem, ServedLlm, round_rate
from foreserve.models.specs import Node
from foreserve.planner.fleet import build_fleet
from foreserve.planner.scenario import parse_scenario
from foreserve.solvers.base import solve
from foreserve.solvers.result import SolveOptions
from foreserve.solvers.scale import prepare

SIZES = {
    # LLMs, GPUs, scenarios, seconds, seconds to the first plan, gap at stake wanted
    "16x32": (16, 32, 20, 10.0, 0.5, 0.05),
    "32x128": (32, 128, 20, 30.0, 1.0, 0.08),
    "96x512": (96, 512, 20, 60.0, 3.0, 0.10),
    "500x10000": (500, 10_000, 10, 120.0, 30.0, 0.15),
}
BUSY = 0.45
"""Share of the GPUs that the steady demand takes, at the LLMs' smallest TP sizes."""
PRICES = Prices(usd_s=0.1, load_s=0.05, demote_s=0.05, slower_s=0.005)
"""GPUs that are there anyway; losses count 5 to 30 bursts an epoch."""
LENGTHS = Lengths.fixed(1000, 250)
RESULTS = Path("benchmarks/results/scale.json")
"""Rows of sizes that are not run again are kept."""
GREEDY_GPUS = 64
"""Above this many GPUs greedy is not run: 43 s at 128, and it grows fast."""


@cache
def menu() -> Fleet:
    """Catalogue LLMs that run on one node of 8 H100 within the default SLO."""
    names = []
    for name in (spec.name for spec in catalog.llms()):
        try:
            build_fleet(_scenario([name]), {name: LENGTHS})
        except InvalidInput:
            continue
        names.append(name)
    return build_fleet(_scenario(names), dict.fromkeys(names, LENGTHS))


def _scenario(names: Sequence[str]) -> Any:
    lines = [
        "apiVersion: foreserve/v1alpha1",
        "kind: Scenario",
        "metadata: {name: scale}",
        "spec:",
        "  cluster:",
        "    nodes: [{name: n, count: 1, gpu: h100, gpus: 8, host_ram: 4TiB}]",
        "  models:",
        *(f"    - {{name: {name}, llm: {name}}}" for name in names),
    ]
    return parse_scenario("\n".join(lines))


def instance(llms: int, gpus: int, scenarios: int, seed: int) -> Problem:
    """A problem of one epoch from an empty cluster."""
    rng = np.random.default_rng(seed)
    kinds = menu()
    node = kinds.cluster.nodes[0]
    cluster = replace(
        kinds.cluster,
        nodes=tuple(
            Node(name=f"n{i}", gpu=node.gpu, gpus=8, host_ram_bytes=node.host_ram_bytes)
            for i in range(gpus // 8)
        ),
    )
    size = np.array(
        [
            min(o.resident_bytes * o.tp for o in kinds.options if o.llm == m.name)
            for m in kinds.llms
        ]
    )
    # Small LLMs are served more often: chance falls with the root of the size.
    chance = size**-0.5 / (size**-0.5).sum()
    share = rng.dirichlet(np.full(llms, 2.0)) * BUSY * gpus
    steady = rng.permutation(llms) < llms // 2
    share = np.where(steady, share, 0.0) * share.sum() / share[steady].sum()
    common = rng.normal(size=scenarios)
    families = rng.normal(size=(4, scenarios))
    served, options, demand, loads = [], [], [], []
    for i in range(llms):
        kind = kinds.llms[rng.choice(len(kinds.llms), p=chance)]
        name = f"{kind.name}-{i:03d}"
        own = [replace(o, llm=name) for o in kinds.options if o.llm == kind.name]
        options += own
        least = min(own, key=lambda o: o.tp)
        booked = share[i] / least.tp
        draw = 0.5 * common + 0.5 * families[i % 4] + 0.7 * rng.normal(size=scenarios)
        if booked > 0:
            bursts = np.clip(np.exp(0.2 + 0.45 * draw), 0.3, 5)
            loads.append(0.8 * booked * least.concurrency * bursts)
        else:
            asked = draw > 0.3
            peak = least.concurrency * rng.uniform(0.2, 2.5) * max(1.0, gpus / llms / 4)
            loads.append(asked * peak * np.clip(np.exp(0.4 * draw), 0.3, 3))
        demand.append((round_rate(booked * least.rate_rps),))
        served.append(
            ServedLlm(
                name=name,
                weight=float(rng.choice([1.0, 1.0, 2.0])),
                unserved_s=kind.unserved_s,
                cold_loss_s=kind.cold_loss_s * float(rng.uniform(5, 30)),
                instance_concurrency=kind.instance_concurrency,
            )
        )
    return Problem(
        fleet=Fleet(cluster=cluster, llms=tuple(served), options=tuple(options)),
        epoch_s=300.0,
        prices=PRICES,
        demand_rps=tuple(demand),
        scenario_probability=(1 / scenarios,) * scenarios,
        peak_load=tuple(
            tuple((float(load[s]),) for load in loads) for s in range(scenarios)
        ),
    )


def row(size: str, seed: int, stretch: float, note: str) -> dict[str, Any]:
    """One instance by `scale`, compiled before, and by greedy where that ends."""
    llms, gpus, scenarios, limit_s, first_s, wanted = SIZES[size]
    p = instance(llms, gpus, scenarios, seed)
    options = SolveOptions(time_limit_s=stretch * limit_s, gap=1e-3, in_process=True)
    found: dict[str, Any] = {"size": size, "seed": seed, "note": note}
    found["load_before"] = getloadavg()[0]
    greedy_s = None
    if gpus <= GREEDY_GPUS:
        began_s = process_time()
        greedy = solve(p, "greedy", options)
        greedy_s = process_time() - began_s
        found |= {"greedy": greedy.report.objective, "greedy_cpu_s": greedy_s}
    prepare()
    began_s, worked_s = perf_counter(), process_time()
    solved = solve(p, "scale", options)
    whole_s, cpu_s = perf_counter() - began_s, process_time() - worked_s
    report = solved.report
    if solved.schedule is None or report.objective is None:
        return found | {"status": report.status, "message": report.message}
    active = (r for r in solved.schedule[0].replicas if r.state == "ACTIVE")
    bare = referee.cost(p, (Placement(replicas=tuple(active)),)).total
    at_stake = gap_at_stake(report.objective, report.bound, bare)
    return found | {
        "status": report.status,
        "objective": report.objective,
        "bound": report.bound,
        "without_warm": bare,
        "gap": relative_gap(report.objective, report.bound),
        "gap_at_stake": at_stake,
        "floor": wanted,
        "first_s": report.time_to_first_s,
        "first_wanted_s": first_s,
        "limit_s": options.time_limit_s,
        "with_referee_s": whole_s,
        "cpu_s": cpu_s,
        "times_greedy": None if greedy_s is None else cpu_s / greedy_s,
        "search": report.message,
        "load_after": getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stretch", type=float, default=1.0)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    wanted = parser.parse_args()
    sizes = wanted.size or list(SIZES)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for seed in range(wanted.seeds if SIZES[size][1] <= 128 else 1):
            rows.append(row(size, seed, wanted.stretch, wanted.note))
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows += [old for old in kept if old["size"] not in sizes]
    rows.sort(key=lambda found: (list(SIZES).index(found["size"]), found["seed"]))
    write_result("scale", {"rows": rows})


if __name__ == "__main__":
    main()
