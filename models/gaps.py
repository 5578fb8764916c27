"""Gaps between tokens (inter-token latencies), counted in bins 1 % wide.

A run has hundreds of gaps per request, so they are counted, not kept. Plain arithmetic on
numbers: the simulator compiles these functions.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

GAP_LOW_S = 1e-5
"""Shorter gaps are in bin 0."""
GAP_STEP = math.log(1.01)
GAP_BINS = 1852
"""The last bin begins at 1,000 s and has no end."""


def gap_bin(gap_s: float) -> int:
    """Index of the bin that ``gap_s`` is counted in."""
    if gap_s <= GAP_LOW_S:
        return 0
    return min(GAP_BINS - 1, int(math.log(gap_s / GAP_LOW_S) / GAP_STEP))


def gap_edge_s(index: int) -> float:
    """Lower edge of bin ``index``."""
    return GAP_LOW_S * math.exp(GAP_STEP * index)


def gap_quantile_s(counts: NDArray[np.int64], share: float) -> float:
    """The gap that ``share`` of those in ``counts`` [bin] do not exceed, within half a
    bin; NaN where there are none."""
    upto = np.cumsum(counts)
    if not upto[-1]:
        return math.nan
    index = int(np.searchsorted(upto, share * upto[-1], side="left"))
    return gap_edge_s(index) * math.exp(GAP_STEP / 2)
