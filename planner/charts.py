"""Curves for the report as inline SVG: the only file that draws with matplotlib.

The same numbers give the same bytes. Texts stay texts and follow the page's font; ink,
grid and panel colours become the page's CSS variables, so dark mode and print just work.
No text comes from the user: names stand in the HTML around a chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreserve.planner.display import TERMS, clock, time_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

INK, MUTED, GRID, LINE = "#000001", "#000002", "#000003", "#000004"
"""Stand-ins that `_svg` turns into CSS variables."""
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", LINE: "--line"}
MISS = "#d1242f"
OTHER_TERM = "#888888"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.0,
    "axes.formatter.useoffset": False,
    "axes.formatter.use_mathtext": False,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "path.simplify": True,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


class Curve(NamedTuple):
    """First-token delays of one policy; infinite where no token came."""

    delay_s: Floats
    color: str
    dashes: str


class Course(NamedTuple):
    """One policy over time: means of the bins, and NaN where no request came."""

    edges_s: Floats
    load: Floats
    ttft_p99_s: Floats
    color: str
    dashes: str


@contextmanager
def _figure(width_in: float, height_in: float, salt: str) -> Iterator[Figure]:
    """A figure of our style, independent of any the user has set."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**STYLE, "svg.hashsalt": salt})
        yield Figure(figsize=(width_in, height_in), layout="constrained")


def _svg(figure: Figure, label: str) -> str:
    """The figure as an ``<svg>`` element for the page, ``label`` read to the blind."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    head = f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{label}">'
    text = head + text[text.index(">") + 1 :]
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    # Older versions of matplotlib write the shorthand.
    text = re.sub(r"font: [^;]*?([\d.]+px) [^;]*;", r"font-size: \1;", text)
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', _rounded, text)
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, f"var({variable})")
    return re.sub(r"\n\s*", "\n", text)


def _rounded(attribute: re.Match[str]) -> str:
    """Coordinates to a tenth of a unit, which no eye can tell apart."""
    text = re.sub(r"-?\d+\.\d\d+", lambda m: f"{float(m[0]):.1f}", attribute[0])
    return re.sub(r" *\n *", "", text)


def _time_axis(axes: Axes, edges_s: Floats, at_most: int) -> None:
    ticks = time_ticks(edges_s[0], edges_s[-1], at_most)
    axes.set_xticks(ticks, [clock(t) for t in ticks])
    axes.set_xlim(edges_s[0], edges_s[-1])


def _steps(values: Floats) -> Floats:
    """Values of epochs, the last one twice: with edges as x, a ``post`` step."""
    return np.append(values, values[-1])


def load_panel(
    edges_s: Floats,
    *,
    forecast_peak: Floats,
    high: Floats,
    actual_mean: Floats,
    actual_peak: Floats,
    salt: str,
) -> str:
    """Load of one LLM over the epochs: forecast band, actual, misses in red.

    The page says in ``--line`` what colour the actual load has.
    """
    with _figure(3.6, 1.6, salt) as figure:
        axes = figure.add_subplot()
        peak, top = _steps(forecast_peak), _steps(high)
        mean, actual = _steps(actual_mean), _steps(actual_peak)
        axes.fill_between(
            edges_s,
            peak,
            np.fmax(peak, top),
            step="post",
            color=MUTED,
            alpha=0.25,
            lw=0,
        )
        axes.fill_between(edges_s, 0, mean, step="post", color=LINE, alpha=0.35, lw=0)
        axes.step(edges_s, peak, where="post", color=MUTED, lw=1.0, ls=(0, (3, 1.5)))
        axes.step(edges_s, actual, where="post", color=LINE, lw=1.3)
        axes.fill_between(
            edges_s, top, np.fmax(top, actual), step="post", color=MISS, alpha=0.9, lw=0
        )
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=4)
        _time_axis(axes, edges_s, 6)
        return _svg(figure, "Load against forecast over time")


def ttft(curves: Sequence[Curve], slo_s: float | None) -> str:
    """Share of requests whose first token came within x, and the share that waited
    longer on a logarithmic axis, where the tail shows."""
    with _figure(12, 3.2, "ttft") as figure:
        body, tail = figure.subplots(1, 2)
        least = 1.0
        for curve in curves:
            ordered = np.sort(curve.delay_s)
            answered = int(np.isfinite(ordered).sum())
            if not answered:
                continue
            count = len(ordered)
            # Evenly in the body and ever denser towards the last request.
            rank = np.unique(
                np.concatenate(
                    [
                        np.linspace(0, answered - 1, 200),
                        answered - np.geomspace(1, answered, 200),
                    ]
                ).astype(np.int64)
            )
            delay_s = np.maximum(ordered[rank], 1e-4)
            share = (rank + 1) / count
            body.plot(delay_s, share, color=curve.color, ls=curve.dashes)
            waiting = np.maximum(1 - share, 0.5 / count)
            tail.plot(delay_s, waiting, color=curve.color, ls=curve.dashes)
            least = min(least, 1 / count)
        for axes in (body, tail):
            axes.set_xscale("log")
            axes.margins(x=0.02)
            _plain_seconds(axes.xaxis)
            axes.set_xlabel("time to first token")
            if slo_s is not None:
                axes.axvline(slo_s, color=MUTED, lw=0.9, ls=(0, (1, 2)))
        body.set_ylim(0, 1.02)
        body.set_title("Answered within")
        body.yaxis.set_major_formatter(_percents)
        tail.set_yscale("log")
        tail.set_ylim(max(least, 1e-5), 1.1)
        tail.set_title("Still waiting (tail)")
        tail.yaxis.set_major_formatter(_percents)
        tail.yaxis.set_minor_formatter(lambda value, position: "")
        return _svg(figure, "Distribution of the time to first token by policy")


def over_time(courses: Sequence[Course], slo_s: float | None) -> str:
    """Requests in the system, and below the P99 of the time to the first token of those
    that arrived then, on a logarithmic axis."""
    with _figure(12, 4.2, "course") as figure:
        upper, lower = figure.subplots(2, 1, sharex=True)
        for course in courses:
            style: Any = {"where": "post", "color": course.color, "ls": course.dashes}
            upper.step(course.edges_s, _steps(course.load), **style)
            delay_s = np.maximum(course.ttft_p99_s, 1e-4)
            lower.step(course.edges_s, _steps(delay_s), **style)
        upper.set_ylim(bottom=0)
        upper.set_title("Requests in the system, mean")
        lower.set_yscale("log")
        _plain_seconds(lower.yaxis)
        if slo_s is not None:
            lower.axhline(slo_s, color=MUTED, lw=0.9, ls=(0, (1, 2)))
        lower.set_title("P99 of the time to first token, by arrival")
        _time_axis(lower, courses[0].edges_s, 13)
        return _svg(figure, "Load and P99 time to first token over time by policy")


def _plain_seconds(axis: Axis) -> None:
    def text(value: float, position: float) -> str:
        return f"{value:g} s" if value >= 0.1 else f"{1000 * value:g} ms"

    axis.set_major_formatter(text)
    axis.set_minor_formatter(lambda value, position: "")


def _percents(value: float, position: float) -> str:
    return f"{100 * value:g} %"


def terms_and_gap(
    edges_s: Floats,
    terms: Mapping[str, Floats],
    objective: Floats,
    bound: Floats,
    gap: Floats,
) -> str:
    """Objective by term over the epochs with the bound on it; below, the gap."""
    with _figure(12, 4.2, "terms") as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        base = np.zeros(len(edges_s))
        for label, values in terms.items():
            top = base + _steps(np.maximum(values, 0.0))
            color = TERMS[label][1] if label in TERMS else OTHER_TERM
            upper.fill_between(edges_s, base, top, step="post", color=color, lw=0)
            base = top
        upper.step(edges_s, _steps(objective), where="post", color=INK, lw=0.7)
        upper.step(
            edges_s, _steps(bound), where="post", color=INK, lw=1.1, ls=(0, (2, 1.5))
        )
        upper.set_ylim(bottom=0)
        upper.set_ylabel("weighted seconds")
        upper.set_title("Objective by term, per epoch")
        lower.fill_between(
            edges_s, 0, _steps(gap), step="post", color=MUTED, alpha=0.45, lw=0
        )
        lower.set_ylim(bottom=0, top=None if np.nanmax(gap, initial=0) > 0 else 0.01)
        lower.yaxis.set_major_formatter(_percents)
        lower.locator_params(axis="y", nbins=3)
        lower.set_title("Gap, per epoch")
        _time_axis(lower, edges_s, 13)
        return _svg(figure, "Objective terms, bound and gap over the epochs")


def changes(edges_s: Floats, shares: Floats, lengths: Sequence[int]) -> str:
    """Share of the replicas that each epoch's start changes; how long intervals are."""
    with _figure(12, 2.4, "changes") as figure:
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        left.bar(
            edges_s[:-1],
            shares,
            width=np.diff(edges_s),
            align="edge",
            color=MUTED,
            lw=0,
        )
        left.set_ylim(0, max(0.01, 1.05 * shares.max()))
        left.yaxis.set_major_formatter(_percents)
        left.locator_params(axis="y", nbins=4)
        left.set_title("Replicas that change at the start of an epoch")
        _time_axis(left, edges_s, 9)
        counts = np.bincount(lengths)
        right.bar(np.arange(len(counts)), counts, width=0.9, color=MUTED, lw=0)
        right.set_xlim(0, len(counts))
        for axis in (right.xaxis, right.yaxis):
            axis.get_major_locator().set_params(integer=True)
        right.set_xlabel("epochs from one change to the next")
        right.set_title("Replacement intervals")
        return _svg(figure, "Changes of the placement and replacement intervals")


