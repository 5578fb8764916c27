"""The routing table, by hand: who is seated, who waits, what is predicted."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreserve.runtime.gateway.table import SHUN_S, RoutingTable, Waiter
from tests.gateway_stand import replica


class Hand:
    """A table whose clock is set by hand, and what it has called."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.needs = 0
        self.errors: list[tuple[str, float, float]] = []
        self.table = RoutingTable(
            lambda: self.now_s,
            on_need=self._need,
            eta=lambda llm: (3.0, 5.0),
            predicted=lambda *told: self.errors.append(told),
        )

    def _need(self) -> None:
        self.needs += 1

    def ask(self, exact: int = 1, likely: int = 1) -> Waiter:
        """Take a seat, or join the queue."""
        waiter = Waiter("a", exact, likely, lambda: None)
        if not self.table.take(waiter):
            self.table.join(waiter)
        return waiter


@pytest.fixture
def hand():
    return Hand()


def where(waiter: Waiter) -> int | None:
    """The index of its GPU."""
    return waiter.seat.replica.id.gpus[0].index if waiter.seat else None


def test_fewest_in_flight_of_those_with_room(hand):
    """As `choose`: turn about, but what needs more KV memory only where that is."""
    hand.table.publish([replica("x", gpu=0, room=10), replica("y", gpu=1, room=20)])
    assert [where(hand.ask()) for _ in range(3)] == [0, 1, 0]
    assert where(hand.ask(likely=15)) == 1
    assert where(hand.ask(likely=99)) == 1
    assert hand.ask(exact=21).never


def test_queue_in_order(hand):
    """One place: the second and third wait, and are seated in that order."""
    hand.table.publish([replica("x", cap=1)])
    first, second, third = hand.ask(), hand.ask(), hand.ask()
    assert [where(w) for w in (first, second, third)] == [0, None, None]
    assert hand.table.waiting() == {"a": 2}
    hand.table.release(first)
    assert [where(second), where(third)] == [0, None]
    hand.table.leave(third)
    hand.table.release(second)
    assert where(third) is None
    assert hand.table.waiting() == {}


def test_nobody_passes_those_who_wait(hand):
    """A request that comes when a place is just free goes behind the one that waits."""
    hand.table.publish([replica("x", cap=1)])
    hand.ask()
    hand.ask()
    late = Waiter("a", 1, 1, lambda: None)
    assert not hand.table.take(late)


def test_leaving_gives_back_a_seat_that_came_meanwhile(hand):
    """Seated between giving up and leaving: the place is free again."""
    waiter = hand.ask()
    hand.table.publish([replica("x", cap=1)])
    assert where(waiter) == 0
    hand.table.leave(waiter)
    assert where(hand.ask()) == 0


def test_in_flight_until_the_last_has_left(hand):
    """A replica no longer routable is counted until its requests are done, and takes
    none; one that comes back on another port begins anew."""
    hand.table.publish([replica("x")])
    waiter = hand.ask()
    hand.table.publish([])
    (count,) = hand.table.in_flight().values()
    assert count == 1
    assert where(hand.ask()) is None
    hand.table.publish([replica("z")])
    assert sum(hand.table.in_flight().values()) == 2
    hand.table.release(waiter)
    assert sum(hand.table.in_flight().values()) == 1
    hand.table.publish([])
    assert list(hand.table.in_flight().values()) == [1]


def test_idle_since(hand):
    """From its publication, or from its last request's end, as long as it has none."""
    hand.now_s = 2.0
    hand.table.publish([replica("x")])
    (replica_id,) = hand.table.idle_since_s()
    assert hand.table.idle_since_s() == {replica_id: 2.0}
    waiter = hand.ask()
    assert hand.table.idle_since_s() == {}
    hand.now_s = 7.0
    hand.table.release(waiter)
    hand.table.publish([replica("x")])
    assert hand.table.idle_since_s() == {replica_id: 7.0}


def test_need_is_told_at_once_and_not_for_each(hand):
    """For the 1st, 2nd, 4th, 8th of ten that wait."""
    for _ in range(10):
        hand.ask()
    assert hand.needs == 4


