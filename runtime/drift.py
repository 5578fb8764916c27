"""Plan against actual: a journal's events in, one `EpochDrift` for each epoch out.

The same fold reads a finished simulation and follows a cluster that serves; what it keeps
is what may still be asked about: the requests of the epochs that are open, replicas and
faults of the last while. docs/drift.md says what is counted how, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from foreserve.models.drift import (
    BLAMES,
    Blame,
    Demanded,
    EpochDrift,
    LlmDrift,
    Measured,
    Step,
)
from foreserve.models.placement import Placement, ReplicaId
from foreserve.models.plan import Epoch, Plan
from foreserve.models.problem import Fleet
from foreserve.runtime.drift_blame import (
    CLIENT_LEFT,
    Miss,
    blame_of,
    fell_short,
    forecasts,
    judge,
)
from foreserve.runtime.drift_lives import Lives
from foreserve.runtime.drift_model import Work, compare
from foreserve.runtime.drift_room import Taken
from foreserve.runtime.journal import (
    Decision,
    Event,
    Faulted,
    PhaseChange,
    RequestEnd,
    RequestEnds,
    Started,
)
from foreserve.traces.trace import Demand, Floats, Trace, count_demand, passed_s

LONGEST_S = 900.0
"""A report waits no longer than this for an epoch's last requests."""
REMEMBERED_S = 1000.0
"""For how long after it is over a replica or a fault is remembered beyond that."""
CLOSED = 1024
"""Epochs whose peaks are remembered for requests that end much later."""

BusyS = Callable[[Trace], Floats]
"""How long each request of a trace is in flight, as plans count it."""
OnStep = Callable[[Step, str, float, float], None]
"""Hears of each load and activation: its LLM, what it was to take, what it took."""


@dataclass(eq=False)
class _Book:
    """What belongs to one epoch that is open."""

    llms: int
    rows: list[tuple[float, int, int, int]] = field(default_factory=list)
    """Of requests: arrival, LLM, tokens in and out."""
    misses: list[Miss] = field(default_factory=list)
    late: int = 0
    faults: int = 0

    def __post_init__(self) -> None:
        self.counts = {
            name: [0] * self.llms
            for name in (
                *("requests", "finished", "left"),
                *("hits", "misses", "wasted_bytes"),
            )
        }
        self.steps: dict[Step, list[Measured]] = {
            "load": [Measured()] * self.llms,
            "activate": [Measured()] * self.llms,
        }


