"""Solvers, brute force and the referee agree: the whole point of having several."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from foreserve.models import referee
from foreserve.models.codec import from_json, read_text, to_json
from foreserve.models.errors import InvalidInput
from foreserve.models.plan import Status
from foreserve.models.problem import OPTIONAL, Problem, asks_for
from foreserve.solvers import cpsat, direct, milp
from foreserve.solvers.base import CARRIES, SolverPool, refuse_unknown, solve
from foreserve.solvers.result import SolveOptions
from tests import oracle
from tests.instances.make import FOLDER, instances
from tests.problems import ASKED, asking, tiny

EXACT = ("milp", "cpsat", "highs")
INSTANCES = instances()
OPTIONS = SolveOptions(time_limit_s=60.0, gap=0.0)


@pytest.fixture(scope="module")
def pools():
    """One child per solver for the whole file."""
    with (
        SolverPool("milp", OPTIONS) as one,
        SolverPool("cpsat", OPTIONS) as two,
        SolverPool("highs", OPTIONS) as three,
        SolverPool("greedy", OPTIONS) as four,
    ):
        yield {"milp": one, "cpsat": two, "highs": three, "greedy": four}


def labels_in(path: Path) -> set[str]:
    """Labels whose functions a file defines or, in prose, names."""
    found = re.findall(r"(?:def |`)([oc]\d+)_[a-z_]+", path.read_text())
    return {label.upper() for label in found}


def test_every_label_is_in_docs_referee_and_solvers():
    """(O1)-(O5), (C1)-(C10): four places, one set."""
    root = Path(__file__).parents[1]
    expected = {*referee.TERMS, *referee.STATIC_ROWS, *referee.MOVING_ROWS}
    assert len(expected) == 15
    for place in ("docs/formulation.md", "models/referee.py"):
        assert labels_in(root / place) == expected
    for solver in (milp, cpsat, direct):
        names = {n.partition("_")[0].upper() for n in dir(solver) if n[:1] in "oc"}
        assert {n for n in names if n[1:].isdigit()} == expected


def test_who_carries_what_is_said_in_the_docs():
    """The table of docs/formulation.md is `CARRIES`, cell by cell."""
    text = (Path(__file__).parents[1] / "docs/formulation.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \([^|]*\|(.*)\|$", text, re.MULTILINE)
    assert {key for key, _ in rows} == set(OPTIONAL)
    header = re.search(r"^\| \| (`milp`.*) \|$", text, re.MULTILINE)
    names = re.findall(r"`(\w+)`", header[1])
    assert {*names, "auto"} == set(CARRIES)
    for key, cells in rows:
        said = {
            name
            for name, cell in zip(names, cells.split("|"), strict=True)
            if cell.strip() == "yes"
        }
        assert said == {name for name in names if key in CARRIES[name]}


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_solver_refuses_what_it_does_not_know(key):
    """By name, before it starts; `auto` takes it."""
    problem = asking(np.random.default_rng(3), key)
    assert asks_for(problem) == {key}
    for name, carried in CARRIES.items():
        if key in carried:
            refuse_unknown(problem, name)
        else:
            with (
                pytest.raises(InvalidInput, match="does not know"),
                SolverPool(name) as pool,
            ):
                pool.solve(problem)


@pytest.mark.parametrize("seed", range(60))
def test_rows_on_top_agree_with_brute_force(seed):
    """Each optional row by itself, then three at a time, in one epoch and in two: every
    solver that carries them reaches the least cost of all placements; greedy and `scale`
    obey, and the bound of `scale` holds."""
    rng = np.random.default_rng(seed)
    keys = [ASKED[seed % len(ASKED)]]
    if seed >= 5 * len(ASKED):
        keys = list(rng.choice(ASKED, size=3, replace=False))
    problem = asking(rng, *keys, epochs=1 + seed % 2)
    try:
        found = oracle.best(problem, 60 if seed % 2 else 600)
    except oracle.TooLarge:
        pytest.skip("too many placements to enumerate")
    options = replace(OPTIONS, in_process=True)
    for name in (*EXACT, "greedy", "scale"):
        if not asks_for(problem) <= CARRIES[name]:
            continue
        work = 3 if name == "scale" else None
        report = solve(problem, name, replace(options, work_limit=work)).report
        if name in ("greedy", "scale"):
            assert report.status is not Status.ERROR, report.message
            if found is not None and report.objective is not None:
                slack = 1e-6 * max(1.0, found[0])
                assert report.bound - slack <= found[0] <= report.objective + slack
        elif found is None:
            assert report.status is Status.INFEASIBLE
        else:
            assert report.objective == pytest.approx(found[0], rel=1e-6)


def test_terms_in_order():
    """Two GPUs, one LLM: refusing its requests is cheaper than serving them in the sum,
    but unserved demand comes first in order; each stage is proven. Only MILP does it."""
    problem = INSTANCES["not-worth-it"].problem
    options = replace(OPTIONS, lexicographic=True)
    solved = solve(problem, "auto", options)
    assert solved.report.status is Status.OPTIMAL
    assert [stage.label for stage in solved.report.stages] == list(referee.TERMS)
    cost = referee.cost(problem, solved.schedule).terms
    assert cost["O1"] == 0
    for stage in solved.report.stages:
        assert stage.bound == pytest.approx(stage.value, abs=1e-6)
        assert cost[stage.label] == pytest.approx(stage.value, abs=1e-5)
    with pytest.raises(InvalidInput, match="in order"):
        solve(problem, "cpsat", options)


@pytest.mark.parametrize("seed", range(20))
def test_terms_in_order_against_brute_force(seed):
    """No placement refuses less, and none that refuses as little has a lower (O2)."""
    problem = tiny(np.random.default_rng(1000 + seed))
    problem = replace(problem, prices=replace(problem.prices, slower_s=0.0))
    try:
        every = oracle.placements(problem, 600)
    except oracle.TooLarge:
        pytest.skip("too many placements to enumerate")
    options = replace(OPTIONS, lexicographic=True, in_process=True)
    solved = solve(problem, "milp", options)
    if not every:
        assert solved.schedule is None
        return
    costs = [referee.cost(problem, (oracle.split(problem, 0, p),)).terms for p in every]
    least = min(cost["O1"] for cost in costs)
    bursts = min(c["O2"] for c in costs if c["O1"] <= least + 1e-6 * max(1, least))
    found = referee.cost(problem, solved.schedule).terms
    assert found["O1"] == pytest.approx(least, rel=1e-5, abs=1e-6)
    assert found["O2"] == pytest.approx(bursts, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", INSTANCES)
def test_named_instances_are_solved_to_their_optimum(pools, name):
    """MILP and CP-SAT reach the recorded optimum; greedy is not below it; the file beside
    says the same problem, byte for byte."""
    instance = INSTANCES[name]
    text = read_text(FOLDER / f"{name}.json")
    assert text == to_json(instance.problem)
    problem = from_json(Problem, text)
    for solver in EXACT:
        report = pools[solver].solve(problem).report
        assert report.status is Status.OPTIMAL
        assert report.objective == pytest.approx(instance.optimum, rel=1e-6)
        assert report.bound == pytest.approx(report.objective, rel=1e-6)
    greedy = pools["greedy"].solve(problem).report
    assert greedy.objective >= instance.optimum * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_tiny_problems_agree_with_brute_force(pools, seed):
    """MILP = CP-SAT = the cheapest of all placements, by the referee; odd seeds have two
    epochs; greedy is never below; infeasible means that nothing is feasible."""
    problem = tiny(np.random.default_rng(seed), epochs=1 + seed % 2)
    try:
        found = oracle.best(problem)
    except oracle.TooLarge:
        pytest.skip("too many placements to enumerate")
    reports = {name: pool.solve(problem).report for name, pool in pools.items()}
    for solver in EXACT:
        if found is None:
            assert reports[solver].status is Status.INFEASIBLE
        else:
            assert reports[solver].objective == pytest.approx(found[0], rel=1e-6)
    if found is not None and reports["greedy"].objective is not None:
        assert reports["greedy"].objective >= found[0] - 1e-6 * max(1.0, found[0])


@pytest.mark.parametrize("solver", EXACT)
def test_same_seed_and_one_thread_give_the_same_schedule(solver):
    """Two children, one answer."""
    problem = INSTANCES["eight-by-eight"].problem
    schedules = []
    for _ in range(2):
        with SolverPool(solver, OPTIONS) as pool:
            schedules.append(pool.solve(problem).schedule)
    assert schedules[0] == schedules[1]
