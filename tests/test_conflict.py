"""Rules that cannot hold together: found, no larger than needed, and curable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.problem import Fleet, Problem
from foreserve.models.rules import Held, Rules
from foreserve.planner.conflict import conflict
from foreserve.solvers.base import SolveOptions
from tests import oracle
from tests.build import cluster, fleet, gpu, option
from tests.problems import asking, placement, problem

EXACT = SolveOptions(gap=0.0, in_process=True)


def ruled(f: Fleet, **rules: dict[str, object]) -> Problem:
    """The problem without demand of a fleet whose LLMs have these rules."""
    llms = tuple(replace(m, **rules.get(m.name, {})) for m in f.llms)  # type: ignore[arg-type]
    return problem(replace(f, llms=llms), [[0.0]] * len(llms))


def test_rules_that_can_hold_are_no_conflict():
    """One ACTIVE replica each on two GPUs."""
    f = fleet(option("a"), option("b"))
    assert conflict(ruled(f, a={"min_active": 1}, b={"min_active": 1}), EXACT) is None


def test_two_floors_are_too_many_gpus():
    """a wants two GPUs and b one, of two there are; c, which wants nothing, is no part
    of it. Each change that helps is the least of its kind, the cheapest first: a third
    replica's rent is spared by lowering either, a further node costs its 1 s more."""
    f = fleet(option("a"), option("b"), option("c"))
    found = conflict(ruled(f, a={"min_active": 2}, b={"min_active": 1}), EXACT)
    assert found is not None
    assert found.rules == ("'a' keeps min_active=2", "'b' keeps min_active=1")
    assert found.smallest
    assert found.cluster == "n0 (2 g)"
    assert [(way.change, way.objective) for way in found.relaxations] == [
        ("'a': min_active=1", 2 * (2 + 1)),
        ("'b': min_active=0", 2 * (2 + 1)),
        ("1 more node like n0 (2 g)", 3 * (2 + 1)),
    ]


def test_a_rule_against_itself():
    """Two replicas at least and one at most: no GPU in the world helps."""
    f = fleet(option("a"))
    found = conflict(ruled(f, a={"min_active": 2, "max_replicas": 1}), EXACT)
    assert found is not None
    assert found.rules == ("'a' keeps min_active=2", "'a' has max_replicas=1")
    assert {way.change for way in found.relaxations} == {
        "'a': min_active=1",
        "'a': max_replicas=2",
    }


def test_nodes_and_tp_are_rules_too():
    """a and b both want the one GPU of n0, and a could leave if its rule let it; at TP 2,
    to which c is fixed, nothing fits a node of one GPU."""
    f = fleet(option("a"), option("b"), on=cluster(1, 2))
    own = {"min_active": 1, "nodes": ("n0",)}
    found = conflict(ruled(f, a=own, b=own), EXACT)
    assert found is not None
    assert "'a' may only be on n0" in found.rules
    assert "'b': any node" in {way.change for way in found.relaxations}

    c = fleet(option("c", tp=2), on=cluster(1, 2))
    other = {"c": [option("c", tp=1), option("c", tp=2)]}
    found = conflict(ruled(c, c={"min_active": 1}), EXACT, other)
    assert found is not None
    assert found.rules == ("'c' keeps min_active=1", "'c' runs at TP 2 only")
    assert "'c': any TP size (1, 2)" in {way.change for way in found.relaxations}


def test_memory_is_told_with_its_numbers():
    """80 and 30 GiB in 100: a can never serve, and only giving up its floor helps."""
    gib = 2**30
    f = fleet(
        option("a", resident_bytes=80 * gib, kv_bytes=30 * gib),
        on=cluster(memory_bytes=100 * gib),
    )
    found = conflict(ruled(f, a={"min_active": 1}), EXACT)
    assert found is not None
    assert found.rules == (
        "'a' keeps min_active=1",
        "'a' at TP 1 takes 110.0 GiB per GPU while ACTIVE, 100.0 are usable",
    )
    assert [way.change for way in found.relaxations] == ["'a': min_active=0"]