def solver(
    found: tuple[Floats, Floats],
    proven: tuple[Floats, Floats],
    wall_s: Floats,
    first_s: Floats,
) -> str:
    """Incumbent and bound ``(elapsed_s, value)`` of one solve; seconds of all solves."""
    with _figure(12, 3.0, "solver") as figure:
        left, right = figure.subplots(1, 2)
        end_s = max([*found[0], *proven[0]], default=0.0) or 1.0
        for (elapsed_s, value), dashes in ((found, "-"), (proven, (0, (2, 1.5)))):
            if len(value):
                x, y = np.append(elapsed_s, end_s), _steps(value)
                left.step(x, y, where="post", color=INK, ls=dashes)
                left.plot(elapsed_s, value, "o", color=INK, ms=2.5)
        left.set_xlim(0, 1.02 * end_s)
        left.set_xlabel("seconds since the solve began")
        left.set_ylabel("weighted seconds")
        left.set_title("Best plan (line) and bound (dashed), slowest epoch")
        index = np.arange(len(wall_s))
        right.bar(index, wall_s, width=0.9, color="#7fa8c9", lw=0)
        right.plot(
            index, first_s, "_", color=INK, ms=max(1.5, min(12, 300 / len(index)))
        )
        right.set_xlim(-0.7, len(index) - 0.3)
        right.xaxis.get_major_locator().set_params(integer=True)
        right.set_ylim(bottom=0)
        right.set_xlabel("epoch")
        right.set_ylabel("seconds")
        right.set_title("Solve time per epoch, and when its first plan was there")
        return _svg(figure, "Solver progress and solve times")
