"""Who may take requests now, who waits for it, and how long that is likely to take.

The one place where the controller's threads and the gateway's event loop meet. Every
method may be called from any thread and returns at once; callbacks run in the thread that
caused them, never under the lock.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from foreserve.models.placement import ReplicaId
from foreserve.models.specs import GpuId
from foreserve.runtime.journal import Result
from foreserve.runtime.router import NEVER, choose

SHUN_S = 1.0
"""For how long a replica that failed a request is asked nothing."""

REMEMBERED_REFUSALS = 1024
"""Per LLM; more are not counted as demand."""

Z90 = 1.2816
"""90th percentile of the standard normal distribution."""

MEMORY = 0.1
"""Weight of the last request in the mean time that one takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routable:
    """A replica that takes requests: ACTIVE, and its canary answered."""

    id: ReplicaId
    url: str
    """Base of an OpenAI API, without ``/v1`` and without a slash at the end."""
    max_num_seqs: int
    room_tokens: int
    """Tokens that its KV cache holds."""
    served_name: str
    """What the engine calls the LLM."""
    key: str = field(default="", repr=False)
    """What the engine wants to be shown; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """All about one request, told once, when it ended. Times are of the table's clock."""

    arrival_s: float
    """When it was received as a whole."""
    llm: str
    replica: ReplicaId | None
    """Where it was worked on last; None: nowhere."""
    input_tokens: int
    output_tokens: int
    first_token_s: float | None
    """When the first token was sent; of an answer in one piece, when that was."""
    end_s: float
    result: Result
    reason: str | None
    """Why it failed: the error's code, or ``client_left``."""
    number: int = 0
    """What `RoutingTable.began` said."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """When a request would get its replica."""

    p50_s: float
    p90_s: float
    position: int
    """Its place among those who wait for the LLM, from 1."""


@dataclass(eq=False, slots=True)
class Seat:
    """One replica's count of requests. Mutable, owned by the table."""

    replica: Routable
    idle_since_s: float | None
    in_flight: int = 0
    shunned_until_s: float = -math.inf
    at_work: set[Waiter] = field(default_factory=set)
    """Whose requests it works on."""
    lost: bool = False
    """It will not answer any more."""


@dataclass(eq=False, slots=True)
class Waiter:
    """One request that looks for a replica."""

    llm: str
    exact_tokens: int
    """At least so many tokens of KV memory are needed, for certain."""
    likely_tokens: int
    """What it will probably need; an estimate."""
    wake: Callable[[], object]
    """Called when ``seat`` or ``never`` was set after `RoutingTable.join`."""
    lost: Callable[[], object] = lambda: None
    """Called when its seat is lost."""
    seat: Seat | None = None
    joined_s: float = 0.0
    taken_s: float = 0.0
    never: bool = False
    """No replica that serves now could ever hold it."""


@dataclass(eq=False, slots=True)
class Lane:
    """What the table knows of one LLM."""

    seats: list[Seat] = field(default_factory=list)
    """Sorted by id, as `choose` wants them."""
    queue: dict[Waiter, None] = field(default_factory=dict)
    refused: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=REMEMBERED_REFUSALS)
    )
    """(when, predicted seconds) of those sent away until the LLM serves."""
    request_s: float = 0.0
    """Mean time that a request occupies its place; 0 until one has ended."""
    places: int = 0
    """Requests that its replicas worked on at once when there last were any."""
    left_s: float = -math.inf
    """When it last had some."""


