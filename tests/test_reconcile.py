"""The steps from observed to desired: safe at every moment, and always arriving."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.errors import IllegalTransition
from foreserve.models.observed import HOLDS_KV, Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement, Replica, ReplicaId, State
from foreserve.models.problem import Fleet
from foreserve.models.referee import fleet_violations
from foreserve.models.specs import GpuId
from foreserve.runtime.ledger import Ledger, OverCommitted, phase_bytes
from foreserve.runtime.reconcile import reconcile
from foreserve.runtime.states import LEGAL, check_action, check_move
from tests.build import cluster, fleet, gpu, option

NEXT: dict[Phase, Phase] = {
    "LOADING": "WARM",
    "ACTIVATING": "ACTIVE",
    "DRAINING": "WARM",
}


def seen(llm: str, *gpus: int, phase: Phase, in_flight: int = 0) -> ObservedReplica:
    return ObservedReplica(
        llm=llm, gpus=tuple(map(gpu, gpus)), phase=phase, in_flight=in_flight
    )


def want(llm: str, *gpus: int, state: State = "ACTIVE") -> Replica:
    return Replica(llm=llm, gpus=tuple(map(gpu, gpus)), state=state)


def steps(desired: list[Replica], now: list[ObservedReplica], on: Fleet) -> list[str]:
    """Emitted actions as ``kind llm@gpus``."""
    actions = reconcile(
        Placement(replicas=tuple(desired)),
        Observed(now_s=0.0, replicas=tuple(now)),
        on,
    )
    return [f"{action.kind} {action.replica}" for action in actions]


# --- by hand: 100 bytes a GPU; a replica holds 30, and 20 more while ACTIVE -------------


def test_from_nothing_loads_then_activates():
    """An absent replica is loaded first; activation comes once it is observed WARM."""
    f = fleet(option("a"))
    goal = [want("a", 0)]
    assert steps(goal, [], f) == ["load a@n0/0x1"]
    assert steps(goal, [seen("a", 0, phase="LOADING")], f) == []
    assert steps(goal, [seen("a", 0, phase="WARM")], f) == ["activate a@n0/0x1"]
    assert steps(goal, [seen("a", 0, phase="ACTIVATING")], f) == []
    assert steps(goal, [seen("a", 0, phase="ACTIVE")], f) == []


def test_leaves_by_draining_then_dropping():
    """An unwanted ACTIVE replica is demoted, and dropped only once it is WARM."""
    f = fleet(option("a"))
    assert steps([], [seen("a", 0, phase="ACTIVE")], f) == ["demote a@n0/0x1"]
    assert steps([], [seen("a", 0, phase="DRAINING")], f) == []
    assert steps([], [seen("a", 0, phase="ACTIVATING")], f) == []
    assert steps([], [seen("a", 0, phase="WARM")], f) == ["drop a@n0/0x1"]
    assert steps([], [seen("a", 0, phase="LOADING")], f) == ["drop a@n0/0x1"]


def test_room_counts_once_it_is_observed_to_be_free():
    """60 + 60 > 100 bytes: b is loaded after a's drop was seen, not beside it."""
    f = fleet(option("a", resident_bytes=60), option("b", resident_bytes=60))
    goal = [want("b", 0, state="WARM")]
    assert steps(goal, [seen("a", 0, phase="WARM")], f) == ["drop a@n0/0x1"]
    assert steps(goal, [], f) == ["load b@n0/0x1"]


def test_move_makes_before_it_breaks():
    """a moves from GPU 0 to the empty GPU 1: the old one serves until the new one does."""
    f = fleet(option("a"))
    goal, old = [want("a", 1)], seen("a", 0, phase="ACTIVE", in_flight=3)
    assert steps(goal, [old], f) == ["load a@n0/1x1"]
    assert steps(goal, [old, seen("a", 1, phase="WARM")], f) == ["activate a@n0/1x1"]
    assert steps(goal, [old, seen("a", 1, phase="ACTIVATING")], f) == []
    assert steps(goal, [old, seen("a", 1, phase="ACTIVE")], f) == ["demote a@n0/0x1"]


