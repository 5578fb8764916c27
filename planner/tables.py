"""Tables: what a plan, its runs and its LLMs come to, as text for terminal and report;
and plain rows as Markdown, CSV or JSON for other programs."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from foreserve.models.errors import InvalidInput
from foreserve.models.outcome import Latency, Outcome, Run, Service
from foreserve.models.plan import Plan
from foreserve.planner.display import NONE, number, percent, seconds, term_name, usd
from foreserve.planner.facts import PlanFacts, load_fits, plan_facts, predicted
from foreserve.planner.picture import colours


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Cells of a table; the first is a name, the others are numbers as text."""

    cells: tuple[str, ...]
    colour: int | None = None
    """Colour index of the LLM the row is about."""
    best: frozenset[int] = frozenset()
    """Cells to stress: the best of those the row compares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    head: tuple[str, ...]
    rows: tuple[Row, ...]


def comparison(plan: Plan, runs: Sequence[Run]) -> Table:
    """Measures down, the plan's prediction and each simulated policy across."""
    facts, said = plan_facts(plan), predicted(plan)

    def promise(value_s: float) -> str:
        known = math.isfinite(value_s)
        error = f" ± {percent(said.relative_error, 0)}" if known else ""
        return seconds(value_s) + error

    outcomes = [run.outcome for run in runs]
    measures: list[tuple[str, str, Callable[[Outcome], float], _Form, int]] = [
        ("TTFT, median", promise(said.ttft_s), _ttft("p50_s"), seconds, -1),
        ("TTFT, P99", promise(said.worst_ttft_s), _ttft("p99_s"), seconds, -1),
        ("TPOT, median", promise(said.tpot_s), _tpot("p50_s"), seconds, -1),
        ("TPOT, P99", promise(said.worst_tpot_s), _tpot("p99_s"), seconds, -1),
        (
            "SLO attainment",
            percent(said.served, 2),
            lambda o: o.total.slo_attainment,
            lambda v: percent(v, 2),
            1,
        ),
        (
            "Requests left unanswered",
            NONE,
            lambda o: o.total.requests - o.total.finished,
            number,
            -1,
        ),
        (
            "GPU-hours",
            number(facts.gpu_hours),
            lambda o: o.gpu_hours.get("total", math.nan),
            number,
            -1,
        ),
        ("Cost", usd(facts.cost_usd), lambda o: o.cost_usd, usd, -1),
        ("Loads", number(facts.steps["load"]), lambda o: o.loads, number, -1),
        (
            "Activations",
            number(facts.steps["activate"]),
            lambda o: o.activations,
            number,
            0,
        ),
        ("of them from WARM", NONE, lambda o: o.warm_starts, number, 0),
        ("of them cold", NONE, lambda o: o.cold_starts, number, -1),
    ]
    rows = []
    for name, plan_cell, measure, form, better in measures:
        values = [measure(outcome) for outcome in outcomes]
        cells = (name, plan_cell, *(form(v) for v in values))
        rows.append(Row(cells=cells, best=_best(values, better)))
    policies = (f"{outcome.policy}, simulated" for outcome in outcomes)
    return Table(head=("", "plan, predicted", *policies), rows=tuple(rows))


_Form = Callable[[float], str]


def _ttft(quantile: str) -> Callable[[Outcome], float]:
    return lambda outcome: _quantile(outcome.total.ttft, quantile)


def _tpot(quantile: str) -> Callable[[Outcome], float]:
    return lambda outcome: _quantile(outcome.total.tpot, quantile)


def _quantile(latency: Latency, quantile: str) -> float:
    value: float = getattr(latency, quantile)
    return value if latency.count else math.nan


def _best(values: Sequence[float], better: int) -> frozenset[int]:
    """Columns (of the whole row) of the best run, where runs differ."""
    known = [v for v in values if math.isfinite(v)]
    if not better or len(known) < 2 or max(known) == min(known):
        return frozenset()
    top = max(known) if better > 0 else min(known)
    return frozenset(i + 2 for i, v in enumerate(values) if v == top)


