"""Orders of steps: the best one by brute force, and never less than the controller's."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.observed import Phase
from foreserve.models.placement import Action, Placement, ReplicaId, diff
from foreserve.models.problem import Fleet, held_bytes
from foreserve.models.transitions import Transition, parts, transition
from foreserve.runtime.ledger import Ledger, phase_bytes
from foreserve.runtime.reconcile import reconcile
from foreserve.runtime.states import check_action, check_move
from tests.build import cluster, fleet, option
from tests.problems import placement
from tests.test_reconcile import NEXT, World, random_fleet, random_placement

SEEDS = st.integers(0, 2**32 - 1)


def told(found: Transition) -> list[str]:
    return [f"{step.action.kind} {step.action.replica}" for step in found.steps]


def test_moves_make_before_they_break():
    """a moves to an empty GPU: 2 s of loading, 0.05 s to activate, then a second to drain
    the old one; nobody waits."""
    f = fleet(option("a"))
    found = transition(
        f, placement(("a", "n0/0", "ACTIVE")), placement(("a", "n0/1", "ACTIVE"))
    )
    assert told(found) == [
        "load a@n0/1x1",
        "activate a@n0/1x1",
        "demote a@n0/0x1",
        "drop a@n0/0x1",
    ]
    assert (found.outages, found.delayed_requests, found.exact) == (0, 0.0, True)
    assert found.seconds == pytest.approx(3.05)


def test_chain_goes_from_its_end():
    """a goes 0 -> 1, b goes 1 -> 2, and 2 is free: b goes first, none is ever away."""
    f = fleet(
        option("a", resident_bytes=80), option("b", resident_bytes=80), on=cluster(4)
    )
    found = transition(
        f,
        placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "ACTIVE")),
        placement(("a", "n0/1", "ACTIVE"), ("b", "n0/2", "ACTIVE")),
    )
    assert told(found)[0] == "load b@n0/2x1"
    assert found.outages == 0


def test_circle_breaks_where_least_is_asked_for():
    """a and b swap GPUs that hold one of them: one of the two must go before it is back.
    b does, of which 0.1 requests/s are asked: 1 s to drain, 2.05 s until a has moved, a
    second until the old a has gone, and 2.05 s until b is back."""
    f = fleet(option("a", resident_bytes=80), option("b", resident_bytes=80))
    found = transition(
        f,
        placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "ACTIVE")),
        placement(("a", "n0/1", "ACTIVE"), ("b", "n0/0", "ACTIVE")),
        {"a": 1.0, "b": 0.1},
    )
    assert found.outages == 1
    assert [str(s.action.replica) for s in found.steps if s.outage] == ["b@n0/1x1"]
    assert found.delayed_requests == pytest.approx(0.1 * (1 + 2.05 + 1 + 2.05))


def test_what_many_ask_for_is_loaded_first():
    """a and b come to one GPU set, b with ten times the rate: of the two
    orders, b first keeps ten requests/s waiting for 2.05 s less."""
    f = fleet(option("a", rate_rps=1.0), option("b", rate_rps=10.0), on=cluster(1))
    both = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/0", "ACTIVE"))
    found = transition(f, Placement(), both)
    assert told(found)[:2] == ["load b@n0/0x1", "activate b@n0/0x1"]
    assert found.delayed_requests == pytest.approx(11 * 2.05 + 1 * 2.05)


def test_parts_that_do_not_meet_have_clocks_of_their_own():
    """a loads on one GPU while b does on the other: 2.05 s in all."""
    f = fleet(option("a"), option("b"))
    found = transition(
        f, Placement(), placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "ACTIVE"))
    )
    assert found.seconds == pytest.approx(2.05)


def test_replicas_of_lost_gpus_are_gone():
    """A replica on a node that is no more asks for no step."""
    f = fleet(option("a"))
    gone, here = placement(("a", "n9/0", "ACTIVE")), placement(("a", "n0/0", "WARM"))
    assert told(transition(f, gone, here)) == ["load a@n0/0x1"]


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS, exact=st.booleans())
def test_every_step_is_one_the_controller_may_take(seed: int, exact: bool):
    """Played through the controller's own table of phases and ledger of memory: each step
    legal, each within memory, no two hold KV on a GPU unless so desired; the end is the
    goal. By search and by rule alike."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    before, after = _no_overlap(random_placement(f, rng)), random_placement(f, rng)
    found = transition(f, before, after, most_states=500 if exact else 0)
    assert sorted(map(str, (s.action for s in found.steps))) == sorted(
        map(str, diff(before, after))
    )
    phases: dict[ReplicaId, Phase] = {k: r.state for k, r in before.by_id.items()}
    ledger = Ledger(f)
    for key, phase in phases.items():
        ledger.hold(key.gpus, _bytes(f, key, phase))
    for action in (step.action for step in found.steps):
        key, now = action.replica, phases.get(action.replica)
        then: Phase | None = check_action(action.kind, key, now)
        while True:
            check_move(key, now, then)
            ledger.hold(key.gpus, _bytes(f, key, then) - _bytes(f, key, now))
            if then is None:
                del phases[key]
                break
            phases[key] = now = then
            if then == "ACTIVE":
                _alone(key, phases, after)
            if then not in NEXT:
                break
            then = NEXT[then]
    assert phases == {key: r.state for key, r in after.by_id.items()}


