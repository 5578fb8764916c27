"""Whole runs on a cluster whose links, memory and machines have limits and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.errors import InvalidInput
from foreserve.models.faults import Fault, FaultKind
from foreserve.models.loading import LoadRules
from foreserve.models.outcome import Run
from foreserve.models.placement import Action, Placement, Replica
from foreserve.models.problem import Fleet
from foreserve.models.serving import ServingRules
from foreserve.models.specs import ClusterSpec, Node
from foreserve.planner.policies import get_policy
from foreserve.runtime.clock import VirtualClock
from foreserve.runtime.controller import Controller
from foreserve.runtime.journal import Faulted, PhaseChange, Started, read_journal
from foreserve.runtime.ledger import Ledger
from foreserve.runtime.links import Link
from foreserve.runtime.simulated import simulate
from foreserve.runtime.simulated.backend import SimulatedBackend
from foreserve.runtime.tally import Tally
from foreserve.traces.trace import Trace
from tests.build import cluster, fleet, gpu, option, small_plan
from tests.test_reconcile import random_fleet
from tests.test_simulated import (
    Restless,
    Script,
    go,
    place,
    random_trace,
    requests,
    roomy,
)

SECOND_BYTES = 95
"""What a fast loader reads in a second from a storage of 100 bytes/s."""


def slow_disks(gpus: int = 2, nodes: int = 1, ram: int = 1000) -> ClusterSpec:
    on = cluster(gpus, nodes)
    return replace(
        on,
        nodes=tuple(
            replace(node, storage_bytes_per_s=100.0, host_ram_bytes=ram)
            for node in on.nodes
        ),
    )


def loading_fleet(rules: LoadRules, *, ram: int = 1000, **changes: object) -> Fleet:
    """LLMs a, b, c: 2 s from storage, 1 s from host memory, 190 bytes there."""
    own: dict[str, object] = {"weight_bytes": 2 * SECOND_BYTES, "copy_s": 1.0}
    options = [option(name, **(own | changes)) for name in "abc"]
    return replace(fleet(*options, on=slow_disks(ram=ram)), loading=rules)


NOBODY = requests((50.0, "a", 1, 1))


def stretches(run: Run, phase: str) -> list[tuple[str, str, float, float]]:
    """(LLM, first GPU, start, end) of all stretches in ``phase``."""
    rows = sorted(run.residency, key=lambda r: (r.start_s, r.llm))
    return [
        (r.llm, str(r.gpus[0]), round(r.start_s, 6), round(r.end_s, 6))
        for r in rows
        if r.phase == phase
    ]


# --- links and host memory -------------------------------------------------------------


def test_two_llms_from_one_storage_take_twice():
    """Each 2 s alone; at once onto two GPUs, both are there after 4 s."""
    f = loading_fleet(LoadRules(host_cache="none"))
    both = place(("a", 0, "WARM"), ("b", 1, "WARM"))
    for goal, end_s in ((place(("a", 0, "WARM")), 2.0), (both, 4.0)):
        run = go(f, NOBODY, (0.0, goal))
        loads = stretches(run, "LOADING")
        assert [end for *_, end in loads] == [end_s] * len(goal.replicas)
        assert run.outcome.storage_loads == len(goal.replicas)


def test_the_second_load_of_an_llm_copies_from_host_memory():
    """2 s from storage; dropped and loaded again elsewhere at 10 s: 1 s."""
    f = loading_fleet(LoadRules(host_cache="lru"))
    run = go(
        f,
        NOBODY,
        (0.0, place(("a", 0, "WARM"))),
        (5.0, place()),
        (10.0, place(("a", 1, "WARM"))),
    )
    assert stretches(run, "LOADING") == [
        ("a", "n0/0", 0.0, 2.0),
        ("a", "n0/1", 10.0, 11.0),
    ]
    assert (run.outcome.loads, run.outcome.storage_loads) == (2, 1)


def test_host_memory_for_one_keeps_the_last_used():
    """Room for one LLM: a, b, then a again reads storage again, b after it too."""
    f = loading_fleet(LoadRules(host_cache="lru"), ram=200)
    steps = [(10.0 * i, place((llm, 0, "WARM"))) for i, llm in enumerate("abab")]
    run = go(f, NOBODY, *steps)
    lasted = [round(end - start, 6) for *_, start, end in stretches(run, "LOADING")]
    assert lasted == [2.0] * 4
    assert run.outcome.storage_loads == 4


def test_a_load_waits_for_its_process_unless_one_is_ready():
    """3 s to start a process. No pool: 2 s of loading begin after it. One ready: the
    first load goes at once, the second, asked for with it, when the next is there."""
    for pool, ends in ((0, [5.0, 5.0]), (1, [2.0, 5.0])):
        rules = LoadRules(process_start_s=3.0, process_pool=pool)
        f = replace(fleet(option("a"), option("b")), loading=rules)
        run = go(f, NOBODY, (0.0, place(("a", 0, "WARM"), ("b", 1, "WARM"))))
        assert sorted(end for *_, end in stretches(run, "LOADING")) == ends


def test_what_requests_wait_for_is_loaded_first():
    """b is on its way (2 s) to a GPU when a request of a comes at 1 s: a's load goes
    first, from 1 to 3 s, then the rest of b's."""
    f = fleet(option("a"), option("b"))
    run = go(
        f,
        requests((1.0, "a", 10, 1)),
        (0.0, place(("b", 0, "WARM"))),
        (1.0, place(("b", 0, "WARM"), ("a", 0, "ACTIVE"))),
    )
    assert stretches(run, "LOADING") == [
        ("b", "n0/0", 0.0, 4.0),
        ("a", "n0/0", 1.0, 3.0),
    ]
    assert run.first_token_s[0] == pytest.approx(3.05 + 0.0101)


