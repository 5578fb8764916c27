"""The solver for large clusters: its bound holds, and its search is right."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from time import perf_counter

import numpy as np
import pytest

from foreserve.models import recourse, referee
from foreserve.models.placement import Placement
from foreserve.models.plan import Status
from foreserve.models.specs import Node
from foreserve.solvers.arrange import PatternModel
from foreserve.solvers.base import solve
from foreserve.solvers.counts import CountModel
from foreserve.solvers.field import Field
from foreserve.solvers.patterns import NEAR, best_set, good_sets
from foreserve.solvers.result import SolveOptions
from foreserve.solvers.spares import Arranged
from tests import oracle
from tests.build import cluster, fleet, option
from tests.problems import asking, problem, realistic, tiny

WORK = SolveOptions(time_limit_s=60.0, work_limit=3, gap=0.0, in_process=True)


@pytest.mark.parametrize("block", range(4))
def test_bound_holds_and_small_problems_are_solved(block: int) -> None:
    """Against brute force on 20 tiny problems each, odd ones of two epochs: the relaxation
    is never above the optimum, no plan is below it, and most one-epoch plans reach it."""
    reached, counted = 0, 0
    for seed in range(20 * block, 20 * block + 20):
        p = tiny(np.random.default_rng(1000 + seed), epochs=1 + seed % 2)
        try:
            found = oracle.best(p, most=600)
        except oracle.TooLarge:
            continue
        solved = solve(p, "scale", WORK)
        if found is None:
            assert solved.schedule is None
            continue
        optimum, slack = found[0], 1e-6 * max(1.0, found[0])
        model = CountModel(p, 0, switching=True)
        relaxed = model.relax(float("inf"))
        assert relaxed is not None
        if p.num_epochs == 1:
            assert relaxed.bound <= optimum + slack
        assert solved.report.status is not Status.ERROR, solved.report.message
        assert solved.report.bound <= optimum + slack
        if solved.report.objective is not None:
            assert solved.report.objective >= optimum - slack
            if p.num_epochs == 1:
                counted += 1
                reached += solved.report.objective <= optimum + slack
    assert reached >= 0.8 * counted


@pytest.mark.parametrize("seed", range(20))
def test_no_pattern_is_worth_more_than_the_limit(seed: int) -> None:
    """Against all sets of items that fit a GPU, one per LLM: the search finds the best
    one, its limit is that but for `NEAR`, and holds as well where the search was cut off
    after a step or two."""
    rng = np.random.default_rng(seed)
    count, room, scenarios = 9, 100, 4
    weight = rng.integers(10, 60, count)
    llm = rng.integers(0, 6, count)
    value = rng.uniform(0, 3, (count, scenarios)) * (
        rng.random((count, scenarios)) < 0.6
    )
    cost = rng.uniform(0, 1, count)
    worths = [0.0]
    for size in range(1, count + 1):
        for chosen in combinations(range(count), size):
            items = list(chosen)
            if weight[items].sum() <= room and len(set(llm[items])) == size:
                worths.append(value[items].max(axis=0).sum() - cost[items].sum())
    best = max(worths)
    limit, worth, found = best_set(value, cost, weight, llm, room, 100_000)
    assert weight[found].sum() <= room
    assert len(set(llm[found])) == len(found)
    if len(found):
        made = value[found].max(axis=0).sum() - cost[found].sum()
        assert worth == pytest.approx(made)
    assert worth <= best + 1e-9 <= limit + 2e-9 <= best * (1 + 2 * NEAR) + 1e-6
    for steps in (1, 2, 5):
        assert best_set(value, cost, weight, llm, room, steps)[0] >= best - 1e-9
    for items in good_sets(value, cost, weight, llm, room, np.arange(count)):
        chosen = np.flatnonzero(items)
        assert weight[chosen].sum() <= room
        assert len(set(llm[chosen].tolist())) == len(chosen)


@pytest.mark.parametrize("block", range(2))
def test_patterns_bound_what_brute_force_finds(block: int) -> None:
    """On 50 tiny problems each, with rules, a placement before and odd nodes: neither LP
    nor whole counts are above the optimum, and patterns are no weaker than counts."""
    for seed in range(50 * block, 50 * block + 50):
        p = tiny(np.random.default_rng(5000 + seed))
        try:
            found = oracle.best(p, most=300)
        except oracle.TooLarge:
            continue
        counts = CountModel(p, 0, switching=True)
        first = counts.relax(60.0)
        patterns = PatternModel(p, 0, counts, switching=True)
        if first is None or found is None:
            assert found is None
            continue
        slack = 1e-6 * max(1.0, found[0])
        end_s = perf_counter() + 60.0
        priced = patterns.relax(end_s, first.prices, 1e-6, None)
        relaxed = patterns.bound
        assert priced is not None
        assert first.bound - slack <= priced.value
        assert relaxed <= priced.value + slack
        assert relaxed <= found[0] + slack
        whole = patterns.whole(end_s, 1e-6, 0, None)
        assert relaxed - slack <= patterns.bound <= found[0] + slack
        assert whole is not None


@pytest.mark.parametrize("seed", range(4))
def test_the_search_knows_what_its_placement_costs(seed: int) -> None:
    """After thousands of moves, hot and cold, the cost kept move by move is at least the
    referee's and no more than a little above it (activations are repaired, not best),
    and every row holds."""
    p = realistic(np.random.default_rng(seed), 10, [8, 4], 6)
    field = Field(p, 0, p.initial, seed)
    field.cover()
    for heat in (1.0, 0.1, 0.0):
        field.search(heat * field.unit(), 3_000)
        placement = field.placement()
        assert referee.violations(p, (placement,)) == ()
        total = referee.cost(p, (placement,)).total
        assert total - 1e-6 <= field.cost <= 1.1 * total + 1e-6
    again = Field(p, 0, p.initial, seed)
    again.take(placement)
    assert again.placement() == placement


@pytest.mark.parametrize("seed", [3, 5, 6])
def test_the_search_obeys_rules(seed: int) -> None:
    """Pins, closed GPUs, LLMs apart, most LLMs on a GPU, replicas left after the loss of a
    node: from nothing, from another placement and from counts, after thousands of moves
    every row holds; where one cannot, the search says so."""
    rng = np.random.default_rng(seed)
    p = asking(rng, "rules", "min_after_loss", problem=realistic(rng, 10, [8, 4, 4], 6))
    field = Field(p, 0, p.initial, seed)
    plain = realistic(np.random.default_rng(seed), 10, [8, 4, 4], 6)
    other = solve(plain, "greedy", WORK).schedule
    assert other is not None
    counts = CountModel(p, 0, switching=True)
    relaxed = counts.relax(60.0)
    assert relaxed is not None
    closed = set(p.fleet.rules.closed)
    assert counts.classes[0].open_gpus == 8 - len(closed)
    arranged = Arranged(value=0.0, active=relaxed.active, warm=relaxed.warm)
    for start in ("nothing", "other", "counts"):
        field.clear()
        if start == "counts":
            field.set_out(counts, arranged)
        else:
            taken = other[0] if start == "other" else Placement()
            field.take(taken, cover=True)
        assert field.obeys()
        field.search(field.unit(), 2_000)
        field.search(0.0, 2_000)
        assert field.obeys()
        placement = field.placement()
        assert referee.violations(p, (placement,)) == ()
        total = referee.cost(p, (placement,)).total
        assert total - 1e-6 <= field.cost <= 1.1 * total + 1e-6
    llms = (replace(p.fleet.llms[0], min_active=99), *p.fleet.llms[1:])
    p = replace(p, fleet=replace(p.fleet, llms=llms))
    field = Field(p, 0, p.initial, seed)
    field.cover()
    assert not field.obeys()


@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_greedy_and_the_same_again(seed: int) -> None:
    """From a placement before, at fixed work: two runs give one schedule, its cost is the
    referee's, and at most greedy's."""
    p = realistic(np.random.default_rng(seed), 8, [8, 8], 6)
    first = solve(p, "greedy", WORK).schedule
    assert first is not None
    p = realistic(np.random.default_rng(seed + 100), 8, [8, 8], 6)
    p = replace(p, initial=first[0])
    greedy = solve(p, "greedy", WORK).report.objective
    found = [solve(p, "scale", WORK) for _ in range(2)]
    assert found[0].schedule == found[1].schedule
    report = found[0].report
    assert report.bound <= report.objective <= greedy + 1e-9
    assert [point.elapsed_s for point in report.progress] == sorted(
        point.elapsed_s for point in report.progress
    )


def test_equal_nodes_are_one_class() -> None:
    """Three nodes, one of which an LLM may not use: two classes, whatever their number."""
    rules = fleet(option("a"), on=cluster(2, nodes=3))
    rules = replace(rules, llms=(replace(rules.llms[0], nodes=("n0", "n2")),))
    p = problem(rules, [[0.5]], [(1.0, [[16.0]])])
    model = CountModel(p, 0, switching=True)
    assert [group.nodes for group in model.classes] == [("n0", "n2"), ("n1",)]
    assert [column.group for column in model.columns] == [0]


def test_cuts_know_that_three_halves_do_not_fit() -> None:
    """Two GPUs of 100 bytes, three LLMs of 51 each, all needed at once and 10 each: the
    relaxation without cuts would hold all three; a GPU holds and runs one. Optimum: 10
    missed, two loads of 2, rent of two GPUs of 0.1."""
    rules = fleet(*(option(name, resident_bytes=51) for name in "abc"), on=cluster(2))
    p = problem(rules, [[0.0]] * 3, [(1.0, [[8.0]] * 3)])
    solved = solve(p, "scale", WORK)
    assert solved.report.status is Status.OPTIMAL
    assert solved.report.objective == pytest.approx(10.0 + 4.0 + 2.0)


@pytest.mark.parametrize("seed", range(20))
def test_costs_of_large_placements_are_never_too_low(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the dynamic programme may not run, what stands in for the best activation
    covers at most as much, here at least nine tenths, and the upper limit holds."""
    rng = np.random.default_rng(seed)
    nodes = Node(name="n", gpu="g", gpus=8, host_ram_bytes=1)
    spare = [
        (llm, block, int(rng.integers(1, 3)))
        for llm in "abcdef"
        for tp in (1, 2, 4)
        for block in nodes.blocks(tp)
        if rng.random() < 0.3
    ]
    value = {llm: float(rng.uniform(1, 5)) for llm in "abcdef"}
    needs = [{llm: int(rng.integers(0, 4)) for llm in "abcdef"} for _ in range(5)]
    exact = recourse.covered_value(spare, value, needs)
    assert recourse.covered_at_most(spare, value, needs) == exact
    monkeypatch.setattr(recourse, "STATES", 0)
    good = recourse.covered_value(spare, value, needs)
    most = recourse.covered_at_most(spare, value, needs)
    for found, best, limit in zip(good, exact, most, strict=True):
        assert found <= best + 1e-9 <= limit + 2e-9
    assert sum(good) >= 0.9 * sum(exact)
    by_llm = recourse.covered_instances(spare, value, needs)
    worth = [sum(value[k] * n for k, n in row.items()) for row in by_llm]
    assert worth == pytest.approx(good)
