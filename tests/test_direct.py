"""The direct MILP: its optima, its start, its runs of frozen epochs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from foreserve.models import referee
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers import direct, greedy
from foreserve.solvers.first_values import first_values
from foreserve.solvers.index import index
from foreserve.solvers.result import Schedule, SolveOptions
from foreserve.solvers.symmetry import classes
from tests import oracle
from tests.build import cluster, fleet, option
from tests.instances.make import instances
from tests.problems import ASKED, asking, placement, problem, realistic, tiny

OPTIONS = SolveOptions(time_limit_s=30.0, gap=0.0)


def agrees(p: Problem, cost: float | None, runs: Sequence[int] | None = None) -> None:
    """`solve_runs` finds ``cost`` and no less, with a schedule that has it."""
    solved = direct.solve_runs(p, OPTIONS, runs=runs)
    if cost is None:
        assert solved.report.status is Status.INFEASIBLE
        return
    assert solved.report.status is Status.OPTIMAL
    assert solved.schedule is not None
    assert referee.violations(p, solved.schedule) == ()
    assert referee.cost(p, solved.schedule).total == pytest.approx(cost, rel=1e-6)
    assert solved.report.objective == pytest.approx(cost, rel=1e-6)
    assert solved.report.bound == pytest.approx(cost, rel=1e-6)


def test_every_label_has_a_function() -> None:
    """The same labels as the referee's."""
    names = {n.partition("_")[0].upper() for n in dir(direct) if n[:1] in "oc"}
    labels = {n for n in names if n[1:].isdigit()}
    assert labels == {*referee.TERMS, *referee.STATIC_ROWS, *referee.MOVING_ROWS}


@pytest.mark.parametrize("name", instances())
def test_named_instances_are_solved_to_their_optimum(name: str) -> None:
    """The recorded optimum."""
    instance = instances()[name]
    agrees(instance.problem, instance.optimum)


@pytest.mark.parametrize("seed", range(100, 124))
def test_tiny_problems_agree_with_brute_force(seed: int) -> None:
    """The cheapest of all placements, also over two epochs; equal GPUs and nodes, and
    some that differ in what they held before, come up often."""
    p = tiny(np.random.default_rng(seed), epochs=1 + seed % 2)
    try:
        found = oracle.best(p, most=500)
    except oracle.TooLarge:
        pytest.skip("too many placements to enumerate")
    agrees(p, None if found is None else found[0])


