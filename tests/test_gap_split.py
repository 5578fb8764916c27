"""The distance from a perfect system: parts by hand, and sums and bounds at random."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from foreserve.models import referee
from foreserve.models.codec import to_json
from foreserve.models.problem import Prices
from foreserve.models.rules import Sharing
from foreserve.planner.gap_split import (
    PARTS,
    distinct_scenarios,
    gap_split,
    whole_counts,
)
from foreserve.solvers.base import SolveOptions, solve
from foreserve.solvers.shares import with_shares
from tests import oracle
from tests.build import cluster, fleet, option, small_plan
from tests.problems import placement, problem, tiny

EXACT = SolveOptions(gap=0.0, in_process=True)
SEEDS = st.integers(0, 2**32 - 1)


def test_every_part_by_hand():
    """Rent is 1 s per GPU and epoch. a is asked for 0.5/s, holds 1.25/s on a GPU, 1 may be
    booked: 0.4, then 0.5, then a whole GPU 1.0. It must be ACTIVE twice: 2.0; both load
    for 2 s: 6.0. b bursts in half of the moments and a cold start costs 20: whoever knows
    rents and loads for it then (3.0, 1.5 on average), who does not always does (3.0): 9.0.
    A plan without b loses 10 instead: 16.0."""
    f = fleet(option("a"), option("b"), on=cluster(3))
    a, b = replace(f.llms[0], min_active=2), replace(f.llms[1], cold_loss_s=20.0)
    p = problem(
        replace(f, llms=(a, b)),
        [[0.5], [0.0]],
        [(0.5, [[0.0], [1.0]]), (0.5, [[0.0], [0.0]])],
    )
    bare = placement(("a", "n0/0", "ACTIVE"), ("a", "n0/1", "ACTIVE"))
    found = gap_split(p, (with_shares(p, 0, bare),), EXACT, max_load=0.8)
    assert [step.most for step in found.steps] == pytest.approx(
        [0.4, 0.5, 1.0, 2.0, 6.0, 7.5, 9.0, 16.0]
    )
    assert {part.name: part.value for part in found.parts} == pytest.approx(
        dict(zip(PARTS, (0.1, 0.5, 1.0, 4.0, 1.5, 1.5, 7.0), strict=True))
    )
    for part in found.parts:
        assert (part.least, part.most) == pytest.approx((part.value,) * 2, abs=1e-6)
    assert found.distance == pytest.approx(15.6)


def test_what_is_not_known_is_an_interval():
    """With greedy alone the steps from *packed* on have the perfect system's bound and no
    more: parts are intervals that hold the true ones, and values still add up."""
    f = fleet(option("a"), on=cluster(2))
    p = problem(f, [[0.5]])
    bare = placement(("a", "n0/0", "ACTIVE"), ("a", "n0/1", "WARM"))
    here = (with_shares(p, 0, bare),)
    found = gap_split(p, here, EXACT, solver="greedy")
    assert sum(part.value for part in found.parts) == pytest.approx(found.distance)
    switching = found.parts[PARTS.index("switching")]
    assert switching.least == 0.0
    assert switching.most >= 2.0 >= switching.least  # it takes one load
    assert referee.cost(p, here).total == found.steps[-1].most


def test_where_groups_are_shared_integrality_is_packing():
    """a and b fill 0.4 of a GPU each and may share one: 0.8, then 1.0; whole replicas each
    by itself would say 2.0, which is no bound here. With two loads 5.0, of the plan that
    shares nothing 6.0."""
    f = replace(fleet(option("a"), option("b")), sharing=Sharing(booked_load=0.8))
    p = problem(f, [[0.4], [0.4]], prices=Prices(slower_s=0.0))
    bare = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "ACTIVE"))
    found = gap_split(p, (with_shares(p, 0, bare),), EXACT, solver="milp")
    assert found.steps[2].least == pytest.approx(0.8)
    assert [step.most for step in found.steps] == pytest.approx(
        [0.8, 0.8, 1.0, 1.0, 5.0, 5.0, 5.0, 6.0]
    )


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS)
def test_steps_hold_their_optima(seed: int):
    """Random problems and greedy's plan: parts add up to the distance, none is negative,
    steps rise, and the optimum by brute force lies where *best* says."""
    p = tiny(np.random.default_rng(seed))
    start = solve(p, "greedy", EXACT).schedule
    assume(start is not None)
    try:
        optimum = oracle.best(p, 500)
    except oracle.TooLarge:
        assume(False)
    assert start is not None
    assert optimum is not None
    found = gap_split(p, start, EXACT, solver="cpsat", max_load=0.8)
    assert sum(part.value for part in found.parts) == pytest.approx(found.distance)
    assert all(part.least <= part.value + 1e-9 for part in found.parts)
    assert all(part.value <= part.most + 1e-9 for part in found.parts)
    for before, after in pairwise(found.steps):
        assert before.least <= after.least
        assert before.most <= after.most
    best = found.steps[-2]
    assert best.least - 1e-6 <= optimum[0] <= best.most + 1e-6


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS)
def test_whole_counts_are_the_cheapest(seed: int):
    """Against all counts of up to three options, filled in every order of slowness."""
    rng = np.random.default_rng(seed)
    options = [
        (float(rng.uniform(0.3, 2)), float(rng.uniform(0, 4)), float(rng.uniform(0, 3)))
        for _ in range(rng.integers(1, 4))
    ]
    demand, lost = float(rng.uniform(0, 2)), float(rng.uniform(0, 5))
    ranges = [range(int(np.ceil(demand / rate)) + 1) for rate, _, _ in options]
    costs = []
    for counts in product(*ranges):
        left, cost = demand, 0.0
        for count, (rate, slow, rent) in sorted(
            zip(counts, options, strict=True), key=lambda pair: pair[1][1]
        ):
            served = min(left, count * rate) if slow < lost else 0.0
            left -= served
            cost += served * slow + count * rent
        costs.append(cost + left * lost)
    assert whole_counts(demand, options, lost) == pytest.approx((min(costs),) * 2)


def test_equal_scenarios_are_one():
    """Peaks of 3 and 5 in flight both need one instance of 8; 9 needs two."""
    f = fleet(option("a"))
    f = replace(f, llms=(replace(f.llms[0], instance_concurrency=8),))
    p = problem(f, [[0.0]], [(0.25, [[3.0]]), (0.25, [[5.0]]), (0.5, [[9.0]])])
    assert [probability for probability, _ in distinct_scenarios(p)] == [0.5, 0.5]


def test_verb_splits_the_gap(plan, tmp_path):
    """`--split` of a problem file: its steps add up in --json, and the table fits a
    terminal; of a plan without its trace it is refused."""
    f = fleet(option("a"), on=cluster(2))
    file = tmp_path / "problem.json.gz"
    file.write_bytes(gzip.compress(to_json(problem(f, [[0.5]])).encode()))
    code, out, _ = plan(f"explain {file} --split --solver cpsat --json")
    assert code == 0
    split = json.loads(out)["split"]
    assert sum(part["value"] for part in split["parts"]) == pytest.approx(2.5)
    assert [step["most"] for step in split["steps"]][-1] == pytest.approx(3.0)
    code, out, _ = plan(f"explain {file} --split --solver cpsat")
    assert code == 0
    assert "integrality" in out
    assert max(map(len, out.splitlines())) <= 100
    (tmp_path / "plan.json").write_text(to_json(small_plan()))
    assert plan(f"explain {tmp_path}/plan.json --split")[0] == 2