class RoutingTable:
    """The routable replicas, the requests on each, and those that wait."""

    def __init__(
        self,
        now_s: Callable[[], float],
        *,
        on_need: Callable[[], None] = lambda: None,
        eta: Callable[[str], tuple[float, float]] = lambda llm: (math.inf, math.inf),
        began: Callable[[str, float, int], int] = lambda llm, arrival_s, tokens: 0,
        ended: Callable[[RequestRecord], None] = lambda record: None,
        failed: Callable[[ReplicaId, str], None] = lambda replica, reason: None,
        predicted: Callable[[str, float, float], None] = lambda llm, said_s, was_s: (
            None
        ),
    ) -> None:
        self.now_s = now_s
        self.on_need = on_need
        """A request found no replica: called for the first that waits for an LLM, and
        whenever as many again do, so that a flood does not drown the controller. Or a
        replica has fallen idle on GPUs that somebody waits for (`watch`)."""
        self.eta = eta
        """(p50, p90) seconds until an LLM without replicas serves; infinite: not
        foreseen."""
        self.began = began
        """A request for an LLM was accepted, with its time and its probable tokens: gives
        the number by which `ended` will tell of it."""
        self.ended = ended
        self.failed = failed
        """A replica did not answer, and why."""
        self.predicted = predicted
        """What a wait was predicted to be, and what it was."""
        self._lock = threading.Lock()
        self._lanes: dict[str, Lane] = {}
        self._leaving: set[Seat] = set()
        self._watched: frozenset[GpuId] = frozenset()

    # For the owner of the replicas.

    def publish(self, replicas: Sequence[Routable]) -> None:
        """Replace all that is routable; requests on those no longer named go on."""
        with self._lock:
            now_s = self.now_s()
            old = {
                (seat.replica.id, seat.replica.url): seat
                for lane in self._lanes.values()
                for seat in lane.seats
            }
            for lane in self._lanes.values():
                if lane.seats:
                    lane.left_s = now_s
                lane.seats = []
            for replica in sorted(replicas, key=lambda r: r.id):
                seat = old.pop((replica.id, replica.url), None)
                if seat is None:
                    seat = Seat(replica, now_s)
                seat.replica = replica
                self._lane(replica.id.llm).seats.append(seat)
            self._leaving.update(seat for seat in old.values() if seat.in_flight)
            for lane in self._lanes.values():
                if lane.seats:
                    lane.places = sum(s.replica.max_num_seqs for s in lane.seats)
            told = [wake for llm in self._lanes for wake in self._serve(llm)]
        for wake in told:
            wake()

    def abandon(self, replicas: Iterable[ReplicaId]) -> None:
        """These have been lost: whoever waits for an answer of theirs need not."""
        gone = set(replicas)
        if not gone:
            return
        with self._lock:
            told = []
            for seat in self._all():
                if seat.replica.id in gone and not seat.lost:
                    seat.lost = True
                    told += [waiter.lost for waiter in seat.at_work]
        for lost in told:
            lost()

    def in_flight(self) -> Mapping[ReplicaId, int]:
        """Requests on each replica that is routable, or still works on some."""
        with self._lock:
            counts: dict[ReplicaId, int] = {}
            for seat in self._all():
                replica = seat.replica.id
                counts[replica] = counts.get(replica, 0) + seat.in_flight
            return counts

    def idle_since_s(self) -> Mapping[ReplicaId, float]:
        """Since when each routable replica without requests has had none."""
        with self._lock:
            return {
                seat.replica.id: seat.idle_since_s
                for lane in self._lanes.values()
                for seat in lane.seats
                if seat.idle_since_s is not None
            }

    def waiting(self) -> Mapping[str, int]:
        """Requests per LLM that nobody has taken: those held, and those sent away that
        are expected back (until the LLM serves, or the predicted wait is over)."""
        with self._lock:
            now_s = self.now_s()
            counts = {llm: self._waiting(llm, now_s) for llm in self._lanes}
            return {llm: count for llm, count in counts.items() if count}

    def unserved_since_s(self) -> Mapping[str, float]:
        """Of LLMs that `waiting` has and no replica serves: since when."""
        with self._lock:
            now_s = self.now_s()
            found = {}
            for llm, lane in self._lanes.items():
                if not lane.seats and self._waiting(llm, now_s):
                    since = [waiter.joined_s for waiter in lane.queue]
                    since += [at_s for at_s, s in lane.refused if now_s <= at_s + s]
                    found[llm] = max(lane.left_s, min(since))
            return found

    def watch(self, gpus: frozenset[GpuId]) -> None:
        """`on_need` whenever the last request of a replica on one of ``gpus`` has ended."""
        with self._lock:
            self._watched = gpus

    # For the gateway.

    def routable(self, llm: str | None = None) -> int:
        """Replicas that take requests, of ``llm`` or of all."""
        with self._lock:
            if llm is not None:
                return len(self._lanes[llm].seats) if llm in self._lanes else 0
            return sum(len(lane.seats) for lane in self._lanes.values())

    def room_tokens(self, llm: str) -> int:
        """KV room of the replica of ``llm`` that has most."""
        with self._lock:
            seats = self._lanes[llm].seats if llm in self._lanes else []
            return max((seat.replica.room_tokens for seat in seats), default=0)

    def held(self) -> Mapping[str, int]:
        """Requests that wait here, by LLM."""
        with self._lock:
            return {llm: len(lane.queue) for llm, lane in self._lanes.items()}

    def take(self, waiter: Waiter) -> bool:
        """Give ``waiter`` a seat, or set ``never``, if that is clear at once. Nobody
        passes those who wait already."""
        with self._lock:
            if self._lane(waiter.llm).queue:
                return False
            return self._seat(waiter, self.now_s())

    def predict(self, llm: str) -> Prediction:
        """The wait of a request that would join now."""
        with self._lock:
            lane = self._lane(llm)
            position = len(lane.queue) + 1
            serves, places = bool(lane.seats), max(1, lane.places)
            each_s = lane.request_s / places
        p50_s, p90_s = (0.0, 0.0) if serves else self.eta(llm)
        # Each that leaves lets one in; a replica that starts lets many in at once.
        turns = position if serves else max(0, position - places)
        return Prediction(
            p50_s + turns * each_s,
            p90_s + (turns + Z90 * math.sqrt(turns)) * each_s,
            position,
        )

    def join(self, waiter: Waiter) -> None:
        """Queue up; `Waiter.wake` tells when there is an answer, which may be at once."""
        with self._lock:
            waiter.joined_s = now_s = self.now_s()
            self._lane(waiter.llm).queue[waiter] = None
            told = self._serve(waiter.llm)
            called = waiter.seat is None and not waiter.never
            called = called and self._is_news(waiter.llm, now_s)
        for wake in told:
            wake()
        if called:
            self.on_need()

    def leave(self, waiter: Waiter) -> None:
        """Give up waiting; a seat given meanwhile is given back."""
        with self._lock:
            self._lane(waiter.llm).queue.pop(waiter, None)
        if waiter.seat is not None:
            self.release(waiter)

    def refuse(self, llm: str, predicted_s: float) -> None:
        """A request was sent away, to come back after ``predicted_s``."""
        with self._lock:
            now_s = self.now_s()
            self._lane(llm).refused.append((now_s, predicted_s))
            called = self._is_news(llm, now_s)
        if called:
            self.on_need()

    def release(self, waiter: Waiter) -> None:
        """The request no longer occupies its seat."""
        with self._lock:
            seat = waiter.seat
            if seat is None:
                return
            waiter.seat = None
            now_s = self.now_s()
            lane = self._lane(waiter.llm)
            seat.in_flight -= 1
            seat.at_work.discard(waiter)
            if seat.in_flight == 0:
                seat.idle_since_s = now_s
                self._leaving.discard(seat)
            took_s = now_s - waiter.taken_s
            weight = MEMORY if lane.request_s else 1.0
            lane.request_s += weight * (took_s - lane.request_s)
            told = self._serve(waiter.llm)
            idle = seat.idle_since_s is not None and seat in lane.seats
            awaited = idle and not self._watched.isdisjoint(seat.replica.id.gpus)
        for wake in told:
            wake()
        if awaited:
            self.on_need()

    def shun(self, waiter: Waiter, reason: str) -> None:
        """Its replica failed the request: ask it nothing for `SHUN_S`. The gateway calls
        `serve` after that."""
        seat = waiter.seat
        assert seat is not None
        with self._lock:
            seat.shunned_until_s = self.now_s() + SHUN_S
        self.failed(seat.replica.id, reason)

    def serve(self, llm: str) -> None:
        """Look again whether somebody who waits can be seated."""
        with self._lock:
            told = self._serve(llm)
        for wake in told:
            wake()

    # Under the lock.

    def _lane(self, llm: str) -> Lane:
        lane = self._lanes.get(llm)
        if lane is None:
            lane = self._lanes[llm] = Lane()
        return lane

    def _all(self) -> list[Seat]:
        seats = [seat for lane in self._lanes.values() for seat in lane.seats]
        return [*seats, *self._leaving]

    def _waiting(self, llm: str, now_s: float) -> int:
        lane = self._lane(llm)
        refused = sum(now_s <= at_s + said_s for at_s, said_s in lane.refused)
        return len(lane.queue) + refused

    def _is_news(self, llm: str, now_s: float) -> bool:
        count = self._waiting(llm, now_s)
        return count & (count - 1) == 0

    def _seat(self, waiter: Waiter, now_s: float) -> bool:
        """Whether ``waiter`` has its answer: a seat, or never."""
        lane = self._lane(waiter.llm)
        if not lane.seats:
            return False
        largest = max(seat.replica.room_tokens for seat in lane.seats)
        if waiter.exact_tokens > largest:
            waiter.never = True
            return True
        # An estimate may choose among replicas, but not turn a request away.
        tokens = min(max(waiter.exact_tokens, waiter.likely_tokens), largest)
        seats = [seat for seat in lane.seats if seat.shunned_until_s <= now_s]
        best = choose(
            [seat.in_flight for seat in seats],
            [seat.replica.max_num_seqs for seat in seats],
            [seat.replica.room_tokens for seat in seats],
            tokens,
        )
        if best in (-1, NEVER):
            return False
        seat = seats[best]
        seat.in_flight += 1
        seat.at_work.add(waiter)
        seat.idle_since_s = None
        waiter.seat, waiter.taken_s = seat, now_s
        return True

    def _serve(self, llm: str) -> list[Callable[[], object]]:
        """Seat those who wait, in their order; what to call once the lock is free."""
        lane = self._lane(llm)
        now_s = self.now_s()
        answered: list[Waiter] = []
        for waiter in lane.queue:
            if not self._has_place(lane, now_s):
                break
            if self._seat(waiter, now_s):
                answered.append(waiter)
        for waiter in answered:
            del lane.queue[waiter]
        told = [waiter.wake for waiter in answered]
        if lane.refused and not lane.queue and self._has_place(lane, now_s):
            for at_s, said_s in lane.refused:
                told.append(self._told(llm, said_s, now_s - at_s))
            lane.refused.clear()
        return told

    def _told(self, llm: str, said_s: float, was_s: float) -> Callable[[], object]:
        return lambda: self.predicted(llm, said_s, was_s)

    @staticmethod
    def _has_place(lane: Lane, now_s: float) -> bool:
        return any(
            seat.in_flight < seat.replica.max_num_seqs and seat.shunned_until_s <= now_s
            for seat in lane.seats
        )
