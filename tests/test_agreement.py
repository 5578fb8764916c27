"""Solvers, brute force and the referee agree: the whole point of having several."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from foreserve.models import referee
from foreserve.models.codec import from_json, read_text, to_json
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers import cpsat, milp
from foreserve.solvers.base import SolverPool
from foreserve.solvers.result import SolveOptions
from tests import oracle
from tests.instances.make import FOLDER, instances
from tests.problems import tiny

EXACT = ("milp", "cpsat")
INSTANCES = instances()
OPTIONS = SolveOptions(time_limit_s=60.0, gap=0.0)


@pytest.fixture(scope="module")
def pools():
    """One child per solver for the whole file."""
    with (
        SolverPool("milp", OPTIONS) as one,
        SolverPool("cpsat", OPTIONS) as two,
        SolverPool("greedy", OPTIONS) as three,
    ):
        yield {"milp": one, "cpsat": two, "greedy": three}


def labels_in(path: Path) -> set[str]:
    """Labels whose functions a file defines or, in prose, names."""
    found = re.findall(r"(?:def |`)([oc]\d+)_[a-z_]+", path.read_text())
    return {label.upper() for label in found}


def test_every_label_is_in_docs_referee_and_solvers():
    """(O1)-(O5), (C1)-(C5), (C10): four places, one set."""
    root = Path(__file__).parents[1]
    expected = {*referee.TERMS, *referee.STATIC_ROWS, "C5"}
    for place in ("docs/formulation.md", "models/referee.py"):
        assert labels_in(root / place) == expected
    for solver in (milp, cpsat):
        names = {n.partition("_")[0].upper() for n in dir(solver) if n[:1] in "oc"}
        assert {n for n in names if n[1:].isdigit()} == expected


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