def test_loads_and_serving_slow_each_other():
    """a serves on the GPU that b is loaded to from 10 s on, at half the rate: 4 s instead
    of 2; meanwhile a's steps of 10.1 ms take 1.5 times as long."""
    rules = LoadRules(share_beside_serving=0.5, slowdown_beside_loading=0.5)
    f = replace(roomy("a", "b"), loading=rules)
    long = requests((5.0, "a", 10, 40), (10.5, "a", 10, 40), (15.0, "a", 10, 40))
    alone = place(("a", 0, "ACTIVE"))
    run = go(f, long, (0.0, alone), (10.0, place(("a", 0, "ACTIVE"), ("b", 0, "WARM"))))
    assert stretches(run, "LOADING")[1:] == [("b", "n0/0", 10.0, 14.0)]
    step_s = (run.finish_s - run.first_token_s) / 39
    np.testing.assert_allclose(step_s, [0.0101, 0.01515, 0.0101])


def test_a_cancelled_load_moves_what_it_has_moved():
    """Given up at 0.5 s of 2: a quarter of the storage's and of the GPU's bytes."""
    f = loading_fleet(LoadRules(host_cache="lru"))
    backend, controller = live(f, NOBODY, Script([(0.0, place(("a", 0, "WARM")))]))
    controller.run(0.5)
    backend.apply([Action(kind="drop", llm="a", gpus=(gpu(0),))])
    own = backend.loads.by_node["n0"]
    assert own.links.moved_bytes == {gpu(0): 7.5, "storage": 47.5}
    assert own.ram.held_bytes == 0


# --- faults ------------------------------------------------------------------------------


def two_nodes() -> Fleet:
    return replace(roomy("a", "b"), cluster=cluster(2, 2, memory_bytes=10_000))


def on(llm: str, node: str, index: int = 0) -> Replica:
    return Replica(llm=llm, gpus=(gpu(index, node),), state="ACTIVE")


