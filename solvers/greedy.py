"""A full schedule in well under a second, epoch by epoch: the start of every solve.

Per epoch: keep the ACTIVE replicas that still pay, add the ACTIVE replica that saves most
per GPU until none pays, then prewarm in WarmServe's manner (`place`), each copy scored by
the expected loss it covers. Several variants are made and the referee picks the cheapest.
"""

from __future__ import annotations

from foreserve.models import referee
from foreserve.models.placement import Placement
from foreserve.models.plan import Status
from foreserve.models.problem import Fleet, Problem
from foreserve.solvers.board import Board
from foreserve.solvers.result import Schedule, Solved, SolveOptions, SolveReport
from foreserve.solvers.shares import perfect_bound

POLISH_TRIALS = 100


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Deterministic; ``options`` and ``start`` change nothing."""
    schedule: list[Placement] = []
    before = problem.initial
    impossible = _impossible(problem.fleet)
    status, message = Status.INFEASIBLE, impossible
    if not impossible:
        for epoch in range(problem.num_epochs):
            best = _epoch(problem, epoch, before)
            if best is None:
                status = Status.TIME_LIMIT
                message = f"greedy found no placement for epoch {epoch}"
                break
            schedule.append(best)
            before = best
        else:
            status = Status.FEASIBLE
    done = status is Status.FEASIBLE
    report = SolveReport(
        status=status,
        solver="greedy",
        objective=referee.cost(problem, schedule).total if done else None,
        bound=perfect_bound(problem) if done else 0.0,
        message=message,
    )
    return Solved(schedule=tuple(schedule) if done else None, report=report)


def _impossible(fleet: Fleet) -> str:
    """Why the least numbers of ACTIVE replicas cannot fit, if that is plain to see."""
    least_gpus = 0
    for llm in fleet.llms:
        if llm.min_active == 0:
            continue
        if llm.max_replicas is not None and llm.max_replicas < llm.min_active:
            return f"{llm.name!r}: max_replicas is below min_active (C10)"
        blocks = [
            block for option, block in fleet.candidates() if option.llm == llm.name
        ]
        least_tp = min(map(len, blocks), default=0)
        nodes = {gpu.node for block in blocks for gpu in block}
        room = sum(fleet.cluster.node_by_name[node].gpus for node in nodes)
        if not blocks or room < least_tp * llm.min_active:
            return f"{llm.name!r}: no room for min_active={llm.min_active} (C10)"
        least_gpus += least_tp * llm.min_active
    if least_gpus > len(fleet.cluster.gpus):
        return f"min_active of all LLMs takes {least_gpus} GPUs (C10)"
    return ""


def _epoch(problem: Problem, epoch: int, before: Placement) -> Placement | None:
    """The cheapest of the variants, given the placement before; None if none fits."""
    fresh = Board(problem, epoch, before)
    kept = fresh.copy()
    kept.keep_active()
    kept.trim()
    covered = []
    for board in (board for board in (kept, fresh) if board.floors()):
        dense, large, small = board.copy(), board.copy(), board
        dense.cover()
        large.cover(per_gpu=False)
        small.cover(frugal=True)
        mixed = small.copy()
        mixed.cover()
        for done in (dense, large, small, mixed):
            done.keep_active()
            done.trim()
            covered.append(done)
    held = {gpu for replica in before.replicas for gpu in replica.gpus}
    variants = list(covered)
    for board in covered:
        for gpus in (held | board.serving, set(problem.fleet.cluster.gpus)):
            warm = board.copy()
            warm.prewarm(gpus)
            pruned = warm.copy()
            pruned.prune()
            variants += [warm, pruned]
    if not variants:
        return None
    best = min(variants, key=Board.cost)
    best.polish(POLISH_TRIALS)
    return best.placement()