@pytest.mark.parametrize("seed", range(200, 230))
def test_rows_on_top_agree_with_brute_force(seed: int) -> None:
    """Each row that may be asked for by itself, then three at a time, in one epoch and
    in two; from greedy's plan, which knows nothing of them, as well as from none."""
    rng = np.random.default_rng(seed)
    keys = [ASKED[seed % len(ASKED)]]
    if seed >= 218:
        keys = list(rng.choice(ASKED, size=3, replace=False))
    p = asking(rng, *keys, epochs=1 + seed // 2 % 2)
    try:
        found = oracle.best(p, most=60 if p.num_epochs > 1 else 500)
    except oracle.TooLarge:
        pytest.skip("too many placements to enumerate")
    agrees(p, None if found is None else found[0])
    start = greedy.solve(p, OPTIONS).schedule
    if found is not None and start is not None:
        report = direct.solve(p, OPTIONS, start).report
        assert report.objective == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("seed", range(16))
def test_frozen_runs_agree_with_brute_force(seed: int) -> None:
    """Over three epochs the placement changes between runs only; demand is split and
    WARM replicas are activated epoch by epoch."""
    p = tiny(np.random.default_rng(seed), epochs=3)
    runs = [(3,), (2, 1), (1, 2), (1, 1, 1)][seed % 4]
    try:
        agrees(p, _best_of_runs(p, runs), runs)
    except oracle.TooLarge:
        pytest.skip("too many placements to enumerate")


def _best_of_runs(p: Problem, runs: Sequence[int]) -> float | None:
    feasible = oracle.placements(p, 200)
    reached: list[tuple[float, Placement]] = [(0.0, p.initial)]
    first = 0
    for length in runs:
        epochs = range(first, first + length)
        first += length
        now = []
        for bare in feasible:
            cost = sum(
                referee.TERMS[label](p, t, bare, oracle.split(p, t, bare))
                for t in epochs
                for label in ("O1", "O2", "O3", "O5")
            )
            cost += min(
                spent + referee.o4_switching(p, epochs[0], last, bare)
                for spent, last in reached
            )
            now.append((cost, bare))
        reached = now
    return min((cost for cost, _ in reached), default=None)


def test_runs_must_cover_the_epochs() -> None:
    """Three epochs are not two and two."""
    p = problem(fleet(option("a")), [[0.5] * 3])
    with pytest.raises(InvalidInput, match="3 epochs"):
        direct.solve_runs(p, OPTIONS, runs=(2, 2))


@pytest.mark.parametrize("seed", range(12))
def test_the_start_is_complete_and_costs_what_the_referee_says(seed: int) -> None:
    """Every column has a value, every row holds, so HiGHS has nothing to find first."""
    rng = np.random.default_rng(seed)
    p = tiny(rng, 1 + seed % 3) if seed % 2 else realistic(rng, 6, [4, 4], 6)
    start = greedy.solve(p, OPTIONS).schedule
    if start is None:
        pytest.skip("greedy finds nothing")
    total = referee.cost(p, start).total
    cost, excess = _start(p, start)
    assert excess <= 1e-9
    assert cost == pytest.approx(total, rel=1e-6)


def _start(p: Problem, start: Schedule) -> tuple[float, float]:
    """Cost of the start's values, and by how much they break a row at most."""
    m = direct.build(index(p))
    given = first_values(m, start)
    assert sorted(given) == list(range(m.num_columns))
    x, lp = np.array([given[j] for j in range(m.num_columns)]), m.programme()
    row = np.repeat(np.arange(m.num_rows), np.diff(lp.begin))
    sums = np.bincount(row, lp.value * x[lp.column], minlength=m.num_rows)
    over = [lp.row_lower - sums, sums - lp.row_upper, x - lp.column_upper, -x]
    return float(lp.cost @ x) + lp.offset, max(part.max() for part in over)


def test_what_was_there_before_tells_gpus_apart() -> None:
    """Four equal GPUs of two nodes: three classes of two (GPUs of each node, the nodes);
    with a WARM replica on one, its GPU and its node stand alone."""
    bare = problem(fleet(option("a"), on=cluster(2, 2)), [[0.5]])
    assert [len(group) for group in classes(index(bare))] == [2, 2, 2]
    held = problem(
        fleet(option("a"), on=cluster(2, 2)),
        [[0.5]],
        initial=placement(("a", "n0/1", "WARM")),
    )
    (group,) = classes(index(held))
    names = {str(index(held).replicas[r][1][0]) for r in group.ravel()}
    assert names == {"n1/0", "n1/1"}
    agrees(held, 1.0)  # to serve where it is needs no load, only the rent


def test_it_loads_no_pyomo() -> None:
    """Pyomo takes longer to import than many of these solves last."""
    code = (
        "import sys; from foreserve.solvers.base import get_solver; "
        "get_solver('highs'); sys.exit('pyomo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_same_twice() -> None:
    """No node of the search allowed: the same schedule and bound again."""
    p = realistic(np.random.default_rng(102), 12, [8], 8)
    limited = SolveOptions(gap=0.0, work_limit=0)
    start = greedy.solve(p, OPTIONS).schedule
    one, two = (direct.solve(p, limited, start) for _ in range(2))
    assert (one.schedule, one.report.bound) == (two.schedule, two.report.bound)
    assert one.report.objective is not None
