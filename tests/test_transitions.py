"""Orders of steps: the best one by brute force, and never less than the controller's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models import referee
from foreserve.models.codec import load_plan, to_json
from foreserve.models.observed import Phase
from foreserve.models.placement import Action, Placement, ReplicaId, diff
from foreserve.models.problem import Fleet, ServedLlm, held_bytes
from foreserve.models.rules import Rules
from foreserve.models.transitions import Transition, leads, parts, transition
from foreserve.runtime.ledger import Ledger, phase_bytes
from foreserve.runtime.reconcile import reconcile
from foreserve.runtime.states import check_action, check_move
from tests.build import cluster, fleet, option
from tests.problems import placement, problem
from tests.test_cli import SCENARIO, TRACE
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


def swap(
    floors: dict[str, int], demand_rps: dict[str, float], after: str = "ACTIVE"
) -> Transition:
    """On n0, a and b change places, which are too small for both; each has a replica on
    n1 as well, that of a in the state ``after`` then. Floors are after a loss."""
    f = fleet(
        option("a", resident_bytes=60), option("b", resident_bytes=60), on=cluster(2, 2)
    )
    llms = tuple(replace(m, min_after_loss=floors.get(m.name, 0)) for m in f.llms)
    b = ("b", "n1/1", "ACTIVE")
    return transition(
        replace(f, llms=llms),
        placement(
            ("a", "n0/0", "ACTIVE"), ("b", "n0/1", "ACTIVE"), ("a", "n1/0", "ACTIVE"), b
        ),
        placement(
            ("a", "n0/1", "ACTIVE"), ("b", "n0/0", "ACTIVE"), ("a", "n1/0", after), b
        ),
        demand_rps,
    )


def test_floor_is_kept_at_a_price():
    """b is missed, a is not: a goes first, and is on n1 alone for a while. If a must
    survive the loss of any node, b goes first, and 1 request/s waits."""
    asked = {"a": 0.1, "b": 2.0}
    free, safe = swap({}, asked), swap({"a": 1}, asked)
    assert told(free)[0] == "demote a@n0/0x1"
    assert (free.exposures, free.delayed_requests) == (0, 0.0)
    assert told(safe)[0] == "demote b@n0/1x1"
    assert (safe.exposures, safe.exact) == (0, True)
    assert safe.delayed_requests > 1


def test_floor_that_no_order_keeps_is_told():
    """Both must survive, and one has to go first: one exposure, at the step of a, which
    nobody misses. A floor that the goal does not keep either is nobody's fault."""
    found = swap({"a": 1, "b": 1}, {"a": 0.1, "b": 2.0})
    assert (found.outages, found.exposures) == (0, 1)
    assert [str(s.action.replica) for s in found.steps if s.exposed] == ["a@n0/0x1"]
    assert swap({"a": 1, "b": 1}, {"a": 0.1, "b": 2.0}, after="WARM").exposures == 0


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
    _compare(f, before, after, demand)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_search_keeps_floors_as_brute_force_does(seed: int):
    """Two replicas each of a, which must survive the loss of a node, and of b, which may
    have to, full on two nodes, in another order each: up to eight steps."""
    rng = np.random.default_rng(seed)
    size = int(rng.choice([30, 60]))
    f = fleet(
        option("a", resident_bytes=size),
        option("b", resident_bytes=60),
        on=cluster(2, 2),
    )
    floors = 1, int(rng.integers(0, 2))
    llms = zip(f.llms, floors, strict=True)
    f = replace(f, llms=tuple(replace(m, min_after_loss=n) for m, n in llms))
    gpus = ["n0/0", "n0/1", "n1/0", "n1/1"]
    before, after = (
        placement(*((llm, g, "ACTIVE") for llm, g in zip(order, gpus, strict=True)))
        for order in (rng.permutation(list("aabb")) for _ in range(2))
    )
    if len(diff(before, after)) <= 8:
        _compare(f, before, after, {"a": rng.uniform(0, 2), "b": rng.uniform(0, 2)})


def _compare(
    f: Fleet, before: Placement, after: Placement, demand: dict[str, float]
) -> None:
    """The search against all orders, and the rule, which is no better."""
    orders: list[tuple[Action, ...]] = [()]
    for _ in (actions := diff(before, after)):
        orders = [
            (*order, action)
            for order in orders
            for action in actions
            if action not in order
            and _judged(f, before, after, (*order, action), demand) is not None
        ]
    least = min(_judged(f, before, after, order, demand) for order in orders)
    exact = transition(f, before, after, demand)
    ruled = transition(f, before, after, demand, most_states=0)
    assert exact.exact
    told = (exact.outages, exact.exposures, exact.delayed_requests)
    assert told == pytest.approx(least)
    assert (ruled.outages, ruled.exposures, ruled.delayed_requests + 1e-9) >= least


