"""Scheduling policies on one server: normalized latency beside the stated values.

    PYTHONPATH=. python benchmarks/scheduling.py

The setting of the SeaLLM reference, section 4.3: services of mean size 0.3, 1.5 and 6 s
with shares of 60, 30 and 10 %, Poisson arrivals, lognormal sizes, preemption for nothing,
40,000 requests a run. D1 is the mean over services of (mean latency / e_s), D2 the mean
over requests of latency / e_s, p99 that ratio's 99th percentile: each the mean of 3 seeds,
as the stated values are (of other random numbers), and of 20 with its standard error.
Writes benchmarks/results/scheduling.json. Takes some minutes on two cores.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.models.lengths import Floats
from foreserve.runtime.scheduler import POLICIES, Mlfq, Policy
from tests.single_server import Load, serve

SEEDS, FEW, REQUESTS = range(20), 3, 40_000
RULES: dict[str, Policy] = {
    name: POLICIES[name].make()
    for name in ("fcfs", "static", "db-level", "db-mean", "db-prod", "oracle")
} | {
    "mlfq": Mlfq(quantum_s=0.015),
    "mlfq-back": Mlfq(quantum_s=0.015, sink_to="back"),
    "oracle-service": POLICIES["oracle-service"].make(),
}
EQUAL = {0.85: (2.36, 1.54, 8.9), 0.95: (4.94, 2.34, 25.7)}
STATED: dict[tuple[float, float], dict[str, tuple[float, ...]]] = {
    (0.0, 0.85): {
        "fcfs": (14.3, 22.2),
        **dict.fromkeys(
            ("static", "db-level", "db-mean", "db-prod", "oracle"), EQUAL[0.85]
        ),
    },
    (0.0, 0.95): {
        "fcfs": (44.8, 70.8),
        **dict.fromkeys(
            ("static", "db-level", "db-mean", "db-prod", "oracle"), EQUAL[0.95]
        ),
    },
    (0.8, 0.85): {
        "fcfs": (23.4, 36.8, 258),
        "static": (3.11, 1.83, 14.8),
        "mlfq": (4.01, 2.52, 28.3),
        "db-level": (3.59, 2.13, 23.5),
        "db-mean": (3.24, 1.88, 14.1),
        "db-prod": (3.55, 2.09, 22.4),
        "oracle": (2.19, 1.54, 12.0),
    },
    (0.8, 0.95): {
        "fcfs": (75.2, 119, 654),
        "static": (7.41, 3.17, 45.9),
        "mlfq": (9.60, 4.57, 76.3),
        "db-level": (8.83, 3.97, 63.0),
        "db-mean": (7.78, 3.28, 30.4),
        "db-prod": (8.80, 3.91, 63.9),
        "oracle": (3.62, 2.03, 18.1),
    },
    (2.0, 0.85): {
        "fcfs": (61.7, 98.0, 830),
        "static": (6.22, 3.13, 41.0),
        "mlfq": (3.58, 2.59, 36.8),
        "db-level": (3.46, 2.38, 33.3),
        "db-mean": (3.50, 2.02, 21.1),
        "db-prod": (3.46, 2.38, 33.7),
        "oracle": (2.17, 1.66, 19.6),
    },
    (2.0, 0.95): {
        "fcfs": (181, 289, 1528),
        "static": (15.9, 6.17, 99.6),
        "mlfq": (6.92, 4.19, 60.9),
        "db-level": (6.74, 3.88, 58.2),
        "db-mean": (6.79, 3.08, 32.6),
        "db-prod": (6.76, 3.89, 59.4),
        "oracle": (3.18, 2.11, 24.1),
        "oracle-service": (np.nan, 1.85, 18.5),
    },
}


@click.command()
def main() -> None:
    """Print (3 seeds, all seeds, stated) and write every cell."""
    cases = list(product(STATED, RULES, SEEDS))
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(cases, pool.map(_case, cases, chunksize=4), strict=True))
    rows = []
    for (cv, load), name in product(STATED, RULES):
        runs = np.array([found[(cv, load), name, seed] for seed in SEEDS])
        few, mean = runs[:FEW].mean(axis=0), runs.mean(axis=0)
        error = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
        stated = STATED[cv, load].get(name.removesuffix("-back"), ())
        row: dict[str, Any] = {"cv": cv, "load": load, "policy": name}
        line = f"{cv:3} {load:4} {name:15}"
        for i, label in enumerate(("d1", "d2", "p99")):
            known = i < len(stated) and not np.isnan(stated[i])
            row[label] = {
                "few": _digits(few[i]),
                "mean": _digits(mean[i]),
                "standard_error": _digits(error[i]),
                "stated": stated[i] if known else None,
            }
            cell = "{few} {mean} ({stated})".format_map(row[label])
            line += f"{label:>5} {cell:24}"
        rows.append(row)
        click.echo(line.rstrip())
    facts = {"seeds": len(SEEDS), "few_seeds": FEW, "requests": REQUESTS}
    command = "PYTHONPATH=. python benchmarks/scheduling.py"
    write_result("scheduling", {"command": command, **facts, "rows": rows})


def _case(case: tuple[tuple[float, float], str, int]) -> Floats:
    """D1, D2 and the 99th percentile of latency / e_s."""
    (cv, load), name, seed = case
    setting = Load(cv=cv, load=load)
    requests = setting.draw(REQUESTS, np.random.default_rng(seed))
    latency_s = serve(requests, RULES[name], setting.profiles())
    service = np.array([request.service for request in requests])
    slowdown = latency_s / np.array(setting.means_s)[service]
    d1 = np.mean([slowdown[service == s].mean() for s in range(len(setting.means_s))])
    return np.array([d1, slowdown.mean(), np.quantile(slowdown, 0.99)])


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
