"""The replacement interval as the plan chose it: when which share of the replicas changed.

An epoch changes the placement if its replicas or their states are not those of the epoch
before; traffic shares alone are no change. The first epoch fills the cluster and counts
as the beginning of an interval, not as a change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from foreserve.models.placement import Placement, diff
from foreserve.models.plan import Plan
from foreserve.models.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Change(Record):
    """What the start of one epoch changes."""

    epoch: int
    start_s: float
    share: float
    """Of the replicas before or after: how many load, stop, start or go."""
    loads: int
    activations: int
    demotions: int
    drops: int


def changes(plan: Plan) -> tuple[Change, ...]:
    """Epochs at whose start the placement changes, in order."""
    found = []
    for index, (before, after) in enumerate(pairwise(plan.epochs), start=1):
        actions = diff(before.placement, after.placement)
        if actions:
            kinds = Counter(action.kind for action in actions)
            found.append(
                Change(
                    epoch=index,
                    start_s=after.start_s,
                    share=share_changed(before.placement, after.placement),
                    loads=kinds["load"],
                    activations=kinds["activate"],
                    demotions=kinds["demote"],
                    drops=kinds["drop"],
                )
            )
    return tuple(found)


def share_changed(before: Placement, after: Placement) -> float:
    """Replicas with a step between the two, over those in either; 0 if there are none."""
    held = {*before.by_id, *after.by_id}
    moved = {action.replica for action in diff(before, after)}
    return len(moved) / len(held) if held else 0.0


def intervals(changed: Sequence[int], epochs: int) -> tuple[int, ...]:
    """Lengths in epochs of the stretches without a change, from the first epoch to the
    last, ``changed`` being where a new one begins."""
    edges = [0, *changed, epochs]
    return tuple(after - before for before, after in pairwise(edges))


def histogram(lengths: Sequence[int]) -> Mapping[int, int]:
    """How many intervals there are of each length."""
    return dict(sorted(Counter(lengths).items()))


def cheapest_runs(
    costs: Mapping[tuple[int, int], float], epochs: int
) -> tuple[float, tuple[int, ...]]:
    """Least sum of ``costs[a, b]`` over ways to cut epochs 0 to ``epochs`` into runs from
    ``a`` to before ``b``, and where runs after the first begin: a shortest path over the
    boundaries. Pairs that are missing cannot be used; infinite where none is left.

    If each cost is a bound on what any schedule pays in those epochs while it does not
    change, the sum is a bound on any schedule at all: it, too, is cut into such runs.
    """
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, epochs + 1):
        best.append(
            min(
                (
                    (best[begin][0] + cost, (*best[begin][1], begin))
                    for begin in range(end)
                    if (cost := costs.get((begin, end))) is not None
                ),
                default=(math.inf, ()),
            )
        )
    total, begins = best[epochs]
    return total, begins[1:]
