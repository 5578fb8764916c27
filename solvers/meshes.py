"""Which meshes to build: each LLM on exactly one, every node split in an allowed way.

An integer program over meshes that are all known, with HiGHS; the problem of MuxServe's
placement, whatever a mesh is worth (`planner.mux_arena`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import highspy


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Indices of the meshes, and what no choice is worth more than."""

    meshes: tuple[int, ...]
    bound: float
    proved: bool
    """No choice is worth more."""


def choose_meshes(
    worth: Sequence[float],
    holds: Sequence[Sequence[int]],
    gpus: Sequence[int],
    *,
    llms: int,
    nodes: int,
    splits: Sequence[Sequence[int]],
    time_limit_s: float,
) -> Chosen | None:
    """The meshes worth most together: mesh i has ``gpus[i]`` GPUs and holds the LLMs
    ``holds[i]``. ``nodes`` nodes are each split in one of the ways ``splits``, into no more
    meshes in all than there are LLMs; a mesh may stay empty. None if nothing was found.
    """
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", 1e-9)
    solver.setOptionValue("time_limit", time_limit_s)
    build = [solver.addBinary() for _ in worth]
    ways = [solver.addIntegral(lb=0, ub=nodes) for _ in splits]
    holding: list[list[object]] = [[] for _ in range(llms)]
    for x, placed in zip(build, holds, strict=True):
        for i in placed:
            holding[i].append(x)
    for row in holding:
        solver.addConstr(solver.qsum(row) == 1)
    solver.addConstr(solver.qsum(ways) == nodes)
    counts = [Counter(split) for split in splits]
    for size in sorted({size for split in splits for size in split}):
        taken = [x for x, n in zip(build, gpus, strict=True) if n == size]
        there = [c[size] * y for c, y in zip(counts, ways, strict=True) if c[size]]
        solver.addConstr(solver.qsum(taken) - solver.qsum(there) <= 0)
    parts = [len(split) * y for split, y in zip(splits, ways, strict=True)]
    solver.addConstr(solver.qsum(parts) <= llms)
    solver.maximize(solver.qsum(w * x for w, x in zip(worth, build, strict=True)))
    info = solver.getInfo()
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None
    return Chosen(
        meshes=tuple(i for i, x in enumerate(build) if solver.val(x) > 0.5),
        bound=info.mip_dual_bound,
        proved=solver.getModelStatus() == highspy.HighsModelStatus.kOptimal,
    )
