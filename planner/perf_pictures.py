"""Pictures of the cost model: predicted against measured, and one LLM's curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
SUFFIXES = (".svg", ".png", ".pdf")
COLORS = ("#0b6e99", "#c2571a", "#3f7d20", "#7b3fa0", "#8c6d1f", "#b02a5b")
INK, MUTED, GRID = "#1c2128", "#59636e", "#d8dee4"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "foreserve",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


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


def check_suffix(path: str) -> None:
    """Refuse a picture format before any work is done."""
    if Path(path).suffix not in SUFFIXES:
        raise InvalidInput(
            f"a picture ends in {', '.join(SUFFIXES)}, not {Path(path).suffix!r}",
            file=path,
        )


def draw_scatter(panels: Sequence[Scatter], path: str) -> None:
    """Predicted against measured, logarithmic; the band is a factor of 1.25 each way."""
    figure = _figure(len(panels))
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
        _plain_ticks(axes)
    _save(figure, path)


def draw_curves(panels: Sequence[Panel], path: str) -> None:
    """Curves with their 90 % intervals; points are second opinions."""
    figure = _figure(len(panels))
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
        _plain_ticks(axes)
    _save(figure, path)


def _plain_ticks(axes: Axes) -> None:
    """Numbers as people write them, at 1, 2 and 5 of each decade while there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis, (low, high) in (
        (axes.xaxis, axes.get_xlim()),
        (axes.yaxis, axes.get_ylim()),
    ):
        marks = (1, 2, 5) if high < 400 * low else (1,)
        axis.set_major_locator(LogLocator(10, subs=marks, numticks=20))
        axis.set_major_formatter(FuncFormatter(_plain_number))
        axis.set_minor_formatter(NullFormatter())


def _plain_number(value: float, _: int | None) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _figure(columns: int) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(4.8 * columns, 4.2), layout="constrained")


def _save(figure: Figure, path: str) -> None:
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    nothing = dict.fromkeys(("Date", "Creator")) if target.suffix == ".svg" else None
    try:
        figure.savefig(
            partial, format=target.suffix.removeprefix("."), dpi=150, metadata=nothing
        )
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
