"""Counts for the bound, annealing for the plan: the solver whose cost grows slowest.

Per epoch, given the placement before: the relaxation over counts per class of nodes
(`counts`) bounds the cost, made stronger by patterns of spare GPUs (`arrange`) or, where
there are many kinds of counts, by whole counts alone; what it found, set out on blocks, is
annealed (`anneal`), then the best of that and of the starts. The bound of several epochs
is the sum of theirs, where (O4) counts in the first one alone, since the others may follow
any placement.

Of the rows that are asked for on top, the search obeys (C9) and (C10); a start that does
not is not taken. A price of every change (O4) is looked at in the end. The bound knows
none of them: fewer rows and terms, a lower bound.

``work_limit`` counts thousands of moves per epoch (and nodes of the branching).
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np

from foreserve.models import referee
from foreserve.models.cost import IterationTime
from foreserve.models.placement import Placement
from foreserve.models.plan import Status, relative_gap
from foreserve.models.problem import Fleet, Problem, ReplicaOption, ServedLlm
from foreserve.models.specs import ClusterSpec, GpuType, Node
from foreserve.solvers import greedy
from foreserve.solvers.arrange import PatternModel
from foreserve.solvers.counts import CountModel
from foreserve.solvers.field import Field
from foreserve.solvers.index import candidate_count
from foreserve.solvers.judge import best_of, in_space
from foreserve.solvers.result import (
    Progress,
    Schedule,
    Solved,
    SolveOptions,
    SolveReport,
)
from foreserve.solvers.shares import perfect_bound, with_shares
from foreserve.solvers.spares import Arranged

RELAX, BRANCH = 0.3, 0.3
"""Shares of an epoch's time for patterns in parts, and for whole counts with patterns."""
MANY = 200
"""With more kinds of counts than this, patterns take too long: counts alone."""
ALONE = 0.15
"""Share of the time for a bound by whole counts alone."""
ENOUGH = 1e-3
"""Relative gap at which that search is done."""
DIVE = 0.1
"""Most of its time for whole patterns, or counts."""
BRANCH_COLUMNS = 600
"""With more kinds of counts than this, the bound is that of counts in parts."""
LARGE = 2_000
"""GPUs from which on one start is searched, and without heat."""
JUDGED = 0.15
"""Share of the time, with so many GPUs, that is left to cost the schedule in the end."""
SECOND = 0.15
"""Share of the search in which ACTIVE replicas move too, once whole counts were set out."""
SMALL = 2_000
"""Greedy is one of the starts where there are at most so many candidate replicas."""
QUICK_MOVES = 3_000
CHUNK = 1000
"""Moves between two looks at the clock."""
HOT, WARM, COLD = 0.5, 0.05, 0.005
"""First heat, first heat once an arrangement has cooled, and last, in mean losses of one
missing instance in one scenario."""


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """One epoch after the other; the start is one of the candidates of each."""
    began_s = perf_counter()
    run = _Run(problem, options, began_s)
    limit_s = options.time_limit_s
    if len(problem.fleet.cluster.gpus) > LARGE:
        limit_s *= 1 - JUDGED
    schedule: list[Placement] = []
    before = problem.initial
    for epoch in range(problem.num_epochs):
        share = (epoch + 1) / problem.num_epochs
        until_s = began_s + share * limit_s
        given = None if start is None else start[epoch]
        found = run.epoch(epoch, before, given, until_s)
        if found is None:
            status = Status.TIME_LIMIT if run.feasible else Status.INFEASIBLE
            message = f"no placement for epoch {epoch}"
            report = SolveReport(status=status, solver="scale", message=message)
            return Solved(schedule=None, report=report)
        schedule.append(found)
        before = found
    total = referee.cost(problem, schedule).total
    bound = max(run.bound, perfect_bound(problem))
    closed = relative_gap(total, bound) <= max(options.gap, 1e-9)
    chosen = tuple(schedule)
    if run.greedy is not None:
        # The search's own cost may be above the referee's, here and there by a little.
        best = best_of(problem, [chosen, run.greedy])
        chosen = chosen if best is None else best
        total = referee.cost(problem, chosen).total
    run.note(total, bound)
    report = SolveReport(
        status=Status.OPTIMAL if closed else Status.FEASIBLE,
        solver="scale",
        objective=total,
        bound=min(bound, total),
        time_to_first_s=run.first_s,
        progress=tuple(run.progress),
        message=run.message,
    )
    return Solved(schedule=chosen, report=report)