def _no_overlap(start: Placement) -> Placement:
    """Without ACTIVE replicas on GPUs that another ACTIVE one serves on."""
    kept = Placement()
    for replica in start.replicas:
        busy = {g for r in kept.replicas if r.state == "ACTIVE" for g in r.gpus}
        if replica.state == "WARM" or busy.isdisjoint(replica.gpus):
            kept = Placement(replicas=(*kept.replicas, replica))
    return kept


def _bytes(f: Fleet, key: ReplicaId, phase: Phase | None) -> int:
    return phase_bytes(f.option_of(key.llm, key.gpus), phase)


def _alone(key: ReplicaId, phases: dict[ReplicaId, Phase], goal: Placement) -> None:
    for other, phase in phases.items():
        if phase == "ACTIVE" and other != key and set(other.gpus) & set(key.gpus):
            assert set(other.gpus) == set(key.gpus)
            assert goal.by_id[other].state == goal.by_id[key].state == "ACTIVE"


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_search_finds_what_brute_force_finds(seed: int):
    """All orders of up to six steps, each judged from its definition alone; the rule's
    order is safe too, and no better."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    before, after = _no_overlap(random_placement(f, rng)), random_placement(f, rng)
    actions = diff(before, after)
    demand = {llm.name: float(rng.uniform(0, 2)) for llm in f.llms}
    if len(actions) > 6 or len(list(parts(before, after))) != 1:
        return
    costs = [
        cost
        for order in permutations(actions)
        if (cost := _judged(f, before, after, order, demand)) is not None
    ]
    exact = transition(f, before, after, demand)
    ruled = transition(f, before, after, demand, most_states=0)
    least = min(costs)
    assert exact.exact
    assert (exact.outages, exact.delayed_requests) == pytest.approx(least)
    assert (ruled.outages, ruled.delayed_requests + 1e-9) >= least


def _judged(
    f: Fleet,
    before: Placement,
    after: Placement,
    order: tuple[Action, ...],
    demand: dict[str, float],
) -> tuple[int, float] | None:
    """(outages, delayed requests) of an order; None where a step of it is not safe."""
    states: dict[ReplicaId, str] = {key: r.state for key, r in before.by_id.items()}
    goal = {r.id for r in after.replicas if r.state == "ACTIVE"}

    def rate(llm: str, serving: set[ReplicaId]) -> float:
        return sum(
            f.option_of(llm, key.gpus).rate_rps for key in serving if key.llm == llm
        )

    def serving() -> set[ReplicaId]:
        return {key for key, state in states.items() if state == "ACTIVE"}

    started = serving()
    asked = {m.name: min(demand[m.name], rate(m.name, goal)) for m in f.llms}
    outages, delayed = 0, 0.0
    for action in order:
        key, own = action.replica, f.option_of(action.llm, action.gpus)
        seconds = {
            "demote": own.exec_s,
            "drop": 0.0,
            "load": own.load_s,
            "activate": own.activate_s,
        }[action.kind]
        expected = {
            "demote": "ACTIVE",
            "drop": "WARM",
            "load": None,
            "activate": "WARM",
        }
        if states.get(key) != expected[action.kind]:
            return None
        admitting = serving() - ({key} if action.kind == "demote" else set())
        if action.kind == "activate":
            for other in serving():
                overlap = set(other.gpus) & set(key.gpus)
                wanted = {other, key} <= goal and set(other.gpus) == set(key.gpus)
                if overlap and not wanted:
                    return None
        if (
            action.kind == "demote"
            and asked[key.llm] > 0
            and rate(key.llm, started) > 0
            and rate(key.llm, admitting) == 0
        ):
            outages += 1
        delayed += seconds * sum(
            max(0.0, asked[m.name] - rate(m.name, admitting)) for m in f.llms
        )
        if action.kind == "drop":
            del states[key]
        else:
            states[key] = "ACTIVE" if action.kind == "activate" else "WARM"
        for gpu in key.gpus:
            held = sum(
                held_bytes(f.option_of(k.llm, k.gpus), s)  # type: ignore[arg-type]
                for k, s in states.items()
                if gpu in k.gpus
            )
            if held > f.cluster.usable_bytes(gpu):
                return None
    return outages, delayed


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_no_outage_where_the_controller_has_none(seed: int):
    """The controller, one call after another, is one order of the same steps: where no
    LLM that serves before and after is ever without a replica then, none is here."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    before, after = _no_overlap(random_placement(f, rng)), random_placement(f, rng)
    found = transition(f, before, after)
    if not found.exact or not found.outages:
        return
    world = World(f, rng, {key: r.state for key, r in before.by_id.items()})
    kept = {r.llm for r in before.replicas if r.state == "ACTIVE"} & {
        r.llm for r in after.replicas if r.state == "ACTIVE"
    }
    broken = False
    for _ in range(300):
        serving = {k.llm for k, phase in world.replicas.items() if phase == "ACTIVE"}
        broken = broken or not kept <= serving
        actions = reconcile(after, world.observe(), f)
        world.apply(actions)
        if not actions and not world.ticks:
            break
        world.tick()
    assert broken