def _judged(
    f: Fleet,
    before: Placement,
    after: Placement,
    order: tuple[Action, ...],
    demand: dict[str, float],
) -> tuple[int, int, float] | None:
    """(outages, exposures, delayed requests) of an order; None if a step is not safe."""
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
    outages, exposures, delayed = 0, 0, 0.0
    floors = {
        m.name: m.min_after_loss
        for m in f.llms
        if asked[m.name] > 0
        and rate(m.name, started) > 0
        and _survives(f, m, started)
        and _survives(f, m, goal)
    }
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
        if floors.get(key.llm):
            llm = f.llm_by_name[key.llm]
            now, then = (_survives(f, llm, some) for some in (serving(), admitting))
            exposures += now and not then
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
    return outages, exposures, delayed


def _survives(f: Fleet, llm: ServedLlm, serving: set[ReplicaId]) -> bool:
    """Whether enough is left whichever node (each a failure domain) is lost."""
    return all(
        sum(k.llm == llm.name and k.gpus[0].node != n.name for k in serving)
        >= llm.min_after_loss
        for n in f.cluster.nodes
    )


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


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_moves_that_the_referee_allows_break_nothing(seed: int):
    """Where no LLM that is asked for would have to stop for the move (C8), the order that
    is found has no outage."""
    rng = np.random.default_rng(seed)
    f = replace(random_fleet(rng), rules=Rules(keep_serving=True))
    before, after = _no_overlap(random_placement(f, rng)), random_placement(f, rng)
    demand = {llm.name: float(rng.choice([0.0, 1.0])) for llm in f.llms}
    p = problem(f, [[rate] for rate in demand.values()], initial=before)
    found = transition(f, before, after, demand)
    if found.exact and not any(referee.c8_reachability(p, 0, before, after)):
        assert found.outages == 0


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_what_leads_there_is_told_from_what_does_not(seed: int):
    """The order that was found leads; without one of its steps, twice the same, or from
    another start it does not; and any two steps in the other order lead only if each is
    safe, as judged from the definition."""
    rng = np.random.default_rng(seed)
    f = random_fleet(rng)
    before, after = _no_overlap(random_placement(f, rng)), random_placement(f, rng)
    found = transition(f, before, after)
    assert leads(f, before, after, found)
    if not found.steps or len(list(parts(before, after))) != 1:
        return
    i, j = rng.integers(len(found.steps), size=2)
    shorter = found.steps[:i] + found.steps[i + 1 :]
    assert not leads(f, before, after, replace(found, steps=shorter))
    twice = (*found.steps, found.steps[i])
    assert not leads(f, before, after, replace(found, steps=twice))
    assert not leads(f, after, after, found)
    swapped = list(found.steps)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    order = tuple(step.action for step in swapped)
    safe = _judged(f, before, after, order, dict.fromkeys(f.llm_by_name, 1.0))
    other = replace(found, steps=tuple(swapped))
    assert leads(f, before, after, other) == (safe is not None)


def test_plan_file_holds_its_steps(plan, tmp_path, monkeypatch):
    """`plan solve` writes them, `explain` shows them as they are written; a file without
    them is read as before, one whose steps lead elsewhere is refused."""
    monkeypatch.chdir(tmp_path)
    scenario = SCENARIO.replace("scenarios: 4", "scenarios: 4, occasional_load: 0")
    (tmp_path / "s.yaml").write_text(scenario)
    (tmp_path / "t.csv").write_text(TRACE)
    code, *_ = plan(
        "solve --trace t.csv --scenario s.yaml --solver cpsat -o p.json --quiet"
    )
    assert code == 0
    made, before = load_plan("p.json"), Placement()
    for epoch in made.epochs:
        assert epoch.transition is not None
        assert leads(made.fleet, before, epoch.placement, epoch.transition)
        before = epoch.placement
    # Nothing is forecast of the first epoch.
    at = next(i for i, e in enumerate(made.epochs) if e.placement.replicas)
    chosen = made.epochs[at].transition
    assert chosen is not None
    assert chosen.steps[0].action.kind == "load"

    def write(file: str, change: Transition | None) -> None:
        told = list(made.epochs)
        told[at] = replace(told[at], transition=change)
        Path(file).write_text(to_json(replace(made, epochs=tuple(told))))

    slow = replace(chosen, delayed_requests=77.25)
    write("p.json", slow)
    shown = json.loads(plan(f"explain p.json --epoch {at} --json")[1])["transition"]
    assert shown["delayed_requests"] == 77.25
    write("old.json", None)
    old = json.loads(Path("old.json").read_text())
    for epoch in old["epochs"]:
        del epoch["transition"]
    Path("old.json").write_text(json.dumps(old))
    shown = json.loads(plan(f"explain old.json --epoch {at} --json")[1])["transition"]
    assert shown["delayed_requests"] == pytest.approx(chosen.delayed_requests, rel=1e-5)
    assert len(shown["steps"]) == len(slow.steps)
    write("wrong.json", replace(slow, steps=slow.steps[1:]))
    code, _, err = plan("explain wrong.json")
    assert code == 2
    assert "the steps do not lead" in err
