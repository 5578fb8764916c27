"""Planning while serving: the policy of a live cluster.

Each epoch is planned from the requests that have come so far, in a thread of its own (the
solver in a child process), so that the controller never waits for it. What comes out is a
proposal. In mode ``automatic`` it is carried out as soon as it is there, in ``recommend``
once somebody has approved it, in ``observe`` never. A proposal that is late, failed or
infeasible changes nothing: the plan before stays, and says so. The requests of the moment
are seen to by the on-demand rule on top of the current plan, as in the simulator. What the
operator asks for by hand, `Wishes`, goes the same way, and a plan that he hands in waits
for approval like one of the planner's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from queue import SimpleQueue

from foreserve import __version__
from foreserve.models.codec import digest
from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.models.plan import Epoch, LlmDemand, Plan, SolverInfo
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.planner.arrivals import Arrivals
from foreserve.planner.pipeline import Problems, solve_options
from foreserve.planner.policies.on_demand import OnDemand
from foreserve.planner.policies.rolling import REST_S, plan_epoch
from foreserve.planner.proposals import Mode, Proposal, Proposals
from foreserve.planner.replan import Reason, in_system, replan_now
from foreserve.planner.rolling import Rolling
from foreserve.planner.scenario import Scenario
from foreserve.planner.wishes import Wishes
from foreserve.solvers.result import SolveReport
from foreserve.traces.trace import Demand

NICENESS = 10
"""Of the solver's process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    epoch: int
    at_s: float
    reasons: tuple[Reason, ...]
    before: Placement
    lost_gpus: frozenset[GpuId]


