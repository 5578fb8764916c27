"""MuxServe's five placement instances, solved to the end under its own rules.

    python benchmarks/muxserve_placement.py

16 LLMs on 4 nodes of 8 A100-80GB; rates of Chatbot Arena's day 55 times five compressions
(benchmarks/instances/muxserve.json), profile in ../shared/data/muxserve_profile. The rules
leave 600 to 1,700 meshes of one, two, three or four LLMs, so all of them are valued by the
published formula, and an integer program (HiGHS) chooses meshes that hold each LLM once and
fit a split of every node: the best score there is, and the proof. Beside it the published
planner, and the same with its index fault corrected.

The score does not cap an LLM's throughput at its rate. So the capped score and the requests
served are printed too, with the gap to bounds: of the score, the program's; of the capped
score, the program's own optimum for that (each mesh in the state that the score is taken
in), and the ceiling sum r^2 / sum r, which no placement of any kind can pass.
Writes benchmarks/results/muxserve_placement.json and, with --update-best, the scores in
benchmarks/instances/INDEX.json.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import highspy
from record import write_result

from foreserve.models.codec import dump_json, write_text
from foreserve.planner.policies.muxserve import (
    NODE_SPLITS,
    Mesh,
    MuxLlm,
    MuxPlacement,
    every_mesh,
    place,
)
from foreserve.planner.policies.muxserve_profile import SmProfile

INSTANCES = Path("benchmarks/instances")
PROFILE = Path("../shared/data/muxserve_profile/llama_sm_profile.csv.gz")
COMPRESSIONS = (500, 800, 1200, 1600, 2000)
NODES = 4
Column = tuple[Mesh, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best choice of meshes, and what no choice exceeds."""

    placement: MuxPlacement
    bound_rps: float
    proved: bool


def best(columns: Sequence[Column], llms: int, *, capped: bool) -> Best:
    """Meshes of the highest score (or capped score) that hold each LLM once.

    As in the published planner the nodes have at most as many meshes as there are LLMs;
    one that stays empty is idle.
    """
    rates = {p[0]: mesh.rate_rps for mesh, p in columns if len(p) == 1}
    total = sum(rates.values())
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", 1e-9)
    chosen = [solver.addBinary() for _ in columns]
    splits = [solver.addIntegral(lb=0, ub=NODES) for _ in NODE_SPLITS]
    for i in range(llms):
        holding = [x for x, (_, p) in zip(chosen, columns, strict=True) if i in p]
        solver.addConstr(solver.qsum(holding) == 1)
    solver.addConstr(solver.qsum(splits) == NODES)
    counts = [Counter(split) for split in NODE_SPLITS]
    for n in sorted({n for split in NODE_SPLITS for n in split}):
        taken = [
            x for x, (mesh, _) in zip(chosen, columns, strict=True) if mesh.gpus == n
        ]
        there = [
            count[n] * x for count, x in zip(counts, splits, strict=True) if count[n]
        ]
        solver.addConstr(solver.qsum(taken) - solver.qsum(there) <= 0)
    meshes = [len(split) * x for split, x in zip(NODE_SPLITS, splits, strict=True)]
    solver.addConstr(solver.qsum(meshes) <= llms)
    worth = [_worth(mesh, capped) / total for mesh, _ in columns]
    solver.maximize(solver.qsum(w * x for w, x in zip(worth, chosen, strict=True)))
    picked = [
        mesh
        for x, (mesh, _) in zip(chosen, columns, strict=True)
        if solver.val(x) > 0.5
    ]
    score = sum(mesh.value_rps * mesh.rate_rps for mesh in picked) / total
    idle = NODES * 8 - sum(mesh.gpus for mesh in picked)
    if idle:
        nothing = Mesh(gpus=idle, llms=(), served_rps=(), value_rps=0.0)
        picked.append(nothing)
    return Best(
        placement=MuxPlacement(meshes=tuple(picked), score_rps=score),
        bound_rps=solver.getInfo().mip_dual_bound,
        proved=solver.getModelStatus() == highspy.HighsModelStatus.kOptimal,
    )


def _worth(mesh: Mesh, capped: bool) -> float:
    if not capped:
        return mesh.value_rps * mesh.rate_rps
    pairs = zip(mesh.capped_rps, mesh.llms, strict=True)
    return sum(rps * llm.rate_rps for rps, (llm, _) in pairs)


