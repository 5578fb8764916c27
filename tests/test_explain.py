"""Explanations: numbers that add up, limits that are true, answers brute force confirms."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foreserve.models import referee
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement, Replica, ReplicaId, State
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.planner.explain import (
    gpu_limits,
    llm_limits,
    obstacles,
    parse_block,
    terms_by_llm,
)
from foreserve.planner.what_if import held_there, more_hardware, repriced, with_node
from foreserve.solvers.base import SolveOptions, SolverPool, solve
from foreserve.solvers.shares import with_shares
from tests import oracle
from tests.build import cluster, fleet, gpu, option
from tests.problems import asking, placement, problem, realistic, tiny

EXACT = SolveOptions(gap=0.0, in_process=True)
SEEDS = st.integers(0, 2**32 - 1)


def test_memory_binds_where_nothing_else_fits():
    """Of 100 bytes n0/0 has 40 left, and b takes 30; n0/1 has 20 left, too few for a."""
    f = fleet(option("a"), option("b", kv_bytes=20))
    here = placement(
        ("a", "n0/0", "WARM"), ("b", "n0/0", "WARM"), ("b", "n0/1", "ACTIVE")
    )
    f = replace(f, options=(option("a", resident_bytes=60), option("b")))
    first, second = gpu_limits(f, here)
    assert (first.held_bytes, first.free_bytes, first.binds) == (90, 10, False)
    assert first.least_bytes is None  # both are there
    assert (second.held_bytes, second.free_bytes) == (50, 50)
    assert (second.least_bytes, second.binds) == (60, True)
    assert second.replicas == ("b ACTIVE",)


def test_rules_and_demand_bind_with_their_numbers():
    """a may be on n0 only, needs one ACTIVE, has the one replica it may have, and 1 of
    2 requests/s find room; b asks for nothing and is bound by nothing."""
    f = fleet(option("a"), option("b"))
    a = replace(f.llms[0], min_active=1, max_replicas=1, nodes=("n0",))
    f = replace(f, llms=(a, f.llms[1]))
    here = Placement(
        replicas=(Replica(llm="a", gpus=(gpu(0),), state="ACTIVE", traffic_share=0.5),)
    )
    first, second = llm_limits(f, here, {"a": 2.0})
    assert first.binds == (
        "demand: 1 of 2/s unserved",
        "rate: all of 1/s is booked",
        "min_active: 1",
        "max_replicas: 1",
        "nodes: only n0",
    )
    assert second.binds == ()


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_terms_by_llm_add_up_to_the_referees(seed: int):
    """Over random problems and plans of theirs, label by label; also with groups that
    share GPUs, weights in host memory, and changes that have a price."""
    rng = np.random.default_rng(seed)
    p = realistic(rng, 6, [4], 4) if rng.random() < 0.2 else tiny(rng, epochs=2)
    solved = solve(p, "greedy", EXACT)
    assume(solved.schedule is not None)
    schedule = solved.schedule or ()
    if rng.random() < 0.5:
        keys = rng.choice(["sharing", "host", "replan"], size=2)
        p = asking(rng, *keys, problem=p)
        if p.fleet.sharing is not None:
            schedule = tuple(
                with_shares(p, t, _shared(p, here)) for t, here in enumerate(schedule)
            )
    before = p.initial
    for epoch, here in enumerate(schedule):
        found = terms_by_llm(p, epoch, before, here)
        known = {r.llm for r in before.replicas} <= found.keys()
        for label, term in referee.TERMS.items():
            total = sum(terms[label] for terms in found.values())
            if known:
                expected = term(p, epoch, before, here)
                assert total == pytest.approx(expected, abs=1e-6)
        before = here


def _shared(p: Problem, here: Placement) -> Placement:
    """Every LLM ACTIVE on every set on which one is, memory aside."""
    return Placement(
        replicas=tuple(
            Replica(llm=llm.name, gpus=gpus, state="ACTIVE")
            for gpus in here.groups
            for llm in p.fleet.llms
            if p.fleet.option_on(llm.name, gpus) is not None
        )
    )


def test_obstacles_name_the_first_limit():
    """a serves on n0/0; b is too large to be ACTIVE beside it, and its rule bars n1."""
    f = fleet(
        option("a", resident_bytes=60),
        option("b", resident_bytes=30),
        option("b", tp=2),
        on=cluster(4, 2),
    )
    f = replace(f, llms=(f.llms[0], replace(f.llms[1], nodes=("n0",), max_replicas=1)))
    here = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/2", "WARM"))

    def told(llm: str, block: str) -> list[tuple[str, str]]:
        key = ReplicaId(llm=llm, gpus=parse_block(block, f.cluster))
        return [(row.state, row.label) for row in obstacles(f, here, key)]

    both = [("ACTIVE", "C10"), ("WARM", "C10")]
    assert told("b", "n1/0") == [
        *(("ACTIVE", "C10"),) * 2,
        *(("WARM", "C10"),) * 2,
    ]
    assert told("b", "n0/1") == both  # max_replicas alone
    assert told("b", "n0/2") == []  # it is there, and could be ACTIVE
    assert told("a", "n0/2-3") == [("ACTIVE", "plan"), ("WARM", "plan")]
    assert ("ACTIVE", "C2") in told("b", "n0/1-2")
    assert ("ACTIVE", "C4") in told("b", "n0/2-3")
    assert told("b", "n0/0") == [
        ("ACTIVE", "C10"),
        ("ACTIVE", "C3"),
        ("ACTIVE", "C1"),
        ("WARM", "C10"),
        ("WARM", "C1"),
    ]


@settings(max_examples=150, deadline=None)
@given(seed=SEEDS)
def test_no_obstacle_means_no_broken_rule(seed: int):
    """A further replica of any LLM on any block: obstacles exactly where the referee
    finds a row broken that was not, or an ACTIVE replica would share its GPU where none
    may; under more rules, and with groups, too."""
    rng = np.random.default_rng(seed)
    p = tiny(rng)
    solved = solve(p, "greedy", EXACT)
    assume(solved.schedule is not None)
    (here,) = cast(tuple[Placement, ...], solved.schedule)
    if rng.random() < 0.5:
        p = asking(rng, rng.choice(["rules", "sharing"]), problem=p)
        assume(not any(referee.fleet_violations(p.fleet, here)))
    alone = p.fleet.sharing is None
    for llm in p.fleet.llms:
        for gpus in ((g,) for g in p.fleet.cluster.gpus):
            key = ReplicaId(llm=llm.name, gpus=gpus)
            if key in here.by_id:
                continue
            barred = {row.state for row in obstacles(p.fleet, here, key)}
            for state in ("ACTIVE", "WARM"):
                more = Replica(llm=llm.name, gpus=gpus, state=cast(State, state))
                then = Placement(replicas=(*here.replicas, more))
                broken = any(referee.fleet_violations(p.fleet, then)) or any(
                    alone and sum(r.state == "ACTIVE" for r in replicas) > 1
                    for replicas in then.by_gpu.values()
                )
                assert (state in barred) == broken


def test_blocks_are_parsed():
    """One GPU, a range, a node whose name holds a dash; and what is wrong with others."""
    on = cluster(4)
    assert parse_block("n0/3", on) == (gpu(3),)
    assert parse_block("n0/0-3", on) == tuple(map(gpu, range(4)))
    dashed = replace(on, nodes=(replace(on.nodes[0], name="a-b"),))
    assert [str(g) for g in parse_block("a-b/1-2", dashed)] == ["a-b/1", "a-b/2"]
    for text in ("n0", "n0/4", "n0/3-5", "n0/x-3", "n0/3-2", "n9/0"):
        with pytest.raises(InvalidInput, match="block"):
            parse_block(text, on)


def _brute(p: Problem, key: ReplicaId) -> float | None:
    """Least cost of all single-epoch placements that hold ``key``."""
    costs = [
        referee.cost(p, (oracle.split(p, 0, bare),)).total
        for bare in oracle.placements(p, 2_000)
        if key in bare.by_id
    ]
    return min(costs, default=None)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_held_there_is_what_brute_force_finds(seed: int):
    """The objective with a replica forced into the plan, on tiny problems; infeasible
    where no placement holds it."""
    rng = np.random.default_rng(seed)
    p = tiny(rng)
    base = solve(p, "milp", EXACT)
    assume(base.schedule is not None)
    candidates = list(p.fleet.candidates())
    chosen, block = candidates[int(rng.integers(len(candidates)))]
    key = ReplicaId(llm=chosen.llm, gpus=block)
    try:
        expected = _brute(p, key)
    except oracle.TooLarge:
        return
    found = held_there(p, base.report, EXACT, key)
    asked = any(
        p.need(s, m, 0)
        for s in range(len(p.scenario_probability))
        for m, llm in enumerate(p.fleet.llms)
        if llm.name == key.llm
    )
    if found.difference is None:
        assert found.status is Status.INFEASIBLE
        assert expected is None or not asked
        return
    assert base.report.objective is not None
    assert expected is not None
    total = found.difference + base.report.objective
    # Without a scenario that asks for it, WARM is not on offer.
    assert total >= expected - 1e-5
    assert total == pytest.approx(expected, abs=1e-5) or not asked


def test_one_more_gpu_is_worth_what_it_serves():
    """One GPU serves 1 of 2 requests/s; the other 100 requests of 100 s cost 60 s each.
    A second GPU saves 6,000 s and costs 2 s of loading and 1 s of rent."""
    p = problem(fleet(option("a"), on=cluster(1)), [[2.0]])
    base = solve(p, "milp", EXACT)
    assert base.schedule is not None
    with SolverPool("milp", EXACT) as pool:
        (more,) = more_hardware(p, base.schedule, base.report, pool)
    assert more.change == "one more g GPU"
    assert more.difference == pytest.approx(-6000 + 2 + 1)
    assert more.least == pytest.approx(more.difference)
    assert more.most == pytest.approx(more.difference)


def test_further_nodes_may_be_used_by_whom_the_first_may():
    """a is bound to n0 and may use a further node like it; b, bound to n1, may not."""
    f = fleet(option("a"), option("b"), on=cluster(1, 2))
    llms = (replace(f.llms[0], nodes=("n0",)), replace(f.llms[1], nodes=("n1",)))
    p = problem(replace(f, llms=llms), [[0.0], [0.0]])
    larger = with_node(p, p.fleet.cluster.nodes[0], 4, count=2).fleet
    assert [(n.name, n.gpus) for n in larger.cluster.nodes[2:]] == [
        ("more0", 4),
        ("more1", 4),
    ]
    assert larger.llms[0].nodes == ("n0", "more0", "more1")
    assert larger.llms[1].nodes == ("n1",)


def test_repriced_is_the_referees_difference():
    """A WARM copy of b costs 2 s to load, and no rent beside a; as ACTIVE there it breaks
    a rule."""
    p = problem(fleet(option("a"), option("b")), [[0.5], [0.0]])
    here = (with_shares(p, 0, placement(("a", "n0/0", "ACTIVE"))),)
    key = ReplicaId(llm="b", gpus=(gpu(0),))
    assert repriced(p, here, 0, key, "WARM") == pytest.approx(2.0)
    too_much = replace(p, fleet=fleet(option("a"), option("b", resident_bytes=90)))
    assert repriced(too_much, here, 0, key, "WARM") is None
