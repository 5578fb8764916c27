"""MuxServe's placement instances in the arena, with their own objective.

The score is the published planner's: the rate-weighted mean of the LLMs' estimated
throughput, *higher is better*. Its profile has no licence to be shipped with, so it is
given as a file. Beside the published planner, and the same with its index fault corrected,
stand two exact answers: all meshes that its rules allow are valued by its formula, and an
integer program chooses among them, for the score, and for the score with throughputs
capped at the rates. No placement's capped score is above sum r^2 / sum r.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from foreserve.models.codec import dump_json, read_text, write_text
from foreserve.models.errors import InvalidInput
from foreserve.models.plan import CLOSED
from foreserve.planner.policies.muxserve import (
    NODE_SPLITS,
    Mesh,
    MuxLlm,
    MuxPlacement,
    every_mesh,
    place,
)
from foreserve.planner.policies.muxserve_profile import SmProfile
from foreserve.solvers.meshes import choose_meshes

OBJECTIVE = "muxserve"
SCORE = "MuxServe's score, higher is better"
NODES = 4
PLANNERS = ("published", "corrected", "exact", "exact, capped")


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxInstance:
    """LLMs with their rates, on ``NODES`` nodes of 8 GPUs."""

    name: str
    about: str
    file: Path
    compression: float
    """Of the time of the file's rates, which grow with it."""

    def read(self) -> tuple[MuxLlm, ...]:
        """The LLMs."""
        try:
            return tuple(
                MuxLlm(
                    name=row["name"],
                    size=row["size"],
                    rate_rps=row["rate_rps"] * self.compression,
                )
                for row in json.loads(read_text(self.file))["llms"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                f"is no list of LLMs: {error!r}", file=str(self.file)
            ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class MuxEntry:
    """What one planner found for an instance, with the bounds of both scores."""

    instance: MuxInstance
    llms: tuple[MuxLlm, ...]
    planner: str
    placement: MuxPlacement | None
    """None: no split of the nodes holds all LLMs, or the time was over."""
    bound: float
    """No score of these rules is higher."""
    capped_bound: float
    proved: bool
    """Both bounds are reached by the exact answers."""
    meshes: int
    """That the rules allow."""
    wall_s: float


def read_mux_library(folder: Path) -> list[MuxInstance]:
    """The instances of a library that have MuxServe's objective."""
    index = folder / "INDEX.json"
    try:
        rows = json.loads(read_text(index))["instances"]
        return [
            MuxInstance(
                name=row["name"],
                about=row["about"],
                file=folder / row["file"],
                compression=row.get("compression", 1.0),
            )
            for row in rows
            if row.get("objective") == OBJECTIVE
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"is no index of instances: {error!r}", file=str(index)
        ) from None


def read_profile(file: Path) -> SmProfile:
    """Iteration times by LLM size, TP, SMs, batch and length, as CSV (.gz)."""
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode()
        rows = csv.DictReader(text.splitlines())
        return SmProfile(
            (
                row["model"],
                int(row["tp"]),
                int(row["sm_percent"]),
                int(row["batch"]),
                int(row["seq_len"]),
                float(row["prefill_ms"]),
                float(row["decode_ms"]),
            )
            for row in rows
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"is no profile: {error!r}", file=str(file)) from None


def compete_mux(
    instances: Sequence[MuxInstance],
    profile: SmProfile,
    time_limit_s: float,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[MuxEntry]:
    """Every planner on every instance; the exact ones have ``time_limit_s`` each."""
    found: list[MuxEntry] = []
    for done, instance in enumerate(instances):
        found += solve_mux(instance, profile, time_limit_s)
        progress(done + 1, len(instances))
    return found


def solve_mux(
    instance: MuxInstance, profile: SmProfile, time_limit_s: float
) -> list[MuxEntry]:
    """The planners' answers, in the order of `PLANNERS`."""
    llms, answers, took_s = instance.read(), [], []
    for corrected in (False, True):
        began_s = perf_counter()
        answers.append(place(llms, profile, nodes=NODES, corrected=corrected))
        took_s.append(perf_counter() - began_s)
    began_s = perf_counter()
    columns = list(every_mesh(llms, profile, nodes=NODES))
    listed_s = perf_counter() - began_s
    rates = [llm.rate_rps for llm in llms]
    # What no placement of any kind can pass.
    bounds, ceiling = [], sum(r * r for r in rates) / sum(rates)
    proved = True
    for capped in (False, True):
        began_s = perf_counter()
        answer, bound, sure = best_meshes(columns, llms, time_limit_s, capped=capped)
        answers.append(answer)
        took_s.append(listed_s + perf_counter() - began_s)
        bounds.append(min(bound, ceiling) if capped else bound)
        proved = proved and sure
    return [
        MuxEntry(
            instance=instance,
            llms=llms,
            planner=planner,
            placement=answer,
            bound=bounds[0],
            capped_bound=bounds[1],
            proved=proved,
            meshes=len(columns),
            wall_s=wall_s,
        )
        for planner, answer, wall_s in zip(PLANNERS, answers, took_s, strict=True)
    ]


def best_meshes(
    columns: Sequence[tuple[Mesh, tuple[int, ...]]],
    llms: Sequence[MuxLlm],
    time_limit_s: float,
    *,
    capped: bool,
) -> tuple[MuxPlacement | None, float, bool]:
    """The placement with the highest (capped) score, a bound of it, and whether that is
    proved. In the capped score meshes stay in the state that the score is taken in."""
    total = sum(llm.rate_rps for llm in llms)
    chosen = choose_meshes(
        [_worth(mesh, capped) / total for mesh, _ in columns],
        [placed for _, placed in columns],
        [mesh.gpus for mesh, _ in columns],
        llms=len(llms),
        nodes=NODES,
        splits=NODE_SPLITS,
        time_limit_s=time_limit_s,
    )
    if chosen is None:
        # Every LLM on its best mesh, wherever there is room for that.
        best = [
            max(_worth(mesh, capped) for mesh, placed in columns if i in placed)
            for i in range(len(llms))
        ]
        return None, sum(best) / total, False
    picked = [columns[i][0] for i in chosen.meshes]
    score = sum(mesh.value_rps * mesh.rate_rps for mesh in picked) / total
    idle = NODES * 8 - sum(mesh.gpus for mesh in picked)
    if idle:
        picked.append(Mesh(gpus=idle, llms=(), served_rps=(), value_rps=0.0))
    placement = MuxPlacement(meshes=tuple(picked), score_rps=score)
    return placement, chosen.bound, chosen.proved


def _worth(mesh: Mesh, capped: bool) -> float:
    if not capped:
        return mesh.value_rps * mesh.rate_rps
    pairs = zip(mesh.capped_rps, mesh.llms, strict=True)
    return sum(rps * llm.rate_rps for rps, (llm, _) in pairs)


def mux_row(entry: MuxEntry) -> Mapping[str, object]:
    """One answer as plain numbers."""
    found = entry.placement
    return {
        "instance": entry.instance.name,
        "planner": entry.planner,
        "objective": SCORE,
        "score": found and found.score_rps,
        "bound": entry.bound,
        "gap": found and _gap(found.score_rps, entry.bound),
        "capped_score": found and found.capped_score_rps,
        "capped_bound": entry.capped_bound,
        "capped_gap": found and _gap(found.capped_score_rps, entry.capped_bound),
        "served_rps": found and found.served_rps,
        "demand_rps": sum(llm.rate_rps for llm in entry.llms),
        "idle_gpus": found and found.idle_gpus,
        "meshes": entry.meshes,
        "proved": entry.proved,
        "wall_s": round(entry.wall_s, 3),
    }


def _gap(score: float, bound: float) -> float:
    gap = 1 - score / bound
    return gap if gap > CLOSED else 0.0


def update_mux_index(folder: Path, entries: Sequence[MuxEntry], by: str) -> list[str]:
    """Write higher scores and lower bounds into a library's index; names that changed."""
    file = folder / "INDEX.json"
    document = json.loads(read_text(file))
    changed: list[str] = []
    for stored in document["instances"]:
        own = [e for e in entries if e.instance.name == stored["name"]]
        scores = [e.placement.score_rps for e in own if e.placement]
        if not scores:
            continue
        for key, value, sign in (("best", max(scores), 1), ("bound", own[0].bound, -1)):
            old = stored.get(key)
            if old is None or sign * (value - old["value"]) > 1e-6 * abs(old["value"]):
                stored[key] = {"value": round(value, 6), "by": by}
                changed.append(stored["name"])
    if changed:
        write_text(file, dump_json(document))
    return list(dict.fromkeys(changed))
