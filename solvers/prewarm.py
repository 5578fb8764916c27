"""WarmServe's prewarming planner as pure functions: how many copies, and where.

Counts and scores follow the published planner; `place` is its choice of GPU groups under
the laminar rule. One restriction: groups are the fleet's aligned blocks, not every subset
of a node's GPUs, so a copy can go only where a plan may put a replica.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from foreserve.models.placement import ReplicaId
from foreserve.models.specs import GpuId

UNIT = 32
"""Requests in flight per instance in the published system."""
TIE = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Warm copies that one LLM should have: their scores in order, and their groups."""

    llm: str
    resident_bytes: int
    """Per GPU of a group."""
    blocks: Sequence[tuple[GpuId, ...]]
    """Possible GPU groups, best ties first."""
    scores: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One new warm copy, and how its group was chosen."""

    llm: str
    gpus: tuple[GpuId, ...]
    score: float
    master: bool
    """It outranks every replica it shares a GPU with."""
    touched: float
    """Sum of the scores of those replicas."""


def copies(
    mean_load: float, peak_load: float, running: int, unit: int = UNIT
) -> tuple[int, int]:
    """(foundation, burst) copies for a forecast of requests in flight."""
    foundation = max(math.ceil(mean_load / unit) - running, 0)
    burst = max(math.ceil(peak_load / unit) - running - foundation, 0)
    return foundation, burst


def scores(
    mean_load: float, peak_load: float, running: int, load_s: float, unit: int = UNIT
) -> tuple[float, ...]:
    """Score of each copy: start-up seconds saved, less for later copies, more for bursty
    LLMs. A mean of 0 or less counts as one request when burstiness is taken."""
    foundation, burst = copies(mean_load, peak_load, running, unit)
    total = foundation + burst
    bursty = peak_load / mean_load if mean_load > 0 else max(1.0, peak_load)
    return tuple(
        math.exp(-j / total) * load_s * (1.0 if j < foundation else bursty)
        for j in range(total)
    )


def place(
    wanted: Sequence[Wanted],
    free_bytes: Mapping[GpuId, int],
    existing: Iterable[ReplicaId] = (),
) -> list[Copy]:
    """New copies in the order they are placed, highest score first.

    ``existing`` replicas (already inside ``free_bytes``) take the first scores of their
    LLM in order of their GPUs; surplus ones score 0. Each new copy goes to the group
    where it outranks all it touches and touches the least, else to the group that
    touches the least; ties go to the first group. Nothing is evicted.
    """
    by_llm = {want.llm: want for want in wanted}
    free = dict(free_bytes)
    holds: dict[GpuId, dict[ReplicaId, float]] = {}
    have = dict.fromkeys(by_llm, 0)

    def register(replica: ReplicaId, score: float) -> None:
        for gpu in replica.gpus:
            holds.setdefault(gpu, {})[replica] = score

    for replica in sorted(existing, key=lambda r: (r.gpus, r.llm)):
        score, want = 0.0, by_llm.get(replica.llm)
        if want is not None:
            if have[replica.llm] < len(want.scores):
                score = want.scores[have[replica.llm]]
            have[replica.llm] += 1
        register(replica, score)

    queue = [
        (score, want) for want in wanted for score in want.scores[have[want.llm] :]
    ]
    queue.sort(key=lambda item: -item[0])  # stable: ties keep the order of LLMs
    placed = []
    for score, want in queue:
        best: Copy | None = None
        for block in want.blocks:
            if any(free.get(gpu, 0) < want.resident_bytes for gpu in block):
                continue
            touched = {r: s for gpu in block for r, s in holds.get(gpu, {}).items()}
            if not all(_nested(want.llm, block, replica) for replica in touched):
                continue
            copy = Copy(
                llm=want.llm,
                gpus=block,
                score=score,
                master=all(other < score for other in touched.values()),
                touched=math.fsum(touched.values()),
            )
            if best is None or _beats(copy, best):
                best = copy
        if best is not None:
            register(ReplicaId(llm=best.llm, gpus=best.gpus), score)
            for gpu in best.gpus:
                free[gpu] -= want.resident_bytes
            placed.append(best)
    return placed


def _beats(copy: Copy, best: Copy) -> bool:
    if copy.master != best.master:
        return copy.master
    return copy.touched < best.touched - TIE


def _nested(llm: str, block: tuple[GpuId, ...], other: ReplicaId) -> bool:
    """May a copy of ``llm`` on ``block`` live beside ``other``, which touches it?"""
    mine, theirs = set(block), set(other.gpus)
    return other.llm != llm and (mine <= theirs or theirs <= mine)
