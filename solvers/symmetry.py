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

from foreserve.models.problem import Fleet
from foreserve.models.specs import Node
from foreserve.solvers.index import Index
from foreserve.solvers.matrix import Floats, Numbers

Class = NDArray[np.int64]
"""[block, place]: candidates of interchangeable blocks, those of one place alike."""


def classes(p: Index, *, nodes: bool = True) -> list[Class]:
    """Classes of two or more blocks each, small blocks before those that hold them;
    ``nodes``: whether nodes may be swapped as well."""
    fleet = p.problem.fleet
    pins = {(held.llm, held.gpus) for held in fleet.rules.held}
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
                p.bridges[r],
                (p.replicas[r][0].llm, p.replicas[r][1]) in pins,
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
    level, first = [], 0
    for node in fleet.cluster.nodes:
        level.append((first, node.gpus))
        first += node.gpus
    whole: dict[object, list[tuple[int, int]]] = {}
    for part, node in zip(level, fleet.cluster.nodes, strict=True):
        whole.setdefault(_kind(fleet, node), []).append(part)
    levels = []
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
    if nodes:
        for blocks in whole.values():
            order(blocks, tps)
    return found


def _kind(fleet: Fleet, node: Node) -> object:
    """What nodes have to have in common beside their GPUs: links, and how much is lost
    with each."""
    domain_of = fleet.cluster.domain_of
    domain = domain_of[node.name]
    alone = list(domain_of.values()).count(domain) == 1
    return node.storage_bytes_per_s, node.host_link_bytes_per_s, alone or domain


def in_order(found: Sequence[Class], measure: Floats, *held: Numbers) -> None:
    """Permute ``held``, arrays [.., replica], in place, so that no block measures less
    than the next of its class. ``measure``: of each replica in the first of ``held``."""
    for group in found:
        weight = (held[0][..., group] * measure[group]).sum(axis=-1)
        weight = weight.reshape(-1, len(group)).sum(axis=0)
        best = group[np.argsort(-weight, kind="stable")]
        for values in held:
            values[..., group] = values[..., best]
