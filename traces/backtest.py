"""Scoring forecasts on any past: rolling origin, per series, in capacity provided.

A method that misses often looks cheap and one that never misses looks careful, so
methods are compared at an equal share of missed epochs: each forecast is multiplied by
the smallest number that covers the stated share of the scored epochs, and the capacity
that this provides is the score. Beside it stands what the method's own bound did, which
knew no future.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.traces.forecast import get_rule
from foreserve.traces.margins import margins
from foreserve.traces.rates import Rates
from foreserve.traces.rules import Calendar, Series
from foreserve.traces.trace import Demand, Floats, Trace, bin_demand

LEAST_EPOCHS = 3
ALWAYS = ("last", "last-or-yesterday")
"""Methods that every table shows."""
METHODS = ("auto", *ALWAYS, "yesterday", "recent-maximum", "seasonal", "corrective")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observed:
    """Series to be forecast, and what their numbers are."""

    names: tuple[str, ...]
    series: Series
    epoch_s: float
    start_s: float
    unit: str

    @property
    def num_epochs(self) -> int:
        return int(self.series.values.shape[1])

    def select(self, names: Sequence[str]) -> Observed:
        """The series called ``names``; an unknown one is an `InvalidInput`."""
        for name in names:
            if name not in self.names:
                raise InvalidInput(
                    f"no series {name!r}",
                    field="series",
                    hint=did_you_mean(name, list(self.names)),
                )
        rows = [self.names.index(name) for name in names]
        series = replace(
            self.series,
            values=self.series.values[rows],
            means=self.series.means[rows],
        )
        return replace(self, names=tuple(names), series=series)


def observed_rates(rates: Rates, epoch_s: float) -> Observed:
    """Peak and mean request rate per epoch of a count series.

    A window belongs to the epoch it starts in. Unknown windows are left out, an epoch
    without a known one is unknown; a last epoch that is not full is dropped.
    """
    if epoch_s < rates.window_s * (1 - 1e-9):
        raise InvalidInput(
            f"epochs of {epoch_s:g} s are shorter than the windows of "
            f"{rates.window_s:g} s",
            field="epoch",
        )
    starts_s = rates.start_s + np.arange(rates.num_windows) * rates.window_s
    epoch = np.floor(starts_s / epoch_s + 1e-9).astype(np.int64)
    begins = np.flatnonzero(np.diff(epoch, prepend=epoch[0] - 1))
    end_s = starts_s[-1] + rates.window_s
    full = end_s + rates.window_s / 2 >= (epoch[-1] + 1) * epoch_s
    epochs = len(begins) - (not full)
    if epochs < LEAST_EPOCHS:
        raise InvalidInput(f"{epochs} epochs are too few to forecast", field="epoch")
    rate = rates.counts / rates.window_s
    known = ~np.isnan(rate)
    count = np.add.reduceat(known, begins, axis=1)[:, :epochs]
    peaks = np.maximum.reduceat(np.where(known, rate, -np.inf), begins, axis=1)
    total = np.add.reduceat(np.where(known, rate, 0.0), begins, axis=1)
    means = total[:, :epochs] / np.maximum(count, 1)
    start_s = float(epoch[0] * epoch_s)
    return Observed(
        names=rates.names,
        series=Series(
            values=np.where(count > 0, peaks[:, :epochs], np.nan),
            means=np.where(count > 0, means, np.nan),
            days=Calendar.of(epoch_s, start_s),
        ),
        epoch_s=epoch_s,
        start_s=start_s,
        unit="requests/s",
    )


def observed_trace(
    trace: Trace, epoch_s: float, *, first_token_s: float, token_s: float
) -> Observed:
    """Peak and mean requests in flight per epoch, each request in flight for
    ``first_token_s + token_s * output_tokens`` (WarmServe, section 12.1)."""
    busy_s = first_token_s + token_s * trace.output_tokens.astype(np.float64)
    demand = bin_demand(trace, epoch_s=epoch_s, busy_s=busy_s)
    # The last epoch is partial unless the trace ends with it.
    return observed_demand(demand.upto(max(1, demand.num_epochs - 1)))


def observed_demand(demand: Demand) -> Observed:
    """Requests in flight as a demand table has them."""
    if demand.num_epochs < LEAST_EPOCHS:
        raise InvalidInput(
            f"{demand.num_epochs} epochs are too few to forecast", field="epoch"
        )
    return Observed(
        names=demand.llms,
        series=Series(
            values=demand.peak_load,
            means=demand.mean_load,
            days=Calendar.of(demand.epoch_s, demand.start_s),
        ),
        epoch_s=demand.epoch_s,
        start_s=demand.start_s,
        unit="requests in flight",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How one method forecast one series over the scored epochs."""

    method: str
    ahead: int
    series: str
    epochs: int
    mean: float
    """Mean peak that came, in the series' unit."""
    error: float
    """Mean of |forecast - peak| over the mean peak."""
    bias: float
    """Mean of forecast - peak over the mean peak."""
    relative_error: float
    """Mean of |forecast / peak - 1| over epochs with any load."""
    pinball: float
    """Of the bound, over the mean peak."""
    missed: float
    """Share of epochs above the method's own bound."""
    provided: float
    """Mean of that bound over the mean peak."""
    factor: float
    """Capacity over demand when one multiplier covers the stated share: the score."""
    multiplier: float
    gpu_hours: float | None
    """Provided at that multiplier, in whole GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rolled:
    """All past forecasts of one method, [series, epoch]."""

    method: str
    ahead: int
    forecast: Floats
    low: Floats
    high: Floats


def roll(observed: Observed, method: str, ahead: int, cover: float) -> Rolled:
    """Forecast every epoch from what was known ``ahead`` epochs before its end."""
    series = observed.series
    forecast = get_rule(method)(series, ahead)
    bounds = margins(series.values, forecast, ahead, cover)
    done = series.values.shape[1]
    return Rolled(
        method=method,
        ahead=ahead,
        forecast=forecast[:, :done],
        low=bounds.low[:, :done],
        high=bounds.high[:, :done],
    )


def backtest(
    observed: Observed,
    methods: Sequence[str],
    aheads: Sequence[int],
    *,
    cover: float,
    first: int,
    per_gpu: float | None = None,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> Iterator[tuple[Rolled, tuple[Score, ...]]]:
    """Score each method and horizon on the epochs from ``first`` on, series by series.

    Series without any load in those epochs have no score.
    """
    values = observed.series.values
    if not (values[:, first:] > 0).any():
        raise InvalidInput("no load in the epochs to be scored", field="from")
    total = float(len(methods) * len(aheads))
    for number, (method, ahead) in enumerate((m, a) for m in methods for a in aheads):
        rolled = roll(observed, method, ahead, cover)
        scores = tuple(
            score
            for row, name in enumerate(observed.names)
            if (score := _score(rolled, observed, row, name, cover, first, per_gpu))
        )
        progress(number + 1.0, total)
        yield rolled, scores


def _score(
    rolled: Rolled,
    observed: Observed,
    row: int,
    name: str,
    cover: float,
    first: int,
    per_gpu: float | None,
) -> Score | None:
    actual, forecast, high = (
        x[row, first:] for x in (observed.series.values, rolled.forecast, rolled.high)
    )
    known = ~(np.isnan(actual) | np.isnan(forecast))
    actual, forecast, high = actual[known], forecast[known], high[known]
    mean = float(actual.mean()) if len(actual) else 0.0
    if mean <= 0:
        return None
    busy = actual > 0
    over = np.maximum(high - actual, 0.0)
    under = np.maximum(actual - high, 0.0)
    multiplier = covering(forecast, actual, cover)
    hours = None
    if per_gpu is not None and np.isfinite(multiplier):
        gpus = np.ceil(multiplier * forecast / per_gpu - 1e-9)
        hours = float(gpus.sum() * observed.epoch_s / 3600)
    return Score(
        method=rolled.method,
        ahead=rolled.ahead,
        series=name,
        epochs=len(actual),
        mean=mean,
        error=float(np.abs(forecast - actual).mean()) / mean,
        bias=float((forecast - actual).mean()) / mean,
        relative_error=float(np.abs(forecast[busy] / actual[busy] - 1).mean()),
        pinball=float((cover * under + (1 - cover) * over).mean()) / mean,
        missed=float((actual > high).mean()),
        provided=float(high.mean()) / mean,
        factor=multiplier * float(forecast.mean()) / mean,
        multiplier=multiplier,
        gpu_hours=hours,
    )


def covering(forecast: Floats, actual: Floats, cover: float) -> float:
    """The smallest multiplier for which at least ``cover`` of the epochs are covered;
    infinite where more than the rest were forecast to be without load and were not."""
    ratio = np.where(actual > 0, np.inf, 0.0)
    some = forecast > 0
    ratio[some] = actual[some] / forecast[some]
    rank = int(np.ceil(cover * len(ratio) - 1e-9)) - 1
    return float(np.sort(ratio)[max(rank, 0)])