def test_a_node_is_lost_in_the_middle_of_a_day():
    """a and b serve on n0, which is gone from 200 to 400 s. Every request is answered all
    the same, on n1 meanwhile, where nobody had been; those under way start anew; nothing
    is on n0 until it is back, and then the plan's replicas are there again."""
    f, base = two_nodes(), small_plan()
    goal = Placement(replicas=(on("a", "n0", 0), on("b", "n0", 1)))
    plan = replace(
        base, fleet=f, epochs=(replace(base.epochs[0], end_s=600.0, placement=goal),)
    )
    rng = np.random.default_rng(5)
    rows = [
        (at_s, str(rng.choice(["a", "b"])), 10, 50)
        for at_s in 20.0 + np.cumsum(rng.exponential(0.3, 1900))
    ]
    trace = requests(*rows)
    run = simulate(
        f,
        trace,
        get_policy("planned", plan, 30.0),
        start_s=0.0,
        end_s=600.0,
        seed=1,
        faults=(Fault(at=200.0, kind="node-loss", target="n0", for_=200.0),),
    )
    total = run.outcome.total
    assert total.finished == total.requests > 1800
    assert run.outcome.faults == 1
    assert 0 < run.outcome.restarted < 20
    for stay in run.residency:
        if stay.gpus[0].node == "n0":
            assert stay.end_s <= 200.0 or stay.start_s >= 400.0
        else:
            assert stay.start_s >= 200.0
    served = [(r.llm, r.gpus[0].node) for r in run.residency if r.phase == "ACTIVE"]
    assert {("a", "n1"), ("b", "n1"), ("a", "n0"), ("b", "n0")} == set(served)
    back = [r for r in run.residency if r.start_s >= 400.0 and r.gpus[0].node == "n0"]
    assert {r.llm for r in back if r.phase == "ACTIVE" and r.end_s >= 600.0} == {
        "a",
        "b",
    }


def test_a_slow_node_takes_longer_by_its_factor():
    """From 20 to 40 s everything on n0 takes 1.5 times as long: tokens 15.15 ms instead
    of 10.1, and b's load 3 s instead of 2."""
    f = roomy("a", "b")
    trace = requests(*((at_s, "a", 10, 100) for at_s in (10.0, 25.0, 45.0)))
    run = go(
        f,
        trace,
        (0.0, place(("a", 0, "ACTIVE"))),
        (30.0, place(("a", 0, "ACTIVE"), ("b", 1, "WARM"))),
        faults=[Fault(at=20.0, kind="slow-node", target="n0", for_=20.0, factor=1.5)],
    )
    step_s = (run.finish_s - run.first_token_s) / 99
    np.testing.assert_allclose(step_s, [0.0101, 0.01515, 0.0101])
    assert stretches(run, "LOADING")[1:] == [("b", "n0/1", 30.0, 33.0)]


def test_requests_of_several_lost_replicas_restart_once():
    """Both replicas of a are lost at once with two requests: none is sent to the other
    on the way, and both are answered after the node is back and 2.05 s of cold start."""
    f = roomy("a")
    run = go(
        f,
        requests((10.0, "a", 10, 1000), (10.0, "a", 10, 1000)),
        (0.0, place(("a", 0, "ACTIVE"), ("a", 1, "ACTIVE"))),
        faults=[Fault(at=15.0, kind="node-loss", target="n0", for_=5.0)],
    )
    assert run.outcome.restarted == 2
    assert run.outcome.total.finished == 2
    assert (run.first_token_s > 22.05).all()


def test_a_load_that_fails_is_tried_again():
    """The first load ends in nothing at 2 s, the second one, a second later, at 5 s; the
    next one begins after 2 s more, as with real agents, and is there at 9 s."""
    run = go(
        fleet(option("a")),
        NOBODY,
        (0.0, place(("a", 0, "WARM"))),
        faults=[Fault(at=1.0, kind="load-failure", target="a@n0/0", for_=5.0)],
    )
    loads = [stay[2:] for stay in stretches(run, "LOADING")]
    assert loads == [(0.0, 2.0), (3.0, 5.0), (7.0, 9.0)]
    assert run.outcome.wasted_bytes == 0


def test_a_crash_takes_one_replica():
    """a's crashes at 10 s, b's does not; a's is back after load and activation."""
    run = go(
        fleet(option("a"), option("b")),
        NOBODY,
        (0.0, place(("a", 0, "ACTIVE"), ("b", 1, "ACTIVE"))),
        faults=[Fault(at=10.0, kind="replica-crash", target="a@n0/0")],
    )
    served = stretches(run, "ACTIVE")
    assert served[:2] == [("a", "n0/0", 2.05, 10.0), ("b", "n0/1", 2.05, 100.0)]
    assert served[2][:3] == ("a", "n0/0", 12.05)


