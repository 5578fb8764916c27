"""Controller, system clock, routing table, live backend and agents together; the engines
only wait. Three LLMs on two GPUs, of which each holds two to serve."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Action, Placement, ReplicaId
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.gateway.table import RoutingTable, Waiter
from foreserve.runtime.journal import Decision, Faulted, Journal, PhaseChange
from foreserve.runtime.live import views
from foreserve.runtime.live.awake import always_awake
from foreserve.runtime.live.backend import LiveBackend
from foreserve.runtime.live.check import check
from foreserve.runtime.live.host import Local, make_agent
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.messages import Link, LinkLost
from foreserve.runtime.live.patience import Patience
from foreserve.runtime.reconcile import reconcile
from tests.build import cluster, gpu
from tests.live_engines import ENGINES
from tests.live_setup import QUICK, Live, key, live, on, setup, three


@pytest.fixture
def made(tmp_path) -> Iterator[Any]:
    """Makes a `Live` with its agent in this process; what was logged is checked."""
    with ExitStack() as stack:

        def make(
            load_s: float = 0.05, patience: Patience = QUICK, **settings: Any
        ) -> Live:
            f = three(load_s)
            chosen = replace(setup(tmp_path, f, **settings), patience=patience)
            agent = make_agent(chosen)
            stack.callback(agent.close)
            return stack.enter_context(live(tmp_path, f, {"n0": Local(agent)}))

        yield make
    found = check(tmp_path)
    assert found.faults == []
    assert max(found.peak.values()) <= 1.0


def story(run: Live, llm: str) -> list[str | None]:
    """Phases of an LLM's replicas as the journal has them."""
    changes = [event for event in run.events() if isinstance(event, PhaseChange)]
    times = [change.at_s for change in changes]
    assert times == sorted(times)
    return [change.phase for change in changes if change.llm == llm]


def faults(run: Live) -> list[tuple[str, str]]:
    """Kinds and targets of the faults that the journal has."""
    return [(e.kind, e.target) for e in run.events() if isinstance(e, Faulted)]


def test_switches_without_a_gap(made):
    """a and b serve; then b and c are wanted, c where a was. a leaves when its request has
    ended and not before, c serves then; b is not touched; the journal tells all of it."""
    run = made()
    run.reach(on("a", 0), on("b", 1))
    request = run.request("a")
    run.want(on("b", 1), on("c", 0))
    run.until(lambda: run.phases().get(key("a", 0)) == "DRAINING")
    assert run.table.routable("a") == 0
    run.pause(0.2)
    assert run.phases()[key("a", 0)] == "DRAINING"
    assert (
        run.phases()[key("c", 0)] == "WARM"
    )  # 80 of 100 bytes: it may come, not serve
    run.table.release(request)
    run.until(lambda: run.phases() == {key("b", 1): "ACTIVE", key("c", 0): "ACTIVE"})
    assert run.table.routable("c") == 1
    lives = ["LOADING", "WARM", "ACTIVATING", "ACTIVE"]
    assert story(run, "a") == [*lives, "DRAINING", "WARM", None]
    assert story(run, "b") == story(run, "c") == lives


def test_engines_that_cannot_sleep(tmp_path):
    """Of GPUs of 80 bytes, one engine of 50 fits each, asleep or not. With the fleet as the
    books see it, c comes when a has gone, and no order is refused on the way; the engines
    are made with the KV memory that they really have."""
    real = replace(three(), cluster=cluster(memory_bytes=80))
    f = always_awake(real)
    chosen = replace(setup(tmp_path, f, real_sleep=False), made_with=real)
    agent = make_agent(chosen)
    with live(tmp_path, f, {"n0": Local(agent)}) as run:
        run.reach(on("a", 0), on("b", 1))
        assert {row["reserved_bytes"] for row in views.engines(run.backend)} == {50}
        run.reach(on("c", 0), on("b", 1))
        assert ENGINES[key("c", 0)].option.kv_bytes == 20
    agent.close()
    assert '"event": "refused"' not in (tmp_path / "n0.log").read_text()
    assert check(tmp_path).faults == []


def test_an_idle_replica_says_so(made):
    """ACTIVE without a request since it was published; at work, it counts one in flight."""
    run = made()
    run.reach(on("a", 0))
    (idle,) = run.backend.observe().replicas
    assert idle.idle_since_s is not None
    assert 0.0 <= idle.idle_since_s <= run.clock.now_s()
    request = run.request("a")
    (works,) = run.backend.observe().replicas
    assert (works.in_flight, works.idle_since_s) == (1, None)
    run.table.release(request)