def test_chain_waits_for_its_first_link():
    """a goes 0 -> 1, b goes 1 -> 2 and 2 is free: b moves first and none is broken.

    GPUs hold one ACTIVE replica, so a's replacement has room only after b has left.
    """
    f = fleet(
        option("a", resident_bytes=80), option("b", resident_bytes=80), on=cluster(4)
    )
    goal = [want("a", 1), want("b", 2)]
    a, b = seen("a", 0, phase="ACTIVE"), seen("b", 1, phase="ACTIVE")
    assert steps(goal, [a, b], f) == ["load b@n0/2x1"]
    moved = seen("b", 2, phase="ACTIVE")
    assert steps(goal, [a, b, moved], f) == ["demote b@n0/1x1"]
    assert steps(goal, [a, moved], f) == ["load a@n0/1x1"]


def test_circle_breaks_at_the_least_missed_replica():
    """a and b swap full GPUs: one must go first, and it is the one with less in flight."""
    f = fleet(option("a", resident_bytes=80), option("b", resident_bytes=80))
    goal = [want("a", 1), want("b", 0)]
    now = [
        seen("a", 0, phase="ACTIVE", in_flight=5),
        seen("b", 1, phase="ACTIVE", in_flight=2),
    ]
    assert steps(goal, now, f) == ["demote b@n0/1x1"]


def test_circle_loads_before_it_breaks():
    """With room for weights beside the other, both are loaded before anything stops."""
    f = fleet(option("a"), option("b"))
    goal = [want("a", 1), want("b", 0)]
    now = [seen("a", 0, phase="ACTIVE"), seen("b", 1, phase="ACTIVE")]
    assert steps(goal, now, f) == ["load b@n0/0x1", "load a@n0/1x1"]
    half = [*now, seen("b", 0, phase="WARM"), seen("a", 1, phase="LOADING")]
    assert steps(goal, half, f) == []
    full = [*now, seen("b", 0, phase="WARM"), seen("a", 1, phase="WARM")]
    assert steps(goal, full, f) == ["demote a@n0/0x1"]


def test_scale_in_keeps_what_is_desired_to_serve():
    """From three ACTIVE to one elsewhere: two go at once, the last one at the end."""
    f = fleet(option("a"), on=cluster(4))
    now = [seen("a", i, phase="ACTIVE") for i in range(3)]
    assert steps([want("a", 3)], now, f) == [
        "demote a@n0/0x1",
        "demote a@n0/1x1",
        "load a@n0/3x1",
    ]


def test_scale_in_starts_with_what_is_in_the_way():
    """Of two on GPUs 0 and 2, the one on 2 goes first, though busier: it keeps the
    replacement on GPUs 2-3 from serving, and the other can serve meanwhile."""
    f = fleet(option("a"), option("a", tp=2), on=cluster(4))
    now = [
        seen("a", 0, phase="ACTIVE"),
        seen("a", 2, phase="ACTIVE", in_flight=5),
        seen("a", 2, 3, phase="WARM"),
    ]
    assert steps([want("a", 2, 3)], now, f) == ["demote a@n0/2x1"]


def test_prewarming_does_not_take_a_replacements_room():
    """a and b swap; GPU 0 holds a (50) and u (25, unwanted), so 25 bytes are free.

    w (25, wanted WARM) would fit into them now, but then b's weights (30) could not come
    beside a once u has gone: w waits.
    """
    f = fleet(
        option("a"),
        option("b"),
        option("u", resident_bytes=25),
        option("w", resident_bytes=25),
    )
    goal = [want("a", 1), want("b", 0), want("w", 0, state="WARM")]
    now = [
        seen("a", 0, phase="ACTIVE"),
        seen("u", 0, phase="WARM"),
        seen("b", 1, phase="ACTIVE"),
    ]
    assert steps(goal, now, f) == ["drop u@n0/0x1", "load a@n0/1x1"]
    assert steps(goal, [now[0], now[2]], f) == ["load b@n0/0x1", "load a@n0/1x1"]