def test_faults_before_the_run_hold_from_its_start():
    """Lost since before the start, for good: nothing is ever there. Over before the
    start, or no time at all: nothing happens."""
    f, goal = fleet(option("a"), option("b")), place(("a", 0, "WARM"), ("b", 1, "WARM"))
    faults = [
        Fault(at=0.0, kind="gpu-loss", target="n0/1"),
        Fault(at=0.0, kind="gpu-loss", target="n0/0", for_=4.0),
        Fault(at=1.0, kind="replica-crash", target="a@n0/0"),
    ]
    run = simulate(
        f,
        NOBODY,
        Script([(0.0, goal)]),
        start_s=5.0,
        end_s=60.0,
        seed=1,
        load_noise=0.0,
        faults=faults,
    )
    assert {(r.llm, r.gpus) for r in run.residency} == {("a", (gpu(0),))}
    assert [f.target for f in run.faults] == ["n0/1"]


def test_faults_are_journalled_with_what_they_take(tmp_path):
    """One line for the fault, with its end and who was hit, before the replica's."""
    path = tmp_path / "run.jsonl"
    f = roomy("a")
    run = go(
        f,
        requests((10.0, "a", 10, 1000)),
        (0.0, place(("a", 0, "ACTIVE"))),
        faults=[Fault(at=15.0, kind="gpu-loss", target="n0/0", for_=5.0)],
        journal=path,
    )
    events = list(read_journal(path))
    at = next(i for i, event in enumerate(events) if isinstance(event, Faulted))
    assert events[at] == Faulted(
        at_s=15.0, kind="gpu-loss", target="n0/0", until_s=20.0, replicas=1, requests=1
    )
    gone = events[at + 1]
    assert isinstance(gone, PhaseChange)
    assert gone.lost
    tally = Tally(f)
    for event in events:
        tally.record(event)
    assert tally.run().outcome == run.outcome
    assert tally.run().faults == run.faults


def test_faults_of_another_cluster_are_invalid_input():
    """Checked before the run, with the place in the list."""
    with pytest.raises(
        InvalidInput, match=r"faults\.0\.target: the cluster has no node"
    ):
        go(
            fleet(option("a")),
            NOBODY,
            (0.0, place()),
            faults=[Fault(at=1.0, kind="node-loss", target="n7")],
        )


# --- whatever happens -------------------------------------------------------------------


def live(
    f: Fleet,
    trace: Trace,
    policy: Script | Restless,
    faults: Sequence[Fault] = (),
    seed: int = 1,
    noise: float = 0.0,
) -> tuple[SimulatedBackend, Controller]:
    tally = Tally(f)
    tally.record(Started(at_s=0.0, policy="p", start_s=0.0, end_s=60.0))
    clock = VirtualClock()
    backend = SimulatedBackend(
        f,
        trace,
        clock,
        np.random.default_rng(seed),
        tally,
        load_noise=noise,
        faults=faults,
    )
    controller = Controller(
        policy=policy, backend=backend, clock=clock, fleet=f, journal=tally
    )
    return backend, controller


def random_rules(rng: np.random.Generator) -> LoadRules:
    return LoadRules(
        host_cache=rng.choice(["all", "lru", "none"]),
        process_start_s=float(rng.choice([0.0, 1.0])),
        process_pool=int(rng.integers(3)),
        share_beside_serving=float(rng.choice([1.0, 0.5])),
        slowdown_beside_loading=float(rng.choice([0.0, 0.3])),
    )


def random_node(node: Node, rng: np.random.Generator) -> Node:
    return replace(
        node,
        host_ram_bytes=int(rng.integers(30, 200)),
        storage_bytes_per_s=float(rng.uniform(10, 100)),
        host_link_bytes_per_s=float(rng.choice([20.0, 1e9])),
    )


def random_fault(f: Fleet, rng: np.random.Generator) -> Fault:
    kinds: list[FaultKind] = ["gpu-loss", "node-loss", "slow-node", "load-failure"]
    kind = kinds[int(rng.integers(4))] if rng.random() < 0.8 else "replica-crash"
    one = f.cluster.gpus[int(rng.integers(len(f.cluster.gpus)))]
    target = {
        "gpu-loss": str(one),
        "load-failure": str(one),
        "replica-crash": f"{f.llms[0].name}@{one}",
    }.get(kind, one.node)
    lasts = kind != "replica-crash" and rng.random() < 0.8
    return Fault(
        at=float(rng.uniform(0, 25)),
        kind=kind,
        target=target,
        for_=float(rng.uniform(1, 10)) if lasts else None,
        factor=float(rng.uniform(1, 3)) if kind == "slow-node" else None,
    )


