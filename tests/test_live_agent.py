"""One node's agent: its books, its log, and what it refuses. GPUs of 100 bytes; a replica
takes 30 to load and 50 to serve."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.models.placement import ReplicaId, replica_id
from foreserve.models.specs import Node
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.live.agent import NodeAgent
from foreserve.runtime.live.binding import Binding, Device
from foreserve.runtime.live.check import check, main
from foreserve.runtime.live.host import NodeSetup, make_agent
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.messages import NodeReport, Order, OrderKind
from foreserve.runtime.live.patience import Patience
from tests.build import fleet, gpu, option
from tests.live_engines import ENGINES, Waiting

A, B, C = (replica_id(llm, (gpu(0),)) for llm in "abc")
KINDS: tuple[OrderKind, ...]
KINDS = ("load", "load", "activate", "activate", "demote", "quiesce", "drop", "hurry")
QUICK = Patience(
    watch_s=0.01, hang_s=0.1, first_retry_s=0.05, tries=3, act_least_s=0.3, act_factor=1
)


class Owner:
    """A controller's place, by hand."""

    def __init__(self, agent: NodeAgent) -> None:
        self.agent, self.generation, self.step = agent, 1, 0
        agent.hello(1)

    def __call__(self, kind: OrderKind, key: ReplicaId, **changes: Any) -> str:
        self.step += 1
        values = {"generation": self.generation, "step": self.step} | changes
        return self.agent.order(Order(kind=kind, replica=key, **values))

    def until(self, wanted: Callable[[NodeReport], Any]) -> NodeReport:
        """The first report that is as wanted; within 5 s."""
        clock, report = SystemClock(), self.agent.report()
        while not wanted(report):
            assert clock.now_s() < 5.0, report
            report = self.agent.report(report.version, 0.1)
        return report

    def phases(self) -> dict[str, str]:
        return {row.id.llm: row.phase for row in self.agent.report().rows}

    def serve(self, key: ReplicaId) -> None:
        """Load and activate."""
        assert self("load", key) == ""
        self.until(lambda _: self.phases().get(key.llm) == "WARM")
        assert self("activate", key) == ""
        self.until(lambda _: self.phases().get(key.llm) == "ACTIVE")


Made = Callable[..., Owner]


@pytest.fixture
def made(tmp_path) -> Iterator[Made]:
    """Makes agents of n0; all that they logged is checked in the end."""
    agents: list[NodeAgent] = []

    def make(
        load_s: float = 0.01, patience: Patience = QUICK, **settings: Any
    ) -> Owner:
        options = (
            option(llm, load_s=load_s, activate_s=0.01, **extra)
            for llm, extra in (("a", {}), ("b", {}), ("c", {}))
        )
        setup = NodeSetup(
            node="n0",
            folder=tmp_path,
            fleet=fleet(*options),
            make="tests.live_engines:make",
            settings=Waiting(folder=tmp_path, **settings),
            binding=Binding(
                devices=(Device(gpu=gpu(0), index=6), Device(gpu=gpu(1), index=4))
            ),
            patience=patience,
        )
        agents.append(make_agent(setup))
        return Owner(agents[-1])

    yield make
    for agent in agents:
        agent.close()
    found = check(tmp_path)
    assert found.faults == []
    assert found.orders > 0
    assert max(found.peak.values()) <= 1.0


def gone(llm: str) -> Callable[[NodeReport], bool]:
    return lambda report: all(row.id.llm != llm for row in report.rows)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "n0.log").read_text().splitlines()]


