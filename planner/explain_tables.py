"""Explanations as tables and lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from foreserve.planner.conflict import Conflict
from foreserve.planner.explain import GIB, GpuLimit, LlmLimit
from foreserve.planner.gap_split import GapSplit
from foreserve.planner.tables import Part
from foreserve.planner.what_if import WhatIf

ROUNDING = 1e-9
"""Less than this is none."""


def seconds(value: float | None, sign: str = "") -> str:
    """Three digits or all before the point; ``sign`` "+" also shows a plus."""
    if value is None:
        return ""
    value = 0.0 if abs(value) < ROUNDING else value
    return format(value, f"{sign}.0f" if abs(value) >= 100 else f"{sign}.3g")


def limit_parts(
    gpu_rows: Sequence[GpuLimit], llm_rows: Sequence[LlmLimit]
) -> list[Part]:
    """Memory by GPU, demand and rules by LLM."""
    return [
        Part(
            "memory (C1)",
            ["GPU", "held GiB", "free", "usable", "holds", ""],
            [
                (
                    row.gpu,
                    f"{row.held_bytes / GIB:.1f}",
                    f"{row.free_bytes / GIB:.1f}",
                    f"{row.usable_bytes / GIB:.1f}",
                    ", ".join(row.replicas),
                    "full" if row.binds else "",
                )
                for row in gpu_rows
            ],
            "full: no LLM that is not there would fit",
        ),
        Part(
            "demand (C5) and rules (C10)",
            ["LLM", "asked /s", "served", "can serve", "ACTIVE", "WARM", "binds"],
            [
                (
                    row.llm,
                    f"{row.demand_rps:.3g}",
                    f"{row.served_rps:.3g}",
                    f"{row.capacity_rps:.3g}",
                    str(row.active),
                    str(row.warm),
                    "; ".join(row.binds),
                )
                for row in llm_rows
            ],
        ),
    ]


def terms_part(
    terms: Mapping[str, float], by_llm: Mapping[str, Mapping[str, float]]
) -> Part:
    """Costs by LLM, where known, and in all."""
    labels = sorted(terms)
    rows = [
        (name, *(seconds(own.get(k)) for k in labels), seconds(sum(own.values())))
        for name, own in by_llm.items()
    ]
    total = ("all", *(seconds(terms[k]) for k in labels), seconds(sum(terms.values())))
    return Part(
        "cost, weighted seconds of delay", ["LLM", *labels, "total"], [*rows, total]
    )


MEANS = {
    "headroom": "rates booked only up to max_load",
    "integrality": "whole replicas",
    "packing": "blocks, memory, nodes, rules of this cluster",
    "switching": "loads and stops, from what is there (O4)",
    "bursts": "of scenarios known beforehand (O2)",
    "uncertainty": "one placement for all scenarios",
    "open": "this plan above the best one found",
}


def split_part(found: GapSplit) -> Part:
    """From a perfect system to the plan, one row for each thing that costs."""
    perfect, plan = found.steps[0].most, found.steps[-1].most
    rows = [("perfect system", seconds(perfect), "", "", "", "GPUs by the request")]
    for part in found.parts:
        share = part.value / found.distance if found.distance > ROUNDING else 0.0
        known = (seconds(part.least), seconds(part.most))
        rows.append(
            (
                part.name,
                seconds(part.value, "+"),
                *known,
                f"{share:.0%}",
                MEANS[part.name],
            )
        )
    rows.append(("this plan", seconds(plan), "", "", "", ""))
    return Part(
        "from a perfect system to this plan, weighted seconds of delay",
        ["", "cost", "at least", "at most", "share", "what it is"],
        rows,
        "by the best plans found, which add up; the truth is between least and most",
    )


def split_facts(found: GapSplit) -> Mapping[str, object]:
    """The same for ``--json``."""
    return {
        "distance": found.distance,
        "steps": [asdict(step) for step in found.steps],
        "parts": [asdict(part) for part in found.parts],
    }


def what_if_part(title: str, rows: Sequence[WhatIf]) -> Part:
    """What each change would cost or save."""
    return Part(
        title,
        ["change", "objective", "at least", "at most", "status", "solver", "gap"],
        [
            (
                row.change,
                seconds(row.difference, "+"),
                seconds(row.least, "+"),
                seconds(row.most, "+"),
                str(row.status),
                row.solver,
                "" if row.gap is None else f"{row.gap:.2%}",
            )
            for row in rows
        ],
        "weighted seconds of delay, against a solve as it is with the same limits",
    )


def conflict_lines(found: Conflict | None) -> Iterator[str]:
    """The conflict in the operator's words."""
    if found is None:
        yield "no conflict of the rules was found: they can hold, or time ran out"
        return
    yield f"these rules cannot hold together on {found.cluster}:"
    yield from (f"  - {rule}" for rule in found.rules)
    if found.smallest:
        yield "no fewer of the rules are in conflict"
    else:
        yield "without any one of them the others can hold"
    for way in found.relaxations:
        cost = "no plan in time" if way.objective is None else f"{way.objective:.1f} s"
        yield f"  would help: {way.change} (cost {cost})"
    if found.together:
        yield "no single change is enough; together these are:"
        yield from (f"  - {change}" for change in found.together)
