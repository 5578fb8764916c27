"""What becomes of requests whose replica is lost while its connections stay open, as those
of a machine do that nobody reaches any more."""

from __future__ import annotations

import json
import threading

import pytest

pytest.importorskip("uvicorn")

from foreserve.runtime.gateway.table import RoutingTable, Waiter
from tests.gateway_stand import replica, stand, wait_for


def test_whoever_is_served_by_a_lost_replica_hears_of_it_once():
    """Of two replicas with a request each, one is lost, twice: its request alone hears of
    it, once, and one that is seated there after it came back does not."""
    table = RoutingTable(lambda: 0.0)
    both = [replica("x", gpu=0), replica("y", gpu=1)]
    table.publish(both)
    heard: list[int] = []

    def ask(number: int) -> Waiter:
        waiter = Waiter("a", 1, 1, lambda: None, lambda: heard.append(number))
        assert table.take(waiter)
        return waiter

    first, second = ask(0), ask(1)
    table.publish(both[1:])
    for _ in range(2):
        table.abandon([both[0].id])
    assert heard == [0]
    assert first.seat is not None
    assert first.seat.lost
    table.publish(both)
    third = ask(2)
    assert third.seat is not None
    assert not third.seat.lost
    table.abandon(())
    assert heard == [0]
    for waiter in (first, second, third):
        table.release(waiter)
    assert set(table.in_flight().values()) == {0}


@pytest.mark.parametrize("stream", [False, True])
def test_what_has_not_begun_is_tried_elsewhere(stream):
    """The engine that was asked says nothing; its replica is lost: the other one answers
    within a moment, and the first is rid of it."""
    with stand(2) as two:
        thread, answers = _ask(two, stream=stream, echo={"wait_s": 9, "once": stream})
        _lose_what_works(two)
        thread.join(5.0)
        (answer,) = answers
        assert answer.status_code == 200
        assert '"length"' in answer.text
        assert sorted(engine.left for engine in two.engines) == [0, 1]
        assert two.failed == ["it was lost"]


def test_a_stream_goes_on_for_as_long_as_it_does(monkeypatch):
    """Of two streams of a lost replica one goes on, and ends whole; the other is silent for
    0.3 s, and ends with an error that says so, without looking whole."""
    monkeypatch.setattr("foreserve.runtime.gateway.gateway.LOST_SILENCE_S", 0.3)
    with stand(2) as two:
        for how in ({"tokens": 10, "gap_s": 0.1}, {"tokens": 2, "gap_s": 9}):
            thread, answers = _ask(two, stream=True, echo=how)
            wait_for(lambda: any(engine.working for engine in two.engines))
            threading.Event().wait(0.1)  # past the first token
            _lose_what_works(two)
            thread.join(5.0)
            (answer,) = answers
            whole = answer.text.endswith("data: [DONE]\n\n")
            assert whole == (how["gap_s"] < 1)
            assert ("engine_lost" in answer.text) == (not whole)
            two.publish_all()
        wait_for(lambda: sum(engine.left for engine in two.engines) == 1)


def _ask(two, **fields):
    """A chat in a thread; it, and where its answer will be."""
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(two.chat(**fields)))
    thread.start()
    return thread, answers


def _lose_what_works(two):
    """As the owner of the replicas does it: no longer published, then abandoned."""
    wait_for(lambda: any(engine.working for engine in two.engines))
    (lost,) = (i for i, engine in enumerate(two.engines) if engine.working)
    rest = [replica(e.url, gpu=i) for i, e in enumerate(two.engines) if i != lost]
    two.table.publish(rest)
    two.table.abandon([replica("", gpu=lost).id])


def test_the_journal_ends_what_a_killed_gateway_had_accepted(tmp_path):
    """Two were accepted, one has ended, and the last line is cut off: the next opening
    ends the other one, as lost, and numbers its own requests anew. Blocks are smaller than
    the file: it is read from its end."""
    from foreserve.runtime.journal import RequestEnd, Started, read_journal
    from foreserve.runtime.live import journal as live

    path = tmp_path / "journal.jsonl"
    log = live.LiveJournal(path)
    log.record(Started(at_s=0.0, policy="live", start_s=0.0, end_s=0.0))
    for number in range(200):
        assert log.accepted("a", float(number), 7) == number
    ends = path.read_text().splitlines()
    assert len(ends) == 201
    for number in range(199):
        log.record(
            RequestEnd(
                at_s=200.0,
                request=number,
                llm="a",
                arrival_s=float(number),
                input_tokens=7,
                output_tokens=1,
                result="finished",
            )
        )
    log.close()
    with path.open("a") as file:
        file.write('{"event":"requ')
    assert path.stat().st_size > 0
    again = live.LiveJournal(path)
    assert again.accepted("a", 0.0, 7) == 0
    again.close()
    found = list(read_journal(path))
    lost = [e for e in found if isinstance(e, RequestEnd) and e.reason is not None]
    assert [(e.request, e.reason, e.at_s) for e in lost] == [(199, live.LOST, 200.0)]
    assert json.loads(path.read_text().splitlines()[-1])["event"] == "accepted"
    for _ in range(2):  # one more crash: the one that was accepted since, once
        live.LiveJournal(path).close()
    ends = [e for e in read_journal(path) if isinstance(e, RequestEnd)]
    assert [e.request for e in ends[-2:]] == [199, 0]
    assert len(ends) == 201