def quick(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """A schedule without looking at the bound: what was there, ACTIVE replicas by a greedy
    rule, then moves that pay. Deterministic; ``start`` changes nothing."""
    began_s = perf_counter()
    schedule: list[Placement] = []
    before = problem.initial
    for epoch in range(problem.num_epochs):
        field = Field(problem, epoch, before, options.seed)
        field.take(before, cover=True)
        field.search(0.0, QUICK_MOVES)
        before = field.placement()
        schedule.append(before)
    possible = not referee.violations(problem, schedule)
    report = SolveReport(
        status=Status.FEASIBLE if possible else Status.TIME_LIMIT,
        solver="quick",
        objective=referee.cost(problem, schedule).total if possible else None,
        bound=perfect_bound(problem) if possible else 0.0,
        time_to_first_s=perf_counter() - began_s if possible else None,
    )
    return Solved(schedule=tuple(schedule) if possible else None, report=report)


def prepare() -> None:
    """Load the compiled search, or compile it: once per version, about half a minute."""
    kind = GpuType(
        name="g",
        memory_bytes=2,
        hbm_bytes_per_s=1.0,
        bf16_flop_per_s=1.0,
        gpu_link_bytes_per_s=1.0,
        host_link_bytes_per_s=1.0,
        price_usd_per_h=1.0,
    )
    node = Node(name="n", gpu="g", gpus=2, host_ram_bytes=1)
    cluster = ClusterSpec(nodes=(node,), gpu_types=(kind,), usable_fraction=1.0)
    time = IterationTime(
        prefill_base_s=0.0,
        prefill_s_per_token=0.0,
        prefill_s_per_token2=0.0,
        decode_base_s=0.0,
        decode_s_per_seq=0.0,
        decode_s_per_context_token=0.0,
        relative_error=0.0,
        source="",
    )
    option = ReplicaOption(
        llm="m",
        gpu_type="g",
        tp=1,
        resident_bytes=1,
        kv_bytes=1,
        kv_token_bytes=1,
        concurrency=1,
        rate_rps=1.0,
        exec_s=1.0,
        load_s=1.0,
        activate_s=0.0,
        ttft_s=1.0,
        tpot_s=1.0,
        time=time,
    )
    llm = ServedLlm(name="m", cold_loss_s=9.0, instance_concurrency=1)
    problem = Problem(
        fleet=Fleet(cluster=cluster, llms=(llm,), options=(option,)),
        epoch_s=1.0,
        demand_rps=((1.0,),),
        scenario_probability=(1.0,),
        peak_load=(((2.0,),),),
    )
    options = SolveOptions(work_limit=1, gap=0.0)
    schedule = solve(problem, options).schedule
    assert schedule is not None
    Field(problem, 0, Placement(), 0).take(schedule[0])


class _Run:
    """What the epochs of one solve share."""

    def __init__(self, problem: Problem, options: SolveOptions, began_s: float) -> None:
        self.problem, self.options, self.began_s = problem, options, began_s
        self.bound = 0.0
        self.first_s: float | None = None
        self.progress: list[Progress] = []
        self.message, self.feasible = "", True
        # Greedy is a start, and what `never worse than greedy` is held against.
        small = candidate_count(problem.fleet) <= SMALL
        found = greedy.solve(problem, options).schedule if small else None
        self.greedy = found

    def note(self, objective: float | None, bound: float | None) -> None:
        """Progress is told of the first epoch, or of the whole schedule at the end."""
        elapsed_s = perf_counter() - self.began_s
        if objective is not None and self.first_s is None:
            self.first_s = elapsed_s
        self.progress.append(Progress(elapsed_s, objective, bound))

    def epoch(
        self, epoch: int, before: Placement, given: Placement | None, until_s: float
    ) -> Placement | None:
        """The best placement found until then; adds to the bound."""
        options, span_s = self.options, until_s - perf_counter()
        field = Field(self.problem, epoch, before, options.seed + 1009 * epoch)
        field.take(given or Placement(), cover=True)
        if field.obeys():
            self._tell(epoch, field.cost, None)
        model = CountModel(self.problem, epoch, switching=epoch == 0)
        arranged, bound = self._arrange(epoch, model, span_s)
        if not self.feasible:
            return None
        self.bound += bound
        self._tell(epoch, None, bound)
        starts = [(field.state.copy(), field.cost)] if field.obeys() else []
        if self.greedy is not None:
            field.clear()
            field.take(self.greedy[epoch])
            if field.obeys():
                starts.append((field.state.copy(), field.cost))
        if arranged is not None:
            field.clear()
            field.set_out(model, arranged)
            self.message += f"set out {field.cost:.6g}, "
            if field.obeys():
                self._tell(epoch, field.cost, None)
                now_s = perf_counter()
                end_s = until_s - SECOND * (until_s - now_s)
                # Good whole counts are soon forgotten in heat; rough ones must move.
                rough = np.abs(arranged.active - arranged.active.round()) > 1e-6
                moving = bool(rough.any()) or len(model.columns) > MANY
                starts.append(
                    self._anneal(epoch, field, bound, end_s, HOT, actives=moving)
                )
        if not starts:
            return None if self.greedy is None else self.greedy[epoch]
        least = min(starts, key=lambda start: start[1])
        hot = HOT if arranged is None else WARM
        field.state, field.cost = least[0].copy(), least[1]
        found = self._anneal(epoch, field, bound, until_s, hot, actives=True)
        field.state, field.cost = min((least, found), key=lambda start: start[1])
        return self._or_stay(epoch, before, field)

    def _or_stay(self, epoch: int, before: Placement, field: Field) -> Placement:
        """What the search found, or where any change has a price (O4) what was there."""
        found = field.placement()
        if not self.problem.prices.replan_s:
            return found
        problem = self.problem
        suits = in_space(problem, (before,))
        if not suits or any(referee.fleet_violations(problem.fleet, before)):
            return found
        stay = with_shares(problem, epoch, before)

        def cost(placement: Placement) -> float:
            terms = referee.TERMS.values()
            return sum(term(problem, epoch, before, placement) for term in terms)

        return min((found, stay), key=cost)

    def _arrange(
        self, epoch: int, model: CountModel, span_s: float
    ) -> tuple[Arranged | None, float]:
        """Counts and patterns, and the bound."""
        options, work = self.options, self.options.work_limit
        began_s, forever = perf_counter(), float("inf")
        parts_s, whole_s = RELAX * span_s, BRANCH * span_s
        first = model.relax(forever if work else RELAX * span_s)
        self.feasible = self.feasible and model.feasible
        if first is None:
            return None, 0.0
        self.message += f"relaxed {first.bound:.6g} at {self._now_s():.2f} s, "
        many = len(model.columns) > MANY
        dived = model.dive(forever if work else DIVE * span_s) if many else None
        best, bound = dived or first, first.bound
        found = Arranged(value=best.bound, active=best.active, warm=best.warm)
        if MANY < len(model.columns) <= BRANCH_COLUMNS:
            limit_s = forever if work else ALONE * span_s
            gap, nodes = max(ENOUGH, options.gap), int(1000 * work) if work else None
            bound = max(bound, model.whole(limit_s, gap, options.seed, nodes))
            self.feasible = self.feasible and model.feasible
            self.message += f"bound {bound:.6g} at {self._now_s():.2f} s, "
        if many:
            return found, bound
        patterns = PatternModel(self.problem, epoch, model, switching=epoch == 0)
        until_s = forever if work else began_s + parts_s
        found = patterns.relax(until_s, first.prices, options.gap, work) or found
        self.message += f"patterns {patterns.bound:.6g} at {self._now_s():.2f} s, "
        if patterns.feasible:
            until_s = forever if work else began_s + parts_s + whole_s
            whole = patterns.whole(until_s, options.gap, options.seed, work)
            if whole is not None:
                until_s = forever if work else perf_counter() + DIVE * span_s
                found = patterns.dive(whole, until_s)
                self.message += f"whole {found.value:.6g}, "
            self.message += f"bound {patterns.bound:.6g} at {self._now_s():.2f} s, "
        self.feasible = self.feasible and patterns.feasible
        return found, max(first.bound, patterns.bound)

    def _now_s(self) -> float:
        return perf_counter() - self.began_s

    def _anneal(
        self,
        epoch: int,
        field: Field,
        bound: float,
        until_s: float,
        hot: float,
        *,
        actives: bool,
    ) -> tuple[Any, float]:
        """Cooling to the end of the time, or of the work; the best state and its cost."""
        unit = field.unit()
        if len(field.gpus) > LARGE:
            hot = COLD  # too few moves per GPU to come back from worse ones
        began_s, work = perf_counter(), self.options.work_limit
        best, least, moves = field.state.copy(), field.cost, 0
        while True:
            if work:
                done = moves / (1000 * work)
            else:
                done = (perf_counter() - began_s) / max(1e-9, until_s - began_s)
            if done >= 1 or relative_gap(least, bound) <= self.options.gap:
                break
            heat = unit * hot * (COLD / hot) ** done
            field.search(heat, CHUNK, actives=actives)
            moves += CHUNK
            if field.cost < least - 1e-9:
                best, least = field.state.copy(), field.cost
                self._tell(epoch, least, None)
        self.message += f"{moves} moves to {least:.6g}, "
        return best, least

    def _tell(self, epoch: int, objective: float | None, bound: float | None) -> None:
        if epoch == 0 and self.problem.num_epochs == 1:
            self.note(objective, bound)
