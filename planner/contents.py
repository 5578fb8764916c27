"""The sentences and tables that summary and report show, with every number as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from foreserve.models.outcome import Latency, Outcome, Run, Service
from foreserve.models.plan import Plan
from foreserve.planner.display import (
    NONE,
    gib,
    number,
    percent,
    plural,
    seconds,
    span,
    term_name,
    usd,
)
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


def lead(plan: Plan, facts: PlanFacts, runs: Sequence[Run]) -> list[str]:
    """What the plan does and how good it is, in plain sentences."""
    nodes, count = len(plan.fleet.cluster.nodes), len(plan.epochs)
    epoch_s = plan.epochs[0].end_s - plan.start_s
    replicas = "replica" if facts.active[1] == 1 else "replicas"
    said = [
        f"{plural(len(plan.fleet.llms), 'LLM')} on {plural(facts.gpus, 'GPU')} of "
        f"{plural(nodes, 'node')}, planned in {plural(count, 'epoch')} of "
        f"{seconds(epoch_s)}: {span(*facts.active)} {replicas} ACTIVE to serve, "
        f"{span(*facts.warm)} WARM with their weights loaded."
    ]
    if count > 1:
        said[0] += (
            f" The placement changes {plural(facts.changes, 'time')}: "
            f"{plural(facts.steps['load'], 'load')}, "
            f"{plural(facts.steps['activate'], 'activation')}."
        )
    of = "" if plan.fleet.sharing else " of dedicated replicas"
    if facts.certified and facts.gap <= 0:
        said.append(f"Proven, epoch by epoch: no placement{of} costs less.")
    elif facts.certified:
        said.append(
            f"Proven, epoch by epoch: no placement{of} costs less than "
            f"{percent(1 - facts.gap)} of this one."
        )
    if runs:
        parts = []
        for run in runs:
            outcome = run.outcome
            parts.append(
                f"“{outcome.policy}” keeps {percent(outcome.total.slo_attainment)} of "
                f"{plural(outcome.total.requests, 'request')} within their latency "
                f"targets on {number(outcome.gpu_hours.get('total'))} GPU-hours"
            )
        said.append("In simulation, " + "; ".join(parts) + ".")
    return said


def interval_line(plan: Plan, facts: PlanFacts) -> str:
    """How long the placement stays as it is, in words."""
    lengths = sorted(facts.intervals)
    epoch_s = plan.epochs[0].end_s - plan.start_s
    middle = median(lengths)
    told = span(lengths[0], lengths[-1])
    return (
        f"{plural(len(lengths), 'interval')} of {told} epochs without a change, "
        f"median {number(middle)} ({seconds(middle * epoch_s)})"
    )


def comparison(plan: Plan, runs: Sequence[Run]) -> Table:
    """Measures down, the plan's prediction and each simulated policy across."""
    facts, said = plan_facts(plan), predicted(plan)

    def promise(value_s: float) -> str:
        known = math.isfinite(value_s)
        error = f" ± {percent(said.relative_error, 0)}" if known else ""
        return seconds(value_s) + error

    outcomes = [run.outcome for run in runs]
    measures: list[tuple[str, str, Callable[[Outcome], float], _Form, int]] = [
        (
            "TTFT, median (plan: mean)",
            promise(said.ttft_s),
            _ttft("p50_s"),
            seconds,
            -1,
        ),
        (
            "TTFT, P99 (plan: slowest replica)",
            promise(said.worst_ttft_s),
            _ttft("p99_s"),
            seconds,
            -1,
        ),
        (
            "TPOT, median (plan: mean)",
            promise(said.tpot_s),
            _tpot("p50_s"),
            seconds,
            -1,
        ),
        (
            "TPOT, P99 (plan: slowest replica)",
            promise(said.worst_tpot_s),
            _tpot("p99_s"),
            seconds,
            -1,
        ),
        ("ITL, P99", NONE, lambda o: _quantile(o.total.itl, "p99_s"), seconds, -1),
        (
            "SLO attainment",
            NONE,
            lambda o: o.total.slo_attainment,
            lambda v: percent(v, 2),
            1,
        ),
        ("Goodput, requests/s", NONE, lambda o: o.total.goodput_rps, number, 1),
        ("Slowdown (D1)", NONE, lambda o: o.total.d1, number, -1),
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
        ("Weights dropped unused", NONE, lambda o: o.wasted_bytes, gib, -1),
    ]
    if any(outcome.storage_loads for outcome in outcomes):
        stored = ("Loads from storage", NONE, lambda o: o.storage_loads, number, -1)
        measures.append(stored)
    if any(outcome.faults for outcome in outcomes):
        measures += [
            ("Faults", NONE, lambda o: o.faults, number, 0),
            ("Requests they restarted", NONE, lambda o: o.restarted, number, -1),
        ]
    rows = []
    for name, plan_cell, measure, form, better in measures:
        if plan_cell == NONE and not runs:
            continue
        values = [measure(outcome) for outcome in outcomes]
        cells = (name, plan_cell, *(form(v) for v in values))
        # A difference that does not show is none.
        differ = len(set(cells[2:])) > 1
        rows.append(Row(cells=cells, best=_best(values, better if differ else 0)))
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
    """Columns (of the whole row) of the best runs; ``better``: 1 more, -1 less, 0 none."""
    known = [v for v in values if math.isfinite(v)]
    if not better or not known:
        return frozenset()
    top = max(known) if better > 0 else min(known)
    return frozenset(i + 2 for i, v in enumerate(values) if v == top)


