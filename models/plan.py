"""The plan: which replica is where in which epoch, how good that is, and from what.

A plan is self-contained (it carries its fleet), immutable, and goes unchanged from
`plan solve` to the simulator and to the runtime. It holds no wall-clock facts: the same
inputs, seed and thread count give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.problem import Fleet
from foreserve.models.record import Record
from foreserve.models.transitions import Transition

SCHEMA_VERSION = 2


class Status(StrEnum):
    """How a solve ended. Only OPTIMAL and FEASIBLE come with a plan."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    TIME_LIMIT = "time_limit"
    ERROR = "error"

    @property
    def has_plan(self) -> bool:
        return self in (Status.OPTIMAL, Status.FEASIBLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate(Record):
    """How good a placement is, in weighted seconds of delay (the referee's numbers)."""

    status: Status
    objective: float
    bound: float
    """No placement of this problem costs less."""
    terms: Mapping[str, float]
    """Objective by label (O1)..(O5)."""
    without_warm: float
    """Cost of the same placement with every WARM replica removed."""

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 when both are 0."""
        return relative_gap(self.objective, self.bound)

    @property
    def gap_at_stake(self) -> float:
        """Gap as a share of what prewarming is worth here: see `gap_at_stake`."""
        return gap_at_stake(self.objective, self.bound, self.without_warm)


CLOSED = 1e-6
"""Relative gap below which the rest is rounding: solver and referee add differently."""


def relative_gap(objective: float, bound: float) -> float:
    """(objective - bound) / objective; 0 when the two are equal."""
    distance = objective - bound
    # Below a nanosecond of delay there is nothing to divide.
    return 0.0 if distance <= 1e-9 else distance / max(abs(objective), distance)


def gap_at_stake(objective: float, bound: float, without_warm: float) -> float:
    """(objective - bound) / (cost without any WARM replica - bound).

    The plain gap means nothing where a good plan loses almost nothing; 0 if it is closed.
    """
    if relative_gap(objective, bound) <= CLOSED:
        return 0.0
    return (objective - bound) / max(without_warm - bound, objective - bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmDemand(Record):
    """What was forecast for one LLM when its epoch was planned."""

    llm: str
    rate_rps: float
    mean_load: float
    """Requests in flight, mean over the epoch."""
    peak_load: float
    peak_high: float
    """95 % of the peaks are expected to stay below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch(Record):
    """One placement, from ``start_s`` to ``end_s``."""

    start_s: float
    end_s: float
    placement: Placement
    demand: tuple[LlmDemand, ...] = ()
    certificate: Certificate | None = None
    transition: Transition | None = None
    """In which order to come here from the placement before; None where nobody said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverInfo(Record):
    """What solved it, and within which limits."""

    name: str
    version: str
    seed: int
    threads: int
    time_limit_s: float
    gap: float
    horizon: int = 1
    """Epochs that each solve looked ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Record):
    """Placements over consecutive epochs, with certificate and provenance."""

    schema_version: int = SCHEMA_VERSION
    foreserve_version: str
    fleet: Fleet
    epochs: tuple[Epoch, ...]
    solver: SolverInfo
    forecaster: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name of each input file -> SHA-256."""

    def __post_init__(self) -> None:
        if not self.epochs:
            raise InvalidInput("plan: no epochs")
        for before, after in zip(self.epochs, self.epochs[1:], strict=False):
            if before.end_s != after.start_s:
                raise InvalidInput(
                    f"plan: epoch ends at {before.end_s} s, the next one starts at "
                    f"{after.start_s} s"
                )

    @property
    def start_s(self) -> float:
        return self.epochs[0].start_s

    @property
    def end_s(self) -> float:
        return self.epochs[-1].end_s

    def at(self, now_s: float) -> Epoch:
        """The epoch in force at ``now_s``; the first before, the last after the plan."""
        for epoch in self.epochs:
            if now_s < epoch.end_s:
                return epoch
        return self.epochs[-1]

    @property
    def objective(self) -> float:
        """Sum over epochs of what each epoch's solve minimised."""
        return sum(e.certificate.objective for e in self.epochs if e.certificate)

    @property
    def bound(self) -> float:
        """Sum over epochs of the lower bounds, each given the placement before it."""
        return sum(e.certificate.bound for e in self.epochs if e.certificate)