def test_loads_wait_for_the_room_of_their_peak():
    """a takes 50 while it loads and 30 once it is WARM. Beside x, which is to go and holds
    30 on a GPU of 100, and b, there already, there is no room yet; c, which is no more
    urgent, waits with it. Once x is gone a loads, then c."""
    f = fleet(*(option(llm) for llm in "bcx"), option("a", load_extra_bytes=20))
    goal = [want(llm, 0, state="WARM") for llm in "abc"]
    b = seen("b", 0, phase="WARM")
    assert steps(goal, [b, seen("x", 0, phase="WARM")], f) == ["drop x@n0/0x1"]
    assert steps(goal, [b], f) == ["load a@n0/0x1"]
    assert steps(goal, [b, seen("a", 0, phase="LOADING")], f) == []
    assert steps(goal, [b, seen("a", 0, phase="WARM")], f) == ["load c@n0/0x1"]


def test_a_peak_for_which_there_is_never_room_keeps_nobody_waiting():
    """a takes 60 while it loads; beside b, which serves with 50, only its 30 would fit. No
    load is begun that an agent would refuse; c, which fits, is loaded."""
    a = option("a", load_extra_bytes=30)
    f = fleet(a, option("b"), option("c", resident_bytes=20))
    goal = [want("b", 0), *(want(llm, 0, state="WARM") for llm in "ac")]
    b = seen("b", 0, phase="ACTIVE")
    assert steps(goal, [b], f) == ["load c@n0/0x1"]
    assert steps(goal[:2], [b], f) == []


def test_never_two_active_on_overlapping_gpus():
    """b on GPUs 0-1 is not activated while a serves on GPU 0, though memory would do."""
    f = fleet(option("a"), option("b", tp=2))
    now = [seen("a", 0, phase="ACTIVE"), seen("b", 0, 1, phase="WARM")]
    assert steps([want("b", 0, 1)], now, f) == ["demote a@n0/0x1"]
    now = [seen("a", 0, phase="DRAINING"), seen("b", 0, 1, phase="WARM")]
    assert steps([want("b", 0, 1)], now, f) == []


def test_wanted_sharing_is_allowed():
    """Two replicas wanted ACTIVE on the same GPU are both activated."""
    f = fleet(option("a"), option("b"))
    now = [seen("a", 0, phase="WARM"), seen("b", 0, phase="WARM")]
    assert steps([want("a", 0), want("b", 0)], now, f) == [
        "activate a@n0/0x1",
        "activate b@n0/0x1",
    ]


def test_ledger_refuses_what_does_not_fit():
    """70 of 100 bytes are held; 30 more fit, 31 do not, and the error names the GPU."""
    ledger = Ledger(fleet(option("a")))
    ledger.hold((gpu(0),), 70)
    assert ledger.can_hold((gpu(0), gpu(1)), 30)
    with pytest.raises(OverCommitted, match="GPU n0/0: 31 bytes asked, 30 are free"):
        ledger.hold((gpu(0), gpu(1)), 31)


def test_illegal_moves_raise_with_their_story():
    """The table knows no way from LOADING to ACTIVE, and the message says what was."""
    key = ReplicaId(llm="a", gpus=(gpu(0),))
    check_move(key, "LOADING", "WARM")
    with pytest.raises(IllegalTransition, match=r"LOADING -> ACTIVE .* at 5 s"):
        check_move(key, "LOADING", "ACTIVE", [(5.0, "LOADING")])
    assert check_action("drop", key, "LOADING") is None
    with pytest.raises(IllegalTransition, match="cannot drop while ACTIVE"):
        check_action("drop", key, "ACTIVE")