def test_a_request_in_need_wakes_the_controller(made):
    """Nobody serves c: the request that waits shows in `observe`, and wakes the clock."""
    run = made()
    run.reach(on("a", 0))
    waiter = Waiter(llm="c", exact_tokens=1, likely_tokens=1, wake=lambda: None)
    run.table.join(waiter)
    assert run.backend.observe().waiting == {"c": 1}
    run.reach(on("a", 0), on("c", 1))
    assert waiter.seat is not None
    run.table.release(waiter)


def test_agents_know_for_what_requests_wait(made):
    """c is loaded while a request waits for it, so its agent is told with the order; a's
    load, which nobody waits for, is hurried when somebody does."""
    run = made(load_s=1.0)
    waiters = [
        Waiter(llm=llm, exact_tokens=1, likely_tokens=1, wake=lambda: None)
        for llm in "ca"
    ]
    run.table.join(waiters[0])
    run.want(on("a", 0), on("c", 1))
    run.until(lambda: len(run.phases()) == 2)
    assert ENGINES[key("c", 1)].hurried
    assert not ENGINES[key("a", 0)].hurried
    run.table.join(waiters[1])
    run.until(lambda: ENGINES[key("a", 0)].hurried)
    assert set(run.phases().values()) == {"LOADING"}
    run.until(lambda: all(waiter.seat is not None for waiter in waiters))
    for waiter in waiters:
        run.table.release(waiter)


def test_who_falls_idle_is_told_of_while_somebody_waits(made):
    """c waits, and nothing of it is on its way: the end of a's last request is told, as is
    since when c has had nobody, and a has served; not once c has left."""
    run, needs = made(), []
    run.reach(on("a", 0))
    waits = Waiter(llm="c", exact_tokens=1, likely_tokens=1, wake=lambda: None)
    busy = run.request("a")
    run.table.join(waits)
    run.until(lambda: gpu(0) in run.table._watched)
    observed = run.backend.observe()
    assert observed.unserved_since_s == {"c": waits.joined_s}
    (a,) = observed.replicas
    assert 0.0 < a.served_since_s < waits.joined_s
    run.table.on_need = lambda: needs.append(run.clock.now_s())
    run.table.release(busy)
    assert len(needs) == 1
    run.table.leave(waits)
    run.until(lambda: not run.table._watched)
    run.table.release(run.request("a"))
    assert len(needs) == 1


def test_a_dead_engine_is_replaced(made):
    """It leaves the table within a moment, counts as lost, and is loaded anew."""
    run = made()
    run.reach(on("a", 0), on("b", 1))
    dead = ENGINES[key("a", 0)]
    dead.up = False
    run.until(lambda: run.table.routable("a") == 0)
    run.until(lambda: run.table.routable("a") == 1)
    assert ENGINES[key("a", 0)] is not dead
    changes = [e for e in run.events() if isinstance(e, PhaseChange) and e.llm == "a"]
    assert [c.phase for c in changes if c.lost] == [None]
    assert faults(run) == [("replica-crash", "a@n0/0x1")]
    assert story(run, "b") == ["LOADING", "WARM", "ACTIVATING", "ACTIVE"]


def test_failed_loads_are_tried_thrice_and_said(made):
    """a never loads: three orders, with pauses, then none. The eta is infinite, b serves.
    Forgiven, it is tried again."""
    run = made(load_fails={"a": 3})
    run.want(on("a", 0), on("b", 1))
    run.until(lambda: any(t.failures == 3 for t in run.backend.troubles()))
    run.pause(0.4)
    loads = [
        event.at_s
        for event in run.events()
        if isinstance(event, Decision)
        for action in event.actions
        if action.llm == "a"
    ]
    assert len(loads) == 3
    assert faults(run) == [("load-failure", "a@n0/0x1")] * 3
    assert loads[1] - loads[0] >= 0.1
    assert loads[2] - loads[1] >= 0.2
    assert run.backend.eta("a") == (math.inf, math.inf)
    assert run.backend.observe().busy == {key("a", 0)}
    assert run.phases() == {key("b", 1): "ACTIVE"}
    run.backend.forgive("n0", key("a", 0))
    run.until(lambda: run.table.routable("a") == 1)


