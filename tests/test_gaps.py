"""The histogram of gaps between tokens against single gaps."""

from __future__ import annotations

import numpy as np
import pytest

from foreserve.models.gaps import (
    GAP_BINS,
    LEAST_S,
    RATIO,
    gap_bin,
    gap_edge_s,
    gap_quantiles,
)


def counted(gaps_s) -> np.ndarray:
    return np.bincount([gap_bin(gap_s) for gap_s in gaps_s], minlength=GAP_BINS)


def test_bins_cover_all_gaps():
    """Edges are 1 % apart from 10 us on, the last beyond 1,000 s; the middle of a bin is
    in it, what is outside goes to the ends."""
    edges_s = [gap_edge_s(index) for index in range(GAP_BINS + 1)]
    assert edges_s[0] == LEAST_S
    assert edges_s[-2] < 1000 < edges_s[-1]
    assert np.diff(np.log(edges_s)) == pytest.approx(np.log(RATIO))
    middles = [edge * RATIO**0.5 for edge in edges_s[:-1]]
    assert [gap_bin(gap_s) for gap_s in middles] == list(range(GAP_BINS))
    assert gap_bin(0.0) == gap_bin(-1.0) == gap_bin(1e-9) == 0
    assert gap_bin(1e9) == gap_bin(np.inf) == GAP_BINS - 1


@pytest.mark.parametrize("count", [1, 2, 3, 100, 10_000])
def test_quantiles_are_right_within_a_bin(count):
    """Against numpy on the single gaps; between two that are far apart, numpy draws a
    line, so there it is the next one on either side."""
    rng = np.random.default_rng(count)
    gaps_s = np.exp(rng.normal(-4, 1.5, count))
    at = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
    found = np.array(gap_quantiles(counted(gaps_s), at))
    low = np.quantile(gaps_s, at, method="lower")
    high = np.quantile(gaps_s, at, method="higher")
    assert (found >= low / RATIO).all()
    assert (found <= high * RATIO).all()


def test_equal_gaps_are_one_number():
    """A thousand gaps of 20 ms: every quantile within 1 % of it, in order."""
    found = gap_quantiles(counted([0.02] * 1000), (0.01, 0.5, 0.99))
    assert found == pytest.approx([0.02] * 3, rel=0.01)
    assert list(found) == sorted(found)