# --- at random: any fleet, start, goal, latencies and crashes --------------------------


@dataclass
class World:
    """A cluster whose phases take random numbers of ticks. Checks every change."""

    fleet: Fleet
    rng: np.random.Generator
    replicas: dict[ReplicaId, Phase]
    lost_gpus: frozenset[GpuId] = frozenset()
    ticks: dict[ReplicaId, int] = field(default_factory=dict)
    log: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.fleet)
        for key, phase in self.replicas.items():
            self.ledger.hold(key.gpus, self.num_bytes(key, phase))
            if phase in NEXT:
                self.ticks[key] = self.latency()

    def latency(self) -> int:
        return int(self.rng.integers(1, 6))

    def num_bytes(self, key: ReplicaId, phase: Phase | None) -> int:
        return phase_bytes(self.fleet.option_of(key.llm, key.gpus), phase)

    def move(self, key: ReplicaId, after: Phase | None) -> None:
        before = self.replicas.get(key)
        check_move(key, before, after)
        grown = self.num_bytes(key, after) - self.num_bytes(key, before)
        self.ledger.hold(key.gpus, grown)  # raises if over-committed
        self.ticks.pop(key, None)
        if after is None:
            del self.replicas[key]
            return
        self.replicas[key] = after
        if after in NEXT:
            self.ticks[key] = self.latency()

    def observe(self) -> Observed:
        replicas = tuple(
            ObservedReplica(
                llm=key.llm,
                gpus=key.gpus,
                phase=phase,
                in_flight=int(self.rng.integers(3)) if phase == "ACTIVE" else 0,
            )
            for key, phase in self.replicas.items()
        )
        return Observed(now_s=0.0, replicas=replicas, lost_gpus=self.lost_gpus)

    def lose(self, gpus: frozenset[GpuId]) -> None:
        """These GPUs are gone, with all that touches them; those lost before are back."""
        self.ledger.open(self.lost_gpus)
        self.lost_gpus = gpus
        for key in [key for key in self.replicas if not gpus.isdisjoint(key.gpus)]:
            self.move(key, None)
        self.ledger.shut(gpus)

    def apply(self, actions: tuple[Action, ...]) -> None:
        """In random order: a call's actions must not rely on one another."""
        for i in self.rng.permutation(len(actions)):
            action = actions[i]
            key = action.replica
            after = check_action(action.kind, key, self.replicas.get(key))
            self.move(key, after)
            self.log.append(action)

    def tick(self) -> None:
        for key in list(self.ticks):
            self.ticks[key] -= 1
            if self.ticks[key] == 0:
                self.move(key, NEXT[self.replicas[key]])

    def crash(self) -> None:
        if self.replicas:
            keys = sorted(self.replicas)
            self.move(keys[int(self.rng.integers(len(keys)))], None)


