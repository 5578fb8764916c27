"""The on-demand rule: what is wanted now, from the plan's base and what is observed."""

from __future__ import annotations

from dataclasses import replace

from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Placement, Replica, ReplicaId
from foreserve.models.referee import fleet_violations
from foreserve.models.rules import Sharing
from foreserve.planner.policies import get_policy
from tests.build import cluster, fleet, gpu, option, small_plan


def plan_with(*replicas: Replica, options=(), on=None):
    base = small_plan()
    epoch = replace(base.epochs[0], placement=Placement(replicas=replicas))
    wide = fleet(*(options or (option("a"), option("b"))), on=on)
    return replace(base, fleet=wide, epochs=(epoch,))


def active(llm, *gpus):
    return Replica(llm=llm, gpus=gpus, state="ACTIVE")


def warm(llm, *gpus):
    return Replica(llm=llm, gpus=gpus, state="WARM")


def test_planned_follows_the_plan_while_nothing_waits():
    """No requests: exactly the placement of the epoch."""
    plan = plan_with(active("a", gpu(0)), warm("b", gpu(1)))
    wanted = get_policy("planned", plan, 30.0).decide(0.0, Observed(now_s=0.0))
    assert wanted == plan.epochs[0].placement


def test_a_waiting_request_promotes_the_warm_replica():
    """b waits and is WARM on n0/1: that replica becomes ACTIVE, nothing is loaded."""
    plan = plan_with(active("a", gpu(0)), warm("b", gpu(1)))
    observed = Observed(
        now_s=1.0,
        replicas=(
            ObservedReplica(llm="a", gpus=(gpu(0),), phase="ACTIVE", in_flight=3),
            ObservedReplica(llm="b", gpus=(gpu(1),), phase="WARM"),
        ),
        waiting={"b": 1},
    )
    wanted = get_policy("planned", plan, 30.0).decide(1.0, observed)
    assert wanted.by_id[ReplicaId(llm="b", gpus=(gpu(1),))].state == "ACTIVE"
    assert len(wanted.replicas) == 2


def test_a_promoted_replica_stays_for_its_keep_alive():
    """Idle for 10 s of 30: stays ACTIVE; idle for 31 s: WARM again, as planned."""
    plan = plan_with(warm("b", gpu(1)))
    policy = get_policy("planned", plan, 30.0)
    for idle_s, state in ((10.0, "ACTIVE"), (31.0, "WARM")):
        seen = ObservedReplica(
            llm="b", gpus=(gpu(1),), phase="ACTIVE", idle_since_s=100.0 - idle_s
        )
        wanted = policy.decide(100.0, Observed(now_s=100.0, replicas=(seen,)))
        assert wanted.replicas[0].state == state


def test_reactive_loads_on_the_first_request_and_drops_when_idle():
    """Nothing in advance; the smallest TP; nothing left after the keep-alive."""
    plan = plan_with(warm("b", gpu(1)))
    policy = get_policy("reactive", plan, 30.0)
    assert policy.decide(0.0, Observed(now_s=0.0)).replicas == ()
    wanted = policy.decide(0.0, Observed(now_s=0.0, waiting={"b": 1}))
    assert [(r.llm, r.state) for r in wanted.replicas] == [("b", "ACTIVE")]
    idle = ObservedReplica(llm="b", gpus=(gpu(0),), phase="ACTIVE", idle_since_s=0.0)
    assert policy.decide(31.0, Observed(now_s=31.0, replicas=(idle,))).replicas == ()
    kept = get_policy("reactive-keep", plan, 30.0).decide(
        31.0, Observed(now_s=31.0, replicas=(idle,))
    )
    assert [(r.llm, r.state) for r in kept.replicas] == [("b", "WARM")]


def test_an_idle_replica_gives_way_to_a_waiting_request():
    """One GPU: a idles on it, b waits; b is wanted there. If a is busy, b must wait, until
    a has served for its turn of 30 s."""
    one = cluster(gpus=1)
    plan = plan_with(active("a", gpu(0)), on=one)
    policy = get_policy("planned", plan, 30.0)
    for now_s, in_flight, expected in ((5.0, 0, "b"), (5.0, 1, "a"), (30.0, 1, "b")):
        seen = ObservedReplica(
            llm="a",
            gpus=(gpu(0),),
            phase="ACTIVE",
            in_flight=in_flight,
            idle_since_s=None if in_flight else 0.0,
            served_since_s=0.0,
        )
        wanted = policy.decide(
            now_s, Observed(now_s=now_s, replicas=(seen,), waiting={"b": 2})
        )
        assert [r.llm for r in wanted.replicas if r.state == "ACTIVE"] == [expected]