def test_two_conflicts_need_two_changes():
    """a and b each contradict themselves: no single change suffices, two do."""
    f = fleet(option("a"), option("b"), on=cluster(4))
    own = {"min_active": 2, "max_replicas": 1}
    found = conflict(ruled(f, a=own, b=own), EXACT)
    assert found is not None
    assert len(found.rules) == 2
    assert found.relaxations == ()
    assert sorted(found.together) == [
        "without: 'a' has max_replicas=1",
        "without: 'b' has max_replicas=1",
    ]


def test_rules_of_the_fleet_conflict_too():
    """a is held ACTIVE on n0/0, which is closed; b must survive the loss of any node, and
    there is one. Each alone cannot hold; each is told with its way out."""
    f = fleet(option("a"), option("b"))
    here = Held(llm="a", gpus=(gpu(0),), state="ACTIVE")
    f = replace(f, rules=Rules(held=(here,), closed=(gpu(0),), max_llms_per_gpu=2))
    found = conflict(ruled(f), EXACT)
    assert found is not None
    assert found.rules == ("'a' is held ACTIVE on n0/0", "closed: n0/0")
    assert found.smallest
    assert {way.change for way in found.relaxations} == {
        "'a': not held on n0/0",
        "open n0/0",
    }
    f = fleet(option("a"), option("b"))
    found = conflict(ruled(f, b={"min_after_loss": 1}), EXACT)
    assert found is not None
    assert found.rules == ("'b' keeps min_after_loss=1",)
    assert {way.change for way in found.relaxations} == {
        "'b': min_after_loss=0",
        "1 more node like n0 (2 g)",
    }


def test_pins_of_llms_that_lie_apart():
    """a and b held on the same GPU, apart, at most one on each: both rules bar it, so no
    single one helps but giving up a pin."""
    f = fleet(option("a"), option("b"))
    pins = tuple(Held(llm=name, gpus=(gpu(0),)) for name in "ab")
    f = replace(f, rules=Rules(held=pins, apart=(("a", "b"),), max_llms_per_gpu=1))
    found = conflict(ruled(f), EXACT)
    assert found is not None
    assert {way.change for way in found.relaxations} == {
        "'a': not held on n0/0",
        "'b': not held on n0/0",
    }
    f = replace(f, rules=Rules(held=pins, max_llms_per_gpu=1))
    found = conflict(ruled(f), EXACT)
    assert found is not None
    assert "no max_llms_per_gpu" in {way.change for way in found.relaxations}


def test_a_move_that_takes_too_long():
    """a must be ACTIVE and takes 2 s to load; loads have 1 s. It may, where it is there
    already."""
    f = replace(fleet(option("a")), rules=Rules(load_window_s=1.0))
    p = ruled(f, a={"min_active": 1})
    found = conflict(p, EXACT)
    assert found is not None
    assert found.rules == (
        "'a' keeps min_active=1",
        "loads are done within load_window=1 s",
    )
    assert "no load_window" in {way.change for way in found.relaxations}
    there = replace(p, initial=placement(("a", "n0/0", "ACTIVE")))
    assert conflict(there, EXACT) is None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_conflict_exactly_where_brute_force_finds_no_placement(seed: int):
    """Tiny problems with higher floors, half of them under rules for the fleet and floors
    after a loss: None where a placement is feasible, else a conflict with a way out."""
    rng = np.random.default_rng(seed)
    p = asking(rng, *(("rules", "min_after_loss") if rng.random() < 0.5 else ()))
    llms = tuple(
        replace(m, min_active=int(rng.choice([0, 1, 2, 3]))) for m in p.fleet.llms
    )
    p = replace(p, fleet=replace(p.fleet, llms=llms))
    try:
        possible = bool(oracle.placements(p, 500))
    except oracle.TooLarge:
        return
    found = conflict(p, EXACT)
    assert (found is None) == possible
    if found is not None:
        assert found.smallest
        assert found.rules
        assert found.relaxations or found.together
        assert all(way.objective is not None for way in found.relaxations)
