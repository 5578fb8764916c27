"""What the past says about the next epochs: mean and peak load per LLM.

Every method is a plain function ``(past, epochs) -> Forecast`` that sees the past and
nothing else. The same rule forecasts rate, mean load and peak load. The error of the
peak is learnt by running the rule over the recent past, each step from its own past.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.traces.trace import Demand, Floats

DAY_S = 86_400.0
CORRECTION_EPOCHS = 10
"""N of WarmServe's correction: how many errors of this day it looks back on."""
ERROR_EPOCHS = 24
"""Over how many past epochs the error of the peak forecast is measured."""
LENGTH_EPOCHS = 24
"""Over how many past epochs mean lengths are taken."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """The next epochs; every array is [llm, epoch]."""

    rate_rps: Floats
    mean_load: Floats
    peak_load: Floats
    peak_std: Floats
    """One standard deviation of the peak around its forecast."""
    input_tokens: Floats
    output_tokens: Floats

    @classmethod
    def perfect(cls, demand: Demand, epoch: int) -> Forecast:
        """Epoch ``epoch`` of ``demand`` itself: what no forecaster can know."""
        now = slice(epoch, epoch + 1)
        return cls(
            rate_rps=demand.rate_rps[:, now],
            mean_load=demand.mean_load[:, now],
            peak_load=demand.peak_load[:, now],
            peak_std=np.zeros_like(demand.peak_load[:, now]),
            input_tokens=demand.input_tokens[:, now],
            output_tokens=demand.output_tokens[:, now],
        )


class Forecaster(Protocol):
    """Looks at the past and at nothing else."""

    def __call__(self, past: Demand, epochs: int) -> Forecast:
        """Forecast the ``epochs`` that follow ``past``."""
        ...


FORECASTERS = {
    "last": "foreserve.traces.forecast:last_value",
    "seasonal": "foreserve.traces.forecast:seasonal",
    "corrective": "foreserve.traces.forecast:corrective",
}


def get_forecaster(name: str) -> Forecaster:
    """The forecaster called ``name``."""
    if name not in FORECASTERS:
        raise InvalidInput(
            f"unknown forecast method {name!r}",
            hint=did_you_mean(name, list(FORECASTERS)),
        )
    module, _, attribute = FORECASTERS[name].partition(":")
    forecaster: Forecaster = getattr(import_module(module), attribute)
    return forecaster


@dataclass(frozen=True, slots=True, kw_only=True)
class Calendar:
    """Where the days are: ``per_day`` epochs each, the first epoch is ``phase``."""

    per_day: int
    phase: int

    @classmethod
    def of(cls, past: Demand) -> Calendar:
        """Days of `Demand`'s clock, in whole epochs."""
        per_day = max(1, round(DAY_S / past.epoch_s))
        phase = round(past.start_s % DAY_S / past.epoch_s) % per_day
        return cls(per_day=per_day, phase=phase)


Rule = Callable[[Floats, int, Calendar], Floats]
"""``rule(series, epochs, days)``: [llm, epoch] past -> [llm, epochs] to come."""


def last_value(past: Demand, epochs: int) -> Forecast:
    """Every epoch to come is like the last one."""
    return _apply(_last, past, epochs)


def seasonal(past: Demand, epochs: int) -> Forecast:
    """The mean of the same epoch of all earlier days; last value before there is one."""
    return _apply(_seasonal, past, epochs)


def corrective(past: Demand, epochs: int) -> Forecast:
    """WarmServe's predictor: the earlier days' mean, corrected by this day's errors.

    ``P(i) + sum_w omega_w * (L(i-w) - P(i-w))`` over the ``m = min(i, N)`` latest epochs
    of this day, ``omega_w = 2^(m-w) / (2^m - 1)``: the newest error counts about half.
    Clipped at 0; last value while there is no earlier day.
    """
    return _apply(_corrective, past, epochs)


def _last(series: Floats, epochs: int, days: Calendar) -> Floats:
    return np.repeat(series[:, -1:], epochs, axis=1)


def _seasonal(series: Floats, epochs: int, days: Calendar) -> Floats:
    done = series.shape[1]
    if done < days.per_day:
        return _last(series, epochs, days)
    ahead = range(done, done + epochs)
    return np.stack([_day_mean(series, i, days.per_day) for i in ahead], axis=1)


def _corrective(series: Floats, epochs: int, days: Calendar) -> Floats:
    base = _seasonal(series, epochs, days)
    done = series.shape[1]
    of_day = (done + days.phase) % days.per_day
    # An epoch has an error once there was an earlier day to expect it from.
    m = min(of_day, CORRECTION_EPOCHS, done - days.per_day)
    if m <= 0:
        return base
    recent = range(done - m, done)
    expected = np.stack([_day_mean(series, i, days.per_day) for i in recent], axis=1)
    errors = series[:, done - m :] - expected
    weights = 2.0 ** np.arange(m) / (2.0**m - 1)  # oldest first
    corrected: Floats = np.maximum(0.0, base + (errors @ weights)[:, None])
    return corrected


def _day_mean(series: Floats, epoch: int, per_day: int) -> Floats:
    """Mean over all earlier days of the same epoch of the day, from before ``epoch``."""
    of_day = series[:, epoch % per_day : min(epoch, series.shape[1]) : per_day]
    mean: Floats = of_day.mean(axis=1)
    return mean


def _apply(rule: Rule, past: Demand, epochs: int) -> Forecast:
    shape = (len(past.llms), epochs)
    if past.num_epochs == 0:
        # Nothing is known: be ready for one request at a time of every LLM.
        zeros, ones = np.zeros(shape), np.ones(shape)
        return Forecast(
            rate_rps=zeros,
            mean_load=zeros,
            peak_load=ones,
            peak_std=zeros,
            input_tokens=zeros,
            output_tokens=zeros,
        )
    days = Calendar.of(past)
    rate, mean, peak = (
        rule(series, epochs, days)
        for series in (past.rate_rps, past.mean_load, past.peak_load)
    )
    std = np.repeat(_error_std(rule, past.peak_load, days)[:, None], epochs, axis=1)
    inputs, outputs = (
        np.repeat(_recent_mean(past, column)[:, None], epochs, axis=1)
        for column in (past.input_tokens, past.output_tokens)
    )
    return Forecast(
        rate_rps=rate,
        mean_load=mean,
        peak_load=np.maximum(peak, mean),
        # Even a perfect mean leaves the scatter of a counting process.
        peak_std=np.maximum(std, np.sqrt(np.maximum(peak, 0.0))),
        input_tokens=inputs,
        output_tokens=outputs,
    )


def _error_std(rule: Rule, series: Floats, days: Calendar) -> Floats:
    """Root mean square of the rule's one-step errors over the last epochs: [llm]."""
    done = series.shape[1]
    steps = range(max(1, done - ERROR_EPOCHS), done)
    if not steps:
        return np.zeros(len(series))
    errors = [series[:, step] - rule(series[:, :step], 1, days)[:, 0] for step in steps]
    rms: Floats = np.sqrt(np.mean(np.square(errors), axis=0))
    return rms


def _recent_mean(past: Demand, column: Floats) -> Floats:
    """Mean weighted by requests: [llm]; over the last epochs, else over the whole past,
    0 where there was never a request."""
    mean = np.zeros(len(past.llms))
    for epochs in (past.num_epochs, LENGTH_EPOCHS):
        weight = past.rate_rps[:, -epochs:]
        total, seen = (weight * column[:, -epochs:]).sum(axis=1), weight.sum(axis=1)
        mean = np.where(seen > 0, total / np.maximum(seen, 1e-12), mean)
    return mean
