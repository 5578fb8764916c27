"""Forecast rules in rolled form: every past forecast of a series at once.

A rule maps `Series` of shape [series, epoch] to forecasts [series, epoch + ahead]: column
``t`` is what was known of epoch ``t`` at the end of epoch ``t - ahead``, so it depends
on columns up to ``t - ahead`` alone (tests change the future and compare). The last
column is the forecast of the epoch ``ahead`` epochs after the end; the others are the
past forecasts that margins and scores are learnt from. Epochs of which nothing was known
yet, or not measured when they were needed, are NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from foreserve.traces.trace import Floats

DAY_S = 86_400.0
CORRECTION_EPOCHS = 10
"""N of WarmServe's correction: how many errors of this day it looks back on."""
RECENT_S = 3 * 3600.0
"""What counts as recent in `recent_maximum`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calendar:
    """Where the days are: ``per_day`` epochs each, the first epoch is ``phase``."""

    per_day: int
    phase: int

    @classmethod
    def of(cls, epoch_s: float, start_s: float = 0.0) -> Calendar:
        """Days of a clock whose second 0 is midnight, in whole epochs."""
        per_day = max(1, round(DAY_S / epoch_s))
        return cls(per_day=per_day, phase=round(start_s % DAY_S / epoch_s) % per_day)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Series:
    """What is forecast, [series, epoch]; NaN where it was not measured."""

    values: Floats
    means: Floats
    """Means over the epochs that ``values`` are the peaks of; ``values`` again if they
    are means themselves."""
    days: Calendar


Rule = Callable[[Series, int], Floats]
"""``rule(past, ahead)``: [series, epoch] -> [series, epoch + ahead]."""


def lagged(values: Floats, epochs: int, ahead: int) -> Floats:
    """Column t holds column ``t - epochs``, NaN before the start; ``ahead`` columns more
    than ``values``."""
    rows, done = values.shape
    found = np.full((rows, done + ahead), np.nan)
    kept = done + ahead - epochs
    if kept > 0:
        found[:, epochs:] = values[:, :kept]
    return found


def filled(values: Floats) -> Floats:
    """Gaps take the last value before them; NaN before the first."""
    known = ~np.isnan(values)
    at = np.maximum.accumulate(np.where(known, np.arange(values.shape[1]), 0), axis=1)
    return np.take_along_axis(values, at, axis=1)


def last_value(past: Series, ahead: int) -> Floats:
    """Like the last epoch known."""
    return lagged(filled(past.values), ahead, ahead)


def yesterday(past: Series, ahead: int) -> Floats:
    """Like the same epoch of the last day known; last value before there is one."""
    before = lagged(past.values, whole_days(ahead, past.days), ahead)
    return np.where(np.isnan(before), last_value(past, ahead), before)


def last_or_yesterday(past: Series, ahead: int) -> Floats:
    """The larger of last value and the same epoch yesterday."""
    return np.maximum(last_value(past, ahead), yesterday(past, ahead))


def recent_maximum(past: Series, ahead: int) -> Floats:
    """The largest of the last three hours."""
    epochs = max(1, round(RECENT_S / DAY_S * past.days.per_day))
    found = last_value(past, ahead)
    for more in range(1, epochs):
        found = np.fmax(found, lagged(past.values, ahead + more, ahead))
    return found


def seasonal(past: Series, ahead: int) -> Floats:
    """The mean of the same epoch of all earlier days; last value before there is one."""
    known = day_mean(past.values, ahead, past.days)
    return np.where(np.isnan(known), last_value(past, ahead), known)


def corrective(past: Series, ahead: int) -> Floats:
    """WarmServe's predictor: the earlier days' mean, corrected by this day's errors.

    ``P(i) + sum_w omega_w * (L(i-w) - P(i-w))`` over the ``m = min(i, N)`` latest epochs
    of this day, ``omega_w = 2^(m-w) / (2^m - 1)``: the newest error counts about half.
    Clipped at 0; last value while there is no earlier day. Farther ahead the correction
    stays as it was when the forecast was made.
    """
    base, days = seasonal(past, ahead), past.days
    done = past.values.shape[1]
    errors = past.values - day_mean(past.values, 1, days)[:, :done]
    # Errors known at the end of epoch o = t - ahead, of the day that epoch o + 1 is in.
    of_day = (np.arange(done) + 1 + days.phase) % days.per_day
    total, weights = np.zeros_like(errors), np.zeros_like(errors)
    for w in range(1, CORRECTION_EPOCHS + 1):
        error = lagged(errors, w - 1, 0)
        used = (of_day >= w) & ~np.isnan(error)
        total += np.where(used, error * 2.0**-w, 0.0)
        weights += used * 2.0**-w
    correction = lagged(total / np.maximum(weights, 1e-12), ahead, ahead)
    return np.maximum(0.0, base + np.nan_to_num(correction))


def whole_days(ahead: int, days: Calendar) -> int:
    """Epochs of as many whole days as reach back to something known."""
    return -(-ahead // days.per_day) * days.per_day


def day_mean(values: Floats, ahead: int, days: Calendar) -> Floats:
    """Mean over the days before of the same epoch; NaN where there is none."""
    per_day, (rows, done) = days.per_day, values.shape
    whole = -(-done // per_day)
    padded = np.full((rows, whole * per_day), np.nan)
    padded[:, :done] = values
    grid = padded.reshape(rows, whole, per_day)
    known = ~np.isnan(grid)
    total = np.cumsum(np.where(known, grid, 0.0), axis=1)
    count = np.cumsum(known, axis=1)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    flat = mean.reshape(rows, whole * per_day)[:, :done]
    return lagged(flat, whole_days(ahead, days), ahead)
