"""Three LLMs on the two GPUs of one node, live: for tests of the backend."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreserve.models.observed import Observed
from foreserve.models.placement import Placement, Replica, ReplicaId, State, replica_id
from foreserve.models.problem import Fleet
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.gateway.table import RoutingTable, Waiter
from foreserve.runtime.journal import Event, Journal, parse
from foreserve.runtime.live.backend import LiveBackend
from foreserve.runtime.live.host import NodeSetup, Open
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.patience import Patience
from tests.build import cluster, fleet, gpu, option
from tests.live_engines import Waiting

QUICK = Patience(watch_s=0.02, hang_s=0.2, first_retry_s=0.1, tries=3)


def three(load_s: float = 0.05, nodes: int = 1) -> Fleet:
    """30 bytes resident, 50 serving, on GPUs of 100; a second node if asked for."""
    options = (option(llm, load_s=load_s, activate_s=0.01) for llm in "abc")
    return fleet(*options, on=cluster(nodes=nodes))


def setup(folder: Path, f: Fleet, node: str = "n0", **settings: Any) -> NodeSetup:
    return NodeSetup(
        node=node,
        folder=folder,
        fleet=f,
        make="tests.live_engines:make",
        settings=Waiting(folder=folder / node, **settings),
        patience=QUICK,
    )


def on(llm: str, index: int, state: State = "ACTIVE", node: str = "n0") -> Replica:
    return Replica(llm=llm, gpus=(gpu(index, node),), state=state)


def key(llm: str, index: int, node: str = "n0") -> ReplicaId:
    return replica_id(llm, (gpu(index, node),))


@dataclass
class Wish:
    """A policy that wants what it is told."""

    placement: Placement
    name: str = "wish"

    def decide(self, now_s: float, observed: Observed) -> Placement:
        return self.placement

    def next_review_s(self, now_s: float) -> float:
        return now_s + 0.2


@dataclass
class Live:
    """A controller that runs in a thread, over everything real but the engines."""

    fleet: Fleet
    backend: LiveBackend
    table: RoutingTable
    clock: SystemClock
    journal: Journal
    wish: Wish
    stopped: threading.Event = field(default_factory=threading.Event)

    def want(self, *replicas: Replica) -> None:
        self.wish.placement = Placement(replicas=replicas)
        self.clock.wake()

    def phases(self) -> dict[ReplicaId, str]:
        observed = self.backend.observe()
        return {replica.id: replica.phase for replica in observed.replicas}

    def until(self, done: Callable[[], Any], within_s: float = 8.0) -> float:
        """Wait for it; seconds that it took."""
        clock = SystemClock()
        while not done():
            assert clock.now_s() < within_s, self.backend.status()
            clock.wait(clock.now_s() + 0.005)
        return clock.now_s()

    def pause(self, seconds: float) -> None:
        """Let time pass, without taking the controller's wakes."""
        SystemClock().wait(seconds)

    def reach(self, *replicas: Replica) -> float:
        """Want it and wait for it."""
        self.want(*replicas)
        wanted = {replica.id: replica.state for replica in replicas}
        return self.until(lambda: self.phases() == wanted)

    def request(self, llm: str) -> Waiter:
        """A request that is worked on until `RoutingTable.release`."""
        waiter = Waiter(llm=llm, exact_tokens=1, likely_tokens=1, wake=lambda: None)
        assert self.table.take(waiter)
        return waiter

    def events(self) -> list[Event]:
        return list(parse(self.journal.lines))


@contextmanager
def live(folder: Path, f: Fleet, nodes: Mapping[str, Open]) -> Iterator[Live]:
    """All of it, started; agents and engines go on when it ends."""
    clock, journal = SystemClock(), Journal()
    table = RoutingTable(clock.now_s, on_need=clock.wake)
    log = IntentLog(folder / "controller.log")
    backend = LiveBackend(
        fleet=f, clock=clock, table=table, nodes=nodes, log=log, journal=journal
    )
    table.eta = backend.eta
    wish = Wish(Placement())
    controller = Controller(
        policy=wish, backend=backend, clock=clock, fleet=f, journal=journal
    )
    found = Live(f, backend, table, clock, journal, wish)
    backend.start()
    # What is there already stays until somebody wants something else.
    there = (
        Replica(llm=r.llm, gpus=r.gpus, state="WARM" if r.phase == "WARM" else "ACTIVE")
        for r in backend.observe().replicas
    )
    wish.placement = Placement(replicas=tuple(there))

    def run() -> None:
        while not found.stopped.is_set():
            controller.turn(clock.now_s() + 0.2)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        found.stopped.set()
        clock.wake()
        thread.join()
        backend.close()
        log.close()
