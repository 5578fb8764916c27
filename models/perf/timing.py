"""How long one iteration takes, asked of a source: measured kernels, a table, a roofline.

`Timing` is what the sources have in common. Every answer is an `Estimate`: a value, the
interval that covers nine measurements in ten, whether it lies outside what was measured,
and where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.perf.kernels import Bools, Floats


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """Seconds with a 90 % interval; arrays of one shape (or scalars as 0-d arrays)."""

    seconds: Floats
    low: Floats
    high: Floats
    extrapolated: Bools
    source: str

    @classmethod
    def within(
        cls,
        seconds: ArrayLike,
        interval: tuple[float, float],
        extrapolated: ArrayLike,
        source: str,
    ) -> Estimate:
        """``seconds`` with ``interval`` = factors of its lower and upper end."""
        value = np.asarray(seconds, dtype=np.float64)
        return cls(
            seconds=value,
            low=value * interval[0],
            high=value * interval[1],
            extrapolated=np.broadcast_to(np.asarray(extrapolated), value.shape),
            source=source,
        )


class Timing(Protocol):
    """Iteration times of one LLM on ``tp`` GPUs of one type under one engine."""

    @property
    def source(self) -> str: ...

    def prefill(
        self, tokens: ArrayLike, *, past: ArrayLike = 0, prompts: ArrayLike = 1
    ) -> Estimate:
        """One iteration over ``prompts`` chunks of ``tokens`` prompt tokens each.

        ``past`` tokens of each prompt are in the cache already (chunks, prefixes).
        """
        ...

    def decode(self, batch: ArrayLike, context: ArrayLike) -> Estimate:
        """One step of ``batch`` sequences that hold ``context`` tokens each."""
        ...

    def mixed(
        self,
        batch: ArrayLike,
        context: ArrayLike,
        tokens: ArrayLike,
        *,
        past: ArrayLike = 0,
        prompts: ArrayLike = 1,
    ) -> Estimate:
        """One decode step that also works on ``prompts`` chunks of ``tokens`` tokens."""
        ...
