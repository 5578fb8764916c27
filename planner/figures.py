"""Figures by matplotlib in one style: sizes, colours, ticks, and whole files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreserve.models.errors import InvalidInput

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def check_suffix(path: str) -> None:
    """Refuse a picture format before any work is done."""
    if Path(path).suffix not in SUFFIXES:
        raise InvalidInput(
            f"a picture ends in {', '.join(SUFFIXES)}, not {Path(path).suffix!r}",
            file=path,
        )


def plain_ticks(axes: Axes) -> None:
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


def new_figure(
    columns: int, rows: int = 1, *, width: float = 4.8, height: float = 4.2
) -> Figure:
    """An empty figure of ``rows`` by ``columns`` panels, in inches each."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width * columns, height * rows), layout="constrained")


def save_figure(figure: Figure, path: str) -> None:
    """Write the figure whole or not at all; the same figure is the same bytes."""
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
