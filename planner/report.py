"""The HTML report: one file that shows a plan, how good it is, and what came of it.

It fetches nothing, runs no script, prints, and follows the reader's light or dark scheme.
The same inputs give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from foreserve.models.codec import digest, write_text
from foreserve.models.faults import Fault
from foreserve.models.outcome import Residency, Run
from foreserve.models.plan import Plan
from foreserve.planner import charts
from foreserve.planner.contents import (
    comparison,
    drivers,
    interval_line,
    lead,
    llm_table,
    load_errors,
    option_table,
    service,
)
from foreserve.planner.display import (
    LLM_COLORS,
    NONE,
    POLICY_COLORS,
    TERMS,
    clock,
    line_colors,
    mix,
    number,
    percent,
    plural,
    seconds,
    span,
    term_name,
    usd,
)
from foreserve.planner.facts import (
    LoadFit,
    PlanFacts,
    Solve,
    busiest,
    course,
    first_token_delay_s,
    load_fits,
    plan_facts,
)
from foreserve.planner.intervals import changes
from foreserve.planner.picture import Picture, colours, ledger_bars
from foreserve.planner.residency import planned_residency, residency_map

MAX_TIPS = 8000
"""Boxes with a tip, over all maps; with `MAX_BOXES` keeps a report below 5 MB."""
MAX_BOXES = 200_000
"""Boxes over all maps, which one planned and one simulated map may pass."""
MAX_MAPS = 4
MAX_PANELS = 16
"""LLMs whose load is drawn; the table lists all."""
DASHES = ("solid", "dashed", "dashdot", "dotted")
WHITE, NIGHT = "#ffffff", "#171c22"


def write_report(
    path: str | os.PathLike[str],
    *,
    plan: Plan,
    solves: Sequence[Solve],
    runs: Sequence[Run],
    title: str,
    command: str | None,
) -> None:
    """Write the report of ``plan`` to ``path``, whole or not at all.

    ``solves`` holds one report per epoch, in order, and may be empty; so may ``runs``,
    whose first is the one that is shown against the forecast.
    """
    environment = Environment(
        loader=PackageLoader("foreserve.planner"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": _coordinate, "percent": percent, "number": number}
    facts = plan_facts(plan)
    shown = LLM_COLORS[: len(plan.fleet.llms)]
    page = environment.get_template("report.html").render(
        title=title,
        lead=lead(plan, facts, runs),
        cards=_cards(plan, facts, runs),
        comparison=comparison(plan, runs),
        llms=colours(plan.fleet).items(),
        tints=[
            (color, mix(color, WHITE, 0.45), mix(color, NIGHT, 0.55)) for color in shown
        ],
        lines=[line_colors(color) for color in shown],
        maps=(maps := _maps(plan, runs)),
        maps_left_out=len(runs) + 1 - len(maps),
        faults=any(run.faults for run in runs),
        runs=[run.outcome for run in runs],
        load=_load(plan, runs),
        latency=_latency(plan, runs),
        service=service(plan, runs) if runs else None,
        facts=facts,
        drivers=drivers(facts) if facts.certified else None,
        terms=[(term_name(k), TERMS.get(k, ("", "#888888"))[1]) for k in facts.terms],
        terms_chart=_terms_chart(plan, facts),
        changes=_changes(plan, facts),
        solver=_solver(solves),
        ledger=_ledger(plan),
        fleet=llm_table(plan),
        options=option_table(plan),
        provenance=_provenance(plan, command),
        relative_errors=sorted({o.time.relative_error for o in plan.fleet.options}),
        sources=sorted({o.time.source for o in plan.fleet.options}),
    )
    write_text(path, page)


def _cards(
    plan: Plan, facts: PlanFacts, runs: Sequence[Run]
) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the headline numbers."""
    ideal = (
        f"of {facts.gpus}; {number(facts.perfect_gpus)} if they could be split at will"
    )
    cards = []
    if facts.certified:
        cards += [
            (
                "Status",
                facts.status.value,
                f"{facts.optimal} of {plural(facts.certified, 'epoch')} optimal",
            ),
            (
                "Objective",
                number(facts.objective),
                f"weighted seconds; bound {number(facts.bound)}",
            ),
            (
                "Gap",
                percent(facts.gap, 2),
                f"{percent(facts.gap_at_stake, 2)} of the value at stake",
            ),
        ]
    cards.append(("GPUs in use", span(*facts.used), ideal))
    cards.append(
        ("GPU-hours", number(facts.gpu_hours), f"{usd(facts.cost_usd)} as planned")
    )
    if runs:
        total = runs[0].outcome.total
        met = percent(total.slo_attainment, 2)
        cards.append(("SLO met", met, f"{runs[0].outcome.policy}, simulated"))
        if total.ttft.count:
            tpot = seconds(total.tpot.p99_s if total.tpot.count else None)
            cards.append(("P99 TTFT", seconds(total.ttft.p99_s), f"P99 TPOT {tpot}"))
    return cards


def _maps(plan: Plan, runs: Sequence[Run]) -> list[tuple[str, Picture]]:
    """Planned, then simulated residency, all on one time scale, as many as fit."""
    residencies: list[tuple[str, Sequence[Residency], Sequence[Fault]]] = [
        ("Planned", planned_residency(plan), ())
    ]
    residencies += [
        (f"Simulated: {r.outcome.policy}", r.residency, r.faults) for r in runs
    ]
    sizes = [sum(len(s.gpus) for s in residency) for _, residency, _ in residencies]
    while len(sizes) > MAX_MAPS or (len(sizes) > 2 and sum(sizes) > MAX_BOXES):
        sizes.pop()
    end_s = max([plan.end_s, *(run.outcome.end_s for run in runs)])
    tips = MAX_TIPS // len(sizes)
    return [
        (name, residency_map(plan.fleet, residency, plan.start_s, end_s, tips, faults))
        for name, residency, faults in residencies[: len(sizes)]
    ]