def test_reconcile_leaves_busy_replicas_alone():
    """a is to serve on n0/1 in place of n0/0, and c to come: while a's new place is busy,
    only c is loaded, and the old a goes on; after that a is loaded as well. A busy
    replica is not dropped either."""
    f, old, c = three(), on("a", 0), on("c", 0, "WARM")
    desired = Placement(replicas=(on("a", 1), c))
    serving = ObservedReplica(llm="a", gpus=old.gpus, phase="ACTIVE")
    observed = Observed(now_s=0.0, replicas=(serving,))

    def steps(*busy: ReplicaId) -> set[tuple[str, ReplicaId]]:
        now = replace(observed, busy=frozenset(busy))
        return {(a.kind, a.replica) for a in reconcile(desired, now, f)}

    assert steps(key("a", 1)) == {("load", c.id)}
    assert steps() == {("load", c.id), ("load", key("a", 1))}
    leaving = ObservedReplica(llm="b", gpus=(gpu(1),), phase="WARM")
    observed = replace(observed, replicas=(serving, leaving))
    assert ("drop", key("b", 1)) in steps()
    assert ("drop", key("b", 1)) not in steps(key("b", 1))


def test_any_wishes_and_deaths(made):
    """Wishes that change by chance every few milliseconds, engines that die in between,
    requests that come and go: no GPU is over-committed at any line (the fixture looks),
    each request ends on a replica that serves, and the last wish is reached."""
    run = made(load_s=0.01, patience=replace(QUICK, first_retry_s=0.01, tries=1000))
    rng = np.random.default_rng(0)
    held: list[Waiter] = []
    for _ in range(60):
        wanted = []
        for i in range(2):
            first, second, third = rng.permutation(list("abc"))
            if rng.random() < 0.7:
                wanted += [on(str(first), i)]
                wanted += [on(str(second), i, "WARM")] if rng.random() < 0.5 else []
            else:
                wanted += [on(str(llm), i, "WARM") for llm in (second, third)]
        run.want(*wanted)
        run.pause(0.06 * rng.random())
        for llm in "abc":
            waiter = Waiter(llm=llm, exact_tokens=1, likely_tokens=1, wake=lambda: None)
            if rng.random() < 0.3 and run.table.take(waiter):
                held.append(waiter)
        if held and rng.random() < 0.7:
            run.table.release(held.pop(int(rng.integers(len(held)))))
        if rng.random() < 0.15:
            list(ENGINES.values())[rng.integers(len(ENGINES))].up = False
    for waiter in held:
        run.table.release(waiter)
    run.reach(*wanted)
    assert run.table.in_flight() == dict.fromkeys(
        [replica.id for replica in wanted if replica.state == "ACTIVE"], 0
    )
    assert len([e for e in run.events() if isinstance(e, PhaseChange)]) > 60


def test_eta(made):
    """Of loads of 10 s that nothing is known about: 10.01 s before, less while it loads,
    nothing once it serves; 1.5 times that at the 90th percentile."""
    run = made(load_s=10.0)
    assert run.backend.eta("a") == pytest.approx((10.01, 15.015))
    run.want(on("a", 0))
    run.until(lambda: run.phases())
    run.pause(0.1)
    p50_s, p90_s = run.backend.eta("a")
    assert 9.0 < p50_s < 9.95
    assert 14.0 < p90_s < 14.95
    run.want()
    run.until(lambda: not run.phases())


def test_eta_learns_from_what_steps_took(made):
    """After six loads that took about 50 ms as planned, p90 is nearer to p50 than the 1.5
    of the beginning, and a WARM replica counts its activation alone."""
    run = made()
    for _ in range(6):
        run.reach(on("a", 0, "WARM"))
        assert run.backend.eta("a")[0] == pytest.approx(0.01, rel=0.01)
        run.reach()
    assert 0.9 < run.backend.times.ratio("load")[0] < 3.0
    run.reach(on("a", 0))
    assert run.backend.eta("a") == (0.0, 0.0)


