"""A full schedule in well under a second, epoch by epoch: the start of every solve.

Per epoch: keep the ACTIVE replicas that still pay, add the ACTIVE replica that saves most
per GPU until none pays, then prewarm in WarmServe's manner (`place`), each copy scored by
the expected loss it covers. Several variants are made and the referee picks the cheapest.
"""

from __future__ import annotations

from dataclasses import replace

from foreserve.models import referee
from foreserve.models.bursts import losses
from foreserve.models.placement import HostCopy, Placement
from foreserve.models.plan import Status
from foreserve.models.problem import Fleet, Problem, asks_for
from foreserve.solvers.board import Board
from foreserve.solvers.index import stay
from foreserve.solvers.result import Schedule, Solved, SolveOptions, SolveReport
from foreserve.solvers.shares import perfect_bound

POLISH_TRIALS = 100
REGROUP_TRIALS = 200


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
    if not fresh.pins():
        return None
    kept = fresh.copy()
    kept.keep_active()
    covered = []
    if asks_for(problem) & {"keep_serving", "window", "replan"}:
        # Those may leave nothing but to stay.
        still = kept.copy()
        covered = [still] if still.floors() else []
    kept.trim()
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
    for board in sorted(variants, key=Board.cost):
        placement = board.placement()
        if _moves(problem, epoch, before, placement):
            break
    else:
        return None
    board.polish(POLISH_TRIALS)
    if problem.fleet.sharing is not None:
        board.regroup(REGROUP_TRIALS)
    ways = [board.placement(), placement]
    hosted = keep(problem, epoch, before, board.placement())
    ways.insert(0, replace(board.placement(), hosted=hosted))
    return next(way for way in ways if _moves(problem, epoch, before, way))


def _moves(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> bool:
    """Whether the rows hold that look at the placement before (C5, C7, C8)."""
    return not any(
        any(row(problem, epoch, before, placement))
        for row in referee.MOVING_ROWS.values()
    )


def keep(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> tuple[HostCopy, ...]:
    """What nodes keep in host memory: first, on one node each, the LLMs that lose most
    if none does, then what was there (C6)."""
    fleet = problem.fleet
    if fleet.loading.host_cache != "planned":
        return ()
    expected = dict.fromkeys(fleet.llm_by_name, 0.0)
    found = losses(problem, epoch, placement, by_llm=True)
    for probability, loss in zip(problem.scenario_probability, found, strict=True):
        for name, count in loss.missing.items():
            llm = fleet.llm_by_name[name]
            expected[name] += probability * count * llm.weight * llm.storage_loss_s
    had = {copy.llm: copy for copy in before.hosted}
    room = {node.name: node.host_ram_bytes for node in fleet.cluster.nodes}
    kept = []
    for name in sorted(expected, key=lambda name: -expected[name]):
        nodes = [node for node, llm in fleet.places if llm == name]
        fitting = [n for n in nodes if room[n] >= fleet.stored_bytes[name]]
        if expected[name] <= 0 or not fitting:
            continue
        stays = [n for n in fitting if had.get(name) == HostCopy(node=n, llm=name)]
        node = min(stays or fitting, key=lambda n: (-room[n], n))
        room[node] -= fleet.stored_bytes[name]
        kept.append(HostCopy(node=node, llm=name))
    return stay(fleet, tuple(kept), before.hosted)