def service(plan: Plan, runs: Sequence[Run]) -> Table:
    """What each LLM's users got, policy by policy, beside what was predicted."""
    head = ["LLM", "requests", "answered", "TTFT P50", "P90", "P99", "TPOT P50", "P99"]
    head += ["ITL P99", "SLO met", "TTFT pred.", "TPOT pred."]
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
        (got.itl, ("p99_s",)),
    ):
        yield from (seconds(_quantile(latency, q)) for q in quantiles)
    yield percent(got.slo_attainment if got.requests else None, 2)


def service_brief(plan: Plan, runs: Sequence[Run]) -> Table:
    """TTFT P99 and SLO attainment of each LLM, policies side by side."""
    policies = [run.outcome.policy for run in runs]
    head = ["LLM", "requests"]
    head += [
        f"{policy}: {what}" for policy in policies for what in ("P99 TTFT", "SLO met")
    ]
    rows = []
    for llm in plan.fleet.llms:
        cells = [llm.name, NONE]
        for run in runs:
            got = run.outcome.by_llm.get(llm.name)
            if got is None or not got.requests:
                cells += [NONE, NONE]
                continue
            cells[1] = f"{got.requests:,}"
            cells.append(seconds(_quantile(got.ttft, "p99_s")))
            cells.append(percent(got.slo_attainment, 2))
        rows.append(Row(cells=tuple(cells)))
    return Table(head=tuple(head), rows=tuple(rows))


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


def llm_table(plan: Plan) -> Table:
    """Targets, rules and forecast of each LLM."""
    head: tuple[str, ...] = (
        "LLM",
        "weight",
        "TTFT target",
        "TPOT target",
        "least ACTIVE",
        "most",
    )
    head += ("TP sizes", "mean forecast, requests/s")
    colour, rows = colours(plan.fleet), []
    length_s = plan.end_s - plan.start_s
    for llm in plan.fleet.llms:
        requests = sum(
            row.rate_rps * (epoch.end_s - epoch.start_s)
            for epoch in plan.epochs
            for row in epoch.demand
            if row.llm == llm.name
        )
        sizes = sorted({o.tp for o in plan.fleet.options if o.llm == llm.name})
        cells = (
            llm.name,
            number(llm.weight),
            seconds(llm.slo.ttft_s),
            seconds(llm.slo.tpot_s),
            str(llm.min_active),
            NONE if llm.max_replicas is None else str(llm.max_replicas),
            ", ".join(map(str, sizes)),
            number(requests / length_s),
        )
        rows.append(Row(cells=cells, colour=colour[llm.name]))
    return Table(head=head, rows=tuple(rows))


def option_table(plan: Plan) -> Table:
    """What a replica of each LLM takes and gives, by GPU type and TP size."""
    head: tuple[str, ...] = (
        "LLM",
        "GPU type",
        "TP",
        "weights/GPU",
        "engine/GPU",
        "KV/GPU",
        "in flight",
    )
    head += ("requests/s", "TTFT", "TPOT", "load", "activate", "source", "error")
    colour = colours(plan.fleet)
    rows = [
        Row(
            cells=(
                option.llm,
                option.gpu_type,
                str(option.tp),
                gib(option.resident_bytes - option.residue_bytes),
                gib(option.residue_bytes + option.activation_bytes),
                gib(option.kv_bytes),
                str(option.concurrency),
                number(option.rate_rps),
                seconds(option.ttft_s),
                seconds(option.tpot_s),
                seconds(option.load_s),
                seconds(option.activate_s),
                option.time.source,
                f"± {percent(option.time.relative_error, 0)}",
            ),
            colour=colour[option.llm],
        )
        for option in plan.fleet.options
    ]
    return Table(head=head, rows=tuple(rows))
