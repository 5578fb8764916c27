"""Forecasts: the published test vector, no look-ahead, safe on short series."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.traces.forecast import (
    RULES,
    Forecast,
    Outlook,
    forecast_by,
    get_forecaster,
    get_rule,
)
from foreserve.traces.margins import margins
from foreserve.traces.rules import Calendar, Series
from foreserve.traces.scenarios import joint_peaks, joint_scenarios
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


@pytest.mark.parametrize("name", RULES)
def test_no_past_and_short_past(name):
    """Before anything is known: no rate, one request at a time; then the last value."""
    forecaster = get_forecaster(name)
    blank = forecaster(demand([[5.0, 5.0]]).upto(0), 1)
    assert blank.rate_rps.tolist() == [[0.0]]
    assert blank.peak_load.tolist() == [[1.0]]
    assert forecaster(demand([3, 7]), 1).mean_load.tolist() == [[7.0]]


@pytest.mark.parametrize("name", RULES)
def test_no_look_ahead(name):
    """Whatever comes later, the forecast made before is the same."""
    rng = np.random.default_rng(1)
    series = rng.poisson(5, 40).astype(float)
    betrayed = np.concatenate([series[:20], 1000 + series[20:]])
    forecaster = get_forecaster(name)
    one = forecaster(demand(series).upto(20), 3)
    other = forecaster(demand(betrayed).upto(20), 3)
    for column in ("rate_rps", "mean_load", "peak_load", "peak_high", "peak_errors"):
        assert (getattr(one, column) == getattr(other, column)).all()


@pytest.mark.parametrize("name", RULES)
def test_a_replay_knows_no_more_than_each_of_its_moments(name):
    """Forecasts of a whole trace at once against those of the past alone, epoch by epoch,
    several ahead: the same in every field."""
    rng = np.random.default_rng(3)
    whole = demand(rng.poisson(5, (3, 80)).astype(float), 3600.0)
    rule = get_rule(name)
    replay = Outlook(rule, whole, 2)
    for now in (0, 1, 2, 24, 25, 49, 60, 78):
        alone, played = forecast_by(rule, whole.upto(now), 2), replay.after(now)
        for column in (field.name for field in fields(Forecast)):
            assert np.array_equal(getattr(alone, column), getattr(played, column)), (
                column
            )


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


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("ahead", [1, 3, 23, 24, 25, 30])
def test_past_forecasts_never_saw_what_came(name, ahead):
    """Rolled forecasts: from any epoch on the future is replaced by one that would betray
    it; forecasts of what lies up to ``ahead`` later stay as they were."""
    rng = np.random.default_rng(2)
    values = rng.gamma(2.0, 5.0, (2, 120)) * (1 + (np.arange(120) % 24 > 12))
    values[1, 40:50] = np.nan
    rule = get_rule(name)
    days = Calendar.of(3600.0)
    whole = rule(Series(values=values, means=values / 2, days=days), ahead)
    assert whole.shape == (2, 120 + ahead)
    for now in (1, 30, 71, 72, 100):
        betrayed = values.copy()
        betrayed[:, now:] = 1e6 * rng.random((2, 120 - now))
        other = rule(Series(values=betrayed, means=betrayed / 2, days=days), ahead)
        kept = slice(0, now + ahead)
        assert np.array_equal(whole[:, kept], other[:, kept], equal_nan=True)
        bounds = margins(values, whole, ahead)
        others = margins(betrayed, other, ahead)
        assert np.array_equal(
            bounds.high[:, kept], others.high[:, kept], equal_nan=True
        )
        short = Series(values=values[:, :now], means=values[:, :now] / 2, days=days)
        last = rule(short, ahead)[:, -1]
        assert np.array_equal(last, whole[:, now + ahead - 1], equal_nan=True)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("series", [[0.0] * 90, [5.0] * 90, [0.0] * 60 + [7.0] * 30])
def test_dead_and_constant_series(name, series):
    """No NaN, nothing negative or endless, and a constant is forecast as it is."""
    forecast = get_forecaster(name)(demand(series, 3600.0), 2)
    for column in (forecast.peak_load, forecast.peak_high, forecast.rate_rps):
        assert np.isfinite(column).all()
        assert (column >= 0).all()
        assert (column < 100).all()
    if series[0] == series[-1]:
        assert forecast.peak_load[0] == pytest.approx([series[0]] * 2)


@pytest.mark.parametrize("drift", [1.0, 1.3, 1 / 1.3])
@pytest.mark.parametrize("name", ["last", "corrective", "auto"])
def test_bounds_cover_under_drift(name, drift):
    """A daily rhythm with noise whose level moves by 30 % over the second half, ten
    series of ten days: 93 to 97 % of the peaks stay below the bound, and as many above
    the lower one."""
    rng = np.random.default_rng(5)
    t = np.arange(240)
    level = np.where(t < 120, 1.0, drift ** ((t - 120) / 60))
    rhythm = 1 + 0.5 * np.sin(2 * np.pi * t / 24)
    values = 100 * level * rhythm * rng.lognormal(0, 0.15, (10, 240))
    rule = get_rule(name)
    past = Series(values=values, means=values, days=Calendar.of(3600.0))
    bounds = margins(values, rule(past, 1), 1)
    scored = slice(48, 240)
    above = values[:, scored] > bounds.high[:, scored]
    below = values[:, scored] < bounds.low[:, scored]
    assert 0.03 <= above.mean() <= 0.07
    assert 0.03 <= below.mean() <= 0.07


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
        peak_low=(peak - 1.645 * std) * column,
        peak_high=(peak + 1.645 * std) * column,
        peak_errors=std * np.random.default_rng(1).standard_normal((2000, llms, 1)),
        input_tokens=column,
        output_tokens=column,
    )


def test_scenarios_have_the_margins_of_past_errors():
    """Always busy (mean load 50): the mid-quantiles of Normal(100, 2), and where past
    errors had nothing to do with each other, neither have the scenarios."""
    forecast = moment(50.0, 100.0, 2.0, llms=2)
    levels = joint_scenarios(forecast, 100, np.random.default_rng(3))
    assert levels.shape == (100, 2, 1)
    assert levels.mean(axis=0).ravel() == pytest.approx([100.0, 100.0], abs=0.3)
    assert levels.std(axis=0).ravel() == pytest.approx([2.0, 2.0], rel=0.06)
    assert abs(np.corrcoef(levels[:, :, 0].T)[0, 1]) < 0.3


def together(common: float) -> Forecast:
    """Ten LLMs at 100, errors of deviation 10 that share ``common`` of their variance."""
    rng = np.random.default_rng(4)
    one, own = rng.standard_normal((300, 1)), rng.standard_normal((300, 10))
    errors = 10 * (np.sqrt(common) * one + np.sqrt(1 - common) * own)
    return replace(moment(50.0, 100.0, 10.0, llms=10), peak_errors=errors[:, :, None])


def test_bursts_that_came_together_stay_together():
    """Errors that share all their variance: the sum of ten LLMs deviates by 100, not by
    the 32 of independent ones; margins are the same either way."""
    rng = np.random.default_rng(0)
    joint = joint_peaks(together(1.0), 200, rng)
    alone = joint_peaks(together(1.0), 200, rng, together=False)
    assert joint.sum(axis=1).std() == pytest.approx(100.0, rel=0.15)
    assert alone.sum(axis=1).std() == pytest.approx(32.0, rel=0.25)
    assert np.sort(joint, axis=0) == pytest.approx(np.sort(alone, axis=0))
    apart = joint_peaks(together(0.0), 200, rng)
    assert apart.sum(axis=1).std() == pytest.approx(32.0, rel=0.25)


def test_a_higher_bound_stretches_the_scenarios():
    """The bound is twice as far off as past errors say: so is the 95th percentile; what
    lies below the forecast stays."""
    forecast = together(0.5)
    wide = replace(forecast, peak_high=np.full((10, 1), 100 + 2 * 16.45))
    peaks = joint_peaks(wide, 400, np.random.default_rng(0))[:, 0, 0]
    assert np.quantile(peaks, 0.95) == pytest.approx(132.9, rel=0.01)
    plain = joint_peaks(forecast, 400, np.random.default_rng(0))[:, 0, 0]
    assert np.quantile(peaks, 0.25) == pytest.approx(np.quantile(plain, 0.25))


@pytest.mark.parametrize(("mean", "busy"), [(0.01, 1), (0.2, 4), (1.0, 13), (9.0, 20)])
def test_an_llm_is_busy_as_often_as_poisson_says(mean, busy):
    """Mean load 0.2: busy in 1 - exp(-0.2) = 18 % of 20 moments, so in 4; never in none."""
    levels = joint_scenarios(moment(mean, 3.0, 0.5), 20, np.random.default_rng(0))
    assert (levels > 0).sum() == busy


def test_no_load_no_burst():
    """An LLM that is forecast to be dead needs nothing."""
    levels = joint_scenarios(moment(0.0, 0.0, 0.0), 9, np.random.default_rng(0))
    assert levels.max() == 0.0


def test_bursts_never_fall_below_the_mean_load():
    """A peak is at least the mean, however wide its error."""
    levels = joint_scenarios(moment(5.0, 6.0, 60.0), 9, np.random.default_rng(0))
    assert levels.min() == 5.0
