"""What became of an epoch's plan: forecasts, predictions and prewarming against what came,
and whose fault each missed target was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from foreserve.models.record import Record

Blame = Literal["fault", "forecast", "capacity", "load", "queue"]
BLAMES: tuple[Blame, ...] = ("fault", "forecast", "capacity", "load", "queue")
"""In the order in which they are looked for (docs/drift.md)."""

Step = Literal["load", "activate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured(Record):
    """How long things took, against how long they were predicted to take; adds up."""

    count: int = 0
    predicted_s: float = 0.0
    """Sum over the ``count`` of them, like the others."""
    measured_s: float = 0.0
    abs_error_s: float = 0.0

    @property
    def ratio(self) -> float | None:
        """Measured by predicted; None where nothing was measured."""
        return self.measured_s / self.predicted_s if self.predicted_s > 0 else None

    def __add__(self, other: Measured) -> Measured:
        return _sum((self, other))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demanded(Record):
    """Requests of one LLM in one epoch, counted as plans count them: in flight is who
    would be if each took as long as the cost model says."""

    rate_rps: float
    mean_load: float
    peak_load: float
    peak_high: float | None = None
    """Of a forecast: 95 % of the peaks are expected to stay below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmDrift(Record):
    """One LLM in one epoch."""

    llm: str
    forecast: Demanded | None
    """What the epoch was planned for; None: no plan was carried out."""
    actual: Demanded
    passed: bool
    """Whether the peak was above the bound, or above nothing where nothing was forecast."""
    requests: int
    """Booked in this epoch, whatever became of them."""
    finished: int
    """Answered in full."""
    left: int
    """Whose clients left before their target was missed: neither kept nor missed."""
    missed: int
    """Not answered in full within the targets, for whichever reason."""
    blame: Mapping[Blame, int]
    """All of `BLAMES`; they add up to ``missed``."""
    ttft: Measured
    """Of requests that found their replica without any: against the prompt's time alone."""
    tpot: Measured
    """Sums over answers of seconds per further token: against a step with those who were
    answered beside it, and the prompts that came meanwhile."""
    load: Measured
    activate: Measured
    hits: int
    """WARM replicas that requests called for and the plan did not."""
    misses: int
    """Loads that a request waited for."""
    unused: int
    """Replicas that were WARM for at least half of the epoch and never called for."""
    wasted_bytes: int
    """Weights dropped before any request was worked on there; not those lost in a crash."""
    warm_byte_s: float
    """Bytes held WARM, times seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochDrift(Record):
    """One epoch, as it is known once its requests have ended. A line of a journal."""

    at_s: float
    """When it was drawn up."""
    epoch: int
    """Counted from second 0."""
    start_s: float
    end_s: float
    """What of the epoch was seen: from here to there."""
    late: int
    """Of the requests, those that came in an epoch before, whose report was done."""
    faults: int
    """That began."""
    llms: tuple[LlmDrift, ...]
    """In the fleet's order."""

    @property
    def missed(self) -> int:
        return sum(row.missed for row in self.llms)


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftTotal(Record):
    """Several epochs of one LLM, or of all, added up."""

    epochs: int
    """Of one LLM each."""
    planned: int
    """Of them, those with a forecast."""
    passed: int
    """Of these, those whose peak was above the bound."""
    requests: int
    finished: int
    left: int
    missed: int
    blame: Mapping[Blame, int]
    rate_error_rps: float
    """Mean over epochs with a forecast of actual less forecast, like the next three."""
    rate_abs_error_rps: float
    peak_error: float
    peak_abs_error: float
    ttft: Measured
    tpot: Measured
    load: Measured
    activate: Measured
    hits: int
    misses: int
    unused: int
    wasted_bytes: int
    warm_byte_s: float


COUNTS = (
    *("requests", "finished", "left", "missed"),
    *("hits", "misses", "unused", "wasted_bytes"),
)
MEASURES = ("ttft", "tpot", "load", "activate")


def total(rows: Iterable[LlmDrift]) -> DriftTotal:
    """The rows added up."""
    own = list(rows)
    pairs = [(row.forecast, row.actual) for row in own if row.forecast is not None]
    rates = [real.rate_rps - said.rate_rps for said, real in pairs]
    peaks = [real.peak_load - said.peak_load for said, real in pairs]
    count = max(1, len(pairs))
    sums: dict[str, Any] = {
        **{name: sum(getattr(row, name) for row in own) for name in COUNTS},
        **{name: _sum(getattr(row, name) for row in own) for name in MEASURES},
    }
    return DriftTotal(
        epochs=len(own),
        planned=len(pairs),
        passed=sum(row.passed for row in own),
        blame={name: sum(row.blame[name] for row in own) for name in BLAMES},
        rate_error_rps=sum(rates) / count,
        rate_abs_error_rps=sum(map(abs, rates)) / count,
        peak_error=sum(peaks) / count,
        peak_abs_error=sum(map(abs, peaks)) / count,
        warm_byte_s=sum(row.warm_byte_s for row in own),
        **sums,
    )


def _sum(parts: Iterable[Measured]) -> Measured:
    own = list(parts)
    names = [field.name for field in fields(Measured)]
    return Measured(**{name: sum(getattr(x, name) for x in own) for name in names})
