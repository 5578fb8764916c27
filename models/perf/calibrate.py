"""Fit what an engine adds to its kernels, from measurements.

TTFT and TPOT of a closed-loop run are close to linear in the corrections, so a
measurement is one row of a small linear system: its prediction with the default
corrections, and the slopes. The fit is a robust regression of *relative* errors (medians,
not means: single runs are far off for reasons of their own), in which each group of
measurements counts alike, pulled weakly towards the defaults.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foreserve.models.perf.closed_loop import Benchmark, Scheduler, SteadyState, play
from foreserve.models.perf.kernels import Floats
from foreserve.models.perf.measured import Corrections, MeasuredTiming

FITTED = ("kernel_factor", "prefill_factor", "layer_s", "step_s", "request_s")
"""Corrections fitted for all engines together; `admission_steps` follows from how an
engine polls and streams, so it is fitted for each."""
_DOUBTS = {
    "kernel_factor": 0.15,
    "prefill_factor": 0.15,
    "layer_s": 3e-6,
    "step_s": 0.5e-3,
    "request_s": 10e-3,
    "admission_steps": 10.0,
}
"""How far each correction may plausibly lie from its default."""
_LEAST = {"kernel_factor": 0.6, "prefill_factor": 0.6}
_TTFT_WEIGHT = 0.5
"""TTFT scatters more than TPOT between repeats of one run."""
_PRIOR = 0.1
"""Weight of a doubt's square; a run that is 10 % off weighs as much."""
_OUTLIER = 0.7
"""Relative error (logarithm) from which a run has next to no say."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deployment:
    """A closed-loop run on real GPUs, as far as it is known."""

    timing: MeasuredTiming
    run: Benchmark
    scheduler: Scheduler
    kv_tokens: float
    ttft_s: float
    tpot_s: float
    pair: tuple[str, str]
    """GPU and LLM by catalogue names: what is held out together."""

    def predict(self, corrections: Corrections) -> SteadyState:
        """Play the run with ``corrections``; every call meets the same arrivals."""
        return play(
            replace(self.timing, corrections=corrections),
            self.run,
            self.scheduler,
            kv_tokens=self.kv_tokens,
            rng=np.random.default_rng(0),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Slopes:
    """Predictions of many runs, linear in the corrections: ``at + by @ corrections``.

    The corrections are those of `FITTED`, then `admission_steps` of each engine.
    """

    engines: tuple[str, ...]
    groups: NDArray[np.int64]
    ttft_s: Floats
    tpot_s: Floats
    ttft_at: Floats
    tpot_at: Floats
    ttft_by: Floats
    tpot_by: Floats

    @classmethod
    def of(
        cls,
        deployments: Sequence[Deployment],
        progress: Callable[[int], None] = lambda done: None,
    ) -> Slopes:
        base = Corrections()
        names: dict[tuple[str, str], int] = {}
        engines = tuple(sorted({d.timing.engine for d in deployments}))
        n, m = len(deployments), len(FITTED) + len(engines)
        at, by = np.zeros((2, n)), np.zeros((2, n, m))
        for i, deployment in enumerate(deployments):
            names.setdefault(deployment.pair, len(names))
            first = deployment.predict(base)
            at[:, i] = first.ttft_s, first.tpot_s
            for j, name in enumerate(FITTED):
                if name == "request_s":
                    continue
                step = _DOUBTS[name]
                moved = replace(base, **{name: getattr(base, name) + step})
                other = deployment.predict(moved)
                by[0, i, j] = (other.ttft_s - first.ttft_s) / step
                by[1, i, j] = (other.tpot_s - first.tpot_s) / step
            # These two are added to the TTFT as they are (`play`).
            by[0, i, FITTED.index("request_s")] = 1.0
            engine = engines.index(deployment.timing.engine)
            by[0, i, len(FITTED) + engine] = first.tpot_s
            progress(i + 1)
        at -= np.einsum("inj,j->in", by, values_of(base, engines))
        return cls(
            engines=engines,
            groups=np.array([names[d.pair] for d in deployments], dtype=np.int64),
            ttft_s=np.array([d.ttft_s for d in deployments]),
            tpot_s=np.array([d.tpot_s for d in deployments]),
            ttft_at=at[0],
            tpot_at=at[1],
            ttft_by=by[0],
            tpot_by=by[1],
        )

    def select(self, rows: NDArray[np.bool_]) -> Slopes:
        fields = [name for name in self.__dataclass_fields__ if name != "engines"]
        return Slopes(self.engines, *(getattr(self, name)[rows] for name in fields))

    def predict_tpot(self, known: Corrections) -> Floats:
        """Seconds per output token of each run with ``known``."""
        values = values_of(known, self.engines)
        return np.asarray(self.tpot_at + self.tpot_by @ values)

    def log_errors(self, corrections: Floats) -> tuple[Floats, Floats]:
        """Logarithms of predicted over measured TTFT and TPOT."""
        ttft = self.ttft_at + self.ttft_by @ corrections
        tpot = self.tpot_at + self.tpot_by @ corrections
        return (
            np.log(np.maximum(ttft / self.ttft_s, 1e-2)),
            np.log(np.maximum(tpot / self.tpot_s, 1e-2)),
        )


def _unknowns(engines: tuple[str, ...]) -> list[str]:
    return [*FITTED, *("admission_steps" for _ in engines)]


def values_of(known: Corrections, engines: tuple[str, ...]) -> Floats:
    """``known`` in the order of `Slopes`."""
    return np.array([getattr(known, n) for n in _unknowns(engines)], dtype=np.float64)


def fit(slopes: Slopes, around: Corrections | None = None) -> Floats:
    """Corrections in the order of `Slopes` with the least robust relative error.

    What the runs do not tell stays near ``around`` (the defaults).
    """
    by = np.vstack(
        [
            slopes.ttft_by / slopes.ttft_s[:, None],
            slopes.tpot_by / slopes.tpot_s[:, None],
        ]
    )
    to = np.concatenate(
        [1 - slopes.ttft_at / slopes.ttft_s, 1 - slopes.tpot_at / slopes.tpot_s]
    )
    _, index, sizes = np.unique(slopes.groups, return_inverse=True, return_counts=True)
    share = len(slopes.groups) / len(sizes) / sizes[index]
    say = np.concatenate([_TTFT_WEIGHT * share, share])
    defaults = values_of(around or Corrections(), slopes.engines)
    unknowns = _unknowns(slopes.engines)
    doubts = np.array([_DOUBTS[name] for name in unknowns])
    least = np.array([_LEAST.get(name, 0.0) for name in unknowns])
    found = defaults
    for _ in range(60):
        # Gauss-Newton on the logarithm of predicted over measured; least absolute
        # deviations as reweighted least squares.
        ratio = np.maximum(by @ found - to + 1, 0.05)
        error = np.log(ratio)
        slope = by / ratio[:, None]
        size = np.maximum(np.abs(error), 0.03)
        weight = say / size * np.where(size > _OUTLIER, 0.05, 1.0)
        pull = _PRIOR / doubts**2
        target = slope @ found - error
        square = slope.T @ (slope * weight[:, None]) + np.diag(pull)
        right = slope.T @ (target * weight) + pull * defaults
        after = _bounded_minimum(square, right, least)
        if np.abs((after - found) / doubts).max() < 1e-3:
            return after
        found = (found + after) / 2
    return found


def _bounded_minimum(square: Floats, right: Floats, least: Floats) -> Floats:
    """min x' square x - 2 right' x over x >= least, exactly.

    Few unknowns: the best of all choices of which of them sit on their bound, starting
    with the choice that is nearly always right, none.
    """
    best, best_loss = least, np.inf
    for choice in itertools.product((True, False), repeat=len(least)):
        free = np.array(choice)
        x = least.copy()
        if free.any():
            rest = right[free] - square[np.ix_(free, ~free)] @ x[~free]
            x[free] = np.linalg.solve(square[np.ix_(free, free)], rest)
            if (x[free] < least[free]).any():
                continue
        if free.all():
            return x
        loss = float(x @ square @ x - 2 * right @ x)
        if loss < best_loss:
            best, best_loss = x, loss
    return best


def interval(
    log_errors: Floats, groups: int, coverage: float = 0.9
) -> tuple[float, float]:
    """Factors on a prediction between which ``coverage`` of the measurements lie.

    The errors are those of ``groups`` groups; a new group differs from all of them, so
    the quantiles are taken at ``coverage * (groups + 1) / groups`` as in split-conformal
    prediction (0.95 at most: the tails are runs gone wrong).
    """
    level = min(0.95, coverage * (groups + 1) / groups)
    low, high = np.quantile(-log_errors, [(1 - level) / 2, (1 + level) / 2])
    ends = min(1.0, np.exp(low)), max(1.0, np.exp(high))
    return float(f"{ends[0]:.4g}"), float(f"{ends[1]:.4g}")


def corrections(
    slopes: Slopes,
    found: Floats,
    *,
    ttft_interval: tuple[float, float],
    tpot_interval: tuple[float, float],
    source: str,
) -> dict[str, Corrections]:
    """The fitted numbers as values by engine, with the intervals of their errors."""
    rounded = [float(f"{value:.4g}") for value in found]
    common = replace(
        Corrections(),
        **dict(zip(FITTED, rounded, strict=False)),
        ttft_interval=ttft_interval,
        tpot_interval=tpot_interval,
        source=source,
    )
    return {
        engine: replace(common, admission_steps=steps)
        for engine, steps in zip(slopes.engines, rounded[len(FITTED) :], strict=True)
    }