class Drift:
    """The fold. `record` events in their order, `advance` as time passes."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        epoch_s: float,
        busy_s: BusyS,
        origin_s: float = 0.0,
        since_s: float | None = None,
        until_s: float = math.inf,
        on_step: OnStep = lambda step, llm, predicted_s, measured_s: None,
    ) -> None:
        """Epochs begin at ``origin_s``; of the first one only what comes from ``since_s``
        on is seen. None begins at ``until_s`` or later."""
        self.fleet, self.epoch_s, self._origin_s = fleet, epoch_s, origin_s
        self._busy_s, self._on_step = busy_s, on_step
        self._since_s = origin_s if since_s is None else since_s
        self._llms = [llm.name for llm in fleet.llms]
        last = (until_s - origin_s) / epoch_s
        self._last = math.inf if math.isinf(last) else math.ceil(round(last, 9)) - 1
        self._until_s = until_s
        self._next = self._number(self._since_s)
        """The oldest epoch that is open."""
        self._books: dict[int, _Book] = {}
        self._carried: list[tuple[float, int, int, int]] = []
        """Requests of epochs that are closed, still in flight as plans count it."""
        self._works: dict[ReplicaId, list[tuple[int, Work]]] = {}
        """By replica: (epoch it is measured in or -1, request)."""
        self._passed: dict[int, Floats] = {}
        """By closed epoch: [llm] when the bound on its peak was passed."""
        self._plans: list[tuple[float, Plan]] = []
        self._planned_in = -1
        self.lives = Lives(fleet)

    # Events.

    def adopt(self, at_s: float, plan: Plan) -> None:
        """``plan`` is carried out from now on."""
        self._plans.append((at_s, plan))
        self.lives.plan(plan.at(at_s).placement, at_s)

    def record(self, event: Event | RequestEnds) -> None:
        match event:
            case RequestEnds():
                for end in event.events():
                    self._end(end)
            case RequestEnd():
                self._end(event)
            case PhaseChange():
                self._change(event)
            case Decision():
                self.lives.want(event)
            case Faulted():
                self._book(event.at_s).faults += 1
                self.lives.fault(event, self._placement(event.at_s))
            case Started():
                self.lives.place(event.initial, event.at_s)

    def advance(self, now_s: float) -> list[EpochDrift]:
        """Reports of the epochs whose requests have had time to end by ``now_s``."""
        number = self._number(now_s)
        if number != self._planned_in:
            self._planned_in = number
            placement = self._placement(now_s)
            if placement is not None:
                self.lives.plan(placement, now_s)
        settle_s = min(self.epoch_s, LONGEST_S)
        found = []
        while (
            self._next < self._last and self._edge(self._next + 1) + settle_s <= now_s
        ):
            found.append(self._close(now_s))
        if found:
            self.lives.forget(self._edge(self._next) - REMEMBERED_S)
        return found

    def finish(self, now_s: float) -> list[EpochDrift]:
        """Reports of all epochs that are left; the last one is cut off at ``now_s``."""
        found = []
        while self._next <= self._last and self._edge(self._next) < now_s:
            found.append(self._close(now_s))
        return found

    # One event.

    def _end(self, end: RequestEnd) -> None:
        """A request has ended: book it, and what its replica did."""
        number = self._number(end.arrival_s)
        book = self._book(end.arrival_s)
        book.late += number < self._next
        llm = self.fleet.number_of[end.llm]
        book.counts["requests"][llm] += 1
        book.counts["finished"][llm] += end.result == "finished"
        asked = max(1, end.output_tokens)
        if end.reason != CLIENT_LEFT or end.output_tokens:
            book.rows.append((end.arrival_s, llm, max(1, end.input_tokens), asked))
        key = None if end.gpus is None else ReplicaId(llm=end.llm, gpus=end.gpus)
        if key is not None:
            self._served(end, key, number)
        verdict = judge(self.fleet, end, key)
        if verdict is None:
            return
        if verdict == "left":
            book.counts["left"][llm] += 1
            return
        first_s = end.first_token_s
        book.misses.append(
            Miss(
                llm=llm,
                arrival_s=end.arrival_s,
                answered_s=end.at_s if first_s is None else first_s,
                end_s=end.at_s,
                key=key,
                late_first=verdict == "first",
                reason=end.reason,
            )
        )

    def _served(self, end: RequestEnd, key: ReplicaId, number: int) -> None:
        """Note what this says of the replica."""
        life = next(self.lives.all(key), None)
        if life is not None:
            life.unworked_bytes = 0
        first_s = end.first_token_s
        answered_s = end.at_s if first_s is None else first_s
        served = self.lives.served_by(key, answered_s)
        if served is None:
            return
        waited = end.arrival_s < served.begin_s
        if waited and served.cold and not served.told:
            served.told = True
            llm = self.fleet.number_of[key.llm]
            self._book(served.begin_s).counts["misses"][llm] += 1
        begun_s = max(end.arrival_s, served.begin_s)
        work = Work(
            arrival_s=begun_s,
            first_s=math.nan if first_s is None else first_s,
            end_s=end.at_s,
            input_tokens=end.input_tokens,
            output_tokens=end.output_tokens,
            counts=end.result == "finished",
            fresh=not waited,
        )
        measured_in = number if number >= self._next else -1
        self._works.setdefault(key, []).append((measured_in, work))

    def _change(self, event: PhaseChange) -> None:
        life, before = self.lives.change(event)
        if life is None:
            return
        key, llm = life.id, self.fleet.number_of[event.llm]
        option = self.fleet.option_of(key.llm, key.gpus)
        counts = self._book(event.at_s).counts
        if event.phase is None:
            if not event.lost or event.revoked:
                counts["wasted_bytes"][llm] += life.unworked_bytes
            return
        if event.phase == "LOADING":
            life.unworked_bytes = option.shard_bytes * len(key.gpus)
            life.from_storage = event.from_storage
        if before is None:
            return
        took_s = event.at_s - before.begin_s
        if before.phase == "LOADING":
            predicted_s = option.load_s
            if life.from_storage:
                predicted_s += self.fleet.storage_s(option, key.gpus[0].node)
            self._step("load", event.at_s, llm, predicted_s, took_s)
        elif before.phase == "ACTIVATING":
            self._step("activate", event.at_s, llm, option.activate_s, took_s)
        elif event.phase == "ACTIVATING" and not life.cold:
            placement = self._placement(event.at_s)
            planned = None if placement is None else placement.by_id.get(key)
            if planned is None or planned.state != "ACTIVE":
                counts["hits"][llm] += 1

    def _step(
        self, step: Step, at_s: float, llm: int, predicted_s: float, took_s: float
    ) -> None:
        one = Measured(
            count=1,
            predicted_s=predicted_s,
            measured_s=took_s,
            abs_error_s=abs(took_s - predicted_s),
        )
        self._book(at_s).steps[step][llm] += one
        self._on_step(step, self._llms[llm], predicted_s, took_s)

    # Epochs and plans.

    def _number(self, at_s: float) -> int:
        number = math.floor((at_s - self._origin_s) / self.epoch_s)
        return int(min(number, self._last))

    def _edge(self, number: int) -> float:
        return min(self._origin_s + number * self.epoch_s, self._until_s)

    def _book(self, at_s: float) -> _Book:
        """Of the epoch of ``at_s``, or of the oldest one that is open."""
        number = max(self._next, self._number(at_s))
        if number not in self._books:
            self._books[number] = _Book(len(self._llms))
        return self._books[number]

    def _in_force(self, at_s: float) -> Plan | None:
        found = None
        for from_s, plan in self._plans:
            if from_s <= at_s:
                found = plan
        return found

    def _placement(self, at_s: float) -> Placement | None:
        plan = self._in_force(at_s)
        return None if plan is None else plan.at(at_s).placement

    def _planned_for(self, number: int) -> Epoch | None:
        """The first plan that was made for the epoch and carried out within it; else what
        was carried out when it began. Later ones have seen what came."""
        start_s, end_s = self._edge(number), self._edge(number + 1)
        for from_s, plan in self._plans:
            epoch = plan.at(start_s)
            if start_s <= from_s < end_s and epoch.start_s <= start_s < epoch.end_s:
                return epoch
        plan_then = self._in_force(start_s)
        return None if plan_then is None else plan_then.at(start_s)

    # The report.

    def _close(self, now_s: float) -> EpochDrift:
        number = self._next
        book = self._books.pop(number, None) or _Book(len(self._llms))
        begin_s = max(self._edge(number), self._since_s)
        stop_s = max(min(self._edge(number + 1), now_s), begin_s)
        epoch = self._planned_for(number)
        said = forecasts(epoch, self._llms)
        trace, busy = self._trace(book)
        real = self._counted(trace, busy, begin_s, stop_s)
        self._passed[number] = self._bounds(said, real, trace, busy, begin_s)
        blamed = self._blamed(number, book.misses, epoch, real)
        works = self._compared(number, begin_s, stop_s)
        lived = self.lives.warm(begin_s, stop_s)
        rows = []
        for llm, name in enumerate(self._llms):
            blame = {x: blamed.get((llm, x), 0) for x in BLAMES}
            warm_byte_s, unused = lived.get(name, (0.0, 0))
            ttft, tpot = works.get(name, (Measured(), Measured()))
            rows.append(
                LlmDrift(
                    llm=name,
                    forecast=said[llm],
                    actual=real[llm],
                    passed=bool(math.isfinite(self._passed[number][llm])),
                    missed=sum(blame.values()),
                    blame=blame,
                    ttft=ttft,
                    tpot=tpot,
                    load=book.steps["load"][llm],
                    activate=book.steps["activate"][llm],
                    unused=unused,
                    warm_byte_s=warm_byte_s,
                    **{name: column[llm] for name, column in book.counts.items()},
                )
            )
        self._next += 1
        self._let_go(book, trace, busy, stop_s)
        return EpochDrift(
            at_s=now_s,
            epoch=number,
            start_s=begin_s,
            end_s=stop_s,
            late=book.late,
            faults=book.faults,
            llms=tuple(rows),
        )

    def _trace(self, book: _Book) -> tuple[Trace, Floats]:
        rows = sorted([*self._carried, *book.rows])
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        trace = Trace(
            arrival_s=np.array(columns[0], np.float64),
            llm=np.array(columns[1], np.int32),
            llms=tuple(self._llms),
            input_tokens=np.array(columns[2], np.int32),
            output_tokens=np.array(columns[3], np.int32),
        )
        return trace, self._busy_s(trace)

    def _counted(
        self, trace: Trace, busy: Floats, begin_s: float, stop_s: float
    ) -> list[Demanded]:
        """What came, by LLM, as `bin_demand` counts it."""
        if stop_s <= begin_s:
            nothing = Demanded(rate_rps=0.0, mean_load=0.0, peak_load=0.0)
            return [nothing] * len(self._llms)
        edges = np.array([begin_s, stop_s])
        found: Demand = count_demand(
            trace, epoch_s=self.epoch_s, busy_s=busy, edges=edges
        )
        return [
            Demanded(
                rate_rps=float(found.rate_rps[i, 0]),
                mean_load=float(found.mean_load[i, 0]),
                peak_load=float(found.peak_load[i, 0]),
            )
            for i in range(len(self._llms))
        ]

    def _bounds(
        self,
        said: list[Demanded | None],
        real: list[Demanded],
        trace: Trace,
        busy: Floats,
        begin_s: float,
    ) -> Floats:
        """[llm] when the bound on the peak was passed; infinite where it was not."""
        found = np.full(len(self._llms), np.inf)
        for llm, (forecast, actual) in enumerate(zip(said, real, strict=True)):
            bound = math.inf if forecast is None else forecast.peak_high or 0.0
            if actual.peak_load > bound:
                own = trace.llm == llm
                found[llm] = passed_s(trace.arrival_s[own], busy[own], bound, begin_s)
        return found

    def _blamed(
        self,
        number: int,
        misses: list[Miss],
        epoch: Epoch | None,
        real: list[Demanded],
    ) -> Mapping[tuple[int, Blame], int]:
        found: dict[tuple[int, Blame], int] = {}
        if not misses:
            return found
        works = {
            key: [(work.arrival_s, work.end_s) for _, work in kept]
            for key, kept in self._works.items()
        }
        taken = Taken(self.fleet.cluster.gpus, works, self.lives)
        for llm in {miss.llm for miss in misses}:
            name, own = self._llms[llm], [miss for miss in misses if miss.llm == llm]
            # Of what was before the epoch not all is remembered.
            at_s = np.array([max(x.arrival_s, self._edge(number)) for x in own])
            short = taken.full(name, at_s)
            if epoch is not None:
                short |= fell_short(self.fleet, epoch, name, real[llm].peak_load)
            for miss, had_no_room in zip(own, short.tolist(), strict=True):
                epochs = range(self._number(miss.arrival_s), number + 1)
                passed = (self._passed[e][llm] for e in epochs if e in self._passed)
                blame = blame_of(miss, name, self.lives, min(passed), had_no_room)
                found[llm, blame] = found.get((llm, blame), 0) + 1
        return found

    def _compared(
        self, number: int, begin_s: float, stop_s: float
    ) -> Mapping[str, tuple[Measured, Measured]]:
        """By LLM: TTFT and TPOT of the epoch's requests against the cost model."""
        found: dict[str, tuple[Measured, Measured]] = {}
        for key, kept in self._works.items():
            works = [
                work._replace(counts=work.counts and own == number)
                for own, work in kept
            ]
            if not any(work.counts for work in works) or self.lives.shared(
                key, begin_s, stop_s
            ):
                continue
            time = self.fleet.option_of(key.llm, key.gpus).time
            both = compare(time, works)
            before = found.get(key.llm, (Measured(), Measured()))
            found[key.llm] = before[0] + both[0], before[1] + both[1]
        return found

    def _let_go(self, book: _Book, trace: Trace, busy: Floats, stop_s: float) -> None:
        """Keep of a closed epoch what later ones need."""
        stays = (trace.arrival_s + busy > stop_s).tolist()
        rows = sorted([*self._carried, *book.rows])
        self._carried = [row for row, kept in zip(rows, stays, strict=True) if kept]
        for key, kept in list(self._works.items()):
            left = [pair for pair in kept if pair[1].end_s >= stop_s]
            if left:
                self._works[key] = left
            else:
                del self._works[key]
        while len(self._passed) > CLOSED:
            del self._passed[next(iter(self._passed))]
        edge_s = self._edge(self._next)
        old = [pair for pair in self._plans if pair[0] <= edge_s]
        self._plans = [*old[-1:], *(pair for pair in self._plans if pair[0] > edge_s)]
