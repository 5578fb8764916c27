"""Interchangeable blocks of GPUs: which they are, rows that order them, plans in order.

Two blocks of one size in the same place (halves of one block, nodes of the cluster) are
interchangeable if every replica that may be on one may be on the other, at the same
offset, on as much memory at the same rent, and was there before or not: to swap what they
hold changes neither cost nor feasibility. So only plans need to be looked at in which a
block holds no less than the next of its class, by any measure that swaps inside the blocks
leave as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from foreserve.solvers.index import Index
from foreserve.solvers.matrix import Floats, Numbers

Class = NDArray[np.int64]
"""[block, place]: candidates of interchangeable blocks, those of one place alike."""


def classes(p: Index) -> list[Class]:
    """Classes of two or more blocks each, small blocks before those that hold them."""
    fleet = p.problem.fleet
    options = {id(option): k for k, option in enumerate(fleet.options)}
    numbers = {gpu: g for g, gpu in enumerate(fleet.cluster.gpus)}
    inside: dict[tuple[int, int], list[int]] = {}
    for r, (_, block) in enumerate(p.replicas):
        first = numbers[block[0]]
        inside.setdefault((first, len(block)), []).append(r)
    found: list[Class] = []

    def contents(first: int, size: int, tps: Sequence[int]) -> list[int]:
        return [
            r
            for tp in tps
            if tp <= size
            for start in range(first, first + size)
            for r in inside.get((start, tp), ())
            if start + tp <= first + size
        ]

    def alike(first: int, size: int, held: Sequence[int]) -> tuple[object, ...]:
        gpus = tuple((p.usable[g], p.rent[g]) for g in range(first, first + size))
        replicas = tuple(
            (
                numbers[p.replicas[r][1][0]] - first,
                options[id(p.replicas[r][0])],
                p.resident_before[r],
                p.active_before[r],
            )
            for r in held
        )
        return gpus, replicas

    def order(blocks: Sequence[tuple[int, int]], tps: Sequence[int]) -> None:
        groups: dict[tuple[object, ...], list[list[int]]] = {}
        for first, size in blocks:
            held = contents(first, size, tps)
            groups.setdefault(alike(first, size, held), []).append(held)
        found.extend(
            np.array(group) for group in groups.values() if len(group) > 1 and group[0]
        )

    def split(first: int, size: int, tps: Sequence[int]) -> Iterator[tuple[int, int]]:
        tp = max((tp for tp in tps if tp < size), default=size)
        return ((start, tp) for start in range(first, first + size - tp + 1, tp))

    tps = sorted({option.tp for option, _ in p.replicas})
    nodes, first = [], 0
    for node in fleet.cluster.nodes:
        nodes.append((first, node.gpus))
        first += node.gpus
    level = nodes
    levels = [nodes]
    # Each level: the blocks of the next smaller TP size inside each block of this one.
    while level:
        below = []
        for start, size in level:
            parts = list(split(start, size, tps))
            if parts and parts[0][1] < size:
                levels.append(parts)
                below += parts
        level = below
    for blocks in reversed(levels):
        order(blocks, tps)
    return found


def in_order(found: Sequence[Class], measure: Floats, *held: Numbers) -> None:
    """Permute ``held``, arrays [.., replica], in place, so that no block measures less
    than the next of its class. ``measure``: of each replica in the first of ``held``."""
    for group in found:
        weight = (held[0][..., group] * measure[group]).sum(axis=-1)
        weight = weight.reshape(-1, len(group)).sum(axis=0)
        best = group[np.argsort(-weight, kind="stable")]
        for values in held:
            values[..., group] = values[..., best]
