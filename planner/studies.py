"""How sure a simulated number is: the same run with several seeds, mean and interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from foreserve.models.outcome import Outcome
from foreserve.models.record import Record
from foreserve.planner.display import NONE, gib, number, percent, seconds, usd
from foreserve.planner.tables import Part, outcome_row

COVERAGE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval(Record):
    """Mean of a metric over runs with different seeds, and how far off it may be.

    The metric's expectation is within ``mean - half_width`` and ``mean + half_width`` in
    `COVERAGE` of all such studies, as far as runs are normally distributed. It speaks of
    chance inside the simulator alone: the trace is the same in every run.
    """

    runs: int
    """That have the metric: a quantile needs a request."""
    mean: float
    half_width: float | None
    """None: one run says nothing about chance."""


def student_t(freedom: int, coverage: float = COVERAGE) -> float:
    """``t`` with probability ``coverage`` between -t and t, for ``freedom`` >= 1 degrees.

    Bisection on the closed form in ``theta = atan(t / sqrt(freedom))``, a finite sum
    (Abramowitz and Stegun, 26.7.3 and 26.7.4); exact to rounding.
    """
    if freedom < 1 or not 0 < coverage < 1:
        raise ValueError(f"student_t({freedom}, {coverage})")
    low, high = 0.0, math.pi / 2
    while low < (theta := (low + high) / 2) < high:
        if _between(theta, freedom) < coverage:
            low = theta
        else:
            high = theta
    return math.sqrt(freedom) * math.tan(high)


def _between(theta: float, freedom: int) -> float:
    """Probability of |T| < sqrt(freedom) tan(theta)."""
    odd, cosine = freedom % 2, math.cos(theta)
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def interval(values: Sequence[float]) -> Interval | None:
    """Student's interval of the mean; None without values."""
    if not values:
        return None
    count, mean = len(values), math.fsum(values) / len(values)
    half_width = None
    if count > 1:
        deviation = float(np.std(np.array(values) - mean, ddof=1))
        half_width = student_t(count - 1) * deviation / math.sqrt(count)
    return Interval(runs=count, mean=mean, half_width=half_width)


def intervals(outcomes: Sequence[Outcome]) -> Mapping[str, Interval]:
    """Of every number of `outcome_row`, over the runs of one policy with many seeds."""
    rows = [outcome_row(outcome) for outcome in outcomes]
    columns = {key: [row[key] for row in rows] for key in (rows[0] if rows else ())}
    found = {
        key: interval([float(v) for v in column if isinstance(v, int | float)])
        for key, column in columns.items()
    }
    return {key: value for key, value in found.items() if value is not None}


MAIN: Sequence[tuple[str, str, Callable[[float], str]]] = (
    ("SLO attainment", "slo_attainment", lambda v: percent(v, 2)),
    ("within 8 x isolated time", "attainment_at_8", lambda v: percent(v, 2)),
    ("Goodput, requests/s", "goodput_rps", number),
    ("Goodput, tokens/s", "goodput_tokens_per_s", number),
    ("TTFT, median", "ttft_p50_s", seconds),
    ("TTFT, P99", "ttft_p99_s", seconds),
    ("TPOT, P99", "tpot_p99_s", seconds),
    ("ITL, P99", "itl_p99_s", seconds),
    ("End to end, P99", "e2e_p99_s", seconds),
    ("Slowdown by LLM (D1)", "d1", number),
    ("Slowdown by request (D2)", "d2", number),
    ("Latency per token (D3)", "d3_s", seconds),
    ("GPU-hours", "gpu_hours", number),
    ("Cost", "cost_usd", usd),
    ("Cold starts", "cold_starts", number),
    ("Warm starts", "warm_starts", number),
    ("Weights moved", "moved_bytes", gib),
    ("of them dropped unused", "wasted_bytes", gib),
)


def study_part(
    policies: Sequence[str], studies: Sequence[Mapping[str, Interval]], seeds: int
) -> Part:
    """Metrics down, policies across: mean and half of the interval."""

    def cell(found: Interval | None, form: Callable[[float], str]) -> str:
        if found is None:
            return NONE
        if found.half_width is None:
            return form(found.mean)
        return f"{form(found.mean)} ± {form(found.half_width)}"

    rows = [
        (name, *(cell(study.get(key), form) for study in studies))
        for name, key, form in MAIN
    ]
    return Part(
        f"Mean of {seeds} seeds, and 95 % confidence interval",
        ("", *policies),
        rows,
        "The trace is the same in every run; seeds draw the load times.",
    )