def random_fleet(rng: np.random.Generator) -> Fleet:
    """2-5 LLMs of random size on 1-2 nodes of 1-4 GPUs, TP 1 and 2."""
    on = cluster(int(rng.choice([1, 2, 4])), int(rng.integers(1, 3)))
    options = []
    for name in "abcde"[: rng.integers(2, 6)]:
        size = int(rng.integers(10, 60))
        for tp in (1, 2):
            options.append(
                option(
                    name,
                    tp=tp,
                    resident_bytes=-(-size // tp),
                    kv_bytes=int(rng.integers(1, 41)),
                    concurrency=int(rng.integers(1, 9)),
                )
            )
    return fleet(*options, on=on)


def random_placement(on: Fleet, rng: np.random.Generator) -> Placement:
    """Replicas in random order and state, each kept if (C1)-(C4) still hold."""
    candidates = list(on.candidates())
    chosen = Placement()
    for i in rng.permutation(len(candidates))[: rng.integers(0, 12)]:
        found, gpus = candidates[i]
        state: State = "ACTIVE" if rng.random() < 0.5 else "WARM"
        replica = Replica(llm=found.llm, gpus=gpus, state=state)
        larger = Placement(replicas=(*chosen.replicas, replica))
        if not list(fleet_violations(on, larger)):
            chosen = larger
    return chosen


def random_start(
    on: Fleet, rng: np.random.Generator, *, settled: bool
) -> dict[ReplicaId, Phase]:
    """A feasible placement, its replicas in any phase that holds no more memory."""
    phases: dict[ReplicaId, Phase] = {}
    for key, replica in random_placement(on, rng).by_id.items():
        phase: Phase = replica.state
        if not settled and replica.state == "WARM":
            phase = rng.choice(["LOADING", "WARM"])
        elif not settled:
            phase = rng.choice(["ACTIVATING", "ACTIVE", "DRAINING"])
        phases[key] = phase
    return phases


def settle(world: World, goal: Placement, crashes: int = 0) -> None:
    """Run until nothing moves and nothing is asked for; fail if that takes too long."""
    steps_left = 30 * (len(world.replicas) + len(goal.replicas) + crashes + 1)
    while steps_left:
        steps_left -= 1
        actions = reconcile(goal, world.observe(), world.fleet)
        world.apply(actions)
        if not actions and not world.ticks and not crashes:
            break
        if crashes and world.rng.random() < 0.3:
            world.crash()
            crashes -= 1
        world.tick()
    assert steps_left, f"no end: {world.replicas} for {goal.replicas}"
    assert world.replicas == {key: r.state for key, r in goal.by_id.items()}


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), crashes=st.integers(0, 4))
def test_always_arrives_and_never_overcommits(seed: int, crashes: int):
    """From any start, with crashes on the way: exactly the goal, each step legal and
    within memory (`World` raises otherwise), and no dedicated GPU serves two."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    world = World(f, rng, random_start(f, rng, settled=False))
    settle(world, random_placement(f, rng), crashes)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_step_is_taken_twice(seed: int):
    """Without crashes each replica is demoted, dropped, loaded, activated at most once,
    and nothing at all happens where observed is desired already."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    world = World(f, rng, random_start(f, rng, settled=True))
    goal = random_placement(f, rng)
    settle(world, goal)
    assert len(set(world.log)) == len(world.log)
    assert reconcile(goal, world.observe(), f) == ()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_goal_may_change_on_the_way(seed: int):
    """Goals that change before they are reached do no harm: the last one is reached."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    world = World(f, rng, random_start(f, rng, settled=False))
    for _ in range(3):
        goal = random_placement(f, rng)
        for _ in range(int(rng.integers(6))):
            world.apply(reconcile(goal, world.observe(), f))
            world.tick()
    settle(world, goal)


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_overlapping_replicas_serve_together_only_if_desired(seed: int):
    """Never do two replicas hold KV on one GPU unless both are desired ACTIVE there on
    the same set (starts are settled, so none overlaps at the beginning)."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    start = {
        key: phase
        for key, phase in random_start(f, rng, settled=True).items()
        if phase == "WARM" or rng.random() < 0.8
    }
    used: set[GpuId] = set()
    for key, phase in list(start.items()):
        if phase == "ACTIVE" and used & set(key.gpus):
            start[key] = "WARM"
        elif phase == "ACTIVE":
            used |= set(key.gpus)
    world, goal = World(f, rng, start), random_placement(f, rng)
    wanted = {key for key, r in goal.by_id.items() if r.state == "ACTIVE"}
    for _ in range(300):
        serving = [k for k, phase in world.replicas.items() if phase in HOLDS_KV]
        for one in serving:
            for other in serving:
                if one < other and set(one.gpus) & set(other.gpus):
                    assert {one, other} <= wanted
        actions = reconcile(goal, world.observe(), f)
        world.apply(actions)
        if not actions and not world.ticks:
            break
        world.tick()


