"""What goes into a solver beside the problem, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.plan import Status, relative_gap

Schedule = tuple[Placement, ...]
"""One placement per epoch of the problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveOptions:
    """Limits of one solve. The same problem, seed, one thread and a limit that is not of
    wall-clock time (``work_limit``, or none reached) give the same schedule."""

    time_limit_s: float = 30.0
    gap: float = 1e-4
    """Relative gap at which the solver may stop and call its answer optimal."""
    seed: int = 0
    threads: int = 1
    work_limit: float | None = None
    """Deterministic limit in the solver's own unit: branch-and-bound nodes for milp,
    deterministic seconds for cpsat."""
    memory_bytes: int | None = None
    """Cap on the address space of the child process."""
    niceness: int = 0
    """How far the child process steps back for others on the same cores (0 to 19)."""
    lexicographic: bool = False
    """Terms of the objective one after another, (O1) first, instead of their sum; MILP
    only."""
    in_process: bool = False
    """Run in the calling process: no hard limit, no protection; for debugging."""

    def __post_init__(self) -> None:
        if not (self.time_limit_s > 0 and math.isfinite(self.time_limit_s)):
            raise InvalidInput(f"time_limit_s={self.time_limit_s}: must be positive")
        if not 0 <= self.gap < 1:
            raise InvalidInput(f"gap={self.gap}: expected 0 <= gap < 1")
        if self.threads < 1 or self.seed < 0:
            raise InvalidInput("threads must be at least 1 and seed not negative")


class Progress(NamedTuple):
    """What was known ``elapsed_s`` after the solve began."""

    elapsed_s: float
    objective: float | None
    bound: float | None


def curve(points: Iterable[Progress]) -> tuple[Progress, ...]:
    """Points in order of time with the best objective and bound so far, each time that
    one of them got better."""
    objective: float | None = None
    bound: float | None = None
    found: list[Progress] = []
    for point in sorted(points, key=lambda point: point.elapsed_s):
        known = objective, bound
        if point.objective is not None:
            objective = min(
                point.objective, math.inf if objective is None else objective
            )
        if point.bound is not None:
            bound = max(point.bound, -math.inf if bound is None else bound)
        if (objective, bound) != known:
            found.append(Progress(point.elapsed_s, objective, bound))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One term of a lexicographic solve, given the terms before it."""

    label: str
    value: float
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveReport:
    """How a solve went. Objective and bound are weighted seconds of delay."""

    status: Status
    solver: str
    version: str = ""
    seed: int = 0
    threads: int = 1
    objective: float | None = None
    """Of the schedule: the referee's number (inside a solver: the solver's claim)."""
    bound: float = 0.0
    """No schedule on aligned blocks costs less; of dedicated replicas, unless `Sharing`
    allows groups."""
    time_to_first_s: float | None = None
    wall_s: float = 0.0
    peak_bytes: int | None = None
    """Most memory that the child process held so far; None where nobody measured."""
    progress: tuple[Progress, ...] = ()
    """What was known when, as `curve` gives it: a solver notes each new answer and each
    new bound; the start, the referee's judgement and the time before are added to it."""
    message: str = ""
    stages: tuple[Stage, ...] = ()
    """Of a lexicographic solve; ``bound`` is then that of the perfect system."""

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective; None without a schedule."""
        if self.objective is None:
            return None
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A schedule (None: no plan) and how it was found."""

    schedule: Schedule | None
    report: SolveReport
