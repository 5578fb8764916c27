"""What the past says about the next epochs: mean and peak load per LLM.

A `Forecaster` sees the past and nothing else. Each is a rule (`foreserve.traces.rules`)
applied to rate, mean load and peak load alike, with a bound on the peak that keeps its
coverage (`foreserve.traces.margins`) and the errors of all LLMs at the same past epochs,
from which joint scenarios are made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from typing import Protocol

import numpy as np

from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.traces.margins import Margin, margins
from foreserve.traces.rules import Calendar, Rule, Series
from foreserve.traces.trace import Demand, Floats

COVER = 0.95
LENGTH_EPOCHS = 24
"""Over how many past epochs mean lengths are taken."""
ERROR_EPOCHS = 300
"""How many past epochs' errors scenarios are made of."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """The next epochs; every array is [llm, epoch] unless it says otherwise."""

    rate_rps: Floats
    mean_load: Floats
    peak_load: Floats
    peak_low: Floats
    peak_high: Floats
    """The peak stays below ``peak_high``, and above ``peak_low``, in 95 % of the epochs
    each."""
    peak_errors: Floats
    """[sample, llm, epoch]: by how much peaks missed their forecasts at past epochs, all
    LLMs at the same epoch, in the size they would have now; no sample if none is known."""
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
            peak_low=demand.peak_load[:, now],
            peak_high=demand.peak_load[:, now],
            peak_errors=np.zeros((1, len(demand.llms), 1)),
            input_tokens=demand.input_tokens[:, now],
            output_tokens=demand.output_tokens[:, now],
        )

    def only(self, epoch: int) -> Forecast:
        """One of its epochs alone, counted from its first."""
        one = slice(epoch, epoch + 1)
        return Forecast(
            **{f.name: getattr(self, f.name)[..., one] for f in fields(Forecast)}
        )


class Forecaster(Protocol):
    """Looks at the past and at nothing else."""

    def __call__(self, past: Demand, epochs: int) -> Forecast:
        """Forecast the ``epochs`` that follow ``past``."""
        ...


RULES = {
    "auto": "foreserve.traces.mixture:mixture",
    "last": "foreserve.traces.rules:last_value",
    "yesterday": "foreserve.traces.rules:yesterday",
    "last-or-yesterday": "foreserve.traces.rules:last_or_yesterday",
    "recent-maximum": "foreserve.traces.rules:recent_maximum",
    "seasonal": "foreserve.traces.rules:seasonal",
    "corrective": "foreserve.traces.rules:corrective",
    "ets": "foreserve.traces.smoothing:ets",
}


def get_rule(name: str) -> Rule:
    """The rule called ``name``."""
    if name not in RULES:
        raise InvalidInput(
            f"unknown forecast method {name!r}", hint=did_you_mean(name, list(RULES))
        )
    module, _, attribute = RULES[name].partition(":")
    rule: Rule = getattr(import_module(module), attribute)
    return rule


def get_forecaster(name: str) -> Forecaster:
    """The forecaster called ``name``."""
    return partial(forecast_by, get_rule(name))


def forecast_by(rule: Rule, past: Demand, epochs: int) -> Forecast:
    """Forecast the ``epochs`` after ``past`` by ``rule``."""
    return Outlook(rule, past, epochs).after(past.num_epochs)


class Outlook:
    """All forecasts of a past by one rule, each from what was known when it was made.

    Rules and margins are rolled: a forecast does not change with what came later (a test
    replaces the future and compares), so a replay of a whole trace computes them once.
    """

    def __init__(self, rule: Rule, demand: Demand, epochs: int) -> None:
        """``epochs``: how many are forecast at a time."""
        self._demand, self._epochs = demand, epochs
        days = Calendar.of(demand.epoch_s, demand.start_s)
        means = [
            Series(values=x, means=x, days=days)
            for x in (demand.rate_rps, demand.mean_load)
        ]
        peaks = Series(values=demand.peak_load, means=demand.mean_load, days=days)
        self._ahead: list[tuple[Floats, Floats, Floats, Margin]] = []
        for ahead in range(1, epochs + 1) if demand.num_epochs else ():
            rate, mean = (rule(series, ahead) for series in means)
            peak = rule(peaks, ahead)
            margin = margins(demand.peak_load, peak, ahead, COVER)
            self._ahead.append((rate, mean, peak, margin))

    def after(self, done: int) -> Forecast:
        """The epochs from ``done`` on, from the ``done`` before them; where there are
        none, be ready for one request at a time of every LLM."""
        past, shape = self._demand.upto(done), (len(self._demand.llms), self._epochs)
        if done == 0:
            zeros, ones = np.zeros(shape), np.ones(shape)
            return Forecast(
                rate_rps=zeros,
                mean_load=zeros,
                peak_load=ones,
                peak_low=ones,
                peak_high=ones,
                peak_errors=np.zeros((0, *shape)),
                input_tokens=zeros,
                output_tokens=zeros,
            )
        rate, mean, peak, low, high = (np.empty(shape) for _ in range(5))
        errors = np.empty((done, *shape))
        for i, (rates, means, peaks, margin) in enumerate(self._ahead):
            at = done + i
            rate[:, i], mean[:, i], peak[:, i] = (
                rates[:, at],
                means[:, at],
                peaks[:, at],
            )
            low[:, i], high[:, i] = margin.low[:, at], margin.high[:, at]
            errors[:, :, i] = (margin.errors[:, :done] * margin.scale[:, at, None]).T
        errors = errors[~np.isnan(errors).any(axis=(1, 2))][-ERROR_EPOCHS:]
        inputs, outputs = (
            np.repeat(_recent_mean(past, column)[:, None], self._epochs, axis=1)
            for column in (past.input_tokens, past.output_tokens)
        )
        peak = np.maximum(peak, mean)
        # Even a perfect mean leaves the scatter of a counting process.
        least = peak + 1.645 * np.sqrt(np.maximum(peak, 0.0)) * (len(errors) == 0)
        return Forecast(
            rate_rps=rate,
            mean_load=mean,
            peak_load=peak,
            peak_low=np.minimum(low, peak),
            peak_high=np.maximum(high, least),
            peak_errors=errors,
            input_tokens=inputs,
            output_tokens=outputs,
        )


def _recent_mean(past: Demand, column: Floats) -> Floats:
    """Mean weighted by requests: [llm]; over the last epochs, else over the whole past,
    0 where there was never a request."""
    mean = np.zeros(len(past.llms))
    for epochs in (past.num_epochs, LENGTH_EPOCHS):
        weight = past.rate_rps[:, -epochs:]
        total, seen = (weight * column[:, -epochs:]).sum(axis=1), weight.sum(axis=1)
        mean = np.where(seen > 0, total / np.maximum(seen, 1e-12), mean)
    return mean