def service(plan: Plan, runs: Sequence[Run]) -> Table:
    """What each LLM's users got, policy by policy, beside what was predicted."""
    head = ["LLM", "requests", "answered", "TTFT P50", "P90", "P99", "TPOT P50", "P99"]
    head += ["SLO met", "TTFT pred.", "TPOT pred."]
    several, colour = len(runs) > 1, colours(plan.fleet)
    if several:
        head.insert(1, "policy")
    rows = []
    for llm in plan.fleet.llms:
        said = predicted(plan, llm.name)
        for run in runs:
            got = run.outcome.by_llm.get(llm.name)
            if got is None:
                continue
            cells = [llm.name, *_service_cells(got)]
            cells += [seconds(said.ttft_s), seconds(said.tpot_s)]
            if several:
                cells.insert(1, run.outcome.policy)
            rows.append(Row(cells=tuple(cells), colour=colour[llm.name]))
    for run in runs:
        said = predicted(plan)
        cells = ["all LLMs", *_service_cells(run.outcome.total)]
        cells += [seconds(said.ttft_s), seconds(said.tpot_s)]
        if several:
            cells.insert(1, run.outcome.policy)
        rows.append(Row(cells=tuple(cells)))
    return Table(head=tuple(head), rows=tuple(rows))


def _service_cells(got: Service) -> Iterator[str]:
    yield f"{got.requests:,}"
    yield percent(got.finished / got.requests if got.requests else None, 2)
    for latency, quantiles in (
        (got.ttft, ("p50_s", "p90_s", "p99_s")),
        (got.tpot, ("p50_s", "p99_s")),
    ):
        yield from (seconds(_quantile(latency, q)) for q in quantiles)
    yield percent(got.slo_attainment if got.requests else None, 2)


def drivers(facts: PlanFacts) -> Table:
    """Objective terms in plain words, with their share."""
    rows = [
        Row(
            cells=(
                f"{term_name(label)} ({label})",
                number(value),
                percent(value / facts.objective if facts.objective > 0 else None),
            )
        )
        for label, value in facts.terms.items()
    ]
    whole = percent(1.0 if facts.objective > 0 else None)
    rows.append(Row(cells=("Objective", number(facts.objective), whole)))
    return Table(head=("", "weighted seconds", "share"), rows=tuple(rows))


def load_errors(plan: Plan, run: Run) -> Table:
    """How far the forecast of each LLM's peak load was off in ``run``."""
    colour = colours(plan.fleet)
    rows = []
    for fit in load_fits(plan, run):
        errors = (fit.peak_error, fit.last_value_error)
        better = math.isfinite(sum(errors)) and errors[0] != errors[1]
        rows.append(
            Row(
                cells=(fit.llm, *map(number, errors), percent(fit.above)),
                colour=colour[fit.llm],
                best=frozenset({1 if errors[0] < errors[1] else 2} if better else ()),
            )
        )
    head = (
        "LLM",
        "forecast: mean error of the peak",
        "last value",
        "epochs above range",
    )
    return Table(head=head, rows=tuple(rows))


def outcome_row(outcome: Outcome) -> Mapping[str, object]:
    """One run as a flat row of plain numbers; None where nothing was measured."""
    total = outcome.total

    def measured(latency: Latency, quantile: str) -> float | None:
        value = _quantile(latency, quantile)
        return value if math.isfinite(value) else None

    return {
        "policy": outcome.policy,
        "requests": total.requests,
        "finished": total.finished,
        "slo_attainment": total.slo_attainment,
        "ttft_p50_s": measured(total.ttft, "p50_s"),
        "ttft_p99_s": measured(total.ttft, "p99_s"),
        "tpot_p50_s": measured(total.tpot, "p50_s"),
        "tpot_p99_s": measured(total.tpot, "p99_s"),
        "gpu_hours": outcome.gpu_hours.get("total"),
        "cost_usd": outcome.cost_usd,
        "loads": outcome.loads,
        "loaded_bytes": outcome.loaded_bytes,
        "activations": outcome.activations,
        "warm_starts": outcome.warm_starts,
        "cold_starts": outcome.cold_starts,
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
