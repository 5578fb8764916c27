"""Pictures of the cost model: predicted against measured, and one LLM's curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreserve.planner.figures import (
    COLORS,
    GRID,
    MUTED,
    new_figure,
    plain_ticks,
    save_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]


class Scatter(NamedTuple):
    """One panel: ``groups`` of (predicted, measured), both in ``unit``."""

    title: str
    unit: str
    groups: Mapping[str, tuple[Floats, Floats]]


class Curve(NamedTuple):
    """A line with its interval, or points of a second source where ``low`` is None."""

    label: str
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None


class Panel(NamedTuple):
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


def draw_scatter(panels: Sequence[Scatter], path: str) -> None:
    """Predicted against measured, logarithmic; the band is a factor of 1.25 each way."""
    figure = new_figure(len(panels))
    for column, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), column + 1)
        values = [value for pair in panel.groups.values() for value in pair]
        low = min(float(v.min()) for v in values) / 1.5
        high = max(float(np.quantile(v, 0.995)) for v in values) * 1.5
        ends = np.array([low, high])
        axes.fill_between(ends, ends / 1.25, ends * 1.25, color=GRID, linewidth=0)
        axes.annotate(
            "grey: within a factor of 1.25",
            (0.98, 0.02),
            xycoords="axes fraction",
            ha="right",
            fontsize=8,
            color=MUTED,
        )
        axes.plot(ends, ends, color=MUTED, linewidth=0.8)
        for (name, (predicted, measured)), color in zip(
            panel.groups.items(), COLORS * len(panel.groups), strict=False
        ):
            axes.scatter(
                measured,
                predicted,
                s=7,
                alpha=0.5,
                linewidths=0,
                color=color,
                label=name,
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlim=(low, high),
            ylim=(low, high),
            title=panel.title,
            xlabel=f"measured, {panel.unit}",
            ylabel=f"predicted, {panel.unit}",
        )
        axes.legend(loc="upper left", markerscale=2, fontsize=8)
        plain_ticks(axes)
    save_figure(figure, path)


def draw_curves(panels: Sequence[Panel], path: str) -> None:
    """Curves with their 90 % intervals; points are second opinions."""
    figure = new_figure(len(panels))
    for column, panel in enumerate(panels):
        axes: Axes = figure.add_subplot(1, len(panels), column + 1)
        for curve, color in zip(panel.curves, COLORS * 9, strict=False):
            if curve.low is None or curve.high is None:
                axes.plot(curve.x, curve.y, "o", ms=4, color=color, label=curve.label)
                continue
            axes.plot(curve.x, curve.y, color=color, label=curve.label, linewidth=1.4)
            axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.12)
        axes.set(
            xscale="log",
            yscale="log",
            title=panel.title,
            xlabel=panel.x_label,
            ylabel=panel.y_label,
        )
        axes.legend(fontsize=8)
        plain_ticks(axes)
    save_figure(figure, path)