class LivePolicy:
    """A `Policy` of the runtime's controller, for one thread that decides; `approve`,
    `set_mode` and the properties may be used from any. A context manager."""

    name = "live"

    def __init__(
        self,
        *,
        scenario: Scenario,
        fleet: Fleet,
        arrivals: Arrivals,
        wake: Callable[[], None],
        now_s: Callable[[], float],
        mode: Mode = "automatic",
        history: Demand | None = None,
        first: Plan | None = None,
        keep_alive_s: float = 30.0,
        adopted: Callable[[Plan], None] = lambda plan: None,
        wishes: Wishes | None = None,
        wished: Callable[[Wishes], None] = lambda wishes: None,
        saw: Callable[[Observed], None] = lambda observed: None,
    ) -> None:
        """``wake`` ends the controller's wait; ``first``: what to follow until the first
        proposal is carried out, else nothing is planned then; ``adopted`` hears of each
        plan that is carried out from now on, ``wished`` of each change of the ``wishes``,
        ``saw`` of what each decision saw, all before it is made; the first and the last in
        the thread that decides."""
        self.scenario, self.fleet, self.arrivals = scenario, fleet, arrivals
        self.mode: Mode = mode
        self.proposed = Proposals()
        self.observed = Observed(now_s=0.0)
        """What the last decision saw."""
        self.wishes = (wishes or Wishes()).of(fleet)
        self.peaks: dict[str, int] = {}
        """Most requests of each LLM in the system at once in this epoch, as decisions saw
        it."""
        self._adopted, self._wished, self._saw = adopted, wished, saw
        self._history, self._keep_alive_s = history, keep_alive_s
        self._wake, self._now_s = wake, now_s
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._index, self._asked_s = -1, -math.inf
        self._peaks: dict[str, float] = {}
        self._first = first
        self.plan = self._plan(0, Placement() if first is None else None, ())
        self._because: list[Reason] = []
        self._rules: tuple[object, object, OnDemand] | None = None
        self._thread = threading.Thread(target=self._work, name="planner", daemon=True)
        self._thread.start()

    def __enter__(self) -> LivePolicy:
        return self

    def __exit__(self, *ending: object) -> None:
        self.close()

    def close(self) -> None:
        """End the planner's thread, and its solver with it."""
        self._jobs.put(None)
        self._thread.join(timeout=5.0)

    @property
    def generation(self) -> int:
        """Raised with every proposal that is carried out."""
        return self.proposed.generation

    @property
    def proposals(self) -> Sequence[Proposal]:
        """The latest ones, the last one last."""
        return self.proposed.history

    @property
    def pending(self) -> Proposal | None:
        """Waits for approval."""
        return self.proposed.pending

    @property
    def plan_id(self) -> str | None:
        """Of the plan that is carried out; None while there is none."""
        if self._first is None and self.generation == 0:
            return None
        return _id(self.plan.at(self._now_s()).placement)

    def next_review_s(self, now_s: float) -> float:
        end_s = (math.floor(now_s / self.scenario.epoch) + 1) * self.scenario.epoch
        return min(self._rule(now_s).next_review_s(now_s), end_s)

    def decide(self, now_s: float, observed: Observed) -> Placement:
        self.observed = observed
        self._saw(observed)
        self._settle(observed)
        index = math.floor(now_s / self.scenario.epoch)
        if index != self._index:
            self.peaks = {}
        for llm, count in in_system(observed).items():
            self._peaks[llm] = max(count, self._peaks.get(llm, 0.0))
            self.peaks[llm] = max(count, self.peaks.get(llm, 0))
        self._adopt(index)
        lost = observed.lost_gpus | self.wishes.gpus(self.fleet)
        with self._lock:
            because, self._because = tuple(self._because), []
        if index != self._index:
            self._index, self._peaks = index, {}
            self._ask(now_s, (), lost)
        else:
            epoch = self.plan.at(now_s)
            reasons = self._named(replan_now(self.fleet, epoch, self._peaks, lost))
            rested = reasons and now_s >= self._asked_s + REST_S
            if because or rested:
                self._ask(now_s, (*because, *reasons), lost)
                self._peaks = {}
        return self._want(now_s, observed, self._rule(now_s), self.wishes)

    def would(
        self, *, wishes: Wishes | None = None, placement: Placement | None = None
    ) -> Placement:
        """What would be wanted now with other wishes, or if this were the plan's placement;
        nothing changes."""
        now_s, observed = self._now_s(), self.observed
        wishes = self.wishes if wishes is None else wishes
        plan = self.plan
        if placement is not None:
            index = math.floor(now_s / self.scenario.epoch)
            plan = self._plan(index, placement, ())
        rule = wishes.rule(plan, now_s, self._keep_alive_s)
        return self._want(now_s, observed, rule, wishes)

    def wish(self, change: Callable[[Wishes], Wishes], text: str) -> Wishes:
        """Change what the operator wants, which is a reason, ``text``, to plan again; the
        wishes of then."""
        with self._lock:
            after = change(self.wishes)
            if after != self.wishes:
                self.wishes = after
                self._because.append(Reason(text=text))
                self._wished(after)
        self._wake()
        return after

    def hand_in(self, placement: Placement) -> Proposal:
        """A placement of the operator's, which waits for approval in every mode. It obeys
        the referee: the caller has seen to that."""
        now_s = self._now_s()
        return self.proposed.hand_in(
            Proposal(
                id=_id(placement),
                epoch=math.floor(now_s / self.scenario.epoch),
                at_s=now_s,
                took_s=0.0,
                reasons=(),
                placement=placement,
                demand=self.plan.at(now_s).demand,
                report=None,
                origin="operator",
            )
        )

    def approve(self, plan_id: str) -> bool:
        """Carry out the pending proposal, if it is this one; whether it is."""
        known = self.proposed.approve(plan_id)
        self._wake()
        return known

    def as_plan(self, proposal: Proposal) -> Plan:
        """A proposal with a placement as a plan of its epoch."""
        assert proposal.placement is not None
        return self._plan(proposal.epoch, proposal.placement, proposal.demand)

    def set_mode(self, mode: Mode) -> None:
        self.mode = mode
        self._wake()

    def _rule(self, now_s: float) -> OnDemand:
        """The on-demand rule for the plan's epoch of now, and the wishes of now."""
        epoch, wishes = self.plan.at(now_s), self.wishes
        known = self._rules
        if known is None or known[0] is not epoch or known[1] is not wishes:
            rule = wishes.rule(self.plan, now_s, self._keep_alive_s)
            self._rules = known = (epoch, wishes, rule)
        return known[2]

    def _want(
        self, now_s: float, observed: Observed, rule: OnDemand, wishes: Wishes
    ) -> Placement:
        seen = wishes.seen(observed, self.fleet)
        return wishes.wanted(rule.decide(now_s, seen), self.fleet)

    def _settle(self, observed: Observed) -> None:
        """Wishes that have come true, or to an end."""
        with self._lock:
            after = self.wishes.after(observed)
            if after is not self.wishes:
                self.wishes = after
                self._wished(after)

    def _named(self, reasons: tuple[Reason, ...]) -> tuple[Reason, ...]:
        """GPUs that are gone because a node was drained are called so."""
        return tuple(
            replace(reason, text=reason.text.replace("are lost", "are drained"))
            if any(gpu.node in self.wishes.drained for gpu in reason.lost_gpus)
            else reason
            for reason in reasons
        )

    def _ask(
        self, now_s: float, reasons: tuple[Reason, ...], lost: frozenset[GpuId]
    ) -> None:
        self._asked_s = now_s
        before = self.plan.at(now_s).placement.without(lost)
        self._jobs.put(
            _Job(
                epoch=self._index,
                at_s=now_s,
                reasons=reasons,
                before=before,
                lost_gpus=lost,
            )
        )

    def _adopt(self, index: int) -> None:
        """Carry out what was approved, or is ready, if it is of this epoch."""
        chosen = self.proposed.chosen(self.mode, index, self._now_s())
        if chosen is not None and chosen.placement is not None:
            self.plan = self._plan(index, chosen.placement, chosen.demand)
            self._adopted(self.plan)

    def _plan(
        self, index: int, placement: Placement | None, demand: tuple[LlmDemand, ...]
    ) -> Plan:
        """A plan that holds ``placement`` from epoch ``index`` on; None: the first one."""
        if placement is None:
            assert self._first is not None
            return self._first
        epoch_s = self.scenario.epoch
        part = self.scenario.solver
        return Plan(
            foreserve_version=__version__,
            fleet=self.fleet,
            epochs=(
                Epoch(
                    start_s=index * epoch_s,
                    end_s=(index + 1) * epoch_s,
                    placement=placement,
                    demand=demand,
                ),
            ),
            solver=SolverInfo(
                name=part.name,
                version=__version__,
                seed=part.seed,
                threads=part.threads,
                time_limit_s=part.time_limit,
                gap=part.gap,
            ),
            forecaster=self.scenario.forecast.method,
        )

    def _work(self) -> None:
        """The planner's thread: one solve after another, of the latest question only."""
        part = self.scenario.solver
        # Requests are answered on the same cores, and come first.
        options = replace(solve_options(self.scenario), niceness=NICENESS)
        with Rolling(part.name, options, part.horizon) as rolling:
            while (job := self._jobs.get()) is not None:
                while not self._jobs.empty():
                    later = self._jobs.get()
                    if later is None:
                        return
                    job = later
                self.proposed.came(self._solve(rolling, job))
                self._wake()

    def _solve(self, rolling: Rolling, job: _Job) -> Proposal:
        placement: Placement | None = None
        demand: tuple[LlmDemand, ...] = ()
        report: SolveReport | None = None
        failed = ""
        wishes = self.wishes
        # Nobody is to serve those, so nothing is to be expected of them.
        held = tuple(Reason(text="held", llm=h.llm, factor=0.0) for h in wishes.holds)
        try:
            problems = Problems.so_far(
                self.scenario,
                wishes.planned_for(self.fleet),
                self.arrivals.demand(job.epoch),
                history=self._history,
                horizon=self.scenario.solver.horizon,
            )
            left_s = (job.epoch + 1) * self.scenario.epoch - job.at_s
            step, demand = plan_epoch(
                rolling,
                problems,
                job.epoch,
                left_s,
                job.before,
                (*job.reasons, *held),
                job.lost_gpus,
            )
            report = step.report
            if step.schedule is None:
                failed = f"{report.status.value} {report.message}".strip()
            else:
                placement = step.schedule[0]
        except Exception as error:  # a planner that fails must not end the serving
            failed = f"{type(error).__name__}: {error}"
        return Proposal(
            id="" if placement is None else _id(placement),
            epoch=job.epoch,
            at_s=job.at_s,
            took_s=self._now_s() - job.at_s,
            reasons=job.reasons,
            placement=placement,
            demand=demand,
            report=report,
            failed=failed,
            fate="failed" if failed else "noted",
        )


@lru_cache(maxsize=64)
def _id(placement: Placement) -> str:
    return digest(placement)[:12]
