"""What must hold on live agents whatever fails, beside the tests of each part: the table in
docs/serving.md says which invariant is looked at where. Engines that only wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from foreserve.models.errors import ForeserveError
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.live.check import check
from foreserve.runtime.live.host import Local, make_agent
from foreserve.runtime.live.messages import Link, LinkLost
from tests.live_engines import ENGINES
from tests.live_setup import Live, key, live, on, setup, three


class Between:
    """A link to an agent of this process, with something in between."""

    def __init__(self, link: Link, before: Callable[[str], None]) -> None:
        self._link, self._before = link, before

    def call(self, name: str, *args: Any, timeout_s: float) -> Any:
        self._before(name)
        return self._link.call(name, *args, timeout_s=timeout_s)

    def close(self) -> None:
        """Nothing to close."""


@pytest.fixture
def agents(tmp_path) -> Iterator[Callable[..., dict[str, Local]]]:
    """Makes agents of this process, by node; what they logged is checked in the end."""
    made = []

    def make(nodes: int = 1, load_s: float = 0.03) -> dict[str, Local]:
        f = three(load_s, nodes=nodes)
        for i in range(nodes):
            made.append(make_agent(setup(tmp_path, f, f"n{i}")))
        return {agent.node: Local(agent) for agent in made}

    yield make
    for agent in made:
        agent.close()
    found = check(tmp_path)
    assert found.faults == []
    assert found.orders > 0
    assert max(found.peak.values()) <= 1.0


@pytest.mark.parametrize("seed", range(2))
def test_a_silent_node_is_no_empty_node(agents, tmp_path, monkeypatch, seed):
    """Links to two nodes that answer late, or break, by chance: whenever one looks, each
    node is either lost as a whole, with nothing of it seen or routable, or there with all
    it has. Once the links hold, the last wish is reached."""
    monkeypatch.setattr("foreserve.runtime.live.backend.AGAIN_S", 0.01)
    monkeypatch.setattr("foreserve.runtime.live.backend.POLL_S", 0.05)
    rng, calm = np.random.default_rng(seed), threading.Event()
    lock, pause = threading.Lock(), threading.Event()

    def mood(name: str) -> None:
        with lock:
            luck = 1.0 if calm.is_set() else rng.random()
        if luck < 0.05:
            raise LinkLost("broken off")
        if luck < 0.2:
            pause.wait(0.05)

    def opened(link: Local) -> Callable[[], Link]:
        return lambda: Between(link, mood)

    f = three(0.03, nodes=2)
    links = {node: opened(link) for node, link in agents(nodes=2).items()}
    lost = 0
    with live(tmp_path, f, links) as run:
        for _ in range(40):
            llms = rng.permutation(list("abc"))
            wanted = [on(str(llms[i]), i % 2, node=f"n{i // 2}") for i in range(3)]
            run.want(*wanted)
            run.pause(0.03)
            with run.backend._lock:
                observed, published = run.backend.observe(), run.backend.published
            gone = {gpu.node for gpu in observed.lost_gpus}
            lost += len(gone)
            for node in gone:
                assert {g.index for g in observed.lost_gpus if g.node == node} == {0, 1}
            seen = {gpu.node for replica in observed.replicas for gpu in replica.gpus}
            routable = {gpu.node for replica in published for gpu in replica.id.gpus}
            assert not (seen | routable) & gone
        calm.set()
        run.reach(*wanted)
    assert lost > 0


@pytest.mark.parametrize("phase", ["LOADING", "WARM", "ACTIVATING"])
def test_a_replacement_that_dies_takes_nobody_with_it(agents, tmp_path, phase):
    """a is to move from n0/0 to n0/1; its new engine dies while it is in ``phase``. The old
    one serves without a gap until a second replacement does."""
    links = agents()
    with live(tmp_path, three(0.03), links) as run:
        run.reach(on("a", 0))
        gaps = watched(run)
        new = key("a", 1)
        run.want(on("a", 1))
        agent = links["n0"]
        report = agent.call("report", timeout_s=1.0)
        while phase not in {row.phase for row in report.rows if row.id == new}:
            report = agent.call("report", report.version, 0.1, timeout_s=1.0)
        first = ENGINES[new]
        first.stop()
        run.until(lambda: ENGINES[new] is not first)
        run.until(lambda: run.phases() == {new: "ACTIVE"})
    assert gaps == []


def watched(run: Live) -> list[float]:
    """When the table was told that nobody serves a: filled from now on."""
    gaps: list[float] = []
    publish = run.table.publish

    def told(replicas: Any) -> None:
        served = any(replica.id.llm == "a" for replica in replicas)
        if not served and not run.stopped.is_set():
            gaps.append(run.clock.now_s())
        publish(replicas)

    run.backend.table.publish = told  # type: ignore[method-assign]
    return gaps


@pytest.mark.parametrize("delivered", [False, True])
@pytest.mark.parametrize("orders", range(1, 6))
def test_a_controller_may_end_at_every_order(agents, tmp_path, orders, delivered):
    """c is to take a's place, which takes five orders. The controller falls silent at one
    of them, before it has been delivered or just after: the next controller, which wants
    the same, reaches it, with orders of its own generation, and c is loaded once."""
    links, sent = agents(), 0
    dead = threading.Event()

    def deadly(name: str) -> None:
        nonlocal sent
        if name == "order":
            sent += 1
            if sent == orders + before and not delivered:
                dead.set()
            if sent > orders + before:
                dead.set()
        if dead.is_set():
            raise ForeserveError("its process has ended")

    before = 4  # to load and activate a and b
    f = three(0.03)
    goal = (on("c", 0), on("b", 1))
    with live(tmp_path, f, {"n0": lambda: Between(links["n0"], deadly)}) as run:
        run.reach(on("a", 0), on("b", 1))
        run.want(*goal)
        clock = SystemClock()
        with suppress(AssertionError):
            run.until(lambda: dead.is_set() or sent == orders + before, within_s=2.0)
        assert clock.now_s() < 2.0
        dead.set()
    with live(tmp_path, f, dict(links)) as run:
        run.reach(*goal)
        assert run.backend.generation == 2
    text = (tmp_path / "n0.log").read_text().splitlines()
    loads = [line for line in text if '"kind": "load"' in line and '"llm": "c"' in line]
    assert len(loads) == 1
