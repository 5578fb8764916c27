"""Plain rows as Markdown, CSV or JSON, for other programs and for pull requests."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Latency, Outcome, Ratios


class Part(NamedTuple):
    """One titled table for people: texts, which may carry rich's markup."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def outcome_row(outcome: Outcome) -> Mapping[str, object]:
    """One run as a flat row of plain numbers; None where nothing was measured."""
    total = outcome.total

    def measured(values: Latency | Ratios, statistic: str) -> float | None:
        value: float = getattr(values, statistic)
        return value if values.count else None

    return {
        "policy": outcome.policy,
        "requests": total.requests,
        "finished": total.finished,
        "slo_attainment": total.slo_attainment,
        "ttft_p50_s": measured(total.ttft, "p50_s"),
        "ttft_p99_s": measured(total.ttft, "p99_s"),
        "tpot_p50_s": measured(total.tpot, "p50_s"),
        "tpot_p99_s": measured(total.tpot, "p99_s"),
        "itl_p50_s": measured(total.itl, "p50_s"),
        "itl_p99_s": measured(total.itl, "p99_s"),
        "gpu_hours": outcome.gpu_hours.get("total"),
        "cost_usd": outcome.cost_usd,
        "loads": outcome.loads,
        "loaded_bytes": outcome.loaded_bytes,
        "activations": outcome.activations,
        "warm_starts": outcome.warm_starts,
        "cold_starts": outcome.cold_starts,
        "e2e_mean_s": measured(total.e2e, "mean_s"),
        "e2e_p99_s": measured(total.e2e, "p99_s"),
        "d1": total.d1 if total.requests else None,
        "d2": measured(total.slowdown, "mean"),
        "d3_s": measured(total.normalized, "mean_s"),
        "slowdown_p99": measured(total.slowdown, "p99"),
        **{f"attainment_at_{k}": share for k, share in total.attainment_at.items()},
        "goodput_rps": total.goodput_rps,
        "goodput_tokens_per_s": total.goodput_tokens_per_s,
        "moved_bytes": outcome.moved_bytes,
        "wasted_bytes": outcome.wasted_bytes,
        "unused_bytes": outcome.unused_bytes,
        "storage_loads": outcome.storage_loads,
        "faults": outcome.faults,
        "restarted": outcome.restarted,
    }


def render(rows: Sequence[Mapping[str, object]], fmt: str) -> str:
    """``rows`` as ``md``, ``csv`` or ``json``; columns in the order first seen.

    Missing, None and NaN are empty cells (null in JSON). CSV and JSON hold numbers in
    full, Markdown to four significant digits.
    """
    if fmt not in ("md", "csv", "json"):
        raise InvalidInput(f"unknown table format {fmt!r}", hint="md, csv or json")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return "[]\n" if fmt == "json" else ""
    if fmt == "json":
        plain = [{key: _known(value) for key, value in row.items()} for row in rows]
        return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if fmt == "csv":
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_known(row.get(key)) for key in columns] for row in rows)
        return file.getvalue()
    cells = [[_markdown(row.get(key)) for key in columns] for row in rows]
    names = [_markdown(column) for column in columns]
    width = [max(3, *map(len, column)) for column in zip(names, *cells, strict=True)]
    right = [
        any(isinstance(row.get(key), int | float) for row in rows) for key in columns
    ]
    rule = [
        "-" * (w - 1) + ":" if r else "-" * w for w, r in zip(width, right, strict=True)
    ]
    lines = []
    for line in (names, rule, *cells):
        padded = [
            text.rjust(w) if r else text.ljust(w)
            for text, w, r in zip(line, width, right, strict=True)
        ]
        lines.append("| " + " | ".join(padded) + " |\n")
    return "".join(lines)


def _known(value: object) -> object:
    unknown = isinstance(value, float) and not math.isfinite(value)
    return None if unknown else value


def _markdown(value: object) -> str:
    value = _known(value)
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return " ".join(str(value).replace("|", "\\|").split())
