"""How far the cost model is from measured deployments: errors, coverage, worst cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foreserve.models.perf.measured import Corrections
from foreserve.models.perf.shipped import family, pair_name, shipped
from foreserve.planner.deployments import Measured

Floats = NDArray[np.float64]
Metric = Literal["tpot", "ttft"]
METRICS: tuple[Metric, ...] = ("tpot", "ttft")
TARGETS: Mapping[tuple[str, Metric], float] = {
    ("dense", "tpot"): 0.12,
    ("dense", "ttft"): 0.25,
    ("moe", "tpot"): 0.18,
    ("moe", "ttft"): 0.35,
}
"""Median absolute errors to stay within."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Errors of some runs in one metric: predicted / measured - 1."""

    runs: int
    median_abs: float
    p90_abs: float
    bias: float
    coverage: float
    """Share of the measurements inside the predicted 90 % interval."""

    @classmethod
    def of(
        cls, predicted: Floats, measured: Floats, inside: NDArray[np.bool_]
    ) -> Errors:
        error = predicted / measured - 1
        return cls(
            runs=len(error),
            median_abs=float(np.median(np.abs(error))),
            p90_abs=float(np.quantile(np.abs(error), 0.9)),
            bias=float(np.median(error)),
            coverage=float(inside.mean()),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steady:
    """Predicted against measured steady state of each deployment of a file."""

    cells: tuple[tuple[str, str, int, str], ...]
    """GPU, LLM, TP size, engine of each run."""
    families: tuple[str, ...]
    predicted_s: Mapping[Metric, Floats]
    measured_s: Mapping[Metric, Floats]
    inside: Mapping[Metric, NDArray[np.bool_]]
    extrapolated: NDArray[np.bool_]
    skipped: Mapping[str, int]

    def errors(self, metric: Metric, rows: NDArray[np.bool_]) -> Errors:
        return Errors.of(
            self.predicted_s[metric][rows],
            self.measured_s[metric][rows],
            self.inside[metric][rows],
        )

    def of_family(self, name: str) -> NDArray[np.bool_]:
        return np.array([kind == name for kind in self.families], dtype=bool)

    def by_cell(self) -> dict[tuple[str, str, int, str], NDArray[np.bool_]]:
        """Rows of each (GPU, LLM, TP, engine), in order."""
        return {
            cell: np.array([other == cell for other in self.cells], dtype=bool)
            for cell in sorted(set(self.cells))
        }

    def worst(self, least_runs: int = 5) -> list[tuple[str, str, int, str]]:
        """Cells by their median TPOT error, worst first."""
        cells = {
            cell: self.errors("tpot", rows).median_abs
            for cell, rows in self.by_cell().items()
            if rows.sum() >= least_runs
        }
        return sorted(cells, key=lambda cell: -cells[cell])


def validate_steady(
    measured: Measured,
    *,
    corrections: Mapping[str, Corrections] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Steady:
    """Predict every deployment with corrections that its (GPU, LLM) pair had no part in.

    ``corrections`` of the user's own, by engine, take the place of the shipped ones.
    """
    predicted: dict[Metric, list[float]] = {"tpot": [], "ttft": []}
    inside: dict[Metric, list[bool]] = {"tpot": [], "ttft": []}
    extrapolated = []
    for i, deployment in enumerate(measured.deployments):
        gpu, llm = deployment.pair
        own = (corrections or {}).get(deployment.timing.engine)
        known = own or shipped(
            deployment.timing.llm, deployment.timing.engine, pair_name(gpu, llm)
        )
        state = deployment.predict(known)
        values: dict[Metric, tuple[float, float, tuple[float, float]]] = {
            "tpot": (state.tpot_s, deployment.tpot_s, known.tpot_interval),
            "ttft": (state.ttft_s, deployment.ttft_s, known.ttft_interval),
        }
        for metric, (value, truth, (low, high)) in values.items():
            predicted[metric].append(value)
            inside[metric].append(low * value <= truth <= high * value)
        extrapolated.append(state.extrapolated)
        progress(i + 1)
    return Steady(
        cells=tuple(
            (row["gpu"], row["llm"], int(row["tp_size"]), d.timing.engine)
            for row, d in zip(measured.rows, measured.deployments, strict=True)
        ),
        families=tuple(family(d.timing.llm) for d in measured.deployments),
        predicted_s={m: np.array(predicted[m]) for m in METRICS},
        measured_s={
            "tpot": np.array([d.tpot_s for d in measured.deployments]),
            "ttft": np.array([d.ttft_s for d in measured.deployments]),
        },
        inside={m: np.array(inside[m], dtype=bool) for m in METRICS},
        extrapolated=np.array(extrapolated, dtype=bool),
        skipped=measured.skipped,
    )
