"""Plan while running: at the start of each epoch, and again where the plan turns out wrong.

Wraps the on-demand rule of ``planned``. Its plan is made as time goes on: each epoch from
what was known before it (`Problems` hides the trace's future) and from what is in place,
and once more in its midst when `replan_now` finds a reason; what is left of the epoch is
then planned for the peaks that were seen, without the GPUs that are lost. Solves take no
time on the run's clock. A solver that its clock stops may answer otherwise on another
machine; limit its work, not its time, where runs must repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.models.plan import Epoch, LlmDemand, Plan
from foreserve.models.problem import Problem
from foreserve.models.specs import GpuId
from foreserve.planner.pipeline import Problems, demand_rows
from foreserve.planner.policies.on_demand import planned
from foreserve.planner.replan import Reason, in_system, replan_now
from foreserve.planner.rolling import Rolling, Step
from foreserve.solvers.result import SolveOptions
from foreserve.traces.forecast import Forecast

REST_S = 30.0
"""From a solve to the next one for a burst; a lost GPU does not wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replanned:
    """One solve of the policy's: of a new epoch (no reasons), or within one."""

    at_s: float
    epoch: int
    reasons: tuple[Reason, ...]
    failed: str = ""
    """Why there is no new placement; the one before is kept then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Online:
    """What `RollingPolicy` plans with; ``solves`` hears of each of its solves."""

    problems: Problems
    solver: str
    options: SolveOptions
    solves: list[Replanned] = field(default_factory=list)

    def policy(self, plan: Plan, keep_alive_s: float) -> RollingPolicy:
        return RollingPolicy(plan, keep_alive_s, self)


class RollingPolicy:
    """A policy with a memory: asked twice in one instant, it answers the same.

    A context manager: its solver's child processes end with it.
    """

    name = "rolling"

    def __init__(self, plan: Plan, keep_alive_s: float, online: Online) -> None:
        """``plan`` gives the fleet and the epochs' times; its placements are not used."""
        self.plan, self.problems, self.solves = plan, online.problems, online.solves
        self._keep_alive_s = keep_alive_s
        horizon = online.problems.horizon
        self._rolling = Rolling(online.solver, online.options, horizon)
        self._rule = planned(plan, keep_alive_s)
        self._index, self._solved_s = -1, 0.0
        self._peaks: dict[str, float] = {}
        self._lost: frozenset[GpuId] = frozenset()
        self._placed = Placement()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._rolling.__exit__(kind, error, traceback)

    def next_review_s(self, now_s: float) -> float:
        return self._rule.next_review_s(now_s)

    def decide(self, now_s: float, observed: Observed) -> Placement:
        index = self.plan.epochs.index(self.plan.at(now_s))
        self._lost = observed.lost_gpus
        if index != self._index:
            self._index, self._peaks = index, {}
            self._solve(now_s, ())
        for llm, count in in_system(observed).items():
            self._peaks[llm] = max(count, self._peaks.get(llm, 0.0))
        epoch = self.plan.epochs[index]
        reasons = replan_now(self.plan.fleet, epoch, self._peaks, self._lost)
        # A loss happens once; a queue takes some time to go down.
        due = now_s >= self._solved_s + REST_S or any(r.lost_gpus for r in reasons)
        if reasons and due and now_s < epoch.end_s:
            self._solve(now_s, reasons)
            self._peaks = {}
        return self._rule.decide(now_s, observed)

    def _solve(self, now_s: float, reasons: tuple[Reason, ...]) -> None:
        """Plan the epoch anew from what is in place."""
        index = self._index
        before = self._placed.without(self._lost)
        left_s = self.plan.epochs[index].end_s - now_s
        step, demand = plan_epoch(
            self._rolling, self.problems, index, left_s, before, reasons, self._lost
        )
        self._solved_s = now_s
        placement, failed = before, step.report.message
        if step.schedule is not None:
            placement, failed = step.schedule[0], ""
        self.solves.append(
            Replanned(at_s=now_s, epoch=index, reasons=reasons, failed=failed)
        )
        self._placed = placement
        epoch = self.plan.epochs[index]
        self._take(replace(epoch, placement=placement, demand=demand))

    def _take(self, epoch: Epoch) -> None:
        epochs = list(self.plan.epochs)
        epochs[self._index] = epoch
        self.plan = replace(self.plan, epochs=tuple(epochs))
        self._rule = planned(self.plan, self._keep_alive_s)


def plan_epoch(
    rolling: Rolling,
    problems: Problems,
    index: int,
    left_s: float,
    before: Placement,
    reasons: Sequence[Reason] = (),
    lost_gpus: frozenset[GpuId] = frozenset(),
) -> tuple[Step, tuple[LlmDemand, ...]]:
    """Plan what is left of epoch ``index``, and the window after it, from ``before``: with
    the loads of LLMs that give a reason raised, and lost GPUs closed. The demand that the
    first epoch was planned for comes with it."""
    forecast = problems.forecast(index)
    for reason in reasons:
        if reason.llm is not None:
            row = problems.fleet.number_of[reason.llm]
            forecast = _raised(forecast, row, reason.factor)
    window = problems.window(index, before)
    window[0] = replace(problems.at(index, before, forecast), epoch_s=max(1.0, left_s))
    step = rolling.step([_without(problem, lost_gpus) for problem in window], before)
    return step, demand_rows(window[0], forecast)


def _without(problem: Problem, lost_gpus: frozenset[GpuId]) -> Problem:
    """``problem`` with the lost GPUs closed."""
    if not lost_gpus:
        return problem
    rules = problem.fleet.rules
    closed = tuple(sorted({*rules.closed, *lost_gpus}))
    fleet = replace(problem.fleet, rules=replace(rules, closed=closed))
    return replace(problem, fleet=fleet)


def _raised(forecast: Forecast, row: int, factor: float) -> Forecast:
    """``forecast`` with all of one LLM's load ``factor`` times as high."""
    found = {}
    for name in ("rate_rps", "mean_load", "peak_load", "peak_low", "peak_high"):
        column = getattr(forecast, name).copy()
        column[row] *= factor
        found[name] = column
    errors = forecast.peak_errors.copy()
    errors[:, row] *= factor
    return replace(forecast, **found, peak_errors=errors)
