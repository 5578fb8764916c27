"""Scores and forecasts as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from foreserve.planner.display import clock, number
from foreserve.planner.tables import Part
from foreserve.traces.backtest import Observed, Score

MOST_ROWS = 40


def summarise(
    scores: Sequence[Score], names: Sequence[str], aheads: Sequence[int]
) -> list[dict[str, Any]]:
    """Medians over series (means of misses), per method and horizon; None is endless."""
    rows = []
    for ahead in aheads:
        for name in names:
            own = [s for s in scores if (s.method, s.ahead) == (name, ahead)]
            row: dict[str, Any] = {"method": name, "ahead": ahead, "series": len(own)}
            for key in ("factor", "error", "bias", "pinball", "provided"):
                median = float(np.median([getattr(s, key) for s in own]))
                row[key] = median if np.isfinite(median) else None
            row["missed"] = float(np.mean([s.missed for s in own]))
            hours = [s.gpu_hours for s in own if s.gpu_hours is not None]
            row["gpu_hours"] = sum(hours) if hours else None
            rows.append(row)
    return rows


def plain(score: Score) -> Mapping[str, Any]:
    """For ``--json``, which has no infinity: None."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(score).items()
    }


def summary_table(rows: Sequence[Mapping[str, Any]], cover: float) -> Part:
    """One row per method and horizon; the least capacity of each horizon is bold."""
    with_hours = any(row["gpu_hours"] is not None for row in rows)
    heads = ["method", "ahead", f"capacity at {1 - cover:.0%} missed", "error", "bias"]
    heads += ["bound missed", "bound provided"] + ["GPU-hours"] * with_hours
    known: dict[int, list[float]] = {}
    for row in rows:
        if row["factor"] is not None:
            known.setdefault(row["ahead"], []).append(row["factor"])
    cells = []
    for row in rows:
        least = row["factor"] == min(known.get(row["ahead"], [math.nan]))
        cells.append(
            [
                row["method"],
                str(row["ahead"]),
                _factor(row["factor"], least, 3),
                f"{row['error']:.1%}",
                f"{row['bias']:+.1%}",
                f"{row['missed']:.1%}",
                f"{row['provided']:.2f}",
            ]
        )
        if with_hours:
            hours = row["gpu_hours"]
            cells[-1].append("-" if hours is None else f"{hours:,.0f}")
    note = (
        "medians over series; capacity and what the bound provided as multiples of the "
        "mean peak (1 is perfect)"
    )
    return Part("By method", heads, cells, note)


def series_table(scores: Sequence[Score], names: Sequence[str], ahead: int) -> Part:
    """Capacity at equal misses, series by method."""
    rows: dict[str, dict[str, float]] = {}
    for each in scores:
        if each.ahead == ahead:
            rows.setdefault(each.series, {})[each.method] = each.factor
    cells = []
    for series, own in list(rows.items())[:MOST_ROWS]:
        least = min(own.values())
        cells.append([series, *(_factor(own[n], own[n] == least, 2) for n in names)])
    more = len(rows) - MOST_ROWS
    title = f"Capacity by series, {ahead} ahead"
    return Part(title, ["series", *names], cells, _more(more))


def ahead_table(
    observed: Observed, rows: Sequence[Mapping[str, Any]], method: str, cover: float
) -> Part:
    """What comes: peaks and their bounds."""
    cells = [
        [
            str(row["series"]),
            clock(row["start_s"]),
            *(number(row[key]) for key in ("low", "peak", "high")),
        ]
        for row in rows[:MOST_ROWS]
    ]
    heads = ["series", "from", f"above in {cover:.0%}", "peak", f"below in {cover:.0%}"]
    title = f"Peak {observed.unit} per epoch of {observed.epoch_s:g} s, {method}"
    return Part(title, heads, cells, _more(len(rows) - MOST_ROWS))


def _factor(value: float | None, least: bool, digits: int) -> str:
    if value is None or not math.isfinite(value):
        return "never"
    text = f"{value:.{digits}f}"
    return f"[bold]{text}[/]" if least else text


def _more(rows: int) -> str:
    return f"{rows} more rows: --json" if rows > 0 else ""
