"""What has happened lately, for people who look: a fold over a run's journal.

Bounded: stretches of residency that ended long ago, old samples and old epochs are
forgotten. One thread may tell while others read.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from foreserve.models.observed import Observed, Phase
from foreserve.models.placement import ReplicaId, replica_id
from foreserve.models.plan import LlmDemand
from foreserve.runtime.journal import (
    Decision,
    Event,
    Faulted,
    PhaseChange,
    Refusal,
    RequestEnd,
    RequestEnds,
)

MOST_STAYS = 4000
MOST_SAMPLES = 900
MOST_RECENT = 20_000
MOST_EPOCHS = 24
MOST_NOTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """A replica was in one phase."""

    replica: ReplicaId
    phase: Phase
    start_s: float
    end_s: float | None = None
    """None: it still is."""
    lost: bool = False
    """It ended without having been asked to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Requests in the system at one moment; LLMs without any are absent."""

    at_s: float
    waiting: Mapping[str, int]
    in_flight: Mapping[str, int]


@dataclass(slots=True, kw_only=True)
class Past:
    """What was expected of one epoch, and what came."""

    index: int
    demand: tuple[LlmDemand, ...] = ()
    """() where no plan was made for it."""
    peaks: dict[str, int]
    """Most requests in the system at once, as samples and decisions saw it."""
    arrived: Counter[str]
    """Requests that came in it and have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """Requests of one LLM that ended lately."""

    ended: int
    failed: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None


class Timeline:
    """A `Recorder` of what the status page shows."""

    def __init__(self, *, epoch_s: float, keep_s: float, recent_s: float) -> None:
        """Residency is kept for ``keep_s``; ``recent_s`` is what counts as lately."""
        self.epoch_s, self.keep_s, self.recent_s = epoch_s, keep_s, recent_s
        self.version = 0
        """Changes with every stay that begins or ends."""
        self._lock = threading.Lock()
        self._open: dict[ReplicaId, Stay] = {}
        self._done: deque[Stay] = deque(maxlen=MOST_STAYS)
        self._samples: deque[Sample] = deque(maxlen=MOST_SAMPLES)
        self._ends: deque[RequestEnd] = deque(maxlen=MOST_RECENT)
        self._epochs: deque[Past] = deque(maxlen=MOST_EPOCHS)
        self._notes: deque[Event] = deque(maxlen=MOST_NOTES)
        self._refusal: Refusal | None = None

    def record(self, event: Event | RequestEnds) -> None:
        with self._lock:
            match event:
                case PhaseChange():
                    self._move(event)
                case RequestEnd():
                    self._ends.append(event)
                    self._past(event.arrival_s).arrived[event.llm] += 1
                case Refusal():
                    self._refusal = event
                    self._notes.append(event)
                case Decision():
                    if event.desired is not None:
                        self._refusal = None
                    if event.actions:
                        self._notes.append(event)
                case Faulted():
                    self._notes.append(event)

    def saw(self, observed: Observed) -> None:
        """What a decision was made on."""
        in_flight = Counter[str]()
        for replica in observed.replicas:
            in_flight[replica.llm] += replica.in_flight
        with self._lock:
            self._count(observed.now_s, observed.waiting, in_flight)

    def sample(
        self, at_s: float, waiting: Mapping[str, int], in_flight: Mapping[str, int]
    ) -> None:
        """Requests in the system now; ``at_s`` only grows."""
        sample = Sample(
            at_s=at_s,
            waiting={llm: n for llm, n in waiting.items() if n},
            in_flight={llm: n for llm, n in in_flight.items() if n},
        )
        with self._lock:
            self._samples.append(sample)
            self._count(at_s, sample.waiting, sample.in_flight)

    def planned(self, at_s: float, demand: tuple[LlmDemand, ...]) -> None:
        """A plan that expects ``demand`` is carried out from now on."""
        with self._lock:
            self._past(at_s).demand = demand

    def stays(self) -> Sequence[Stay]:
        """In order of their ends, those that go on last."""
        with self._lock:
            return (*self._done, *self._open.values())

    def samples(self, after_s: float = -math.inf) -> Sequence[Sample]:
        with self._lock:
            return [s for s in self._samples if s.at_s > after_s]

    def epochs(self) -> Sequence[Past]:
        """The latest ones, the one of now last."""
        with self._lock:
            return [
                replace(past, peaks=dict(past.peaks), arrived=Counter(past.arrived))
                for past in self._epochs
            ]

    def notes(self, most: int) -> Sequence[Event]:
        """Decisions to act, refusals and faults, the latest first."""
        with self._lock:
            return list(islice(reversed(self._notes), most))

    def refused(self) -> Refusal | None:
        """What was wanted last, if it was refused."""
        with self._lock:
            return self._refusal

    def recent(self, now_s: float) -> Mapping[str, Recent]:
        """By LLM; those of which nothing has ended lately are absent."""
        first_s = now_s - self.recent_s
        ends: dict[str, list[RequestEnd]] = {}
        with self._lock:
            while self._ends and self._ends[0].at_s < first_s:
                self._ends.popleft()
            for end in self._ends:
                ends.setdefault(end.llm, []).append(end)
        return {llm: _recent(own) for llm, own in ends.items()}

    # With the lock.

    def _move(self, event: PhaseChange) -> None:
        key = replica_id(event.llm, event.gpus)
        before = self._open.get(key)
        if before is not None and before.phase == event.phase and not event.lost:
            return  # an agent was reached again: it goes on
        self.version += 1
        if before is not None:
            del self._open[key]
            self._done.append(replace(before, end_s=event.at_s, lost=event.lost))
        if event.phase is not None:
            self._open[key] = Stay(replica=key, phase=event.phase, start_s=event.at_s)
        while self._done and (self._done[0].end_s or 0.0) < event.at_s - self.keep_s:
            self._done.popleft()

    def _count(
        self, at_s: float, waiting: Mapping[str, int], in_flight: Mapping[str, int]
    ) -> None:
        peaks = self._past(at_s).peaks
        for llm in {*waiting, *in_flight}:
            count = waiting.get(llm, 0) + in_flight.get(llm, 0)
            if count > peaks.get(llm, 0):
                peaks[llm] = count

    def _past(self, at_s: float) -> Past:
        """The epoch of ``at_s``; the oldest known, if that one is forgotten."""
        index = math.floor(at_s / self.epoch_s)
        if not self._epochs or index > self._epochs[-1].index:
            self._epochs.append(Past(index=index, peaks={}, arrived=Counter()))
        for past in reversed(self._epochs):
            if past.index <= index:
                return past
        return self._epochs[0]


def _recent(ends: Sequence[RequestEnd]) -> Recent:
    delays = sorted(
        end.first_token_s - end.arrival_s
        for end in ends
        if end.first_token_s is not None
    )
    return Recent(
        ended=len(ends),
        failed=sum(end.result != "finished" for end in ends),
        ttft_p50_s=_quantile(delays, 0.5),
        ttft_p99_s=_quantile(delays, 0.99),
    )


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
