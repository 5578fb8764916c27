"""Forecasts: the published test vector, no look-ahead, safe on short series."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.traces.forecast import FORECASTERS, Forecast, get_forecaster
from foreserve.traces.scenarios import independent_scenarios
from foreserve.traces.trace import Demand


def demand(series, epoch_s=21_600.0):
    """One LLM (or several rows); four epochs a day by default."""
    rows = np.atleast_2d(np.array(series, dtype=np.float64))
    return Demand(
        epoch_s=epoch_s,
        start_s=0.0,
        llms=tuple(f"llm{i}" for i in range(len(rows))),
        rate_rps=rows.copy(),
        mean_load=rows.copy(),
        peak_load=rows.copy(),
        input_tokens=np.full(rows.shape, 10.0),
        output_tokens=np.full(rows.shape, 5.0),
    )


@pytest.mark.parametrize(
    ("observed", "expected"), [([12], 14.0), ([12, 11], 14.0), ([12, 11, 17], 17.714)]
)
def test_corrective_seasonal_vector(observed, expected):
    """Base 10, 12, 14, 16; observed 12, 11, 17: 14.000, 14.000, 17.714 (WarmServe, sec 3);
    the oldest-heavy weights would give 15.000 and 17.286 for the last two."""
    past = demand([10, 12, 14, 16, *observed])
    forecast = get_forecaster("corrective")(past, 1)
    assert forecast.peak_load[0, 0] == pytest.approx(expected, abs=5e-4)


def test_seasonal_is_the_mean_of_the_same_epoch():
    """Days (1,2,3,4) and (3,4,5,6): the next day starts at 2, then 3."""
    forecast = get_forecaster("seasonal")(demand([1, 2, 3, 4, 3, 4, 5, 6]), 2)
    assert forecast.mean_load.tolist() == [[2, 3]]


def test_corrections_never_go_below_zero():
    """A quiet day after a loud one: at least 0."""
    forecast = get_forecaster("corrective")(demand([9, 9, 1, 1, 0, 0]), 1)
    assert forecast.peak_load[0, 0] == 0.0


@pytest.mark.parametrize("name", FORECASTERS)
def test_no_past_and_short_past(name):
    """Before anything is known: no rate, one request at a time; then the last value."""
    forecaster = get_forecaster(name)
    blank = forecaster(demand([[5.0, 5.0]]).upto(0), 1)
    assert blank.rate_rps.tolist() == [[0.0]]
    assert blank.peak_load.tolist() == [[1.0]]
    assert forecaster(demand([3, 7]), 1).mean_load.tolist() == [[7.0]]


@pytest.mark.parametrize("name", FORECASTERS)
def test_no_look_ahead(name):
    """Whatever comes later, the forecast made before is the same."""
    rng = np.random.default_rng(1)
    series = rng.poisson(5, 40).astype(float)
    betrayed = np.concatenate([series[:20], 1000 + series[20:]])
    forecaster = get_forecaster(name)
    one = forecaster(demand(series).upto(20), 3)
    other = forecaster(demand(betrayed).upto(20), 3)
    for column in ("rate_rps", "mean_load", "peak_load", "peak_std", "input_tokens"):
        assert (getattr(one, column) == getattr(other, column)).all()


def test_days_are_those_of_the_clock():
    """Four epochs a day, and the past starts at noon: 1 2 | 3 4 1 2 | 3 + 4. Six epochs
    on, a new day has just begun, so no error of the old one is carried into it."""
    past = replace(demand([1, 2, 3, 4, 1, 9]), start_s=43_200.0)
    corrective = get_forecaster("corrective")
    assert corrective(past, 1).peak_load[0, 0] == 3.0
    # An hour into the day it was 5 above: the next epoch is taken to be so, too.
    later = replace(demand([1, 2, 3, 4, 1, 9, 8]), start_s=43_200.0)
    assert corrective(later, 1).peak_load[0, 0] == 9.0
    # On a clock of the past's own, the last day is one epoch older.
    assert corrective(demand([1, 2, 3, 4, 1, 9]), 1).peak_load[0, 0] == pytest.approx(
        3 + (2 * 7 + 1 * 0) / 3
    )


def test_lengths_outlast_a_pause():
    """Nothing for longer than the window of lengths: the mean of the whole past."""
    quiet = np.zeros(40)
    quiet[:2] = [1, 3]
    past = replace(demand(quiet), input_tokens=np.where(quiet, [quiet * 10], 0.0))
    assert get_forecaster("last")(past, 1).input_tokens[0, 0] == pytest.approx(25.0)
    never = replace(demand(quiet * 0), input_tokens=np.zeros((1, 40)))
    assert get_forecaster("last")(never, 1).input_tokens[0, 0] == 0.0


def test_error_of_the_peak_is_learnt():
    """A series that alternates 0 and 20 surprises `last` by 20 each time."""
    forecast = get_forecaster("last")(demand([0, 20] * 15), 1)
    assert forecast.peak_std[0, 0] == pytest.approx(20.0)


def test_unknown_method():
    """The hint names the closest one."""
    with pytest.raises(InvalidInput, match="corrective"):
        get_forecaster("correctiv")


def moment(mean, peak, std, llms=1):
    """A forecast of one epoch, the same for ``llms`` LLMs."""
    column = np.ones((llms, 1))
    return Forecast(
        rate_rps=mean * column,
        mean_load=mean * column,
        peak_load=peak * column,
        peak_std=std * column,
        input_tokens=column,
        output_tokens=column,
    )


def test_scenarios_have_exact_margins_and_no_common_order():
    """Always busy (mean load 50): the mid-quantiles of Normal(100, 2), shuffled."""
    forecast = moment(50.0, 100.0, 2.0, llms=2)
    levels = independent_scenarios(forecast, 100, np.random.default_rng(3))
    assert levels.shape == (100, 2, 1)
    assert np.sort(levels[:, 0, 0]) == pytest.approx(np.sort(levels[:, 1, 0]))
    assert levels[:, 0, 0].mean() == pytest.approx(100.0)
    assert levels[:, 0, 0].std() == pytest.approx(2.0, rel=0.02)
    correlation = np.corrcoef(levels[:, 0, 0], levels[:, 1, 0])[0, 1]
    assert abs(correlation) < 0.3


@pytest.mark.parametrize(("mean", "busy"), [(0.01, 1), (0.2, 4), (1.0, 13), (9.0, 20)])
def test_an_llm_is_busy_as_often_as_poisson_says(mean, busy):
    """Mean load 0.2: busy in 1 - exp(-0.2) = 18 % of 20 moments, so in 4; never in none."""
    levels = independent_scenarios(moment(mean, 3.0, 0.5), 20, np.random.default_rng(0))
    assert (levels > 0).sum() == busy


def test_no_load_no_burst():
    """An LLM that is forecast to be dead needs nothing."""
    levels = independent_scenarios(moment(0.0, 0.0, 0.0), 9, np.random.default_rng(0))
    assert levels.max() == 0.0


def test_bursts_never_fall_below_the_mean_load():
    """A peak is at least the mean, however wide its error."""
    levels = independent_scenarios(moment(5.0, 6.0, 60.0), 9, np.random.default_rng(0))
    assert levels.min() == 5.0