def _edges_s(plan: Plan) -> charts.Floats:
    return np.array([plan.start_s, *(epoch.end_s for epoch in plan.epochs)])


def _load(plan: Plan, runs: Sequence[Run]) -> dict[str, object] | None:
    """Panels of the LLMs with most load, and the table of errors if there is a run."""
    fits = load_fits(plan, runs[0] if runs else None)
    fits = [fit for fit in fits if not np.isnan(fit.peak).all()]
    if not fits:
        return None

    def weight(fit: LoadFit) -> float:
        return float(np.nansum(fit.mean))

    shown = sorted(fits, key=weight, reverse=True)[:MAX_PANELS]
    colour, edges_s = colours(plan.fleet), _edges_s(plan)
    panels = []
    for index, fit in enumerate(fit for fit in fits if fit in shown):
        chart = charts.load_panel(
            edges_s,
            forecast_peak=fit.peak,
            high=fit.high,
            actual_mean=fit.actual_mean,
            actual_peak=fit.actual_peak,
            salt=f"load{index}",
        )
        missed = f"{percent(fit.above, 0)} above" if runs else ""
        panels.append((fit.llm, colour[fit.llm], missed, Markup(chart)))
    return {
        "panels": panels,
        "left_out": len(fits) - len(shown),
        "errors": load_errors(plan, runs[0]) if runs else None,
    }


def _latency(plan: Plan, runs: Sequence[Run]) -> dict[str, object] | None:
    curves, courses, legend = [], [], []
    for index, run in enumerate(runs):
        color = POLICY_COLORS[index % len(POLICY_COLORS)]
        dashes = DASHES[index % len(DASHES)]
        delay_s = first_token_delay_s(run)
        if np.isfinite(delay_s).any():
            curves.append(charts.Curve(delay_s, color, dashes))
            courses.append(charts.Course(*course(run), color, dashes))
            legend.append((run.outcome.policy, color, dashes))
    if not curves:
        return None
    targets = {llm.slo.ttft_s for llm in plan.fleet.llms}
    slo_s = targets.pop() if len(targets) == 1 else None
    return {
        "chart": Markup(charts.ttft(curves, slo_s)),
        "course": Markup(charts.over_time(courses, slo_s)),
        "legend": legend,
        "slo": seconds(slo_s) if slo_s is not None else None,
    }


def _terms_chart(plan: Plan, facts: PlanFacts) -> Markup | None:
    if not facts.certified:
        return None
    certificates = [epoch.certificate for epoch in plan.epochs]

    def series(name: str) -> charts.Floats:
        return np.array([getattr(c, name) if c else np.nan for c in certificates])

    terms = {
        label: np.array([c.terms.get(label, 0.0) if c else 0.0 for c in certificates])
        for label in facts.terms
    }
    return Markup(
        charts.terms_and_gap(
            _edges_s(plan), terms, series("objective"), series("bound"), series("gap")
        )
    )


def _changes(plan: Plan, facts: PlanFacts) -> dict[str, object] | None:
    """When the placement changes, and how long it stays, of plans of several epochs."""
    if len(plan.epochs) < 2:
        return None
    shares = np.zeros(len(plan.epochs))
    for change in changes(plan):
        shares[change.epoch] = change.share
    chart = charts.changes(_edges_s(plan), shares, facts.intervals)
    return {"chart": Markup(chart), "line": interval_line(plan, facts)}


def _solver(solves: Sequence[Solve]) -> dict[str, object] | None:
    """How long the solves took, and the slowest one's course."""
    if not solves:
        return None
    wall_s = np.array([solve.wall_s for solve in solves])
    slowest = int(wall_s.argmax())

    def known(name: str) -> tuple[charts.Floats, charts.Floats]:
        points = [
            (p.elapsed_s, value)
            for p in solves[slowest].progress
            if (value := getattr(p, name)) is not None and np.isfinite(value)
        ]
        return np.array([t for t, _ in points]), np.array([v for _, v in points])

    firsts = [solve.time_to_first_s for solve in solves]
    first_s = np.array([np.nan if value is None else value for value in firsts])
    chart = charts.solver(known("objective"), known("bound"), wall_s, first_s)
    return {
        "chart": Markup(chart),
        "slowest": slowest,
        "slowest_s": seconds(float(wall_s[slowest])),
        "median_s": seconds(float(np.median(wall_s))),
        "total_s": seconds(float(wall_s.sum())),
        "first_s": seconds(max((v for v in firsts if v is not None), default=None)),
    }


def _ledger(plan: Plan) -> dict[str, object]:
    index = busiest(plan)
    epoch = plan.epochs[index]
    return {
        "picture": ledger_bars(plan.fleet, epoch.placement),
        "epoch": index,
        "start": clock(epoch.start_s),
        "end": clock(epoch.end_s),
    }


def _provenance(plan: Plan, command: str | None) -> list[tuple[str, str]]:
    solver = plan.solver
    return [
        ("Command", command or NONE),
        ("foreserve", plan.foreserve_version),
        ("Plan, SHA-256", digest(plan)),
        *((f"{name}, SHA-256", value) for name, value in sorted(plan.inputs.items())),
        ("Forecaster", plan.forecaster),
        ("Solver", f"{solver.name} ({solver.version})"),
        ("Seed and threads", f"{solver.seed}, {solver.threads}"),
        (
            "Limits per epoch",
            f"{seconds(solver.time_limit_s)}, gap {percent(solver.gap, 2)}",
        ),
    ]


def _coordinate(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