def test_falling_idle_where_somebody_waits_is_told(hand):
    """Of two replicas on a watched GPU and beside it, the end of the last request on the
    first is told, neither that of one before it, nor that on the other; and since when the
    LLM that waits has had nobody."""
    hand.table.publish([replica("x", gpu=0), replica("y", gpu=1)])
    first, other, last = hand.ask(), hand.ask(), hand.ask()
    hand.now_s = 4.0
    hand.table.join(Waiter("b", 1, 1, lambda: None))
    hand.table.watch(frozenset(first.seat.replica.id.gpus))
    hand.now_s, hand.needs = 5.0, 0
    assert [where(w) for w in (first, other, last)] == [0, 1, 0]
    needs = []
    for waiter in (first, other, last):
        hand.table.release(waiter)
        needs.append(hand.needs)
    assert needs == [0, 0, 1]
    assert hand.table.unserved_since_s() == {"b": 4.0}
    hand.table.publish([])
    hand.ask()
    assert hand.table.unserved_since_s() == {"a": 5.0, "b": 4.0}


def test_a_refused_request_is_demand_until_served(hand):
    """For as long as its wait was predicted, or until a place is free, when the error of
    the prediction is told."""
    hand.table.refuse("a", 5.0)
    assert hand.table.waiting() == {"a": 1}
    assert hand.needs == 1
    hand.now_s = 5.1
    assert hand.table.waiting() == {}
    hand.table.refuse("a", 5.0)
    hand.now_s = 8.1
    hand.table.publish([replica("x")])
    assert hand.table.waiting() == {}
    assert ("a", 5.0, 3.0) in [(llm, s, round(w, 6)) for llm, s, w in hand.errors]


def test_a_shunned_replica_is_asked_nothing_for_a_while(hand):
    """Requests go to the other; after a second it is asked again."""
    hand.table.publish([replica("x", gpu=0), replica("y", gpu=1)])
    waiter = hand.ask()
    hand.table.shun(waiter, "refused")
    hand.table.release(waiter)
    assert [where(hand.ask()) for _ in range(4)] == [1, 1, 1, 1]
    waits = hand.ask()
    assert where(waits) is None
    hand.now_s = SHUN_S
    hand.table.serve("a")
    assert where(waits) == 0


def test_predictions(hand):
    """Asleep: the owner's. Awake and full: one leaves every 10 s / 2 places, so the second
    in the queue waits 10 s, at the 90th percentile 10 + 1.28 * sqrt(2) * 5."""
    said = hand.table.predict("a")
    assert (said.p50_s, said.p90_s, said.position) == (3.0, 5.0, 1)
    hand.table.publish([replica("x", cap=2)])
    first, _ = hand.ask(), hand.ask()
    hand.now_s = 10.0
    hand.table.release(first)
    hand.ask()
    hand.ask()
    said = hand.table.predict("a")
    assert said.position == 2
    assert said.p50_s == pytest.approx(10.0)
    assert said.p90_s == pytest.approx(10 + 1.2816 * math.sqrt(2) * 5)


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["ask", "leave", "end", "publish"]), st.integers(0, 3)
        ),
        max_size=60,
    )
)
def test_no_request_is_lost_or_counted_twice(steps):
    """Whatever comes and goes: counts are those of the seats given, no replica has more
    than its cap, and nobody waits while there is a place."""
    hand = Hand()
    asked: list[Waiter] = []
    live: list = []
    for step, number in steps:
        if step == "ask":
            asked.append(hand.ask())
        elif step == "publish":
            live = [replica(f"u{number}", gpu=i, cap=2) for i in range(number)]
            hand.table.publish(live)
        elif asked:
            waiter = asked.pop(number % len(asked))
            hand.table.leave(waiter)
        seated = [w for w in asked if w.seat]
        assert sum(hand.table.in_flight().values()) == len(seated)
        for one in live:
            assert sum(w.seat.replica is one for w in seated) <= 2
        waiting = hand.table.waiting().get("a", 0)
        assert waiting == len(asked) - len(seated)
        if waiting:
            urls = {one.url for one in live}
            busy = sum(w.seat.replica.url in urls for w in seated)
            assert busy >= 2 * len(live)
    for waiter in asked:
        hand.table.leave(waiter)
    assert not any(hand.table.in_flight().values())


def test_threads(hand):
    """Four threads asking and leaving while a fifth publishes: all counts end at zero."""
    stop = threading.Event()

    def come_and_go() -> None:
        for _ in range(300):
            hand.table.leave(hand.ask())

    def publish() -> None:
        while not stop.is_set():
            for count in (0, 1, 2):
                hand.table.publish([replica("x", gpu=i, cap=1) for i in range(count)])

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    publisher = threading.Thread(target=publish)
    for thread in (*threads, publisher):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    publisher.join()
    assert not any(hand.table.in_flight().values())
    assert hand.table.waiting() == {}