def test_views(made):
    """a serves (30 + 20), b waits (30) beside it; c has failed for good: the rows add up,
    and say so."""
    run = made(load_fails={"c": 9})
    run.want(on("a", 0), on("b", 0, "WARM"), on("c", 1))
    run.until(lambda: any(math.isinf(t.retry_in_s) for t in run.backend.troubles()))
    run.until(lambda: len(run.phases()) == 2)
    found = {
        (row["device"], row["kind"]): row["reserved_bytes"]
        for row in views.ledger(run.backend)
    }
    assert found == {
        ("n0/0", "kv"): 20,
        ("n0/0", "weights"): 60,
        ("n0/0", "all"): 80,
        ("n0/1", "all"): 0,
        ("host", "host"): 60,
    }
    whole = views.ledger(run.backend)[2]
    assert (whole["capacity_bytes"], whole["free_bytes"]) == (100, 20)
    assert whole["observed_bytes"] is None
    rows = {row["llm"]: row for row in views.engines(run.backend)}
    assert [rows[llm]["phase"] for llm in "abc"] == ["ACTIVE", "WARM", None]
    assert rows["a"]["url"] == run.backend.published[0].url
    assert (rows["c"]["given_up"], rows["c"]["error"]) == (True, "no such weights")
    (node,) = views.nodes(run.backend)
    assert (node["state"], node["replicas"], node["error"]) == ("up", 2, None)


class _Slow:
    """A link to an agent behind which every order takes long."""

    def __init__(self, link: Link) -> None:
        self.link, self.pause = link, SystemClock()

    def call(self, name: str, *args: Any, timeout_s: float) -> Any:
        if name == "order":
            self.pause.wait(self.pause.now_s() + 0.5)
        return self.link.call(name, *args, timeout_s=timeout_s)

    def close(self) -> None:
        self.link.close()


def alone(tmp_path, f, nodes) -> tuple[LiveBackend, IntentLog]:
    clock = SystemClock()
    log = IntentLog(tmp_path / "controller.log")
    backend = LiveBackend(
        fleet=f,
        clock=clock,
        table=RoutingTable(clock.now_s),
        nodes=nodes,
        log=log,
        journal=Journal(),
    )
    backend.start(5.0)
    return backend, log


def test_never_blocks_and_shows_orders_at_once(tmp_path):
    """Behind a link of half a second, ordering and observing take no time, and the load is
    seen as LOADING from the call on, never twice."""
    f = three()
    agent = make_agent(setup(tmp_path, f))
    backend, log = alone(tmp_path, f, {"n0": lambda: _Slow(Local(agent))})
    clock = SystemClock()
    loads = [Action(kind="load", llm=llm, gpus=(gpu(0),)) for llm in "abc"]
    backend.apply(loads)
    seen = {r.llm: r.phase for r in backend.observe().replicas}
    assert clock.now_s() < 0.1
    assert seen == dict.fromkeys("abc", "LOADING")
    while {r.phase for r in backend.observe().replicas} != {"WARM"}:
        assert len(backend.observe().replicas) == 3
        assert clock.now_s() < 5.0
        clock.wait(clock.now_s() + 0.02)
    backend.close(stop_engines=True)
    log.close()
    assert check(tmp_path).faults == []


def test_an_unreachable_node_is_lost(tmp_path):
    """n1 cannot be reached: its GPUs are lost, with the reason; n0 goes on."""
    f = three(nodes=2)
    agent = make_agent(setup(tmp_path, f))

    def never() -> Link:
        raise LinkLost("no route")

    clock = SystemClock()
    log = IntentLog(tmp_path / "controller.log")
    backend = LiveBackend(
        fleet=f,
        clock=clock,
        table=RoutingTable(clock.now_s),
        nodes={"n0": Local(agent), "n1": never},
        log=log,
        journal=Journal(),
    )
    backend.start(0.3)
    assert backend.observe().lost_gpus == {gpu(0, "n1"), gpu(1, "n1")}
    assert [node.error for node in backend.status()] == ["", "no route"]
    backend.close(stop_engines=True)
    log.close()


def test_a_later_controller_fences_an_earlier_one(tmp_path):
    """A second backend over the same agent has a higher generation: the first one sees the
    node as lost, publishes nobody, and its orders do nothing."""
    f = three()
    agent = make_agent(setup(tmp_path, f))
    first, log = alone(tmp_path, f, {"n0": Local(agent)})
    first.apply([Action(kind="load", llm="a", gpus=(gpu(0),))])
    clock = SystemClock()
    while not agent.report().rows:
        assert clock.now_s() < 3.0
    log.close()  # as if its process had hung, and lost the lock
    second, log = alone(tmp_path, f, {"n0": Local(agent)})
    while not first.observe().lost_gpus:
        assert clock.now_s() < 3.0
        clock.wait(clock.now_s() + 0.02)
    assert "generation 2 is in charge" in first.status()[0].error
    first.apply([Action(kind="load", llm="b", gpus=(gpu(1),))])
    clock.wait(clock.now_s() + 0.1)
    assert {r.llm for r in second.observe().replicas} == {"a"}
    first.close()
    second.close(stop_engines=True)
    log.close()
