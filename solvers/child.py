"""What runs in the child process: greedy first, then the solver on the time left."""

from __future__ import annotations

import importlib
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter

from foreserve.models import referee
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers.base import get_solver, version
from foreserve.solvers.index import GREEDY_CANDIDATES, candidate_count, compiles
from foreserve.solvers.judge import best_of
from foreserve.solvers.result import Progress, Schedule, Solved, SolveOptions, curve
from foreserve.solvers.shares import resplit

SCALE = "foreserve.solvers.scale"


def main() -> None:
    """Serve solves over the pipe whose descriptor is the first argument, until it closes.

    Each answer is a pair: a value, and what went wrong ("" if nothing). A solve has two
    answers: the schedule it starts from (or None), and a `Solved`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    pipe: Connection = Connection(int(sys.argv[1]))

    def found(schedule: Schedule | None) -> None:
        pipe.send((schedule, ""))

    try:
        name, options = pipe.recv()
        _answer(pipe, partial(_prepare, name, options))
        while True:
            problem, start = pipe.recv()
            _answer(pipe, partial(work, problem, name, options, start, found))
    except (EOFError, ConnectionError):
        return


def _answer(pipe: Connection, job: Callable[[], object]) -> None:
    try:
        value, failure = job(), ""
    except ConnectionError:
        raise
    except Exception as error:
        value, failure = None, f"{type(error).__name__}: {error}"
    pipe.send((value, failure))


def _prepare(name: str, options: SolveOptions) -> None:
    if options.memory_bytes is not None:
        limits = (options.memory_bytes, options.memory_bytes)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    os.nice(options.niceness)
    get_solver(name)


def work(
    problem: Problem,
    name: str,
    options: SolveOptions,
    start: Schedule | None,
    found: Callable[[Schedule | None], None] = lambda schedule: None,
) -> Solved:
    """Run the solver from the best of ``start`` and greedy, in what they leave of the
    time; ``found`` hears of that start before the solver begins. Not refereed.

    `scale` begins with its own quick start, and so do all where greedy takes too long."""
    if compiles(problem, name):
        importlib.import_module(SCALE).prepare()
    began_s = perf_counter()
    solver, greedy = get_solver(name), get_solver("greedy")
    starts = [start, None if start is None else resplit(problem, start)]
    first = None
    if solver is not greedy:
        large = candidate_count(problem.fleet) > GREEDY_CANDIDATES
        own = name == "scale" or large
        first = (
            get_solver(f"{SCALE}:quick")(problem, options)
            if own
            else greedy(problem, options)
        )
        starts.append(first.schedule)
    best = best_of(problem, starts)
    found(best)
    if first is not None and first.report.status is Status.INFEASIBLE:
        return first
    spent_s = perf_counter() - began_s
    left_s = max(0.01, options.time_limit_s - spent_s)
    solved = solver(problem, replace(options, time_limit_s=left_s), best)
    report, wall_s = solved.report, perf_counter() - began_s
    if best is not None:
        first_s: float | None = spent_s
    elif report.time_to_first_s is not None:
        first_s = spent_s + report.time_to_first_s
    else:
        first_s = None if solved.schedule is None else wall_s
    points = [p._replace(elapsed_s=spent_s + p.elapsed_s) for p in report.progress]
    if best is not None:
        if first is not None and best is first.schedule:
            cost = first.report.objective
        else:
            cost = referee.cost(problem, best).total
        points.append(Progress(spent_s, cost, None))
    report = replace(
        report,
        version=version(report.solver),
        seed=options.seed,
        threads=options.threads,
        time_to_first_s=first_s,
        wall_s=wall_s,
        peak_bytes=peak_bytes(),
        progress=curve(points),
    )
    return replace(solved, report=report)


def peak_bytes() -> int | None:
    """Most memory that this process has held at a time; None where Linux is not.

    Not of `getrusage`, which counts what the parent held when it began this process.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else None
