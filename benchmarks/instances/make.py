"""Write the instance library: ``python benchmarks/instances/make.py``.

Problems drawn at random, problems of the shipped samples, and MuxServe's; the same seeds
give the same files. Best-known values and bounds that INDEX.json has stay with problems
that did not change.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from drawn import draw, of_trace, pressure

from foreserve.models.codec import dump_json, to_json
from foreserve.models.problem import Problem
from foreserve.planner.arena import read_problem

FOLDER = Path(__file__).parent
TESTS = FOLDER.parents[1] / "tests/instances"
RATES = FOLDER.parents[2] / "shared/data/muxserve_profile/chatlmsys_day55_rates.csv"
TINY = {
    "serve-one": "one LLM, two GPUs",
    "faster-on-two": "TP 2 needs a second GPU, but pays",
    "bursts-apart": "bursts of two LLMs never meet: one GPU holds both WARM",
    "bursts-together": "bursts of two LLMs meet: a second GPU beats a miss",
    "whole-set": "an activation over two GPUs bars the WARM replicas on each",
    "ride-out-a-dip": "three epochs, two LLMs in turn on one GPU",
    "eight-by-eight": "eight LLMs of 3 to 70 billion parameters on eight GPUs",
    "sixteen-by-sixteen": "sixteen of them on two nodes of eight",
}
DRAWN = (
    # LLMs, nodes of 8 GPUs, scenarios
    (16, 4, 20),
    (32, 16, 20),
    (96, 64, 20),
)
LEVELS = (
    # suffix, share of the GPUs that the steady demand takes, correlation of bursts
    ("calm", 0.4, 0.0),
    ("together", 0.4, 0.8),
    ("apart", 0.4, -0.8),
    ("full", 0.7, 0.0),
    ("full-together", 0.7, 0.8),
)
PRESSED = (16, 32, 48)
"""LLMs on 16 GPUs: rising memory pressure at the same demand."""
HOURS = (8, 32, 44, 56, 76)
"""Epochs of fleet-day (15 minutes each)."""
COMPRESSIONS = (500, 800, 1200, 1600, 2000)
MUX_SOURCE = (
    "rates: Chatbot Arena, day 55, numbers published with hao-ai-lab/MuxServe, commit "
    "22314803, package metadata says Apache-2.0; sizes and GPUs as there"
)
DRAWN_SOURCE = "made up by benchmarks/instances/drawn.py"
TRACE_SOURCE = {
    "fleet-day": "sample:fleet-day (alibaba/ServeGen, Apache-2.0)",
    "azure-2023": "sample:azure-2023 (Azure/AzurePublicDataset, CC-BY-4.0; Patel et al., "
    "'Splitwise', ISCA 2024; changed)",
}


def problems() -> Iterator[tuple[str, Problem, str, str]]:
    """(name, problem, about, source) of all that is made here."""
    for llms, nodes, scenarios in DRAWN:
        for suffix, busy, c in LEVELS:
            rng = np.random.default_rng([llms, nodes])
            problem, _ = draw(
                rng, llms, [8] * nodes, scenarios, busy=busy, correlation=c
            )
            about = f"steady demand on {busy:.0%} of the GPUs, bursts correlated {c:g}"
            yield f"r{llms}-{8 * nodes}-{suffix}", problem, about, DRAWN_SOURCE
    for llms in PRESSED:
        rng = np.random.default_rng([llms, 16])
        problem, _ = draw(rng, llms, [8, 8], 20, busy=0.5, correlation=0.5)
        about = (
            f"half of the GPUs busy, bursts correlated 0.5, {llms} LLMs on 16 GPUs: "
            f"weights are {pressure(problem):.0%} of all memory"
        )
        yield f"pressed-{llms}", problem, about, DRAWN_SOURCE
    problem, _ = draw(np.random.default_rng(500), 500, [8] * 1250, 10)
    about = "ten thousand GPUs: steady demand on 40% of them"
    yield "r500-10000", problem, about, DRAWN_SOURCE
    for sample, at, nodes in (
        ("fleet-day", HOURS, 3),
        ("fleet-day", HOURS, 2),
        ("azure-2023", (3, 8), 2),
    ):
        found = of_trace(sample, at, scenarios=20, fresh=20, nodes=nodes)
        for epoch, (problem, _) in zip(at, found, strict=True):
            gpus = len(problem.fleet.cluster.gpus)
            about = f"epoch {epoch} of the sample on {gpus} GPUs, after greedy's plans"
            yield f"{sample}-{gpus}-{epoch:02d}", problem, about, TRACE_SOURCE[sample]


def entry(name: str, file: str, problem: Problem, about: str, source: str) -> Any:
    """One line of the index."""
    return {
        "name": name,
        "file": file,
        "objective": "foreserve",
        "about": f"{about}; {len(problem.fleet.llms)} LLMs, "
        f"{len(problem.fleet.cluster.gpus)} GPUs, "
        f"{len(problem.scenario_probability)} scenarios",
        "source": source,
    }


def mux_llms() -> None:
    """Write MuxServe's LLMs and their rates, which five time compressions multiply."""
    with RATES.open() as handle:
        llms = [
            {
                "name": row["llm"],
                "size": row["size"],
                "rate_rps": float(row["rate_rps_unscaled"]),
            }
            for row in csv.DictReader(handle)
        ]
    document = {"nodes": 4, "gpus_per_node": 8, "gpu": "a100-80gb", "llms": llms}
    (FOLDER / "muxserve.json").write_text(dump_json(document))


def mux_index(known: dict[str, Any]) -> Iterator[Any]:
    """MuxServe's five lines of the index, with the scores known."""
    for compression in COMPRESSIONS:
        name = f"muxserve-{compression}"
        yield {
            "name": name,
            "file": "muxserve.json",
            "objective": "muxserve",
            "about": f"MuxServe's 16 LLMs on 32 GPUs, rates times {compression}; score, "
            "higher is better (benchmarks/muxserve_placement.py)",
            "compression": compression,
            "source": MUX_SOURCE,
            **known.get(name, {}),
        }


@click.command()
def main() -> None:
    """Write all files and the index."""
    index = FOLDER / "INDEX.json"
    known: dict[str, Any] = {}
    if index.exists():
        known = {
            row["name"]: {k: row[k] for k in ("best", "bound") if k in row}
            for row in json.loads(index.read_text())["instances"]
        }
    rows: list[Any] = []
    for name, about in TINY.items():
        file = TESTS / f"{name}.json"
        problem = read_problem(file)
        path = f"../../tests/instances/{name}.json"
        made = entry(name, path, problem, about, "tests/instances/make.py")
        rows.append(made | known.get(name, {}))
    for name, problem, about, source in problems():
        path = FOLDER / f"{name}.json.gz"
        data = to_json(problem).encode()
        same = path.exists() and gzip.decompress(path.read_bytes()) == data
        if not same:
            path.write_bytes(gzip.compress(data, mtime=0))
        made = entry(name, path.name, problem, about, source)
        rows.append(made | (known.get(name, {}) if same else {}))
        click.echo(f"{name}: {'as it was' if same else 'new'}")
    if RATES.exists():
        mux_llms()
    rows += mux_index(known)
    index.write_text(dump_json({"instances": rows}))


if __name__ == "__main__":
    main()
