"""Forecasts on real series: the published benchmark, coverage, joint scenarios, speed.

    python benchmarks/forecast.py --shared ../shared

Table 1 rebuilds the benchmark of four rules on ServeGen (hourly peaks of 10-minute rates,
one hour ahead, days 5-9 scored) and puts ours beside them; the same table for the Azure
2024 conversation week, 40 days of BurstGPT, and 5-minute peaks of requests in flight
(ServeGen's m-small, requests sampled with the recorded counts and burstiness). Table 2:
share of epochs below the 95 % bound, as recorded and with a drift of the level by 30 %.
Table 3: how often the sum over all series lies in the 90 % interval of joint and of
independent scenarios. Speed: 500 series of ten days of 5-minute epochs, fitted and
forecast. Nothing here was used to choose a constant of the mixture: those were chosen on
clients that are not among the thirty.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_result

from foreserve.traces.backtest import (
    METHODS,
    Observed,
    backtest,
    covering,
    observed_rates,
    observed_trace,
    roll,
)
from foreserve.traces.forecast import Outlook, get_forecaster, get_rule
from foreserve.traces.lengths import LengthQuantiles
from foreserve.traces.margins import margins
from foreserve.traces.rates import Rates, read_rates, sample_requests
from foreserve.traces.rules import Series
from foreserve.traces.scenarios import joint_peaks
from foreserve.traces.trace import Demand

HOUR_S = 3600.0
CLIENTS = 30
LENGTHS = LengthQuantiles(
    input_tokens=np.array([[20.0, 300.0, 4000.0]]),
    output_tokens=np.array([[5.0, 150.0, 1500.0]]),
    starts_s=np.zeros(1),
    levels=np.array([0.0, 0.5, 1.0]),
)


@click.command()
@click.option("--shared", default="../shared", show_default=True)
def main(shared: str) -> None:
    """Print and write all tables."""
    data = Path(shared) / "data"
    totals = observed_rates(read_rates(data / "servegen/totals.csv.gz"), HOUR_S)
    clients = _clients(data)
    sets = {
        "servegen totals": totals.select(("m-large", "m-small")),
        "servegen clients": observed_rates(clients, HOUR_S),
        "azure 2024 conversation": observed_rates(
            read_rates(data / "azure_llm_2024_digitised/conv_envelope.csv.gz"), HOUR_S
        ),
        "burstgpt": observed_rates(
            read_rates(data / "burstgpt_hourly/hourly_d00-39.csv.gz"), HOUR_S
        ),
        "5-minute peaks": _five_minutes(data),
    }
    found: dict[str, Any] = {"published": _published(sets)}
    found["tables"] = {name: _table(observed) for name, observed in sets.items()}
    found["coverage"] = {name: _coverage(observed) for name, observed in sets.items()}
    together = _joined(sets["servegen totals"], sets["servegen clients"])
    found["joint"] = {
        "servegen clients": _joint(sets["servegen clients"]),
        "azure 2024 over six LLMs": _joint(_split(data)),
        "burstgpt over six LLMs": _joint(_split(data, "burstgpt_hourly/hourly_d00-39")),
    }
    found["together"] = _table(together)
    found["speed"] = _speed()
    write_result("forecast", found)
    _show(found)


def _clients(data: Path) -> Rates:
    """The clients of both LLMs with most requests; windows without a row are 0."""
    parts = [
        read_rates(data / f"servegen/rates_{llm}_d00-09.csv.gz")
        for llm in ("m-large", "m-small")
    ]
    windows = 1440
    counts, names = [], []
    for llm, part in zip(("large", "small"), parts, strict=True):
        whole = np.zeros((len(part.names), windows))
        first = round(part.start_s / part.window_s)
        whole[:, first : first + part.num_windows] = np.nan_to_num(part.counts)
        counts.append(whole)
        names += [f"{llm} {name}" for name in part.names]
    every = np.vstack(counts)
    most = np.argsort(-every.sum(axis=1), kind="stable")[:CLIENTS]
    return Rates(
        names=tuple(names[i] for i in most),
        window_s=600.0,
        start_s=0.0,
        counts=every[most],
    )


def _five_minutes(data: Path) -> Observed:
    """Three days of the twelve busiest clients of m-small, as requests in flight."""
    rates = read_rates(data / "servegen/rates_m-small_d00-09.csv.gz")
    most = np.argsort(-np.nan_to_num(rates.counts).sum(axis=1), kind="stable")[:12]
    days = slice(0, 3 * 144)
    assert rates.cv is not None
    chosen = Rates(
        names=tuple(rates.names[i] for i in most),
        window_s=rates.window_s,
        start_s=rates.start_s,
        # A hundredth of the traffic, so that single requests matter.
        counts=np.floor(np.nan_to_num(rates.counts[most][:, days]) / 100),
        cv=rates.cv[most][:, days],
    )
    trace = sample_requests(chosen, LENGTHS, np.random.default_rng(0))
    return observed_trace(trace, 300.0, first_token_s=0.035, token_s=0.015)


def _split(
    data: Path, source: str = "azure_llm_2024_digitised/conv_envelope"
) -> Observed:
    """One service's traffic over six LLMs by a power law, each request by chance: what
    they share are the bursts of their users."""
    whole = read_rates(data / f"{source}.csv.gz")
    share = (1 + np.arange(6.0)) ** -0.5
    share /= share.sum()
    # A tenth of the traffic, so that chance plays a part.
    mean = np.nan_to_num(whole.counts) * share[:, None] / 10
    rates = Rates(
        names=tuple(f"llm{i}" for i in range(6)),
        window_s=whole.window_s,
        start_s=whole.start_s,
        counts=np.random.default_rng(0).poisson(mean).astype(np.float64),
    )
    return observed_rates(rates, HOUR_S)


def _published(sets: dict[str, Observed]) -> dict[str, Any]:
    """The benchmark as it was published: multipliers learnt on days 2-4, too."""
    found = {}
    for method in ("last", "yesterday", "last-or-yesterday", "recent-maximum", "auto"):
        row: dict[str, Any] = {}
        for name in ("servegen totals", "servegen clients"):
            observed = sets[name]
            rolled = roll(observed, method, 1, 0.95)
            factors, missed, bound = [], [], []
            for series in range(len(observed.names)):
                actual = observed.series.values[series]
                forecast = np.nan_to_num(rolled.forecast[series])
                late = slice(120, 240)
                k = covering(forecast[late], actual[late], 0.95)
                factors.append(k * forecast[late].mean() / actual[late].mean())
                k = covering(forecast[48:120], actual[48:120], 0.95)
                missed.append(float((actual[late] > k * forecast[late] + 1e-9).mean()))
                bound.append(float((actual[late] > rolled.high[series, late]).mean()))
            if name == "servegen totals":
                row["factor_large_small"] = [round(float(f), 3) for f in factors]
                row["factor_mean"] = round(float(np.mean(factors)), 3)
                row["missed_learnt_on_days_2_4"] = [round(m, 3) for m in missed]
                row["missed_own_bound"] = [round(m, 3) for m in bound]
            else:
                row["clients_median"] = round(float(np.median(factors)), 3)
        found[method] = row
    return found


def _table(observed: Observed) -> dict[str, Any]:
    first = observed.num_epochs // 2
    rows = {}
    for rolled, scores in backtest(observed, METHODS, (1,), cover=0.95, first=first):
        factor = np.array([score.factor for score in scores])
        rows[rolled.method] = {
            "factor_median": _round(np.median(factor)),
            "error": _round(np.median([score.error for score in scores])),
            "missed": _round(np.mean([score.missed for score in scores])),
            "provided_median": _round(np.median([score.provided for score in scores])),
            "pinball": _round(np.median([score.pinball for score in scores])),
        }
    return rows


def _coverage(observed: Observed) -> dict[str, Any]:
    """Share below the bound after the first day, per drift of the level."""
    values, means = observed.series.values, observed.series.means
    skip = min(observed.series.days.per_day, observed.num_epochs // 3)
    t = np.linspace(0.0, 1.0, observed.num_epochs)
    found = {}
    for label, drift in (("none", 1.0), ("up 30 %", 1.3), ("down 30 %", 1 / 1.3)):
        level = drift ** np.clip(2 * t - 1, 0, 1)
        series = Series(
            values=values * level, means=means * level, days=observed.series.days
        )
        bounds = margins(series.values, get_rule("auto")(series, 1), 1)
        actual, high = series.values[:, skip:], bounds.high[:, skip : values.shape[1]]
        busy = np.nan_to_num(values[:, skip:]).sum(axis=1) > 0
        known = ~np.isnan(actual) & busy[:, None]
        found[label] = _round((actual <= high)[known].mean())
    return found


def _joined(one: Observed, other: Observed) -> Observed:
    """Series forecast together."""
    series = replace(
        one.series,
        values=np.vstack([one.series.values, other.series.values]),
        means=np.vstack([one.series.means, other.series.means]),
    )
    return replace(one, names=(*one.names, *other.names), series=series)


def _joint(observed: Observed, every: int = 1) -> dict[str, Any]:
    """How often the sum of all series lies in the 90 % interval of its scenarios."""
    values = np.nan_to_num(observed.series.values)
    means = np.nan_to_num(observed.series.means)
    demand = Demand(
        epoch_s=observed.epoch_s,
        start_s=observed.start_s,
        llms=observed.names,
        rate_rps=means.copy(),
        mean_load=means.copy(),
        peak_load=values.copy(),
        input_tokens=np.zeros(values.shape),
        output_tokens=np.zeros(values.shape),
    )
    outlook = Outlook(get_rule("auto"), demand, 1)
    inside: dict[bool, list[bool]] = {True: [], False: []}
    correlation = []
    for epoch in range(observed.num_epochs // 2, observed.num_epochs, every):
        forecast = outlook.after(epoch)
        total = values[:, epoch].sum()
        for together, hits in inside.items():
            rng = np.random.default_rng(epoch)
            peaks = joint_peaks(forecast, 200, rng, together=together)
            low, high = np.quantile(peaks[:, :, 0].sum(axis=1), (0.05, 0.95))
            hits.append(bool(low <= total <= high))
        errors = forecast.peak_errors[:, :, 0]
        own = errors.var(axis=0).sum()
        correlation.append(errors.sum(axis=1).var() / max(own, 1e-12))
    return {
        "epochs": len(inside[True]),
        "joint": _round(np.mean(inside[True])),
        "independent": _round(np.mean(inside[False])),
        "variance_of_sum_over_sum_of_variances": _round(np.mean(correlation)),
    }


def _speed() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    t = np.arange(2880)
    rhythm = 1.2 + np.sin(2 * np.pi * t / 288)
    values = rng.gamma(2.0, 5.0, (500, 2880)) * rhythm
    demand = Demand(
        epoch_s=300.0,
        start_s=0.0,
        llms=tuple(f"llm{i}" for i in range(500)),
        rate_rps=values / 3,
        mean_load=values.copy(),
        peak_load=values * 1.5,
        input_tokens=np.ones(values.shape),
        output_tokens=np.ones(values.shape),
    )
    began = time.perf_counter()
    get_forecaster("auto")(demand, 1)
    seconds = time.perf_counter() - began
    return {"series": 500, "epochs": 2880, "seconds": round(seconds, 1)}


def _round(value: Any) -> float | None:
    return round(float(value), 3) if np.isfinite(value) else None


def _show(found: dict[str, Any]) -> None:
    for part, rows in found.items():
        click.echo(part)
        for name, row in rows.items():
            click.echo(f"  {name}: {row}")


if __name__ == "__main__":
    main()
