"""Solvers that misbehave, each in one way, to be run by dotted path."""

from __future__ import annotations

import os
import signal
import time

from foreserve.models import referee
from foreserve.models.placement import Placement, Replica
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers.result import Schedule, Solved, SolveOptions, SolveReport


def _answer(
    schedule: Schedule | None, objective: float | None, bound: float, status: Status
) -> Solved:
    report = SolveReport(status=status, solver="fake", objective=objective, bound=bound)
    return Solved(schedule=schedule, report=report)


def sleepy(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Ignores its time limit."""
    time.sleep(600)  # noqa: TID251
    raise AssertionError


def sleepy_once(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Sleeps if anything is resident before, else answers with nothing at all."""
    if problem.initial.replicas:
        sleepy(problem, options, start)
    return empty(problem, options, start)


def dying(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Crashes as native code does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def raising(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    raise ZeroDivisionError("by nought")


def greedy_for_memory(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Takes 4 GiB."""
    return _answer(None, None, float(len(bytearray(4 * 2**30))), Status.TIME_LIMIT)


def empty(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Plans nothing at all, which is feasible and honest but seldom good."""
    schedule = (Placement(),) * problem.num_epochs
    total = referee.cost(problem, schedule).total
    return _answer(schedule, total, 0.0, Status.FEASIBLE)


def nothing(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Finds no schedule in time."""
    return _answer(None, None, 0.0, Status.TIME_LIMIT)


def pessimist(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Says there is no schedule, whatever it was given to start from."""
    return _answer(None, None, 0.0, Status.INFEASIBLE)


def flattering(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Claims one thousandth less than its schedule costs."""
    assert start is not None
    total = referee.cost(problem, start).total
    return _answer(start, total * 0.999, 0.0, Status.FEASIBLE)


def overbound(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Claims a bound above what its own schedule costs."""
    assert start is not None
    total = referee.cost(problem, start).total
    return _answer(start, total, total * 1.001, Status.OPTIMAL)


def overbound_without_plan(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Claims a bound above what the start costs."""
    assert start is not None
    total = referee.cost(problem, start).total
    return _answer(None, None, total * 1.001, Status.TIME_LIMIT)


def overloaded(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Gives all traffic to every replica there can be."""
    replicas = tuple(
        Replica(llm=option.llm, gpus=block, state="ACTIVE", traffic_share=1.0)
        for option, block in problem.fleet.candidates()
    )
    schedule = (Placement(replicas=replicas),) * problem.num_epochs
    return _answer(schedule, 0.0, 0.0, Status.OPTIMAL)


def telling_niceness(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Finds nothing, and says how nice its process is."""
    nice = str(os.getpriority(os.PRIO_PROCESS, 0))
    report = SolveReport(status=Status.TIME_LIMIT, solver="fake", message=nice)
    return Solved(schedule=None, report=report)
