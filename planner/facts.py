"""The numbers that summary and report state about a plan, its solves and its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foreserve.models.outcome import Run
from foreserve.models.placement import Kind, Placement, diff
from foreserve.models.plan import Epoch, Plan, Status, gap_at_stake, relative_gap
from foreserve.models.problem import ReplicaOption
from foreserve.models.quantiles import grouped_quantiles
from foreserve.planner.fleet import gpu_hours, perfect_system_gpus
from foreserve.planner.intervals import intervals


class Point(Protocol):
    """What a solver knew at one moment; `foreserve.solvers.base.Progress` is one."""

    @property
    def elapsed_s(self) -> float: ...
    @property
    def objective(self) -> float | None: ...
    @property
    def bound(self) -> float | None: ...


class Stage(Protocol):
    """One term of the objective, where they are taken one after another."""

    @property
    def label(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def bound(self) -> float: ...


class Solve(Protocol):
    """How one epoch was solved; `foreserve.solvers.base.SolveReport` is one."""

    @property
    def wall_s(self) -> float: ...
    @property
    def time_to_first_s(self) -> float | None: ...
    @property
    def progress(self) -> Sequence[Point]: ...
    @property
    def stages(self) -> Sequence[Stage]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What a plan promises and what it takes."""

    certified: int
    """Epochs with a certificate; without any, the certificate's numbers mean nothing."""
    optimal: int
    status: Status
    objective: float
    bound: float
    gap: float
    gap_at_stake: float
    without_warm: float
    terms: dict[str, float]
    gpu_hours: float
    cost_usd: float
    gpus: int
    used: tuple[int, int]
    """Least and most GPUs that hold anything in an epoch; the pairs below likewise."""
    active: tuple[int, int]
    warm: tuple[int, int]
    changes: int
    """Epochs that ask for another set of replicas or states than the one before."""
    intervals: tuple[int, ...]
    """Epochs from one change to the next, from the first epoch to the end: the
    replacement intervals that the plan chose."""
    steps: dict[Kind, int]
    """Loads, activations, demotions and drops between epochs (not into the first)."""
    perfect_gpus: float
    """GPUs that the mean demand of the busiest epoch takes if GPUs could be rented by
    the request (sum of rates over capacities)."""


def plan_facts(plan: Plan) -> PlanFacts:
    certificates = [e.certificate for e in plan.epochs if e.certificate]
    optimal = sum(c.status is Status.OPTIMAL for c in certificates)
    without_warm = sum(c.without_warm for c in certificates)
    terms: dict[str, float] = {}
    for certificate in certificates:
        for label, value in certificate.terms.items():
            terms[label] = terms.get(label, 0.0) + value
    placements = [epoch.placement for epoch in plan.epochs]
    steps: dict[Kind, int] = {"load": 0, "activate": 0, "demote": 0, "drop": 0}
    changed = []
    for epoch, (before, after) in enumerate(pairwise(placements), start=1):
        actions = diff(before, after)
        changed += [epoch] if actions else []
        for action in actions:
            steps[action.kind] += 1
    hours, usd = gpu_hours(plan)
    return PlanFacts(
        certified=len(certificates),
        optimal=optimal,
        status=Status.OPTIMAL if optimal == len(certificates) else Status.FEASIBLE,
        objective=plan.objective,
        bound=plan.bound,
        gap=relative_gap(plan.objective, plan.bound),
        gap_at_stake=gap_at_stake(plan.objective, plan.bound, without_warm),
        without_warm=without_warm,
        terms=dict(sorted(terms.items())),
        gpu_hours=hours,
        cost_usd=usd,
        gpus=len(plan.fleet.cluster.gpus),
        used=_least_most(len(p.by_gpu) for p in placements),
        active=_least_most(_count(p, "ACTIVE") for p in placements),
        warm=_least_most(_count(p, "WARM") for p in placements),
        changes=len(changed),
        intervals=intervals(changed, len(placements)),
        steps=steps,
        perfect_gpus=perfect_system_gpus(plan)[0],
    )


def _count(placement: Placement, state: str) -> int:
    return sum(replica.state == state for replica in placement.replicas)


def _least_most(counts: Iterable[int]) -> tuple[int, int]:
    found = list(counts)
    return min(found), max(found)


