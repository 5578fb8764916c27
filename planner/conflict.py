"""Why there is no plan: the rules that cannot hold together, and what would help.

Feasibility knows nothing of demand or bursts: unserved requests and cold starts have a
price. What can fail are rules that ask for replicas, the *floors* (``min_active``,
``min_after_loss``, replicas that are held, LLMs that must go on serving), on GPUs with room
for so many ACTIVE ones (C1, C3), under rules that bar some places (C7, C10). Each question
is a solve without demand and scenarios. A question that its time limit leaves open counts
as feasible, and the answer says that it may not be the smallest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

from foreserve.models.placement import Placement
from foreserve.models.plan import Status
from foreserve.models.problem import Problem, ReplicaOption
from foreserve.planner.conflict_rules import (
    FLOORS,
    Rule,
    rules_of,
    with_llm,
    with_rules,
)
from foreserve.planner.pipeline import Problems
from foreserve.planner.scenario import Scenario
from foreserve.planner.what_if import with_node
from foreserve.solvers.base import SolverPool
from foreserve.solvers.result import SolveOptions
from foreserve.traces.trace import Demand, Trace

MOST_SMALLER = 100
"""Subsets of rules that are tried for a smaller conflict."""
MOST_NODES = 8
"""Further nodes that are tried as a way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A change after which there is a plan, and what that plan costs."""

    change: str
    objective: float | None
    """Weighted seconds of delay; None: no plan found in time, though there is one."""
    bound: float
    solver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Rules of which not all can hold on this cluster."""

    rules: tuple[str, ...]
    cluster: str
    """What they would have to hold on."""
    smallest: bool
    """No fewer rules are in conflict; else only: without any of them the rest can hold."""
    relaxations: tuple[Relaxation, ...]
    """Single changes that suffice, cheapest first; () where no single one does."""
    together: tuple[str, ...]
    """Where no single change suffices: changes, one after another, that do."""


def conflict(
    problem: Problem,
    options: SolveOptions,
    other_tp: Mapping[str, Sequence[ReplicaOption]] | None = None,
) -> Conflict | None:
    """The conflict of a problem without a plan; None if its rules can hold.

    ``other_tp``: options of LLMs whose TP size is fixed by rule, were it not fixed.
    """
    with _Oracle(options, "milp" if problem.fleet.sharing else "cpsat") as feasible:
        every = tuple(rules_of(problem, other_tp or {}))
        if feasible(problem):
            return None
        core, smallest = _smallest(problem, every, feasible)
        ways = list(_ways_out(problem, core, feasible))
        with SolverPool("auto", options) as pool:
            found = [_priced(way, relaxed, pool) for way, relaxed in ways]
        together = () if found else tuple(_together(problem, every, feasible))
        smallest = smallest and not feasible.open
    return Conflict(
        rules=tuple(rule.text for rule in core),
        cluster=_cluster(problem),
        smallest=smallest,
        relaxations=tuple(
            sorted(
                found, key=lambda r: (r.objective is None, r.objective or 0.0, r.change)
            )
        ),
        together=together,
    )


def unfixed_tp(
    scenario: Scenario, trace: Trace, history: Demand | None = None
) -> Mapping[str, Sequence[ReplicaOption]]:
    """For `conflict`: what LLMs whose TP sizes the scenario restricts could be else."""
    if not any(llm.tp for llm in scenario.models):
        return {}
    free = tuple(replace(llm, tp=None) for llm in scenario.models)
    fleet = Problems(replace(scenario, models=free), trace, history=history).fleet
    return {
        llm.name: [o for o in fleet.options if o.llm == llm.name]
        for llm in scenario.models
        if llm.tp
    }


class _Oracle:
    """Whether the rules of a problem can hold; remembers nothing but open questions."""

    def __init__(self, options: SolveOptions, solver: str) -> None:
        self._pool = SolverPool(solver, options)
        self.open = False

    def __enter__(self) -> _Oracle:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def __call__(self, problem: Problem) -> bool:
        bare = replace(problem, scenario_probability=(), peak_load=())
        rules = problem.fleet.rules
        if not rules.keep_serving:  # it is about LLMs that are asked for
            none = ((0.0,) * problem.num_epochs,) * len(problem.fleet.llms)
            bare = replace(bare, demand_rps=none)
            if rules.load_window_s is None:
                bare = replace(bare, initial=Placement())
        report = self._pool.solve(bare).report
        if report.status not in (Status.INFEASIBLE, Status.OPTIMAL, Status.FEASIBLE):
            self.open = True
        return report.status is not Status.INFEASIBLE


