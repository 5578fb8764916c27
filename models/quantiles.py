"""Quantiles of many groups at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def grouped_quantiles(
    values: NDArray[np.float64],
    group: NDArray[np.integer],
    groups: int,
    quantiles: Sequence[float],
) -> NDArray[np.float64]:
    """[quantile, group] quantiles of the values of each group, numbered from 0, as
    `numpy.quantile` has them; NaN for a group without values. One sort for all."""
    order = np.lexsort((values, group))
    ordered = values[order]
    count = np.bincount(group, minlength=groups)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    found = np.full((len(quantiles), groups), np.nan)
    some = count > 0
    for row, q in zip(found, quantiles, strict=True):
        rank = q * (count[some] - 1)
        below = np.floor(rank).astype(np.int64)
        low = ordered[first[some] + below]
        high = ordered[first[some] + np.minimum(below + 1, count[some] - 1)]
        row[some] = low + (high - low) * (rank - below)
    return found
