"""The one seam to every solver: a problem in, a refereed schedule and a report out.

A solver is a function `(problem, options, start) -> Solved`. It runs by name in a child
process, so the caller never imports a solver library, a hard time limit holds, and a
crash is a status. What comes back is judged by the referee before anyone sees it.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version as installed
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, Self

import foreserve
from foreserve.models.codec import did_you_mean
from foreserve.models.errors import InvalidInput
from foreserve.models.plan import Status
from foreserve.models.problem import OPTIONAL, Problem, asks_for
from foreserve.solvers.index import compiles
from foreserve.solvers.judge import refereed
from foreserve.solvers.result import (
    Progress,
    Schedule,
    Solved,
    SolveOptions,
    SolveReport,
)
from foreserve.solvers.shares import perfect_bound, with_shares

__all__ = [
    "SOLVERS",
    "Progress",
    "Schedule",
    "SolveOptions",
    "SolveReport",
    "Solved",
    "Solver",
    "SolverPool",
    "get_solver",
    "perfect_bound",
    "solve",
    "version",
    "with_shares",
]

SOLVERS = {
    "auto": "foreserve.solvers.auto:solve",
    "milp": "foreserve.solvers.milp_solve:solve",
    "highs": "foreserve.solvers.direct:solve",
    "cpsat": "foreserve.solvers.cpsat:solve",
    "scale": "foreserve.solvers.scale:solve",
    "greedy": "foreserve.solvers.greedy:solve",
}
"""Name -> dotted path, imported only where it runs. Any ``module:function`` works too."""

LIBRARIES = {
    "auto": ("highspy", "pyomo", "ortools"),
    "milp": ("highspy", "pyomo"),
    "highs": ("highspy",),
    "cpsat": ("ortools",),
    "scale": ("highspy", "numba"),
}

EVERYTHING = frozenset(OPTIONAL)
CARRIES: Mapping[str, frozenset[str]] = {
    "auto": EVERYTHING,
    "milp": EVERYTHING,
    "highs": EVERYTHING,
    "cpsat": EVERYTHING - {"sharing"},
    "scale": frozenset({"min_after_loss", "rules", "replan"}),
    "greedy": EVERYTHING,
}
"""Which of the rows that a problem may ask for on top (`models.problem.OPTIONAL`) each
solver knows; greedy and `scale` obey theirs, but may find no placement. One of your own
is trusted to know all: the referee looks at its answers."""

DEFAULTS = SolveOptions()
START_S = 120.0
"""A child that has not imported its solver after this long is given up."""
GRACE_S = 5.0
"""A solver that has not answered this long after its time limit is killed."""

COMPILE_S = 180.0
"""More grace for the first solve of a child that may have code to compile."""


class Solver(Protocol):
    """One solve: pure but for time, which ``options`` limit.

    ``start`` is feasible where given. The report states the solver's own claims.
    """

    def __call__(
        self, problem: Problem, options: SolveOptions, start: Schedule | None = None
    ) -> Solved: ...


def get_solver(name: str) -> Solver:
    """Import the solver called ``name`` (or at dotted path ``module:function``)."""
    _check(name)
    module, _, function = SOLVERS.get(name, name).partition(":")
    solver: Solver = getattr(importlib.import_module(module), function)
    return solver


def version(name: str) -> str:
    """Versions of the libraries behind a solver, without importing them."""
    libraries = [
        f"{library} {installed(library)}" for library in LIBRARIES.get(name, ())
    ]
    return ", ".join(libraries) or f"foreserve {foreserve.__version__}"


def solve(
    problem: Problem,
    name: str = "auto",
    options: SolveOptions = DEFAULTS,
    start: Schedule | None = None,
) -> Solved:
    """Solve one problem and referee the answer; see `SolverPool` for many in a row.

    ``start`` is any schedule, such as the one before: it is used as far as it suits.
    Raises `InvalidInput` if the problem asks for rows that the solver does not know.
    """
    if options.in_process:
        refuse_unknown(problem, name, options)
        from foreserve.solvers.child import work

        found: list[Schedule | None] = []
        solved = work(problem, name, options, start, found.append)
        return refereed(problem, solved, found[0])
    with SolverPool(name, options) as pool:
        return pool.solve(problem, start)


class SolverPool:
    """One child process with one solver loaded, for solves one after another.

    The child starts with the first solve, and again after it had to be killed. Leaving
    the ``with`` block ends it, also on Ctrl-C.
    """

    def __init__(self, name: str = "auto", options: SolveOptions = DEFAULTS) -> None:
        _check(name)
        self.name, self.options = name, options
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child; nothing happens if there is none."""
        if self._child is not None:
            process, pipe = self._child
            self._child = None
            process.kill()
            process.wait()
            pipe.close()

    def solve(self, problem: Problem, start: Schedule | None = None) -> Solved:
        """As `solve`, in this pool's child."""
        if self.options.in_process:
            return solve(problem, self.name, self.options, start)
        refuse_unknown(problem, self.name, self.options)
        fallback, began_s = start, perf_counter()
        try:
            grace_s = GRACE_S
            starts = self._child is None or self._child[0].poll() is not None
            if starts and compiles(problem, self.name):
                grace_s += COMPILE_S
            pipe = self._pipe()
            deadline_s = perf_counter() + self.options.time_limit_s + grace_s
            pipe.send((problem, start))
            found = self._receive(pipe, deadline_s)
            fallback = found or start
            solved = self._receive(pipe, deadline_s)
        except _NoAnswer as failure:
            solved = self._failed(failure, perf_counter() - began_s)
        except BaseException:
            # The child may still answer; the next solve must not take that for its own.
            self.close()
            raise
        return refereed(problem, solved, fallback)

    def _pipe(self) -> Connection:
        """The pipe to a child that has imported its solver; starts one if needed."""
        if self._child is not None and self._child[0].poll() is not None:
            self.close()  # it was killed while it had nothing to do
        if self._child is None:
            here, there = Pipe()
            code = "from foreserve.solvers.child import main; main()"
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(there.fileno())],
                pass_fds=[there.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            there.close()
            self._child = process, here
            here.send((self.name, self.options))
            try:
                self._receive(here, perf_counter() + START_S)
            except _NoAnswer:
                self.close()
                raise
        return self._child[1]

    def _receive(self, pipe: Connection, deadline_s: float) -> Any:
        """The next answer of the child; `_NoAnswer` if it fails, dies, or is too late."""
        try:
            if not pipe.poll(max(0.0, deadline_s - perf_counter())):
                self.close()
                raise _NoAnswer(Status.TIME_LIMIT, "killed at the hard time limit")
            answer, failure = pipe.recv()
        except (EOFError, ConnectionError):
            raise _NoAnswer(Status.ERROR, f"the solver {self._ending()}") from None
        if failure:
            raise _NoAnswer(Status.ERROR, failure)
        return answer

    def _ending(self) -> str:
        """How the child, whose pipe is closed, came to its end."""
        assert self._child is not None
        code = self._child[0].wait()
        self.close()
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def _failed(self, failure: _NoAnswer, wall_s: float) -> Solved:
        report = SolveReport(
            status=failure.status,
            solver=self.name,
            version=version(self.name),
            seed=self.options.seed,
            threads=self.options.threads,
            wall_s=wall_s,
            message=failure.message,
        )
        return Solved(schedule=None, report=report)


class _NoAnswer(Exception):
    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


def refuse_unknown(
    problem: Problem, name: str, options: SolveOptions = DEFAULTS
) -> None:
    """`InvalidInput` if ``problem`` asks for rows that solver ``name`` does not carry, or
    ``options`` for an order of terms that it does not know."""
    if options.lexicographic and name in SOLVERS and name not in ("auto", "milp"):
        raise InvalidInput(
            f"solver {name!r} cannot take the terms of the objective in order",
            hint="use --solver milp with --lexicographic",
        )
    missing = sorted(asks_for(problem) - CARRIES.get(name, EVERYTHING))
    if missing:
        others = [key for key, carried in CARRIES.items() if carried >= set(missing)]
        raise InvalidInput(
            f"solver {name!r} does not know {'; '.join(OPTIONAL[key] for key in missing)}",
            hint="use --solver " + " or ".join(others),
        )


def _check(name: str) -> None:
    if name not in SOLVERS and ":" not in name:
        hint = did_you_mean(name, list(SOLVERS))
        raise InvalidInput(f"unknown solver {name!r}", hint=hint)