def test_what_is_wanted_always_fits():
    """KV of a promoted replica takes space: a WARM neighbour that no longer fits goes."""
    # 100 bytes: b ACTIVE takes 50, so of the WARM a and c (30 each) one has to go.
    options = (option("a"), option("b"), option("c"))
    plan = plan_with(
        warm("a", gpu(0)), warm("b", gpu(0)), warm("c", gpu(0)), options=options
    )
    observed = Observed(now_s=0.0, waiting={"b": 1})
    wanted = get_policy("planned", plan, 30.0).decide(0.0, observed)
    assert list(fleet_violations(plan.fleet, wanted)) == []
    assert [r.state for r in wanted.of("b")] == ["ACTIVE"]
    assert len(wanted.replicas) == 2


def test_a_lost_replica_is_replaced_elsewhere():
    """a's GPU is lost and a waits: it is wanted on the other one, though b idles there;
    nothing is wanted on the lost one, and all is as planned once it is back."""
    plan = plan_with(active("a", gpu(0)), warm("b", gpu(1)))
    policy = get_policy("planned", plan, 30.0)
    lost = frozenset({gpu(0)})
    seen = ObservedReplica(llm="b", gpus=(gpu(1),), phase="WARM")
    wanted = policy.decide(
        5.0,
        Observed(now_s=5.0, replicas=(seen,), waiting={"a": 1}, lost_gpus=lost),
    )
    assert [r.gpus for r in wanted.of("a")] == [(gpu(1),)]
    assert wanted == wanted.without(lost)
    again = policy.decide(6.0, Observed(now_s=6.0, replicas=(seen,)))
    assert again == plan.epochs[0].placement


def test_a_replica_that_failed_is_sought_elsewhere():
    """a's planned replica has failed, is waited with, and a waits: it is wanted on the
    other GPU, too, and where it was, so that nobody gives that up; with nobody waiting, as
    planned. Once three replicas of an LLM have failed no further place is tried."""
    options = (option("a"), option("b"))
    on = cluster(gpus=4)
    plan = plan_with(active("a", gpu(0)), options=options, on=on)
    policy = get_policy("planned", plan, 30.0)

    def wanted(waiting: dict[str, int], *failed: int) -> list[tuple[object, ...]]:
        busy = frozenset(ReplicaId(llm="a", gpus=(gpu(i),)) for i in failed)
        seen = Observed(now_s=5.0, waiting=waiting, busy=busy)
        return sorted(r.gpus for r in policy.decide(5.0, seen).of("a", "ACTIVE"))

    assert wanted({"a": 1}, 0) == [(gpu(0),), (gpu(1),)]
    assert wanted({"a": 1}, 0, 1) == [(gpu(0),), (gpu(2),)]
    assert wanted({}, 0) == [(gpu(0),)]
    assert wanted({"a": 1}, 0, 1, 2) == [(gpu(0),)]


def test_the_least_number_holds_beside_a_lost_gpu():
    """min_active 1: a is wanted elsewhere without any request; with nowhere to go, the
    lost replica stays wanted, so that the placement keeps the operator's rule."""
    plan = plan_with(active("a", gpu(0)))
    guarded = fleet(option("a"), min_active=1)
    plan = replace(plan, fleet=guarded)
    policy = get_policy("planned", plan, 30.0)
    for lost, expected in ((0,), (1,)), ((0, 1), (0,)):
        observed = Observed(now_s=5.0, lost_gpus=frozenset(map(gpu, lost)))
        wanted = policy.decide(5.0, observed)
        assert [r.gpus for r in wanted.of("a", "ACTIVE")] == [(gpu(expected[0]),)]
        assert list(fleet_violations(guarded, wanted)) == []