def test_a_whole_life(made, tmp_path):
    """Load, activate, demote, quiesce, drop: each phase with the bytes that it needs, all
    of them on disk before it is entered, and all free in the end."""
    owner = made()
    owner.serve(A)
    (row,) = owner.agent.report().rows
    assert (row.held_bytes, row.url, row.served_name) == (50, ENGINES[A].url, "a")
    assert ENGINES[A].settings.devices == (6,)
    owner("demote", A)
    assert owner.phases() == {"a": "DRAINING"}
    assert owner.agent.report().free_bytes[gpu(0)] == 50
    owner("quiesce", A)
    owner.until(lambda r: r.rows[0].phase == "WARM")
    assert owner.agent.report().free_bytes[gpu(0)] == 70
    owner("drop", A)
    report = owner.until(gone("a"))
    assert report.free_bytes[gpu(0)] == 100
    told = [(e["event"], e.get("phase"), e.get("held")) for e in logged(tmp_path)[2:]]
    assert told == [
        ("host", None, 30),
        ("intent", "LOADING", 30),
        ("phase", "LOADING", 30),
        ("host", None, 30),
        ("phase", "WARM", 30),
        ("intent", "ACTIVATING", 50),
        ("phase", "ACTIVATING", 50),
        ("phase", "ACTIVE", 50),
        ("intent", "DRAINING", 50),
        ("phase", "DRAINING", 50),
        ("intent", "DRAINING", 50),
        ("phase", "WARM", 30),
        ("intent", "WARM", 30),
        ("phase", None, 0),
    ]
    steps = [(m.phase, m.done) for m in owner.agent.report().moves]
    assert steps[1] == ("WARM", "load")
    assert steps[3] == ("ACTIVE", "activate")


def test_what_drains_gives_memory_up(made):
    """a serves and b is WARM, so 20 bytes are free and c's load of 30 is refused. a drains,
    and its engine says that 15 bytes of its KV cache are not needed any more: c loads
    beside it. Asleep, a holds 30 as ever, and served again 50."""
    owner = made()
    owner.serve(A)
    owner("load", B)
    owner.until(lambda _: owner.phases().get("b") == "WARM")
    assert "bytes asked" in owner("load", C)
    owner("demote", A)
    ENGINES[A].gives_up_bytes = 15
    report = owner.until(lambda r: r.free_bytes[gpu(0)] == 35)
    assert (report.rows[0].held_bytes, report.rows[0].spare_bytes) == (35, 15)
    owner.agent.forgive()
    assert owner("load", C) == ""
    owner.until(lambda _: owner.phases().get("c") == "WARM")
    owner("quiesce", A)
    report = owner.until(lambda r: r.rows[0].phase == "WARM")
    assert (report.rows[0].held_bytes, report.free_bytes[gpu(0)]) == (30, 10)
    owner("drop", C)
    owner.until(gone("c"))
    owner("activate", A)
    report = owner.until(lambda _: owner.phases()["a"] == "ACTIVE")
    assert (report.rows[0].held_bytes, report.rows[0].spare_bytes) == (50, 0)


def test_refuses_what_does_not_fit(made):
    """50 serve and 30 are loaded: another 30 would make 110, whatever anybody believes. It
    may be asked for again after a while, however often."""
    owner = made()
    owner.serve(A)
    owner("load", B)
    for _ in range(4):
        assert "30 bytes asked, 20 are free" in owner("load", C)
        owner.until(lambda r: r.troubles[0].retry_in_s == 0.0)
    assert owner.phases().keys() == {"a", "b"}
    assert owner.agent.report().troubles[0].failures == 2