@settings(max_examples=600, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_service_never_stops_where_both_fit(seed: int):
    """An LLM that serves keeps serving where a desired ACTIVE replica of it fits beside
    everything there at the start and everything desired, alone on its GPUs with KV."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    start = random_start(f, rng, settled=True)
    goal = random_placement(f, rng)
    world = World(f, rng, dict(start))
    both = Ledger(f)
    for key in {*start, *goal.by_id}:
        wanted = goal.by_id.get(key)
        states = (start.get(key), wanted.state if wanted else None)
        both.book(key.gpus, max(world.num_bytes(key, state) for state in states))
    kept = set()
    for key, replica in goal.by_id.items():
        others = [
            other
            for other, phase in start.items()
            if phase == "ACTIVE" and other != key and set(other.gpus) & set(key.gpus)
        ]
        if (
            replica.state == "ACTIVE"
            and any(k.llm == key.llm and p == "ACTIVE" for k, p in start.items())
            and all(both.free_bytes[g] >= 0 for g in key.gpus)
            and not others
        ):
            kept.add(key.llm)
    for _ in range(300):
        serving = {k.llm for k, phase in world.replicas.items() if phase == "ACTIVE"}
        assert kept <= serving
        actions = reconcile(goal, world.observe(), f)
        world.apply(actions)
        if not actions and not world.ticks:
            break
        world.tick()


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_lost_gpus_are_left_alone_and_the_rest_goes_on(seed: int):
    """GPUs are lost on the way: nothing is asked of them (`World` would have no room),
    all that is desired elsewhere comes to serve, and what serves beyond that stands in
    for something lost. Once they are back, exactly the goal is reached."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    world = World(f, rng, random_start(f, rng, settled=False))
    goal = random_placement(f, rng)
    for _ in range(int(rng.integers(6))):
        world.apply(reconcile(goal, world.observe(), f))
        world.tick()
    world.lose(frozenset(g for g in f.cluster.gpus if rng.random() < 0.4))
    reachable = goal.without(world.lost_gpus)
    for _ in range(300):
        actions = reconcile(goal, world.observe(), f)
        assert all(world.lost_gpus.isdisjoint(a.gpus) for a in actions)
        world.apply(actions)
        if not actions and not world.ticks:
            break
        world.tick()
    standing_in = {r.llm for r in goal.replicas if r.id not in reachable.by_id}
    for key, replica in reachable.by_id.items():
        assert replica.state == "WARM" or world.replicas.get(key) == "ACTIVE"
    for key, phase in world.replicas.items():
        wanted = reachable.by_id.get(key)
        if wanted is None or phase != wanted.state:
            assert phase == "ACTIVE"
            assert key.llm in standing_in
    world.lose(frozenset())
    settle(world, goal)


def test_what_stands_in_for_a_lost_replica_goes_on_serving():
    """a is desired on GPU 1, which is lost: it serves on from GPU 0 until that is back,
    unless b is desired there, which serves nowhere."""
    f = fleet(option("a", resident_bytes=80), option("b", resident_bytes=80))
    old = seen("a", 0, phase="ACTIVE")
    lost = Observed(now_s=0.0, replicas=(old,), lost_gpus=frozenset({gpu(1)}))
    goal = Placement(replicas=(want("a", 1),))
    assert reconcile(goal, lost, f) == ()
    both = Placement(replicas=(want("a", 1), want("b", 0)))
    assert [str(a.kind) for a in reconcile(both, lost, f)] == ["demote"]


def test_every_phase_can_end():
    """Each phase of the table has a way on and a way out (crash)."""
    phases = {before for before, _ in LEGAL if before is not None}
    assert phases == {"LOADING", "WARM", "ACTIVATING", "ACTIVE", "DRAINING"}
    assert all((phase, None) in LEGAL for phase in phases)
