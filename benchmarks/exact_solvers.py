"""The exact solvers beside each other: HiGHS directly, through Pyomo, and CP-SAT.

    python benchmarks/exact_solvers.py [--size NAME ...] [--seeds N] [--note TEXT]

Random problems (`instances.drawn`), one thread, a gap of 1e-3 wanted, from greedy's plan,
whose time does not count. Seconds of the wall clock and of the processor: where other work
runs beside it, the second is what the solve took. Then what it takes to build the largest
problem and to hand it to HiGHS, both ways.
"""

from __future__ import annotations

import argparse
import json
import sys
from os import getloadavg
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import numpy as np
from instances.drawn import draw
from record import write_result

from foreserve.models import referee
from foreserve.models.placement import Placement
from foreserve.models.plan import gap_at_stake
from foreserve.models.problem import Problem
from foreserve.solvers.auto import choices
from foreserve.solvers.base import get_solver
from foreserve.solvers.judge import refereed
from foreserve.solvers.result import SolveOptions

SIZES = {
    # LLMs, GPUs of each node, scenarios
    "8x8": (8, (8,), 8),
    "12x8": (12, (8,), 8),
    "16x16": (16, (8, 8), 8),
    "16x32": (16, (8, 8, 8, 8), 20),
}
SOLVERS = ("highs", "milp", "cpsat")
OPTIONS = SolveOptions(time_limit_s=20.0, gap=1e-3)
RESULTS = Path("benchmarks/results/exact_solvers.json")
"""Rows of sizes that are not run again are kept."""
TIMES = 5


def instance(size: str, seed: int) -> Problem:
    llms, nodes, scenarios = SIZES[size]
    return draw(np.random.default_rng(seed), llms, nodes, scenarios)[0]


def rows(size: str, seed: int) -> list[dict[str, Any]]:
    """One problem by each solver."""
    p, found = instance(size, seed), []
    start = get_solver("greedy")(p, OPTIONS)
    for name in SOLVERS:
        load, solver = getloadavg()[0], get_solver(name)
        began_s, used_s = perf_counter(), process_time()
        solved = solver(p, OPTIONS, start.schedule)
        row = {"size": size, "seed": seed, "choices": choices(p), "solver": name}
        row |= {
            "status": solved.report.status,
            "greedy": start.report.objective,
            "wall_s": perf_counter() - began_s,
            "cpu_s": process_time() - used_s,
            "load": load,
        }
        solved = refereed(p, solved, start.schedule)
        report = solved.report
        if solved.schedule is not None and report.objective is not None:
            active = (r for r in solved.schedule[0].replicas if r.state == "ACTIVE")
            bare = referee.cost(p, (Placement(replicas=tuple(active)),)).total
            row |= {
                "objective": report.objective,
                "bound": report.bound,
                "gap": report.gap,
                "gap_at_stake": gap_at_stake(report.objective, report.bound, bare),
            }
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        found.append(row)
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by size and solver; a gap of 1 where there is no plan."""
    lines = []
    for size in SIZES:
        for name in SOLVERS:
            own = [r for r in found if (r["size"], r["solver"]) == (size, name)]
            if not own:
                continue
            gaps = [r.get("gap", 1.0) for r in own]
            lines.append(
                {
                    "size": size,
                    "solver": name,
                    "problems": len(own),
                    "choices": median(r["choices"] for r in own),
                    "reached_gap": sum(gap <= OPTIONS.gap for gap in gaps),
                    "mean_wall_s": sum(r["wall_s"] for r in own) / len(own),
                    "mean_cpu_s": sum(r["cpu_s"] for r in own) / len(own),
                    "mean_gap": sum(gaps) / len(own),
                }
            )
    return lines


def building() -> dict[str, Any]:
    """Median seconds from sets and data to a loaded HiGHS, at the largest size."""
    from foreserve.solvers import direct, highs, milp
    from foreserve.solvers.index import index
    from foreserve.solvers.search import load

    p = index(instance("16x32", 0))
    took: dict[str, list[float]] = {"direct_s": [], "pyomo_s": []}
    for _ in range(TIMES):
        began_s = perf_counter()
        one = load(direct.build(p).programme())
        took["direct_s"].append(perf_counter() - began_s)
        began_s = perf_counter()
        two, _ = highs.hand_over(milp.build(p))
        took["pyomo_s"].append(perf_counter() - began_s)
    seconds = {key: median(values) for key, values in took.items()}
    return seconds | {
        "ratio": seconds["pyomo_s"] / seconds["direct_s"],
        "columns": (one.getNumCol(), two.getNumCol()),
        "rows": (one.getNumRow(), two.getNumRow()),
        "entries": (one.getNumNz(), two.getNumNz()),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    wanted = parser.parse_args()
    sizes = wanted.size or list(SIZES)
    kept = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    found = [row for row in kept if row["size"] not in sizes]
    rows("8x8", 99)  # loads the libraries
    for size in sizes:
        for seed in range(wanted.seeds):
            found += rows(size, seed)
    write_result(
        "exact_solvers",
        {
            "note": wanted.note,
            "limit_s": OPTIONS.time_limit_s,
            "summary": summary(found),
            "building": building(),
            "rows": found,
        },
    )


if __name__ == "__main__":
    main()