def test_books_the_peak_at_once(made):
    """60 of 100 are held; 20, 20 and 30 more are asked for by three threads at once: not
    all of them get it, and the books are right whoever does."""
    owner = made()
    for key in (A, B):
        owner("load", key)
    owner.until(lambda r: [row.phase for row in r.rows] == ["WARM"] * 2)
    answers: list[str] = []
    gate = threading.Barrier(3)

    def ask(kind: OrderKind, key: ReplicaId) -> None:
        gate.wait()
        with lock:
            owner.step += 1
            order = Order(generation=1, step=owner.step, kind=kind, replica=key)
        answers.append(owner.agent.order(order))

    lock = threading.Lock()
    asked: list[tuple[OrderKind, ReplicaId]]
    asked = [("activate", A), ("activate", B), ("load", C)]
    threads = [threading.Thread(target=ask, args=args) for args in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owner.agent.report().free_bytes[gpu(0)] >= 0
    assert sum("are free" in answer for answer in answers) in (1, 2)


def test_a_drop_cancels_a_load(made):
    """A load of 60 s is gone at once, nobody calls it lost, and the bytes are back."""
    owner = made(load_s=60.0)
    owner("load", A)
    owner("drop", A)
    report = owner.until(gone("a"))
    assert report.moves[-1].lost is False
    assert report.troubles == ()
    assert report.free_bytes[gpu(0)] == 100


def test_bytes_stay_booked_until_the_engine_is_gone(made):
    """An engine that does not end: its row stays, on its way out, with its bytes; an order
    for it is refused."""
    owner = made()
    owner.serve(A)
    ENGINES[A].stubborn = True
    owner("demote", A)
    owner("quiesce", A)
    owner.until(lambda r: r.rows[0].phase == "WARM")
    owner("drop", A)
    report = owner.until(lambda r: r.rows[0].leaving)
    assert report.free_bytes[gpu(0)] == 70
    assert "being stopped" in owner("activate", A)
    ENGINES[A].stubborn = False
    assert owner.until(gone("a")).free_bytes[gpu(0)] == 100


def test_without_real_sleep_warm_is_booked_as_active(made):
    """Whoever holds its KV memory asleep has it booked from the load on: two fit, not three
    (50 + 50), though the plan believes in 30 each."""
    owner = made(real_sleep=False)
    owner.serve(A)
    owner("load", B)
    assert owner.agent.report().free_bytes[gpu(0)] == 0
    assert "0 are free" in owner("load", C)
    owner("demote", A)
    owner("quiesce", A)
    owner.until(lambda r: r.rows[0].phase == "WARM")
    assert owner.agent.report().free_bytes[gpu(0)] == 0


def test_failed_loads_end(made):
    """A load that always fails is tried again after 50 and 100 ms, refused in between, and
    after the third time refused until it is forgiven; then it may come."""
    owner = made(load_fails={"a": 3})
    for failures in (1, 2, 3):
        assert owner("load", A) == ""
        report = owner.until(lambda r, n=failures: r.troubles and gone("a")(r))
        (trouble,) = report.troubles
        assert (trouble.failures, trouble.reason) == (failures, "no such weights")
        assert report.moves[-1].lost
        assert "no such weights" in owner("load", A)
        if failures < 3:
            assert 0.0 < trouble.retry_in_s <= 0.05 * failures
            owner.until(lambda r: r.troubles[0].retry_in_s == 0.0)
    assert trouble.retry_in_s == float("inf")
    owner.agent.forgive(A)
    owner.serve(A)


def test_a_load_without_room_is_tried_for_ever(made):
    """Nothing is wrong with what found no room: after more failures than are borne of
    others (3) it is tried once more, and comes."""
    owner = made(load_fails={"a": 5}, no_room=True)
    for _ in range(5):
        assert owner("load", A) == ""
        report = owner.until(lambda r: r.troubles and not r.rows)
        assert report.troubles[0].retry_in_s <= 0.1
        owner.until(lambda r: r.troubles[0].retry_in_s == 0.0)
    assert report.troubles[0].failures == 2
    owner.serve(A)


def test_a_load_is_hurried(made):
    """Requests begin to wait while it loads: its engine is told, and its row says so. An
    order that says so tells the engine before it starts. Nothing happens to what does not
    load."""
    owner = made(load_s=1.0, patience=replace(QUICK, act_least_s=5.0))
    assert owner("load", A) == ""
    assert owner("hurry", A) == ""
    owner.until(lambda r: r.rows[0].urgent and ENGINES[A].hurried)
    assert owner.phases() == {"a": "LOADING"}
    assert owner("load", B, urgent=True) == ""
    assert ENGINES[B].hurried
    assert owner("hurry", C) == ""
    assert set(owner.phases()) == {"a", "b"}
    owner("drop", A)
    owner("drop", B)
    owner.until(lambda r: not r.rows)


@pytest.mark.parametrize("fault", ["up", "hangs"])
def test_notices_an_engine_that_died_or_hangs(made, fault):
    """Within a moment, of one that serves: lost, its bytes free, and it may come back."""
    owner = made()
    owner.serve(A)
    setattr(ENGINES[A], fault, fault == "hangs")
    report = owner.until(gone("a"))
    assert report.moves[-1].lost
    assert report.moves[-1].reason in ("it died", "it does not answer")
    assert report.free_bytes[gpu(0)] == 100
    owner.until(lambda r: r.troubles[0].retry_in_s == 0.0)
    owner.serve(A)


def test_one_miss_is_no_death(made):
    """Told not to live for the moment of one look, it goes on."""
    owner = made(patience=Patience(watch_s=0.05))
    owner.serve(A)
    looks: list[bool] = []

    def alive() -> bool:
        looks.append(engine.up and len(looks) != 1)
        return looks[-1]

    engine = ENGINES[A]
    engine.alive = alive
    owner.until(lambda _: len(looks) > 3)
    assert owner.phases() == {"a": "ACTIVE"}
    assert looks[:3] == [True, False, True]


def test_a_load_that_never_ends_is_ended(made):
    """0.3 s are granted; a load of 60 s counts as failed then."""
    owner = made(
        load_s=60.0, patience=Patience(watch_s=0.01, act_least_s=0.3, act_factor=0.0)
    )
    owner("load", A)
    report = owner.until(gone("a"))
    assert report.moves[-1].reason == "LOADING for more than 0.3 s"


def test_orders_of_the_past_are_fenced(made):
    """Once generation 2 has said hello, generation 1 gets nothing; the same step twice is
    carried out once; an older hello is told who is in charge."""
    owner = made()
    assert owner.agent.hello(2) == 2
    assert "2 is in charge" in owner("load", A)
    assert owner.agent.hello(1) == 2
    owner.generation, owner.step = 2, 0
    assert owner("load", A) == ""
    assert owner("drop", A, step=1) == ""
    owner.until(lambda r: r.rows[0].phase == "WARM")


def test_orders_that_were_given_up_are_not_carried_out_late(made):
    """The controller comes back over another link, at step 5: what it had sent before, up
    to that step, does nothing when it arrives; step 6 does."""
    owner = made()
    assert owner.agent.hello(1, 5) == 1
    assert owner("load", A, step=4) == owner("load", A, step=5) == ""
    assert owner.phases() == {}
    assert owner.agent.report().step == 5
    assert owner("load", A, step=6) == ""
    assert owner.phases() == {"a": "LOADING"}


def test_a_slow_disk_does_not_silence_an_agent(made, monkeypatch):
    """While a line of the log is on its way to the disk, reports say what the last one
    said, and soon; the order is obeyed once the line is there, and not before."""
    monkeypatch.setattr("foreserve.runtime.live.agent.BUSY_S", 0.05)
    owner = made()
    owner.serve(A)
    before = owner.agent.report()
    asked, there = threading.Event(), threading.Event()

    def slow(file: int) -> None:
        asked.set()
        there.wait()

    monkeypatch.setattr("foreserve.runtime.live.intents.os.fsync", slow)
    thread = threading.Thread(target=owner, args=("load", B))
    thread.start()
    assert asked.wait(5.0)
    clock = SystemClock()
    told = owner.agent.report(before.version, 1.0)
    assert clock.now_s() < 0.5
    assert (told.version, told.moves) == (before.version, ())
    assert ENGINES.get(B) is None or not ENGINES[B].up
    there.set()
    thread.join()
    owner.until(lambda _: owner.phases() == {"a": "ACTIVE", "b": "WARM"})


@pytest.mark.parametrize(
    ("kind", "key", "message"),
    [
        ("activate", A, "cannot activate while LOADING"),
        ("load", A, "cannot load while LOADING"),
        ("quiesce", A, "cannot quiesce while LOADING"),
        ("demote", B, "cannot demote while absent"),
        ("load", replica_id("a", (gpu(0, "n1"),)), "not a replica of node 'n0'"),
    ],
)
def test_illegal_orders_change_nothing(made, kind, key, message):
    """a is LOADING, b is not there, n1 is another node: refused, and the load goes on."""
    owner = made(load_s=0.2)
    owner("load", A)
    assert message in owner(kind, key)
    assert owner.phases() == {"a": "LOADING"}


@pytest.mark.parametrize("seed", range(3))
def test_any_orders_in_any_order(made, seed):
    """300 orders by chance from two threads, most of them nonsense, to engines of which
    every seventh call fails and some die: whatever happens, the log has no fault (the
    fixture looks), and once all is dropped every byte is free."""
    patience = Patience(watch_s=0.005, hang_s=1.0, first_retry_s=0.001, tries=1000)
    owner = made(load_s=0.002, seed=seed, patience=patience)
    keys = [replica_id(llm, (gpu(i),)) for llm in "abc" for i in range(2)]
    lock = threading.Lock()

    def give(rng: np.random.Generator) -> None:
        for _ in range(150):
            kind = KINDS[rng.integers(len(KINDS))]
            key = keys[rng.integers(len(keys))]
            with lock:
                owner.step += 1
                step = owner.step
            owner.agent.order(Order(generation=1, step=step, kind=kind, replica=key))
            if rng.random() < 0.05 and key in ENGINES:
                ENGINES[key].up = False
            SystemClock().wait(0.003 * rng.random())

    threads = [
        threading.Thread(target=give, args=(np.random.default_rng([seed, i]),))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owner.agent.close()
    report = owner.agent.report()
    assert report.rows == ()
    assert report.free_bytes == report.usable_bytes
    assert {move.phase for move in report.moves} >= {"WARM", "ACTIVE", "DRAINING", None}


def test_the_log_has_one_writer_and_drops_a_line_cut_off(tmp_path):
    """A second writer is refused; half a line at the end is removed at the next opening."""
    log = IntentLog(tmp_path / "x.log")
    log.append("one", n=1)
    with pytest.raises(ForeserveError, match="in use"):
        IntentLog(tmp_path / "x.log")
    log.close()
    with (tmp_path / "x.log").open("ab") as file:
        file.write(b'{"event":"tw')
    log = IntentLog(tmp_path / "x.log")
    log.append("two")
    assert [line["event"] for line in log.lines()] == ["one", "two"]
    log.close()


def intent(step: int = 1, generation: int = 1, held: int = 30) -> str:
    facts = {"generation": generation, "step": step, "kind": "load", "held": held}
    return json.dumps({"event": "intent", "llm": "a", "gpus": ["n0/0"], **facts})


def entered(phase: str | None) -> str:
    facts = {"llm": "a", "gpus": ["n0/0"], "phase": phase, "held": 30}
    return json.dumps({"event": "phase", **facts})


def shrink(held: int) -> str:
    facts = {"event": "shrink", "llm": "a", "gpus": ["n0/0"], "held": held}
    return json.dumps(facts)


def fence(generation: int = 1) -> str:
    return json.dumps({"event": "fence", "generation": generation})


LOADED = [
    '{"event":"start","capacity":{"n0/0":100}}',
    fence(),
    intent(),
    entered("LOADING"),
    entered("WARM"),
]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (entered("ACTIVE"), "no legal move"),
        (entered("ACTIVATING"), "without an order"),
        (entered(None), "although it is gone"),
        (fence(), "generation 1 after 1"),
        (intent(), "obeys step 1 after 1"),
        (intent(step=2, held=10), "before anything is gone"),
        (intent(step=2, held=101), "holds 101 of 100 bytes"),
        (intent(step=2, generation=0), "obeys generation 0"),
        (shrink(20), "shrinks while WARM"),
        (shrink(30), "does not shrink"),
        ("{", "not a JSON line"),
        ('{"event":"dance"}', "no event of an agent: 'dance'"),
    ],
)
def test_the_check_finds_what_cannot_be(tmp_path, monkeypatch, capsys, line, fault):
    """A load by the book has no faults; each of these lines after it is one, and exit
    code 1 says so. Half a last line is a crash, not a fault."""
    path = tmp_path / "n0.log"
    path.write_text("\n".join(LOADED) + '\n{"ev')
    assert check(tmp_path).faults == []
    path.write_text("\n".join([*LOADED, line]) + "\n")
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path)])
    assert main() == 1
    assert fault in capsys.readouterr().err


def test_the_check_compares_with_the_controller(tmp_path):
    """An order that the controller's log does not have."""
    (tmp_path / "n0.log").write_text("\n".join(LOADED) + "\n")
    log = tmp_path / "controller.log"
    log.write_text('{"event":"generation","generation":1}\n' + intent() + "\n")
    assert check(tmp_path).faults == []
    log.write_text('{"event":"generation","generation":1}\n')
    assert "no controller has written down" in check(tmp_path).faults[0]


def test_binding():
    """Logical GPUs in turn; nothing bound twice, too few or unbound GPUs are said."""
    node = Node(name="n0", gpu="g", gpus=2, host_ram_bytes=1)
    binding = Binding.of_node(node, (6, 4, 2))
    assert binding.of((gpu(1), gpu(0))) == (4, 6)
    assert Binding().of((gpu(0),)) == ()
    with pytest.raises(InvalidInput, match="2 GPUs planned, 1 found"):
        Binding.of_node(node, (0,))
    with pytest.raises(InvalidInput, match="4 is bound 2 times"):
        Binding.of_node(node, (4, 4))
    with pytest.raises(InvalidInput, match="n1/0 is bound to nothing"):
        binding.of((gpu(0, "n1"),))
