"""`plan perf validate`: every comparison with measurements, as tables and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from foreserve.models import footprint, loading
from foreserve.models.errors import InvalidInput
from foreserve.models.footprint import Check
from foreserve.models.loading import LoadCheck
from foreserve.models.perf.measured import Corrections
from foreserve.planner.deployments import ASSUMED, read_deployments
from foreserve.planner.perf_iterations import ASKED, Iterations, iterations
from foreserve.planner.perf_pictures import Scatter, draw_scatter
from foreserve.planner.perf_validation import (
    METRICS,
    TARGETS,
    Errors,
    Steady,
    validate_steady,
)
from foreserve.planner.tables import Part

SILICON = "silicon_e2e/silicon_dev.csv.gz"
ASKED_OF = ("llmservingsim", "vllm_e2e_runs", "sageserve", "splitwise")
"""Data sets that are to be met; the others are engines and kernels of 2023, shown too."""
FAMILIES = {"dense": "dense LLMs", "moe": "mixtures of experts"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Validation:
    """All comparisons of one call."""

    data: str
    steady: Steady
    memory: tuple[Check, ...]
    loading: tuple[LoadCheck, ...]
    iterations: tuple[Iterations, ...] = ()
    """Of the data sets in a folder."""

    def plain(self) -> Mapping[str, Any]:
        """For ``--json``."""
        steady = self.steady
        families = {
            name: {metric: _plain(steady, metric, name) for metric in METRICS}
            for name in FAMILIES
            if steady.of_family(name).any()
        }
        return {
            "data": self.data,
            "held_out": "corrections are fitted without the (GPU, LLM) pair predicted",
            "assumed": list(ASSUMED),
            "steady": {
                "families": families,
                "cells": [
                    {
                        "gpu": gpu,
                        "llm": llm,
                        "tp": tp,
                        "engine": engine,
                        **{m: asdict(steady.errors(m, rows)) for m in METRICS},
                    }
                    for (gpu, llm, tp, engine), rows in steady.by_cell().items()
                ],
                "worst": ["/".join(map(str, cell)) for cell in steady.worst()[:3]],
                "left_out": dict(steady.skipped),
            },
            "iterations": {
                "data_sets": {
                    name: {**asdict(errors), "asked": name in ASKED_OF}
                    for name, errors in _by_set(self.iterations).items()
                },
                "target": ASKED,
                "cells": [
                    {
                        "data_set": cell.data_set,
                        "gpu": cell.gpu,
                        "llm": cell.llm,
                        "tp": cell.tp,
                        "phase": cell.phase,
                        **asdict(_errors([cell])),
                        "extrapolated": float(cell.extrapolated.mean()),
                    }
                    for cell in self.iterations
                ],
            },
            "memory": [{**c._asdict(), "error": c.error} for c in self.memory],
            "loading": [{**c._asdict(), "error": c.error} for c in self.loading],
        }

    def tables(self) -> list[Part]:
        return [
            *_steady_tables(self.steady),
            *_iteration_tables(self.iterations),
            _memory_table(self.memory),
            _loading_table(self.loading),
        ]


def run(
    data: str | None,
    corrections: Mapping[str, Corrections] | None,
    update: Callable[[float, float], None],
) -> Validation:
    """Validate against ``data``: a file, a folder of data sets, or what is shipped."""
    shipped = files("foreserve.models.perf").joinpath("data/silicon.csv.gz")
    cells: tuple[Iterations, ...] = ()
    with as_file(shipped) as path:
        source = path if data is None else Path(data)
        if source.is_dir():
            cells = tuple(iterations(source))
            source = source / SILICON
            if not source.is_file():
                raise InvalidInput(f"no {SILICON} in the folder", file=data)
        measured = read_deployments(str(source))
    if not measured.deployments:
        reasons = ", ".join(f"{n} {why}" for why, n in measured.skipped.items())
        raise InvalidInput(f"no run to compare with ({reasons})", file=data)
    total = float(len(measured.deployments))
    steady = validate_steady(
        measured,
        corrections=corrections,
        progress=lambda done: update(done, total),
    )
    return Validation(
        data=data or "shipped: silicon_e2e",
        steady=steady,
        memory=tuple(footprint.checks()),
        loading=tuple(loading.checks()),
        iterations=cells,
    )


def draw(found: Validation, path: str) -> None:
    """Predicted against measured TPOT and TTFT."""
    steady = found.steady
    panels = []
    for metric in METRICS:
        groups = {}
        for name, label in FAMILIES.items():
            rows = steady.of_family(name)
            if rows.any():
                groups[label] = (
                    steady.predicted_s[metric][rows] * 1e3,
                    steady.measured_s[metric][rows] * 1e3,
                )
        panels.append(Scatter(metric.upper(), "ms", groups))
    draw_scatter(panels, path)


def markdown_table(found: Validation) -> str:
    """All tables as Markdown."""
    lines = [f"Measurements: {found.data}.", ""]
    for part in found.tables():
        lines += [f"## {part.title}", ""]
        lines.append("| " + " | ".join(part.columns) + " |")
        lines.append("|---" + "|---:" * (len(part.columns) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in part.rows]
        lines += ["", *([part.note, ""] if part.note else [])]
    return "\n".join(lines)


def _plain(steady: Steady, metric: Any, name: str) -> dict[str, Any]:
    rows = steady.of_family(name)
    said = {**asdict(steady.errors(metric, rows)), "target": TARGETS[name, metric]}
    inside = rows & ~steady.extrapolated
    if inside.any():
        said["inside_the_tables"] = asdict(steady.errors(metric, inside))
    return said


def _steady_tables(steady: Steady) -> list[Part]:
    columns = ["", "runs", "median", "asked", "p90", "bias", "in the 90 % interval"]
    rows = []
    for name, label in FAMILIES.items():
        if not steady.of_family(name).any():
            continue
        for metric in METRICS:
            errors = steady.errors(metric, steady.of_family(name))
            asked = f"<= {TARGETS[name, metric]:.0%}"
            rows.append([f"{label}, {metric.upper()}", *_cells(errors, asked)])
    left_out = ", ".join(f"{n} {why}" for why, n in steady.skipped.items())
    summary = Part(
        "Steady state of measured deployments: |predicted / measured - 1|",
        columns,
        rows,
        "each (GPU, LLM) pair predicted with corrections fitted without it"
        + (f"; left out: {left_out}" if left_out else ""),
    )
    cells = []
    for (gpu, llm, tp, engine), mask in steady.by_cell().items():
        tpot, ttft = steady.errors("tpot", mask), steady.errors("ttft", mask)
        star = "*" if steady.extrapolated[mask].any() else ""
        cells.append(
            [
                f"{gpu} {llm}{star}",
                str(tp),
                engine,
                str(tpot.runs),
                f"{tpot.median_abs:.1%}",
                f"{tpot.bias:+.1%}",
                f"{ttft.median_abs:.1%}",
                f"{ttft.bias:+.1%}",
            ]
        )
    names = ["GPU, LLM", "TP", "engine", "runs", "TPOT", "bias", "TTFT", "bias"]
    note = "median errors; * some of its runs lie outside the kernel tables"
    return [summary, Part("By GPU, LLM and TP", names, cells, note)]


def _errors(cells: Sequence[Iterations]) -> Errors:
    return Errors.of(
        np.concatenate([cell.predicted_s for cell in cells]),
        np.concatenate([cell.measured_s for cell in cells]),
        np.concatenate([cell.inside for cell in cells]),
    )


def _by_set(cells: Sequence[Iterations]) -> dict[str, Errors]:
    names = dict.fromkeys(cell.data_set for cell in cells)
    return {name: _errors([c for c in cells if c.data_set == name]) for name in names}


def _iteration_tables(cells: Sequence[Iterations]) -> list[Part]:
    if not cells:
        return []
    columns = ["", "points", "median", "asked", "p90", "bias", "in the 90 % interval"]
    rows = [
        [name, *_cells(errors, f"<= {ASKED:.0%}" if name in ASKED_OF else "")]
        for name, errors in _by_set(cells).items()
    ]
    summary = Part(
        "Single iterations, by data set",
        columns,
        rows,
        "corrections come from another data set (silicon_e2e); nothing here was fitted",
    )
    detail = []
    for cell in cells:
        errors = _errors([cell])
        star = "*" if cell.extrapolated.mean() > 0.5 else ""
        detail.append(
            [
                f"{cell.data_set}, {cell.phase}",
                cell.gpu,
                cell.llm + star,
                str(cell.tp),
                str(errors.runs),
                f"{errors.median_abs:.1%}",
                f"{errors.bias:+.1%}",
            ]
        )
    names = ["data set, phase", "GPU", "LLM", "TP", "points", "median", "bias"]
    note = "* borrowed or extrapolated kernels"
    return [summary, Part("Single iterations, by cell", names, detail, note)]


def _memory_table(checks: Sequence[Check]) -> Part:
    rows = [
        [
            c.what,
            c.part,
            f"{c.predicted:,.2f}".removesuffix(".00"),
            f"{c.measured:,.2f}".removesuffix(".00"),
            f"{c.error:+.1%}",
            c.role,
        ]
        for c in checks
    ]
    return Part(
        "Memory of an engine, GiB per GPU (tokens where it says so)",
        ["deployment", "part", "predicted", "measured", "error", ""],
        rows,
        "fitted: a constant was taken from it; checked: it was not",
    )


def _loading_table(checks: Sequence[LoadCheck]) -> Part:
    rows = [
        [
            c.what,
            f"{c.predicted_s:.2f}",
            f"{c.measured_s:.2f}",
            f"{c.error:+.1%}",
            "yes" if c.covered else "no",
            c.role,
        ]
        for c in checks
    ]
    return Part(
        "Loading weights, seconds (medians)",
        ["LLM, loader, access", "predicted", "measured", "error", "covered", ""],
        rows,
        "covered: the interval holds the 5th to 95th percentile of the repeats",
    )


def _cells(errors: Errors, asked: str) -> Sequence[str]:
    return (
        str(errors.runs),
        f"{errors.median_abs:.1%}",
        asked,
        f"{errors.p90_abs:.1%}",
        f"{errors.bias:+.1%}",
        f"{errors.coverage:.1%}",
    )