def busiest(plan: Plan) -> int:
    """Index of the epoch with the most forecast load (without forecasts: replicas)."""

    def load(epoch: Epoch) -> tuple[float, int]:
        return sum(row.mean_load for row in epoch.demand), len(epoch.placement.replicas)

    return max(range(len(plan.epochs)), key=lambda i: (*load(plan.epochs[i]), -i))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the cost model says of the replicas that are planned to serve.

    Means are over planned requests; the worst is over options used. All are for mean
    lengths at full concurrency, so they bound the steady state, not the tail.
    """

    ttft_s: float
    worst_ttft_s: float
    tpot_s: float
    worst_tpot_s: float
    relative_error: float


NOTHING = Predicted(
    ttft_s=math.nan,
    worst_ttft_s=math.nan,
    tpot_s=math.nan,
    worst_tpot_s=math.nan,
    relative_error=math.nan,
)
"""Where no replica is planned to serve."""


def predicted(plan: Plan, llm: str | None = None) -> Predicted:
    """Prediction for one LLM, or for all; `NOTHING` where none is planned to serve."""
    used: list[tuple[float, ReplicaOption]] = []
    for epoch in plan.epochs:
        length_s = epoch.end_s - epoch.start_s
        rate_rps = {row.llm: row.rate_rps for row in epoch.demand}
        for replica in epoch.placement.replicas:
            if llm in (None, replica.llm) and replica.traffic_share > 0:
                requests = rate_rps.get(replica.llm, 0.0) * length_s
                option = plan.fleet.option_of(replica.llm, replica.gpus)
                used.append((requests * replica.traffic_share, option))
    served = sum(requests for requests, _ in used)
    if served <= 0:
        return NOTHING
    return Predicted(
        ttft_s=sum(n * option.ttft_s for n, option in used) / served,
        worst_ttft_s=max(option.ttft_s for _, option in used),
        tpot_s=sum(n * option.tpot_s for n, option in used) / served,
        worst_tpot_s=max(option.tpot_s for _, option in used),
        relative_error=max(option.time.relative_error for _, option in used),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadFit:
    """Forecast and actual load of one LLM per epoch; NaN where one is not known."""

    llm: str
    mean: NDArray[np.float64]
    """[epoch] forecast; the next two likewise."""
    peak: NDArray[np.float64]
    high: NDArray[np.float64]
    actual_mean: NDArray[np.float64]
    """[epoch] measured in the run; the next likewise."""
    actual_peak: NDArray[np.float64]

    @property
    def missed(self) -> NDArray[np.bool_]:
        """[epoch] whether the actual peak was above the planned-for range."""
        return self.actual_peak > self.high

    @property
    def above(self) -> float:
        """Share of the known epochs that were `missed`; NaN if none is known."""
        known = ~np.isnan(self.actual_peak) & ~np.isnan(self.high)
        return float(self.missed[known].mean()) if known.any() else np.nan

    @property
    def peak_error(self) -> float:
        """Mean absolute error of the forecast peak, in requests."""
        return _mean_error(self.peak, self.actual_peak)

    @property
    def last_value_error(self) -> float:
        """The same for the actual peak of the epoch before, from the second epoch on."""
        return _mean_error(self.actual_peak[:-1], self.actual_peak[1:])


def _mean_error(forecast: NDArray[np.float64], actual: NDArray[np.float64]) -> float:
    error = np.abs(forecast - actual)
    known = error[~np.isnan(error)]
    return float(known.mean()) if known.size else np.nan


def load_fits(plan: Plan, run: Run | None) -> list[LoadFit]:
    """One `LoadFit` per LLM of the fleet, in its order."""
    fits = []
    for served in plan.fleet.llms:
        forecast = np.full((3, len(plan.epochs)), np.nan)
        for index, epoch in enumerate(plan.epochs):
            for row in epoch.demand:
                if row.llm == served.name:
                    forecast[:, index] = row.mean_load, row.peak_load, row.peak_high
        actual = _actual_load(plan, run, served.name)
        fits.append(
            LoadFit(
                llm=served.name,
                mean=forecast[0],
                peak=forecast[1],
                high=forecast[2],
                actual_mean=actual[0],
                actual_peak=actual[1],
            )
        )
    return fits


def _actual_load(plan: Plan, run: Run | None, llm: str) -> NDArray[np.float64]:
    """[mean or peak, epoch] from the run's bins whose middle lies in the epoch."""
    actual = np.full((2, len(plan.epochs)), np.nan)
    if run is None or llm not in run.llms:
        return actual
    row = run.llms.index(llm)
    bins = run.mean_load.shape[1]
    middle_s = run.outcome.start_s + (np.arange(bins) + 0.5) * run.load_bin_s
    for index, epoch in enumerate(plan.epochs):
        first, last = np.searchsorted(middle_s, (epoch.start_s, epoch.end_s))
        if first < last:
            actual[0, index] = run.mean_load[row, first:last].mean()
            actual[1, index] = run.peak_load[row, first:last].max()
    return actual


def first_token_delay_s(run: Run) -> NDArray[np.float64]:
    """[request] TTFT; infinite for requests that never got a first token."""
    delay_s = run.first_token_s - run.arrival_s
    return np.where(np.isnan(delay_s), np.inf, delay_s)


def course(
    run: Run,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Edges of the run's load bins; of each bin the mean load of all LLMs, and the P99 of
    the TTFT of requests that arrived in it (NaN if none did)."""
    start_s, end_s = run.outcome.start_s, run.outcome.end_s
    load = run.mean_load.sum(axis=0)
    edges_s = np.append(start_s + run.load_bin_s * np.arange(len(load)), end_s)
    number = np.searchsorted(edges_s[1:-1], run.arrival_s, side="right")
    (p99_s,) = grouped_quantiles(run.ttft_s, number, len(load), (0.99,))
    return edges_s, load, p99_s
