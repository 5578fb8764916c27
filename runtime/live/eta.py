"""How long until an LLM serves: from what is under way and what such steps took before."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

from foreserve.models.observed import Phase
from foreserve.models.problem import ReplicaOption

Step = Literal["load", "activate"]
Estimate = tuple[float, float]
"""Median and 90th percentile, in seconds."""

ENOUGH = 5
"""Steps of a kind to have seen, before what they took counts."""
OVERDUE = 0.25
"""A step that is late is expected to take this share of its time more."""


class StepTimes:
    """Ratios of what steps took to what the plan expected. Mutable, for one owner."""

    def __init__(self, first: Estimate = (1.0, 1.5), remembered: int = 200) -> None:
        """``first``: the ratios (median, 90th percentile) until enough have been seen."""
        self._first = first
        self._ratios: dict[Step, deque[float]] = {
            "load": deque(maxlen=remembered),
            "activate": deque(maxlen=remembered),
        }

    def note(self, step: Step, expected_s: float, took_s: float) -> None:
        if expected_s > 0:
            self._ratios[step].append(took_s / expected_s)

    def ratio(self, step: Step) -> Estimate:
        found = sorted(self._ratios[step])
        if len(found) < ENOUGH:
            return self._first
        return found[len(found) // 2], found[math.ceil(0.9 * len(found)) - 1]

    def left(
        self, option: ReplicaOption, phase: Phase | None, age_s: float
    ) -> Estimate:
        """Until a replica that has been in ``phase`` for ``age_s`` can be ACTIVE. One that
        drains must become WARM before."""
        if phase == "ACTIVE":
            return 0.0, 0.0
        load, activate = self.ratio("load"), self.ratio("activate")
        found = []
        for load_ratio, activate_ratio in zip(load, activate, strict=True):
            load_s = load_ratio * option.load_s
            activate_s = activate_ratio * option.activate_s
            if phase == "ACTIVATING":
                found.append(_rest(activate_s, age_s))
            elif phase == "LOADING":
                found.append(_rest(load_s, age_s) + activate_s)
            else:
                found.append(activate_s + (load_s if phase is None else 0.0))
        return found[0], max(found)


def soonest(estimates: Iterable[Estimate]) -> Estimate:
    """Of several ways to get there, the one that is done first; infinite for none."""
    return min(estimates, default=(math.inf, math.inf))


def _rest(whole_s: float, age_s: float) -> float:
    return max(whole_s - age_s, OVERDUE * whole_s)
