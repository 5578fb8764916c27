"""Gaps between tokens, counted: a histogram that is the same size for any number.

Bins are 1 % wide from 10 us to 1,000 s, so a quantile is right within 1 %; what is
shorter or longer counts in the first or last bin. `gap_bin` and `gap_edge_s` are plain
arithmetic on single numbers, which a compiler can take as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEAST_S = 1e-5
RATIO = 1.01
LOG_RATIO = math.log(RATIO)
GAP_BINS = 1852
"""The last one ends at 1,007 s."""


def gap_bin(gap_s: float) -> int:
    """The bin of a gap."""
    if not gap_s > LEAST_S:
        return 0
    place = math.log(gap_s / LEAST_S) / LOG_RATIO
    return int(place) if place < GAP_BINS else GAP_BINS - 1


def gap_edge_s(index: int) -> float:
    """Where bin ``index`` begins; `GAP_BINS` is where the last one ends."""
    return LEAST_S * math.exp(index * LOG_RATIO)


def gap_quantiles(
    counts: NDArray[np.int64], quantiles: Sequence[float]
) -> tuple[float, ...]:
    """Quantiles (seconds) of the gaps in ``counts`` [bin], which holds at least one.

    Rank ``q * (n - 1)``, as numpy has it. The gaps of a bin count as spread over it
    evenly on the logarithmic scale.
    """
    upto = np.cumsum(counts)
    found = []
    for rank in np.asarray(quantiles) * (upto[-1] - 1):
        index = int(np.searchsorted(upto, rank, side="right"))
        within = (rank - (upto[index] - counts[index]) + 0.5) / counts[index]
        found.append(LEAST_S * math.exp((index + min(within, 1.0)) * LOG_RATIO))
    return tuple(found)
