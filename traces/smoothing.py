"""Exponential smoothing by statsmodels: the textbook method, beside ours.

Simple exponential smoothing of logarithms; its constant is fitted by maximum likelihood at
the start of each day, on what was known then. Farther ahead it stays flat.
"""

from __future__ import annotations

import warnings

import numpy as np

from foreserve.models.errors import InvalidInput
from foreserve.traces.rules import Series, filled, lagged, last_value
from foreserve.traces.trace import Floats

LONGEST_FIT = 600
"""Epochs of the past that the constant is fitted to."""


def ets(past: Series, ahead: int) -> Floats:
    """Rolled forecasts; last value on the first day and for dead series."""
    found = last_value(past, ahead)
    values, per_day = np.nan_to_num(filled(past.values)), past.days.per_day
    done = values.shape[1]
    for row, series in enumerate(values):
        level = np.full((1, done), np.nan)
        for start in range(per_day, done + 1, per_day):
            known = series[max(0, start - LONGEST_FIT) : start]
            least = max(float(known.mean()) * 0.02, 1e-12)
            if known.std() < 1e-9:
                continue
            alpha = _fit(np.log(np.maximum(known, least)))
            day = slice(start - 1, min(start + per_day, done))
            log = np.log(np.maximum(series[: day.stop], least))
            level[0, day] = _smooth(log, alpha)[day]
        smoothed = lagged(np.exp(level), ahead, ahead)[0]
        found[row] = np.where(np.isnan(smoothed), found[row], smoothed)
    return found


def _fit(log: Floats) -> float:
    try:
        from statsmodels.tsa.holtwinters import SimpleExpSmoothing
    except ImportError:
        raise InvalidInput(
            "method 'ets' needs statsmodels",
            hint="pip install 'foreserve[statistics]', or choose another method",
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = SimpleExpSmoothing(log, initialization_method="estimated").fit()
    return float(fitted.params["smoothing_level"])


def _smooth(log: Floats, alpha: float) -> Floats:
    """The level after each column."""
    found = np.empty_like(log)
    level = log[0]
    for i, value in enumerate(log.tolist()):
        level += alpha * (value - level)
        found[i] = level
    return found