class Books:
    """Adds up what the loads of a run have moved, beside what their links say."""

    def __init__(self, backend: SimulatedBackend) -> None:
        self.backend = backend
        self.moved: dict[tuple[str, Link], float] = {}
        for name, own in backend.loads.by_node.items():
            self._watch(name, own.links)

    def _watch(self, name: str, links) -> None:
        add, cancel, advance = links.add, links.cancel, links.advance
        known = {}

        def book(over) -> None:
            for link, size in over.items():
                at = name, link
                self.moved[at] = self.moved.get(at, 0.0) + size

        def adding(key, load, now_s, **more) -> None:
            known[key] = load
            add(key, load, now_s, **more)

        def cancelling(key, now_s):
            load, over = known.pop(key), cancel(key, now_s)
            for link, size in over.items():
                assert -1e-6 <= size <= load.num_bytes[link] + 1e-6
            book(over)
            return over

        def advancing(now_s):
            ended = advance(now_s)
            for key in ended:
                book(known.pop(key).num_bytes)
            return ended

        links.add, links.cancel, links.advance = adding, cancelling, advancing

    def check(self, now_s: float) -> None:
        for name, own in self.backend.loads.by_node.items():
            assert own.ram.held_bytes <= own.node.host_ram_bytes
            for seconds in own.links.used_s.values():
                assert seconds <= now_s * (1 + 1e-9) + 1e-6
            if not list(self.backend.loads.on(name)):
                for link, size in own.links.moved_bytes.items():
                    assert size == pytest.approx(self.moved[name, link])


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_nothing_is_lost_whatever_happens(seed: int):
    """Restless goals, small memories, faults of every kind and cancelled loads: at every
    decision requests in = ended + running + waiting (`Restless`), no GPU and no host
    memory holds too much (the ledgers raise), no link was filled for longer than time
    has passed and each moved what its loads did, nothing is on a lost GPU, and each
    request ends exactly once."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    nodes = tuple(random_node(node, rng) for node in f.cluster.nodes)
    f = replace(
        f,
        cluster=replace(f.cluster, nodes=nodes),
        loading=random_rules(rng),
        serving=ServingRules(lending=False),
    )
    trace = random_trace(f, rng, 100)
    policy = Restless(f, rng)
    faults = [random_fault(f, rng) for _ in range(int(rng.integers(6)))]
    backend, controller = live(f, trace, policy, faults, seed, noise=0.1)
    policy.backend, books = backend, Books(backend)
    while backend.clock.now_s() < 40.0:
        controller.turn(40.0)
        observed = backend.observe()
        books.check(observed.now_s)
        assert backend._ledger.free_bytes == Ledger.of(f, observed).free_bytes
        for replica in observed.replicas:
            assert observed.lost_gpus.isdisjoint(replica.gpus)
    backend.stop()
    assert backend.in_system == 0
    tally = backend.journal
    assert isinstance(tally, Tally)
    ends = tally.requests()
    np.testing.assert_array_equal(ends.arrival_s, trace.arrival_s)
    done = ~np.isnan(ends.finish_s)
    assert (ends.first_token_s[done] <= ends.finish_s[done]).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_lenders_faults_and_loads_get_along(seed: int):
    """Small GPUs whose replicas drain for long and lend KV memory to loads, restless goals
    and faults: what is asked for always fits, what is taken back is found, and every
    request is accounted for."""
    rng = np.random.default_rng(seed)
    options = [
        option(
            name,
            tp=tp,
            resident_bytes=int(rng.integers(60, 140)),
            kv_bytes=int(rng.integers(100, 250)),
            concurrency=int(rng.integers(2, 9)),
        )
        for name in "abc"
        for tp in (1, 2)
    ]
    f = fleet(*options, on=cluster(2, int(rng.integers(1, 3)), memory_bytes=400))
    f = replace(f, loading=random_rules(rng))
    trace = random_trace(f, rng, 150)
    trace = replace(trace, output_tokens=(trace.output_tokens * 9).astype(np.int32))
    faults = [random_fault(f, rng) for _ in range(int(rng.integers(6)))]
    policy = Restless(f, rng)
    backend, controller = live(f, trace, policy, faults, seed, noise=0.1)
    policy.backend = backend
    while backend.clock.now_s() < 40.0:
        controller.turn(40.0)
        assert min(backend._ledger.free_bytes.values()) >= 0
    backend.stop()
    assert backend.in_system == 0
