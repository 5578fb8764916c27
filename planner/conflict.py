"""Why there is no plan: the rules that cannot hold together, and what would help.

Feasibility knows nothing of demand or bursts: unserved requests and cold starts have a
price. What can fail are the operator's rules (C10) for LLMs with ``min_active``, on GPUs
of which each holds one ACTIVE replica (C3) in its memory (C1). Each question is a solve
without demand and scenarios. A question that its time limit leaves open counts as
feasible, and the answer says that it may not be the smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from foreserve.models.placement import Placement
from foreserve.models.plan import Status
from foreserve.models.problem import Problem, ReplicaOption, ServedLlm, held_bytes
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
GIB = 2**30

Change = Callable[[Problem], Problem]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule of the operator's, and the problem without it."""

    llm: str
    kind: str
    """min_active, max_replicas, nodes, tp or memory."""
    text: str
    without: Change


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
    with _Oracle(options) as feasible:
        every = tuple(_rules(problem, other_tp or {}))
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

    def __init__(self, options: SolveOptions) -> None:
        self._pool = SolverPool("cpsat", options)
        self.open = False

    def __enter__(self) -> _Oracle:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.close()

    def __call__(self, problem: Problem) -> bool:
        bare = replace(
            problem,
            demand_rps=((0.0,),) * len(problem.fleet.llms),
            scenario_probability=(),
            peak_load=(),
            initial=Placement(),
        )
        report = self._pool.solve(bare).report
        if report.status not in (Status.INFEASIBLE, Status.OPTIMAL, Status.FEASIBLE):
            self.open = True
        return report.status is not Status.INFEASIBLE


def _rules(
    problem: Problem, other_tp: Mapping[str, Sequence[ReplicaOption]]
) -> Iterator[Rule]:
    """Rules of LLMs with a floor: the others can go without any replica."""
    fleet = problem.fleet
    for llm in fleet.llms:
        if not llm.min_active:
            continue
        own = [option for option in fleet.options if option.llm == llm.name]
        name = repr(llm.name)
        text = f"{name} keeps min_active={llm.min_active}"
        yield Rule(
            llm=llm.name, kind="min_active", text=text, without=_with(llm, min_active=0)
        )
        if llm.max_replicas is not None:
            yield Rule(
                llm=llm.name,
                kind="max_replicas",
                text=f"{name} has max_replicas={llm.max_replicas}",
                without=_with(llm, max_replicas=None),
            )
        if llm.nodes is not None:
            yield Rule(
                llm=llm.name,
                kind="nodes",
                text=f"{name} may only be on {', '.join(llm.nodes)}",
                without=_with(llm, nodes=None),
            )
        if others := other_tp.get(llm.name):
            sizes = ", ".join(str(tp) for tp in sorted({o.tp for o in own}))
            yield Rule(
                llm=llm.name,
                kind="tp",
                text=f"{name} runs at TP {sizes} only",
                without=_with_options(llm, others),
            )
        if large := _too_large(problem, own):
            yield Rule(
                llm=llm.name,
                kind="memory",
                text=f"{name} at TP {large[0]} takes {large[1] / GIB:.1f} GiB per GPU "
                f"while ACTIVE, {large[2] / GIB:.1f} are usable",
                without=_with_options(
                    llm,
                    [
                        replace(o, resident_bytes=0, kv_bytes=0, activation_bytes=0)
                        for o in own
                    ],
                ),
            )


def _with(llm: ServedLlm, **changes: object) -> Change:
    """Replaces fields of one LLM."""

    def change(problem: Problem) -> Problem:
        llms = tuple(
            replace(other, **changes) if other.name == llm.name else other  # type: ignore[arg-type]
            for other in problem.fleet.llms
        )
        return replace(problem, fleet=replace(problem.fleet, llms=llms))

    return change


def _with_options(llm: ServedLlm, options: Sequence[ReplicaOption]) -> Change:
    """Replaces what one LLM can run as."""

    def change(problem: Problem) -> Problem:
        rest = (o for o in problem.fleet.options if o.llm != llm.name)
        fleet = replace(problem.fleet, options=(*rest, *options))
        return replace(problem, fleet=fleet)

    return change


def _too_large(
    problem: Problem, own: Sequence[ReplicaOption]
) -> tuple[int, int, int] | None:
    """(TP, bytes needed, bytes usable) of an option that can never be ACTIVE."""
    cluster = problem.fleet.cluster
    for option in own:
        kind = cluster.type_by_name[option.gpu_type]
        usable = int(kind.memory_bytes * cluster.usable_fraction)
        if (needed := held_bytes(option, "ACTIVE")) > usable:
            return option.tp, needed, usable
    return None


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
            if not any(rule.kind == "min_active" for rule in chosen):
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
        llm = llms[rule.llm]
        if not feasible(rule.without(problem)):
            continue
        if rule.kind == "min_active":
            for floor in reversed(range(llm.min_active)):
                lower = _with(llm, min_active=floor)(problem)
                if floor == 0 or feasible(lower):
                    yield f"{llm.name!r}: min_active={floor}", lower
                    break
        elif rule.kind == "max_replicas":
            more = _with(llm, max_replicas=llm.min_active)(problem)
            yield f"{llm.name!r}: max_replicas={llm.min_active}", more
        elif rule.kind == "nodes":
            yield f"{llm.name!r}: any node", rule.without(problem)
        elif rule.kind == "tp":
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
