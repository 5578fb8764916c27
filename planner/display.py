"""How numbers, times, names and colours look, in the terminal and in the report alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foreserve.models.specs import GpuId

LLM_COLORS = (
    "#006bae",
    "#ffae28",
    "#940d1b",
    "#79d7bc",
    "#5136a1",
    "#6b946b",
    "#d76b0d",
    "#00aeff",
    "#c994bc",
    "#00795e",
    "#5e435e",
    "#aeae79",
    "#6b79e4",
    "#a1510d",
    "#94c9ff",
    "#9479a1",
)
"""One colour per LLM, in the order of the fleet, from the start again after the last.
Chosen so that the closest pair is as far apart as possible (OKLab distance 0.117), also
as seen with protanopia and deuteranopia (0.083)."""

POLICY_COLORS = ("#006bae", "#d76b0d", "#00795e", "#940d1b", "#5136a1", "#5e435e")

TERMS = {
    "O1": ("Unserved demand", "#940d1b"),
    "O2": ("Expected cold starts", "#ffae28"),
    "O3": ("Slower TP sizes", "#79d7bc"),
    "O4": ("Loading and stopping replicas", "#5136a1"),
    "O5": ("GPU-hours", "#7fa8c9"),
}
"""Objective terms in plain words, each with its colour."""

NONE = "–"
"""Stands where there is no number."""


def term_name(label: str) -> str:
    return TERMS[label][0] if label in TERMS else label


def number(value: float | None) -> str:
    """At most four significant digits below 1,000, whole numbers above."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    whole = math.isclose(value, round(value), rel_tol=1e-6)
    return f"{value:.{0 if whole else digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """``share`` in percent; what rounds to 0 or 100 without being it says so."""
    if share is None or not math.isfinite(share):
        return NONE
    step = 10.0**-digits
    value = 100 * share
    if 0 < value < step / 2:
        return f"< {step:.{digits}f} %"
    if 100 - step / 2 < value < 100:
        return f"> {100 - step:.{digits}f} %"
    whole = value == round(value)
    return f"{value:.0f} %" if whole else f"{value:.{digits}f} %"


def seconds(value: float | None) -> str:
    """A duration in the unit a person would use for it."""
    if value is None or not math.isfinite(value):
        return NONE
    size = abs(value)
    if size == 0:
        return "0 s"
    if size < 0.9995:
        return f"{1e3 * value:.{1 if size < 0.01 else 0}f} ms"
    if size < 99.95:
        return f"{value:.{2 if size < 9.995 else 1}f} s"
    if size < 7200:
        return f"{value / 60:.{0 if value % 60 == 0 else 1}f} min"
    return f"{value / 3600:.1f} h"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def usd(value: float) -> str:
    return f"${value:,.0f}" if value >= 1000 else f"${value:,.2f}"


def clock(time_s: float) -> str:
    """Trace time as ``h:mm``, with seconds where they are not 0."""
    total = round(time_s)
    sign, total = ("-", -total) if total < 0 else ("", total)
    hours, rest = divmod(total, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{sign}{hours}:{minutes:02d}" + (f":{rest:02d}" if rest else "")


def time_ticks(start_s: float, end_s: float, at_most: int) -> list[float]:
    """Round times within the span, evenly spaced, no more than ``at_most``."""
    minute, hour, day = 60.0, 3600.0, 86400.0
    steps = [1, 2, 5, 10, 15, 30, minute, 2 * minute, 5 * minute, 10 * minute]
    steps += [15 * minute, 30 * minute, hour, 2 * hour, 3 * hour, 6 * hour, 12 * hour]
    steps += [day, 2 * day, 7 * day, 28 * day, 91 * day, 365 * day]
    fitting = (s for s in steps if (end_s - start_s) / s <= at_most - 1)
    step = next(fitting, end_s - start_s)
    first = math.ceil(start_s / step - 1e-9)
    last = math.floor(end_s / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}–{high}"


def gpu_span(gpus: Sequence[GpuId]) -> str:
    """``n0/0``, ``n0/0–3``: a block of GPUs of one node."""
    if len(gpus) == 1:
        return str(gpus[0])
    indices = [gpu.index for gpu in gpus]
    if indices == list(range(indices[0], indices[0] + len(indices))):
        return f"{gpus[0]}–{indices[-1]}"
    return f"{gpus[0].node}/" + ",".join(map(str, indices))


def shorten(text: str, length: int) -> str:
    """``text`` in at most ``length`` characters, cut in the middle."""
    if len(text) <= length:
        return text
    head = length // 2
    tail = length - 1 - head
    return text[:head] + "…" + (text[-tail:] if tail else "")


def is_dark(color: str) -> bool:
    """Whether white text reads better than black on ``#rrggbb`` (WCAG contrast)."""
    return _luminance(color) < 0.179


def _luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def line_colors(color: str) -> tuple[str, str]:
    """``color`` for thin lines on a light and on a dark page: pale and dark ones give
    way until they can be seen."""
    light = mix(color, "#000000", 0.78) if _luminance(color) > 0.35 else color
    dark = mix(color, "#ffffff", 0.68) if is_dark(color) else color
    return light, dark


def mix(color: str, other: str, share: float) -> str:
    """``share`` of ``color`` and the rest of ``other``, both ``#rrggbb``."""
    pairs = zip(_channels(color), _channels(other), strict=True)
    return "#" + "".join(f"{round(a * share + b * (1 - share)):02x}" for a, b in pairs)


def _channels(color: str) -> tuple[int, ...]:
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
