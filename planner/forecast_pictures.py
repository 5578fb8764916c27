"""Pictures of forecasts: what came, what was expected, and what was missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foreserve.planner.figures import COLORS, MUTED, new_figure, save_figure
from foreserve.traces.backtest import Observed, Rolled
from foreserve.traces.trace import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS = 12
ACTUAL, EXPECTED, MISSED = "#1c2128", COLORS[0], COLORS[5]
WIDTH_IN, HEIGHT_IN = 11.0, 2.3


def draw_backtest(observed: Observed, rolled: Rolled, path: str) -> None:
    """One panel per series, the busiest first: peaks, forecast, bounds, misses."""
    values = observed.series.values
    busiest = np.argsort(-np.nansum(values, axis=1), kind="stable")[:MOST_PANELS]
    figure = new_figure(1, len(busiest), width=WIDTH_IN, height=HEIGHT_IN)
    hours = _hours(observed, observed.num_epochs)
    for place, row in enumerate(busiest):
        axes = figure.add_subplot(len(busiest), 1, place + 1)
        high = rolled.high[row]
        _band(axes, hours, rolled.low[row], high)
        axes.plot(
            hours, rolled.forecast[row], color=EXPECTED, lw=1, label=rolled.method
        )
        axes.plot(hours, values[row], color=ACTUAL, lw=0.9, label="came")
        above = values[row] > high
        axes.plot(
            hours[above],
            values[row][above],
            "o",
            ms=3.5,
            color=MISSED,
            label=f"above the bound ({above.mean():.1%})",
        )
        # A bound that once went through the roof must not flatten everything else.
        top = 1.25 * np.nanmax(np.concatenate([values[row], rolled.forecast[row][1:]]))
        _finish(axes, observed, str(observed.names[row]), place == 0, top)
    axes.set_xlabel("hours")
    save_figure(figure, path)


def draw_forecast(observed: Observed, ahead: Floats, path: str) -> None:
    """The past of each series and its forecast; ``ahead`` is [epoch, 3, series]."""
    values = observed.series.values
    busiest = np.argsort(-np.nansum(values, axis=1), kind="stable")[:MOST_PANELS]
    figure = new_figure(1, len(busiest), width=WIDTH_IN, height=HEIGHT_IN)
    past = _hours(observed, observed.num_epochs)
    # Two days, and at least twice what is forecast, are past enough to see.
    kept = min(len(past), max(2 * observed.series.days.per_day, 2 * len(ahead)))
    coming = past[-1] + (1 + np.arange(len(ahead))) * observed.epoch_s / 3600
    for place, row in enumerate(busiest):
        axes = figure.add_subplot(len(busiest), 1, place + 1)
        low, peak, high = ahead[:, 0, row], ahead[:, 1, row], ahead[:, 2, row]
        _band(axes, coming, low, high)
        axes.plot(past[-kept:], values[row, -kept:], color=ACTUAL, lw=0.9, label="came")
        axes.plot(coming, peak, color=EXPECTED, lw=1.4, label="forecast")
        _finish(axes, observed, str(observed.names[row]), place == 0, None)
    axes.set_xlabel("hours")
    save_figure(figure, path)


def _hours(observed: Observed, count: int) -> Floats:
    return (observed.start_s + np.arange(count) * observed.epoch_s) / 3600


def _band(axes: Axes, hours: Floats, low: Floats, high: Floats) -> None:
    axes.fill_between(
        hours, low, high, color=EXPECTED, alpha=0.15, lw=0, label="its bounds"
    )


def _finish(
    axes: Axes, observed: Observed, title: str, legend: bool, top: float | None
) -> None:
    axes.set_title(title)
    axes.set_ylim(bottom=0, top=top if top and top > 0 else None)
    axes.margins(x=0.005)
    axes.tick_params(labelsize=8)
    axes.set_ylabel(observed.unit, fontsize=8, color=MUTED)
    if legend:
        axes.legend(loc="upper left", ncols=4, fontsize=8)
