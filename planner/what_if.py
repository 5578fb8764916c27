"""What would be if: a replica held where the plan has none, one more GPU, one more node.

Each answer is a further solve with the same limits, compared with a solve of the problem
as it is. Both have gaps, so a difference comes with what it can be at least and at most.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from foreserve.models import referee
from foreserve.models.placement import Placement, Replica, ReplicaId, State
from foreserve.models.plan import Status, relative_gap
from foreserve.models.problem import Problem
from foreserve.models.specs import ClusterSpec, Node
from foreserve.solvers.base import SolverPool
from foreserve.solvers.judge import refereed
from foreserve.solvers.milp_solve import solve_with
from foreserve.solvers.result import Schedule, SolveOptions, SolveReport
from foreserve.solvers.shares import with_shares


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """One change and what it is worth, in weighted seconds of delay."""

    change: str
    status: Status
    difference: float | None
    """Objective of the plan found with the change less that found without; negative is
    a saving. None: no plan was found."""
    least: float | None
    """No less than this is the true difference, by the bounds; None: it is impossible."""
    most: float | None
    solver: str
    gap: float | None

    @classmethod
    def of(cls, change: str, base: SolveReport, changed: SolveReport) -> WhatIf:
        """``base`` has a plan."""
        assert base.objective is not None
        impossible = changed.status is Status.INFEASIBLE
        found = changed.objective
        return cls(
            change=change,
            status=changed.status,
            difference=None if found is None else found - base.objective,
            least=None if impossible else changed.bound - base.objective,
            most=None if found is None else found - base.bound,
            solver=changed.solver,
            gap=None if found is None else relative_gap(found, changed.bound),
        )


def repriced(
    problem: Problem, schedule: Schedule, epoch: int, key: ReplicaId, state: State
) -> float | None:
    """By how much the objective changes if ``key`` joins one epoch in ``state`` and all
    else stays but the traffic; None where that breaks a rule."""
    others = (r for r in schedule[epoch].replicas if r.id != key)
    new = Replica(llm=key.llm, gpus=key.gpus, state=state)
    larger = Placement(replicas=(*others, new), hosted=schedule[epoch].hosted)
    changed = with_shares(problem, epoch, larger)
    then = (*schedule[:epoch], changed, *schedule[epoch + 1 :])
    if referee.violations(problem, then):
        return None
    now = referee.cost(problem, schedule).total
    return referee.cost(problem, then).total - now


def held_there(
    problem: Problem,
    base: SolveReport,
    options: SolveOptions,
    key: ReplicaId,
    epoch: int = 0,
) -> WhatIf:
    """The best plan that holds ``key`` in ``epoch``, by the MILP."""
    found = solve_with(problem, options, key, epoch)
    if found.report.status is not Status.INFEASIBLE:
        found = refereed(problem, found, None)
    return WhatIf.of(f"{key} is held", base, found.report)


def more_hardware(
    problem: Problem,
    schedule: Schedule,
    base: SolveReport,
    pool: SolverPool,
) -> tuple[WhatIf, ...]:
    """One more GPU, and one more node like the largest, of each GPU type there is."""
    found = []
    for kind in problem.fleet.cluster.gpu_types:
        like = max(
            (n for n in problem.fleet.cluster.nodes if n.gpu == kind.name),
            key=lambda node: node.gpus,
            default=None,
        )
        if like is None:
            continue
        for gpus in dict.fromkeys((1, like.gpus)):
            larger = with_node(problem, like, gpus)
            solved = pool.solve(larger, schedule)
            what = "GPU" if gpus == 1 else f"node of {gpus} GPUs"
            found.append(WhatIf.of(f"one more {kind.name} {what}", base, solved.report))
    return tuple(found)


def with_node(problem: Problem, like: Node, gpus: int, count: int = 1) -> Problem:
    """The problem with ``count`` more nodes of ``gpus`` GPUs, else as ``like``. LLMs that
    may be on ``like`` may be there too."""
    cluster = problem.fleet.cluster
    free = (
        n for i in itertools.count() if (n := f"more{i}") not in cluster.node_by_name
    )
    names = tuple(itertools.islice(free, count))
    nodes = tuple(replace(like, name=name, gpus=gpus) for name in names)
    llms = tuple(
        replace(llm, nodes=(*llm.nodes, *names))
        if llm.nodes is not None and like.name in llm.nodes
        else llm
        for llm in problem.fleet.llms
    )
    larger = ClusterSpec(
        nodes=(*cluster.nodes, *nodes),
        gpu_types=cluster.gpu_types,
        usable_fraction=cluster.usable_fraction,
    )
    return replace(problem, fleet=replace(problem.fleet, cluster=larger, llms=llms))
