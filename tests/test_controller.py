"""The loop, its clocks and its journal."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Action, Placement, Replica
from foreserve.runtime.clock import SystemClock, VirtualClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.journal import (
    Decision,
    Ended,
    Event,
    Faulted,
    Journal,
    PhaseChange,
    Refusal,
    RequestEnd,
    Started,
    parse,
    read_journal,
)
from tests.build import fleet, gpu, option

ON_0 = Placement(replicas=(Replica(llm="a", gpus=(gpu(0),), state="ACTIVE"),))
TOO_MUCH = Placement(
    replicas=tuple(
        Replica(llm=llm, gpus=(gpu(0),), state="ACTIVE") for llm in ("a", "b", "c")
    )
)  # 3 x 50 bytes on a GPU of 100


@dataclass
class Script:
    """A policy that answers from a list, the last answer again and again."""

    answers: list[Placement]
    review_s: float = 10.0
    asked_s: list[float] = field(default_factory=list)
    name: str = "script"

    def decide(self, now_s: float, observed: Observed) -> Placement:
        self.asked_s.append(now_s)
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def next_review_s(self, now_s: float) -> float:
        return now_s + self.review_s


@dataclass
class Still:
    """A backend where nothing ever happens; notes what it was asked to do."""

    clock: VirtualClock
    replicas: tuple[ObservedReplica, ...] = ()
    applied: list[Action] = field(default_factory=list)

    def observe(self) -> Observed:
        return Observed(now_s=self.clock.now_s(), replicas=self.replicas)

    def apply(self, actions: Sequence[Action]) -> None:
        self.applied += actions


def loop(policy: Script, clock: VirtualClock) -> tuple[Controller, Still, Journal]:
    backend, journal = Still(clock), Journal()
    f = fleet(option("a"), option("b"), option("c"))
    return (
        Controller(
            policy=policy, backend=backend, clock=clock, fleet=f, journal=journal
        ),
        backend,
        journal,
    )


def events(journal: Journal) -> list[Event]:
    return list(parse(journal.lines))


def test_asks_at_reviews_and_when_woken():
    """With reviews every 10 s and a wake at 4 s, decisions fall on 0, 4 and 14 s."""
    clock, policy = VirtualClock(), Script([Placement()])
    clock.schedule(4.0, clock.wake)
    loop(policy, clock)[0].run(20.0)
    assert policy.asked_s == [0.0, 4.0, 14.0]
    assert clock.now_s() == 20.0


def test_journals_only_what_is_new():
    """The same wish twice, on a cluster that shows no change, gives a new line only
    where actions are due."""
    clock = VirtualClock()
    controller, backend, journal = loop(Script([Placement(), Placement(), ON_0]), clock)
    controller.run(21.0)
    load = Action(kind="load", llm="a", gpus=(gpu(0),))
    assert events(journal) == [
        Decision(at_s=0.0, desired=Placement()),
        Decision(at_s=20.0, desired=ON_0, actions=(load,)),
    ]
    assert backend.applied == [load]


def test_refuses_what_cannot_be_and_keeps_the_last_good_placement():
    """150 bytes on a GPU of 100 break (C1): journalled once, a stays desired."""
    clock = VirtualClock()
    controller, backend, journal = loop(Script([ON_0, TOO_MUCH]), clock)
    controller.run(30.0)
    assert controller.desired == ON_0
    refusals = [event for event in events(journal) if isinstance(event, Refusal)]
    assert [r.at_s for r in refusals] == [10.0]
    assert refusals[0].violations[0].startswith("(C1) GPU n0/0 holds 150 bytes")
    assert {action.llm for action in backend.applied} == {"a"}


def test_a_refusal_is_journalled_again_after_a_good_placement():
    """Too much, good, too much: two refusals, since something was wanted in between."""
    clock = VirtualClock()
    controller, _, journal = loop(Script([TOO_MUCH, ON_0, TOO_MUCH]), clock)
    controller.run(30.0)
    assert sum(isinstance(event, Refusal) for event in events(journal)) == 2


def test_does_nothing_before_the_first_good_placement():
    """A replica that is there already is not touched on account of a refused wish."""
    clock = VirtualClock()
    controller, backend, _ = loop(Script([TOO_MUCH]), clock)
    backend.replicas = (ObservedReplica(llm="a", gpus=(gpu(0),), phase="ACTIVE"),)
    controller.run(5.0)
    assert backend.applied == []


def test_a_policy_must_look_ahead():
    """A review that is not in the future would spin: it is an error with its name."""
    clock = VirtualClock()
    with pytest.raises(ValueError, match="policy 'script'"):
        loop(Script([Placement()], review_s=0.0), clock)[0].run(1.0)


def test_virtual_clock_runs_an_instant_as_a_whole():
    """Events of one time run in the order of scheduling, all before the wait returns."""
    clock, seen = VirtualClock(), []
    clock.schedule(2.0, lambda: seen.append("later"))
    for name in "abc":
        clock.schedule(1.0, lambda name=name: (seen.append(name), clock.wake()))
    clock.wait(5.0)
    assert (seen, clock.now_s()) == (["a", "b", "c"], 1.0)
    clock.wait(1.5)
    assert (seen, clock.now_s()) == (["a", "b", "c"], 1.5)
    clock.wait(2.0)
    assert (seen[-1], clock.now_s()) == ("later", 2.0)


def test_virtual_clock_refuses_the_past_and_forever():
    """No event before now, and no endless wait for nothing."""
    clock = VirtualClock(3.0)
    with pytest.raises(ValueError, match="s already"):
        clock.schedule(2.0, clock.wake)
    with pytest.raises(ValueError, match="for ever"):
        clock.wait(float("inf"))


def test_system_clock_wakes_and_times_out():
    """A wake from another thread, or from before, ends the wait; else time does."""
    clock = SystemClock()
    clock.wake()
    clock.wait(60.0)
    thread = threading.Timer(0.01, clock.wake)
    thread.start()
    clock.wait(60.0)
    thread.join()
    before_s = clock.now_s()
    assert before_s < 30.0
    clock.wait(before_s + 0.02)
    assert clock.now_s() >= before_s + 0.02
    clock.wait(0.0)


EVENTS: list[Event] = [
    Started(at_s=0.0, policy="p", start_s=0.0, end_s=9.0, seed=1, initial=ON_0),
    Decision(at_s=0.0, desired=ON_0),
    Faulted(
        at_s=1.5, kind="gpu-loss", target="n0/0", until_s=9.0, replicas=1, requests=2
    ),
    PhaseChange(at_s=1.5, llm="a", gpus=(gpu(0),), phase=None, lost=True),
    RequestEnd(
        at_s=2.0,
        request=7,
        llm="a",
        arrival_s=1.0,
        input_tokens=3,
        output_tokens=1,
        result="finished",
        first_token_s=2.0,
        gpus=(gpu(0),),
    ),
    Ended(at_s=9.0),
]


@pytest.mark.parametrize("name", ["run.jsonl", "run.jsonl.gz"])
def test_journal_reads_back_what_was_written(tmp_path, name):
    """Every kind of event survives the file; lines are canonical; the file appears when
    it is whole and not before."""
    path = tmp_path / name
    with Journal(path) as journal:
        for event in EVENTS:
            journal.record(event)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    assert list(read_journal(path)) == EVENTS
    opened = gzip.open if name.endswith("gz") else open
    with opened(path, "rt") as lines:
        assert lines.readlines()[-1] == '{"at_s":9.0,"event":"ended"}\n'


def test_journal_bytes_do_not_depend_on_file_name(tmp_path):
    """Two gzip journals of the same events are equal: no name, no time inside."""
    for name in ("one.jsonl.gz", "two.jsonl.gz"):
        with Journal(tmp_path / name) as journal:
            journal.record(EVENTS[0])
    one, two = sorted(tmp_path.iterdir())
    assert one.read_bytes() == two.read_bytes()


def test_failed_run_leaves_no_journal(tmp_path):
    """An error inside the block removes the unfinished file."""

    def fail() -> None:
        with Journal(tmp_path / "run.jsonl") as journal:
            journal.record(EVENTS[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a journal line"),
        ('{"event":"dance"}', "not a journal line"),
        ('{"event":"ended"}', "required key is missing"),
        ('{"at_s":"x","event":"ended"}', "at_s: "),
    ],
)
def test_journal_faults_name_file_and_line(tmp_path, line, message):
    """A broken second line is an `InvalidInput` at FILE:2."""
    path = tmp_path / "run.jsonl"
    path.write_text('{"at_s":9.0,"event":"ended"}\n' + line + "\n")
    with pytest.raises(InvalidInput, match=message) as error:
        list(read_journal(path))
    assert str(error.value).startswith(f"{path}:2: ")


def test_missing_or_cut_journals_are_invalid_input(tmp_path):
    """No file, and a gzip file that stops in the middle."""
    with pytest.raises(InvalidInput, match="no such file"):
        list(read_journal(tmp_path / "none.jsonl"))
    path = tmp_path / "run.jsonl.gz"
    with Journal(path) as journal:
        for event in EVENTS:
            journal.record(event)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InvalidInput, match="not a whole journal"):
        list(read_journal(path))
