"""Moments of arrival out of chance: renewal processes, on a clock that may change pace.

Gaps are Gamma with a coefficient of variation (CV): 1 is Poisson, 0 is a metronome, above
1 comes in bursts. A rate that changes bends the clock the gaps are laid on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foreserve.traces.trace import Floats

DECIMALS = 6
"""Digits of a second that are kept, so that files stay small."""
LEAST_SQUARED = 1e-12
"""A Gamma has some CV: this squared stands for none."""
SHAPE_S = 300.0
"""How finely the changes of a rate are kept when requests get new arrivals."""


def draw_gaps(cv: float, count: int, rng: np.random.Generator) -> Floats:
    """``count`` Gamma gaps of mean 1 with this CV."""
    squared = max(cv * cv, LEAST_SQUARED)
    return rng.gamma(1 / squared, squared, count)


def spread(count: int, cv: float, rng: np.random.Generator) -> Floats:
    """``count`` sorted moments in [0, 1): gaps of this CV around a circle, turned by
    chance so that the start is no special moment."""
    gaps = draw_gaps(cv, count, rng) + 1e-12
    turned: Floats = np.sort((np.cumsum(gaps) / gaps.sum() + rng.random()) % 1.0)
    return turned


def renewals(until: float, cv: float, rng: np.random.Generator) -> Floats:
    """Moments in [0, ``until``) of a renewal process of rate 1 that began long ago."""
    squared = max(cv * cv, LEAST_SQUARED)
    # At a random moment one is in a gap chosen by its length: Gamma with shape + 1.
    last = float(rng.random() * rng.gamma(1 / squared + 1, squared))
    parts = [np.array([last])]
    while last < until:
        count = int(until - last + 4 * (1 + cv) * np.sqrt(until - last) + 16)
        parts.append(last + np.cumsum(draw_gaps(cv, count, rng)))
        last = float(parts[-1][-1])
    moments = np.concatenate(parts)
    return moments[moments < until]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cells:
    """A stretch of time in windows: requests in each, and the CV of their gaps; [cell]."""

    edges_s: Floats
    """[cell + 1], from 0 on."""
    requests: Floats
    cv: Floats
    unknown_s: float = 0.0
    """Seconds of the source without a record."""


def cells_of(arrival_s: Floats, span_s: float) -> Cells:
    """Requests counted in windows of about `SHAPE_S`."""
    edges: Floats = np.linspace(0.0, span_s, max(1, round(span_s / SHAPE_S)) + 1)
    number = np.histogram(arrival_s, edges)[0].astype(np.float64)
    return Cells(edges_s=edges, requests=number, cv=np.ones(len(number)))


def bent(cells: Cells, count: int, cv: float, rng: np.random.Generator) -> Floats:
    """``count`` arrivals with gaps of this CV, on a clock as fast as the cells are full."""
    total = np.concatenate([[0.0], np.cumsum(cells.requests)])
    places = spread(count, cv, rng) * total[-1]
    # An empty cell is a jump: its start and its end have the same total.
    cell = np.clip(np.searchsorted(total, places, side="right") - 1, 0, len(total) - 2)
    inside = (places - total[cell]) / np.maximum(cells.requests[cell], 1e-300)
    bent: Floats = cells.edges_s[cell] + inside * np.diff(cells.edges_s)[cell]
    return bent


def scattered(cells: Cells, count: int, rng: np.random.Generator) -> Floats:
    """``count`` arrivals in proportion to the cells, each cell with its recorded CV."""
    total = np.cumsum(cells.requests)
    exact = total / max(float(total[-1]), 1e-300) * count
    exact[-1] = count
    each = np.diff(np.floor(exact + rng.random()).astype(np.int64), prepend=0)
    starts, widths = cells.edges_s[:-1], np.diff(cells.edges_s)
    parts = [np.zeros(0)]
    for cell in np.flatnonzero(each):
        moments = spread(int(each[cell]), float(cells.cv[cell]), rng)
        parts.append(starts[cell] + moments * widths[cell])
    return np.concatenate(parts)


def in_span(arrival_s: Floats, span_s: float) -> Floats:
    """Whole microseconds, all in [0, ``span_s``)."""
    return np.clip(np.round(arrival_s, DECIMALS), 0.0, span_s - 10**-DECIMALS)
