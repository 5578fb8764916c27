"""Host memory of a live node: its books, its log, and files that are really there."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from foreserve.models.loading import LoadRules
from foreserve.models.problem import Fleet
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.hostram import HostRam
from foreserve.runtime.live.check import check
from foreserve.runtime.live.host import make_agent
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.messages import Order
from foreserve.runtime.live.pages import Held, available_bytes
from foreserve.runtime.live.store import Files, HostStore
from tests.build import cluster, fleet, gpu, option
from tests.live_setup import key, setup


def small(cache: str = "lru", ram: int = 100) -> Fleet:
    """Weights of 57 bytes, which storage gives in 0.6 s and host memory in 0.05 s; host
    memory of 100 bytes."""
    options = (
        option(llm, weight_bytes=57, load_s=0.05, copy_s=0.05, activate_s=0.01)
        for llm in "abc"
    )
    on = cluster()
    (node,) = on.nodes
    node = replace(node, host_ram_bytes=ram, storage_bytes_per_s=100.0)
    rules = LoadRules(host_cache=cache)  # type: ignore[arg-type]
    return replace(fleet(*options, on=replace(on, nodes=(node,))), loading=rules)


Make = Callable[..., HostStore]


@pytest.fixture
def made(tmp_path) -> Make:
    def make(f: Fleet, files: Files = lambda llm: ()) -> HostStore:
        log = IntentLog(tmp_path / "n0.log")
        store = HostStore(f, "n0", log, lambda: 1.0, files)
        log.append("start", capacity={"n0/0": 100}, host=store.capacity_bytes)
        return store

    return make


def load(store: HostStore, llm: str) -> None:
    """One from beginning to end."""
    store.begin(llm, 57)
    store.fill(llm, lambda: False)
    store.end(llm, done=True)


def seconds(store: HostStore, f: Fleet, llm: str) -> float:
    return store.load_s(f.option_of(llm, (gpu(0),)), (gpu(0),))


def test_what_is_to_be_kept_goes_last_and_only_for_its_like():
    """Three of 40 bytes in 100: a is to be kept, so b goes for c although a is older; d,
    kept too, takes c's place, then a's; nothing goes for x, which nobody keeps."""
    ram = HostRam(100)
    ram.keep = frozenset("ade")
    for llm in "abc":
        ram.open(llm, 40)
        ram.close(llm, done=True)
    assert set(ram.pinned) == {"a", "c"}
    for llm, left in (("d", {"a", "d"}), ("e", {"d", "e"}), ("x", {"d", "e"})):
        ram.open(llm, 40)
        ram.close(llm, done=True)
        assert set(ram.pinned) == left


def test_the_second_load_is_from_host_memory(made, tmp_path):
    """By storage 57/95 s, by the host link 0.05 s; a's place is needed for b, but not
    while a load copies from it. The log has it all, and the check finds nothing."""
    f = small()
    store = made(f)
    assert seconds(store, f, "a") == pytest.approx(0.6)
    load(store, "a")
    assert seconds(store, f, "a") == pytest.approx(0.05)
    store.begin("a", 57)
    load(store, "b")  # streams through
    assert [row.llm for row in store.rows()] == ["a"]
    store.end("a", done=True)
    load(store, "b")
    (row,) = store.rows()
    assert (row.llm, row.held_bytes, row.whole, row.readers) == ("b", 57, True, 0)
    assert seconds(store, f, "a") == pytest.approx(0.6)
    found = check(tmp_path)
    assert found.faults == []
    lines = [
        json.loads(line) for line in (tmp_path / "n0.log").read_text().split("\n")[1:-1]
    ]
    assert [(e["llm"], e["why"], e["held"]) for e in lines][-3:] == [
        ("a", "drop", 0),
        ("b", "load", 57),
        ("b", "end", 57),
    ]


@pytest.mark.parametrize(("cache", "expected_s"), [("all", 0.05), ("none", 0.6)])
def test_rules_without_a_cache(made, cache, expected_s):
    """``all``: the plan says that everything is here, and loads take its time; ``none``:
    they read storage, however often."""
    f = small(cache)
    store = made(f)
    load(store, "a")
    assert seconds(store, f, "a") == pytest.approx(expected_s)
    assert len(store.rows()) == (cache == "all")


def test_the_check_sees_what_cannot_be(tmp_path):
    """More than there is; weights that go while they are copied; a load without a look."""
    begin = {"event": "start", "capacity": {"n0/0": 100}, "host": 100}
    fence = {"event": "fence", "generation": 1}
    host = {"event": "host", "llm": "a", "why": "load", "held": 60, "readers": 1}
    load = {"event": "intent", "generation": 1, "step": 1, "kind": "load", "llm": "c"}
    lines = [
        *(begin, fence, host, host | {"llm": "b"}),
        host | {"why": "drop", "held": 0, "readers": 0},
        load | {"gpus": ["n0/0"], "held": 10},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "n0.log").write_text(text)
    assert [fault.partition(": ")[2] for fault in check(tmp_path).faults] == [
        "host memory holds 120 of 100 bytes",
        "weights of a go while a load copies from them",
        "loads without a look at host memory",
    ]


def test_loads_of_an_agent_take_their_time(tmp_path):
    """The same replica is loaded, dropped and loaded again, by an engine that takes the
    time that it is told: 0.6 s, then 0.05 s."""
    agent = make_agent(setup(tmp_path, small()))
    agent.hello(1)
    took = []
    a, version, step = key("a", 0), -1, 0

    def order(kind: str, done: Callable[[], bool]) -> None:
        nonlocal step
        step += 1
        told = agent.order(Order(generation=1, step=step, kind=kind, replica=a))  # type: ignore[arg-type]
        assert told == ""
        clock = SystemClock()
        while not done():
            assert clock.now_s() < 10.0
            agent.report(agent.report().version, 0.1)

    for _ in range(2):
        order("load", lambda: any(r.phase == "WARM" for r in agent.report().rows))
        moves = agent.report(version).moves
        took += [move.took_s for move in moves if move.done == "load"]
        version = agent.report().version
        order("drop", lambda: not agent.report().rows)
    (row,) = agent.report().hosted
    assert (row.llm, row.whole, row.resident_bytes) == ("a", True, None)
    assert agent.report().host_bytes == 100
    agent.close()
    assert 0.6 <= took[0] < 1.5
    assert 0.05 <= took[1] < 0.5
    assert check(tmp_path).faults == []


def test_what_the_plan_keeps_is_told_to_the_store(tmp_path):
    """By the controller in charge, not by one that was."""
    agent = make_agent(setup(tmp_path, small()))
    agent.hello(2)
    agent.keep(2, ("a",))
    agent.keep(1, ("b",))
    assert agent._store._ram.keep == {"a"}
    agent.close()


needs_linux = pytest.mark.skipif(
    available_bytes() is None, reason="needs Linux's /proc"
)


@pytest.fixture
def weights(tmp_path) -> Path:
    """A file of 4 MiB and a bit that is not in memory."""
    path = tmp_path / "w.safetensors"
    with path.open("wb") as file:
        file.write(os.urandom(4 * 2**20 + 123))
        file.flush()
        os.fsync(file.fileno())
    held = Held([path])
    held.close(drop=True)
    if held.resident_bytes() != 0:
        pytest.skip("this file system keeps what it is told to drop")
    return path


@needs_linux
def test_files_are_really_brought_in(made, weights):
    """After a load all of its pages are in memory, locked if the kernel lets us; after it
    had to make room for another LLM none are."""
    size = weights.stat().st_size
    f = small(ram=size + 10)
    store = made(f, lambda llm: [weights] if llm == "a" else [])
    load(store, "a")
    (row,) = store.rows()
    assert (row.held_bytes, row.whole) == (size, True)
    assert row.resident_bytes == size
    assert row.locked == may_lock(size)
    load(store, "b")
    assert [row.llm for row in store.rows()] == ["b"]
    assert Held([weights]).resident_bytes() == 0


@needs_linux
def test_reading_that_is_given_up_leaves_no_claim(made, weights):
    """A drop cancels the load: the weights do not count as being here."""
    f = small(ram=10 * 2**20)
    store = made(f, lambda llm: [weights])
    store.begin("a", 57)
    store.fill("a", lambda: True)
    store.end("a", done=False)
    assert store.rows() == ()
    assert seconds(store, f, "a") == pytest.approx(0.6)


@needs_linux
def test_what_the_plan_keeps_is_brought_in_ahead_of_its_load(tmp_path, weights):
    """An agent with nothing to do is told to keep a, of which there is a file, and b, of
    which there is none: a is read and whole, before anything is loaded; and once."""
    f = small(ram=10 * 2**20)
    folder = {"a": str(weights.parent)}
    agent = make_agent(setup(tmp_path / "st", f, checkpoints=folder))
    agent.hello(1)
    agent.keep(1, ("a", "b"))
    clock = SystemClock()
    while not (rows := agent.report().hosted) or not rows[0].whole:
        assert clock.now_s() < 10.0
        agent.report(agent.report().version, 0.1)
    assert [(row.llm, row.resident_bytes) for row in rows] == [
        ("a", weights.stat().st_size)
    ]
    agent.keep(1, ("a", "b"))
    agent.close()
    assert check(tmp_path / "st").faults == []
    lines = (tmp_path / "st/n0.log").read_text()
    assert lines.count('"event": "host"') == 2


def test_files_that_the_machine_has_no_memory_for_stream_through(
    made, weights, monkeypatch
):
    """Host memory by the scenario, but not by the machine: nothing is booked or read."""
    monkeypatch.setattr("foreserve.runtime.live.store.available_bytes", lambda: 2**20)
    f = small(ram=10 * 2**20)
    store = made(f, lambda llm: [weights])
    load(store, "a")
    assert store.rows() == ()


def may_lock(num_bytes: int) -> bool:
    with mmap.mmap(-1, num_bytes) as area:
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        libc = ctypes.CDLL(None)
        libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        return bool(libc.mlock(address, num_bytes) == 0)