def read_profile() -> SmProfile:
    with gzip.open(PROFILE, "rt") as file:
        return SmProfile(
            (
                row["model"],
                *(int(row[key]) for key in ("tp", "sm_percent", "batch", "seq_len")),
                float(row["prefill_ms"]),
                float(row["decode_ms"]),
            )
            for row in csv.DictReader(file)
        )


def read_llms(compression: int) -> list[MuxLlm]:
    document = json.loads((INSTANCES / "muxserve.json").read_text())
    return [
        MuxLlm(
            name=row["name"], size=row["size"], rate_rps=row["rate_rps"] * compression
        )
        for row in document["llms"]
    ]


def numbers(found: MuxPlacement, bound_rps: float, capped_rps: float) -> dict[str, Any]:
    """What a placement reaches, against the bounds of both scores."""
    return {
        "score": round(found.score_rps, 6),
        "gap": round(max(0.0, 1 - found.score_rps / bound_rps), 6),
        "capped_score": round(found.capped_score_rps, 6),
        "capped_gap": round(max(0.0, 1 - found.capped_score_rps / capped_rps), 6),
        "served_rps": round(found.served_rps, 3),
        "idle_gpus": found.idle_gpus,
    }


@click.command()
@click.option(
    "--update-best", is_flag=True, help="Also write the scores into the index."
)
def main(update_best: bool) -> None:
    """Solve all five, print and write the table."""
    cells, rows = read_profile(), []
    index = json.loads((INSTANCES / "INDEX.json").read_text())
    for compression in COMPRESSIONS:
        llms = read_llms(compression)
        rates = [llm.rate_rps for llm in llms]
        took_s = {}
        began_s = perf_counter()
        published = place(llms, cells, nodes=NODES, corrected=False)
        took_s["published"] = perf_counter() - began_s
        began_s = perf_counter()
        corrected = place(llms, cells, nodes=NODES, corrected=True)
        took_s["corrected"] = perf_counter() - began_s
        began_s = perf_counter()
        columns = list(every_mesh(llms, cells, nodes=NODES))
        exact = best(columns, len(llms), capped=False)
        took_s["exact"] = perf_counter() - began_s
        began_s = perf_counter()
        fair = best(columns, len(llms), capped=True)
        took_s["exact, capped"] = perf_counter() - began_s
        if published is None or corrected is None or not (exact.proved and fair.proved):
            raise ValueError(f"compression {compression}: no placement, or no proof")
        if exact.placement.score_rps < corrected.score_rps - 1e-9:
            raise ValueError("the exact search is below the planner's greedy one")
        found = {
            "published": published,
            "corrected": corrected,
            "exact": exact.placement,
            "exact, capped": fair.placement,
        }
        ceiling = sum(r * r for r in rates) / sum(rates)
        rows.append(
            {
                "compression": compression,
                "demand_rps": round(sum(rates), 2),
                "meshes": len(columns),
                "score_bound": round(exact.bound_rps, 6),
                "capped_bound": round(min(fair.bound_rps, ceiling), 6),
                "ceiling": round(ceiling, 6),
                "solves": {
                    name: {
                        **numbers(
                            placement, exact.bound_rps, min(fair.bound_rps, ceiling)
                        ),
                        "wall_s": round(took_s[name], 2),
                    }
                    for name, placement in found.items()
                },
                "placement": [
                    {
                        "gpus": mesh.gpus,
                        "llms": {
                            llm.name: [share.decode_sm, share.batch]
                            for llm, share in mesh.llms
                        },
                    }
                    for mesh in exact.placement.meshes
                ],
            }
        )
        for name, solve in rows[-1]["solves"].items():
            click.echo(f"{compression:5d} {name:14s} {json.dumps(solve)}")
        for row in index["instances"]:
            if row["name"] == f"muxserve-{compression}":
                by = "benchmarks/muxserve_placement.py"
                row["best"] = {"value": round(exact.placement.score_rps, 6), "by": by}
                row["bound"] = {"value": round(exact.bound_rps, 6), "by": by}
    write_result("muxserve_placement", {"rows": rows})
    if update_best:
        write_text(INSTANCES / "INDEX.json", dump_json(index))


if __name__ == "__main__":
    main()