def test_reactive_keeps_the_operators_least_number():
    """min_active 1: one replica is wanted before any request, and after its keep-alive."""
    plan = replace(plan_with(), fleet=fleet(option("a"), min_active=1))
    policy = get_policy("reactive", plan, 30.0)
    first = policy.decide(0.0, Observed(now_s=0.0))
    assert [(r.llm, r.state) for r in first.replicas] == [("a", "ACTIVE")]
    idle = ObservedReplica(llm="a", gpus=(gpu(1),), phase="ACTIVE", idle_since_s=0.0)
    later = policy.decide(90.0, Observed(now_s=90.0, replicas=(idle,)))
    assert [r.gpus for r in later.replicas] == [(gpu(1),)]


# --- ratio --------------------------------------------------------------------------------


def on_two(*phases: tuple[str, str, int], at_s: float = 0.0, **waiting: int):
    """LLMs at TP 2 on the only two GPUs, of 100 bytes: weights of three (20 each) and KV of
    two (20 each) fit. All began to serve ``at_s``, and it is 20 s now."""
    pair = (gpu(0), gpu(1))
    options = [option(llm, tp=2, resident_bytes=20) for llm in "abc"]
    wide = replace(fleet(*options), sharing=Sharing(most=4))
    observed = Observed(
        now_s=20.0,
        replicas=tuple(
            ObservedReplica(
                llm=llm,
                gpus=pair,
                phase=phase,
                in_flight=in_flight,
                idle_since_s=19.0 if phase == "ACTIVE" and not in_flight else None,
                served_since_s=at_s if phase in ("ACTIVE", "DRAINING") else None,
            )
            for llm, phase, in_flight in phases
        ),
        waiting=waiting,
        unserved_since_s={llm: 15.0 for llm in waiting},
    )
    policy = get_policy("ratio", replace(small_plan(), fleet=wide), 30.0)
    wanted = policy.decide(20.0, observed)
    assert list(fleet_violations(wide, wanted)) == []
    states = {r.llm: r.state for r in wanted.replicas}
    return "".join(sorted(llm for llm in states if states[llm] == "ACTIVE"))


def test_ratio_fills_free_memory_at_once():
    """Nobody is there, a and b wait: both. One that is on its way stays, whoever waits."""
    assert on_two(a=1, b=1) == "ab"
    assert on_two(("a", "LOADING", 0), ("b", "ACTIVATING", 0), a=1, b=1, c=9) == "ab"


def test_ratio_wakes_loads_and_drains_by_demand():
    """a has 4 requests, b has 2 in flight, so c pushes b out: it needs more than 3 x 2
    of its own. If b idles, one is enough. Weights that sleep there make no difference
    to a drain."""
    busy = (("a", "ACTIVE", 4), ("b", "ACTIVE", 2))
    assert on_two(*busy, c=6) == "ab"
    assert on_two(*busy, c=7) == "ac"
    assert on_two(*busy, ("c", "WARM", 0), c=6) == "ab"
    assert on_two(("a", "ACTIVE", 4), ("b", "ACTIVE", 0), c=1) == "ac"


def test_ratio_weighs_a_wake_less_than_a_load():
    """a and b have nothing in flight, but 4 requests wait that they have not taken yet: c
    needs more than 1.5 x 4 where its weights are, more than 2 x 4 where they are not."""
    idle = (("a", "ACTIVE", 0), ("b", "ACTIVE", 0))
    for count, awake, absent in ((6, "ab", "ab"), (7, "bc", "ab"), (9, "bc", "bc")):
        assert on_two(*idle, ("c", "WARM", 0), a=4, b=4, c=count) == awake
        assert on_two(*idle, a=4, b=4, c=count) == absent


def test_ratio_leaves_who_has_just_begun():
    """a and b have served for 4.9 s of the tenure of 5: c waits, however many it has."""
    begun = (("a", "ACTIVE", 0), ("b", "ACTIVE", 0))
    assert on_two(*begun, at_s=15.1, c=50) == "ab"
    assert on_two(*begun, at_s=15.0, c=50) == "bc"


def test_ratio_goes_on_with_what_it_has_begun():
    """b drains for c, and c waits for its memory: c is still wanted, though b has more
    requests by now; those that b still works on are no reason to keep it."""
    drains = (("a", "ACTIVE", 4), ("b", "DRAINING", 2), ("c", "WARM", 0))
    assert on_two(*drains, c=7) == "ac"
