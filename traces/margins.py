"""How far above its forecast a value may lie: bounds that keep their coverage.

An error is counted in units of the forecast, or of a third of the usual level where the
forecast is lower (`scale`). The bound follows the errors online: each miss lifts it, each
hit lowers it a little, so that the share of misses tends to the stated one however the
series drifts (the quantile tracker of Angelopoulos, Candès and Tibshirani, 2023,
"Conformal PID control"). Steps are as large as the errors have been of late.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foreserve.traces.rules import lagged
from foreserve.traces.trace import Floats

STEP = 0.2
KEEP = 0.97
"""Weight of the mean size of errors so far against the newest error."""
FIRST_BOUND, FIRST_SIZE, LARGEST = 0.5, 0.3, 5.0
LEVEL_SHARE = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Margin:
    """Bounds on `Rule` forecasts of [series, epoch] values and what they are made of."""

    low: Floats
    """[series, epoch + ahead]: below it lies a share ``1 - cover`` of the values."""
    high: Floats
    errors: Floats
    """[series, epoch], in units of ``scale``; NaN where nothing was forecast."""
    scale: Floats
    """[series, epoch + ahead]"""


def margins(
    values: Floats, forecast: Floats, ahead: int, cover: float = 0.95
) -> Margin:
    """Bounds at ``cover`` from above and, as often, from below, for each past forecast
    and those to come; each from errors known when its forecast was made."""
    done = values.shape[1]
    known = np.nan_to_num(values)
    level = np.cumsum(known, axis=1) / np.arange(1, done + 1)
    scale = np.fmax(forecast, LEVEL_SHARE * lagged(level, ahead, ahead))
    scale = np.maximum(np.nan_to_num(scale), 1e-9)
    errors = (values - forecast[:, :done]) / scale[:, :done]
    high = forecast + scale * _track(errors, ahead, 1 - cover)
    low = forecast - scale * _track(-errors, ahead, 1 - cover)
    return Margin(
        low=np.clip(low, 0.0, np.maximum(forecast, 0.0)),
        high=np.maximum(high, 0.0),
        errors=errors,
        scale=scale,
    )


def _track(errors: Floats, ahead: int, miss: float) -> Floats:
    """The bound on each error, [series, epoch + ahead]; O(series * epochs)."""
    rows, done = errors.shape
    bounds = np.empty((rows, done + ahead))
    bound, size = np.full(rows, FIRST_BOUND), np.full(rows, FIRST_SIZE)
    bounds[:, :ahead] = FIRST_BOUND
    gain = STEP / np.sqrt(miss)
    for column in range(done):
        error = errors[:, column]
        known = ~np.isnan(error)
        newest = np.minimum(np.abs(error), LARGEST)
        size = np.where(known, KEEP * size + (1 - KEEP) * newest, size)
        missed = error > bounds[:, column]
        bound = np.where(known, bound + gain * size * (missed - miss), bound)
        bound = np.clip(bound, -1.0, LARGEST)
        bounds[:, column + ahead] = bound
    return bounds
