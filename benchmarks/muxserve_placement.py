"""MuxServe's five placement instances, solved to the end under its own rules.

    python benchmarks/muxserve_placement.py

16 LLMs on 4 nodes of 8 A100-80GB; rates of Chatbot Arena's day 55 times five compressions
(benchmarks/instances/muxserve.json), profile in ../shared/data/muxserve_profile. The rules
leave 600 to 1,700 meshes of one, two, three or four LLMs, so all of them are valued by the
published formula, and an integer program (HiGHS) chooses meshes that hold each LLM once and
fit a split of every node: the best score there is, and the proof. Beside it the published
planner, and the same with its index fault corrected.

`plan compare --muxserve-profile` does the same (planner/mux_arena.py); here the meshes
of the best placement are written down as well.

The score does not cap an LLM's throughput at its rate. So the capped score and the requests
served are printed too, with the gap to bounds: of the score, the program's; of the capped
score, the program's own optimum for that (each mesh in the state that the score is taken
in), and the ceiling sum r^2 / sum r, which no placement of any kind can pass.
Writes benchmarks/results/muxserve_placement.json and, with --update-best, the scores in
benchmarks/instances/INDEX.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from record import write_result

from foreserve.planner.mux_arena import (
    MuxEntry,
    mux_row,
    read_mux_library,
    read_profile,
    solve_mux,
    update_mux_index,
)

INSTANCES = Path("benchmarks/instances")
PROFILE = Path("../shared/data/muxserve_profile/llama_sm_profile.csv.gz")
TIME_LIMIT_S = 60.0
DIGITS = {"demand_rps": 2, "served_rps": 3}


def numbers(entries: list[MuxEntry]) -> dict[str, Any]:
    """One instance: what is true of all its answers, then each answer."""
    published, corrected, exact, capped = entries
    for entry in entries:
        if entry.placement is None or not entry.proved:
            raise ValueError(f"{entry.instance.name}: no placement, or no proof")
    assert exact.placement
    assert corrected.placement
    if exact.placement.score_rps < corrected.placement.score_rps - 1e-9:
        raise ValueError("the exact search is below the planner's greedy one")
    rows = {entry.planner: _rounded(entry) for entry in entries}
    shared = ("bound", "capped_bound", "demand_rps", "meshes")
    return {
        "instance": exact.instance.name,
        **{key: rows["exact"][key] for key in shared},
        "ceiling": round(_ceiling(exact), 6),
        "solves": {
            entry.planner: {
                key: rows[entry.planner][key]
                for key in (
                    "score",
                    "gap",
                    "capped_score",
                    "capped_gap",
                    "served_rps",
                    "idle_gpus",
                    "wall_s",
                )
            }
            for entry in (published, corrected, exact, capped)
        },
        "placement": [
            {
                "gpus": mesh.gpus,
                "llms": {
                    llm.name: [share.decode_sm, share.batch] for llm, share in mesh.llms
                },
            }
            for mesh in exact.placement.meshes
        ],
    }


def _rounded(entry: MuxEntry) -> dict[str, Any]:
    return {
        key: round(value, DIGITS.get(key, 6)) if isinstance(value, float) else value
        for key, value in mux_row(entry).items()
    }


def _ceiling(entry: MuxEntry) -> float:
    """Of the capped score of any placement whatever."""
    rates = [llm.rate_rps for llm in entry.llms]
    return sum(r * r for r in rates) / sum(rates)


@click.command()
@click.option(
    "--update-best", is_flag=True, help="Also write the scores into the index."
)
def main(update_best: bool) -> None:
    """Solve all five, print and write the table."""
    times, rows = read_profile(PROFILE), []
    found: list[MuxEntry] = []
    for instance in read_mux_library(INSTANCES):
        entries = solve_mux(instance, times, TIME_LIMIT_S)
        found += entries
        rows.append(numbers(entries))
        for name, solve in rows[-1]["solves"].items():
            click.echo(f"{instance.name:14s} {name:14s} {json.dumps(solve)}")
    write_result("muxserve_placement", {"rows": rows})
    if update_best:
        update_mux_index(INSTANCES, found, "benchmarks/muxserve_placement.py")


if __name__ == "__main__":
    main()