def _smallest(
    problem: Problem, every: Sequence[Rule], feasible: _Oracle
) -> tuple[tuple[Rule, ...], bool]:
    """A deletion filter, then a look at all smaller sets where they are few."""

    def holds(rules: Sequence[Rule]) -> bool:
        return feasible(_without(problem, [r for r in every if r not in rules]))

    core = list(every)
    for rule in every:
        rest = [other for other in core if other is not rule]
        if not holds(rest):
            core = rest
    tried = 0
    for size in range(1, len(core)):
        for chosen in combinations(every, size):
            # Without a floor there is nothing that could fail.
            if not any(rule.kind in FLOORS for rule in chosen):
                continue
            tried += 1
            if tried > MOST_SMALLER:
                return tuple(core), False
            if not holds(chosen):
                return chosen, True
    return tuple(core), True


def _without(problem: Problem, rules: Sequence[Rule]) -> Problem:
    for rule in rules:
        problem = rule.without(problem)
    return problem


def _ways_out(
    problem: Problem, core: Sequence[Rule], feasible: _Oracle
) -> Iterator[tuple[str, Problem]]:
    """Single changes of rules, then of the cluster, each as small as it can be."""
    llms = problem.fleet.llm_by_name
    for rule in core:
        if not feasible(rule.without(problem)):
            continue
        if rule.way:
            yield rule.way, rule.without(problem)
        elif rule.kind == "max_llms_per_gpu":
            for most in range(
                (problem.fleet.rules.max_llms_per_gpu or 0) + 1, len(llms)
            ):
                more = with_rules(max_llms_per_gpu=partial(max, most))(problem)
                if feasible(more):
                    yield f"max_llms_per_gpu={most}", more
                    break
            else:
                yield "no max_llms_per_gpu", rule.without(problem)
        elif rule.kind in ("min_active", "min_after_loss"):
            llm = llms[rule.llm]
            for floor in reversed(range(getattr(llm, rule.kind))):
                lower = with_llm(llm, **{rule.kind: floor})(problem)
                if floor == 0 or feasible(lower):
                    yield f"{llm.name!r}: {rule.kind}={floor}", lower
                    break
        elif rule.kind == "max_replicas":
            llm = llms[rule.llm]
            # As many as its own floor asks for, or as there are places.
            for most in (llm.min_active, len(problem.fleet.cluster.gpus)):
                more = with_llm(llm, max_replicas=most)(problem)
                if feasible(more):
                    yield f"{llm.name!r}: max_replicas={most}", more
                    break
        elif rule.kind == "tp":
            llm = llms[rule.llm]
            freed = rule.without(problem)
            sizes = sorted({o.tp for o in freed.fleet.options if o.llm == llm.name})
            text = ", ".join(map(str, sizes))
            yield f"{llm.name!r}: any TP size ({text})", freed
    for like in {node.gpu: node for node in problem.fleet.cluster.nodes}.values():
        for count in range(1, MOST_NODES + 1):
            larger = with_node(problem, like, like.gpus, count)
            if feasible(larger):
                nodes = "node" if count == 1 else "nodes"
                what = f"{like.gpus} {like.gpu}"
                yield f"{count} more {nodes} like {like.name} ({what})", larger
                break


def _together(
    problem: Problem, every: Sequence[Rule], feasible: _Oracle
) -> Iterator[str]:
    """Rules to give up, one conflict after another, until the rest can hold."""
    left = list(every)
    while not feasible(problem):
        core, _ = _smallest(problem, left, feasible)
        gone = core[-1]
        yield f"without: {gone.text}"
        problem = gone.without(problem)
        left = [rule for rule in left if rule is not gone]


def _priced(way: str, relaxed: Problem, pool: SolverPool) -> Relaxation:
    report = pool.solve(relaxed).report
    return Relaxation(
        change=way,
        objective=report.objective,
        bound=report.bound,
        solver=report.solver,
    )


def _cluster(problem: Problem) -> str:
    nodes = ", ".join(
        f"{node.name} ({node.gpus} {node.gpu})"
        for node in problem.fleet.cluster.nodes[:8]
    )
    more = len(problem.fleet.cluster.nodes) - 8
    return nodes + (f" and {more} more nodes" if more > 0 else "")
