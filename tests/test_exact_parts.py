"""What the exact solvers are made of, beside the optimum they agree on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyomo.environ as pyo
import pytest

from foreserve.models import referee
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers import auto, cpsat, milp
from foreserve.solvers.base import SolveOptions, solve
from foreserve.solvers.highs import hand_over
from foreserve.solvers.index import Key, decode, encode, index
from tests.build import fleet, option
from tests.problems import placement, problem, realistic


def test_work_limit_stops_early() -> None:
    """A tenth of a deterministic second, or no node at all, is no proof here; the same
    limit gives the same schedule and bound."""
    p = realistic(np.random.default_rng(102), 12, [8], 8)
    for solver, limit in (("cpsat", 0.1), ("milp", 0)):
        options = SolveOptions(gap=0.0, work_limit=limit, in_process=True)
        one, two = (solve(p, solver, options) for _ in range(2))
        assert one.report.status is Status.FEASIBLE
        assert one.report.gap is not None
        assert 0 < one.report.gap < 1
        assert (one.schedule, one.report.bound) == (two.schedule, two.report.bound)


def test_time_limit_is_kept() -> None:
    """Half a second on 16 LLMs x 32 GPUs x 20 scenarios: the greedy schedule or better,
    at most a few seconds later."""
    p = realistic(np.random.default_rng(1), 16, [8] * 4, 20)
    options = SolveOptions(time_limit_s=0.5, in_process=True)
    greedy = solve(p, "greedy", options).report.objective
    assert greedy is not None
    for solver in ("milp", "cpsat"):
        report = solve(p, solver, options).report
        assert report.wall_s < 6
        assert report.objective is not None
        assert report.objective <= greedy + 1e-6


def test_auto_chooses_by_size() -> None:
    """CP-SAT below the measured threshold, HiGHS above it; the report says which."""
    small = realistic(np.random.default_rng(10), 8, [8], 6, busy=0.25)
    large = realistic(np.random.default_rng(104), 16, [8, 8], 8)
    assert auto.choices(small) < auto.CPSAT_CHOICES < auto.choices(large)
    options = SolveOptions(time_limit_s=2.0, gap=0.05, in_process=True)
    assert solve(small, "auto", options).report.solver == "cpsat"
    assert solve(large, "auto", options).report.solver == "highs"


def test_candidates_are_nested_by_construction() -> None:
    """(C2) needs no row: any two aligned blocks are nested or disjoint."""
    p = realistic(np.random.default_rng(0), 8, [8, 4, 3], 2)
    blocks = {frozenset(block) for _, block in p.fleet.candidates()}
    for one in blocks:
        for other in blocks:
            assert one <= other or other <= one or not one & other


def test_equal_scenarios_are_merged() -> None:
    """Peaks of 1 and of 8 ask for the same instance: one scenario of their chances."""
    peaks = [(0.25, [[1.0]]), (0.25, [[8.0]]), (0.5, [[9.0]])]
    p = index(problem(fleet(option("a")), [[0.0]], peaks))
    assert p.need == [[(0.5, (1,)), (0.5, (2,))]]


def test_encode_and_decode_are_inverse() -> None:
    """A schedule comes back as it was; one off the aligned blocks has no letters."""
    p = index(problem(fleet(option("a"), option("b")), [[0.5], [0.0]]))
    plan = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "WARM"))
    letters = encode(p, (plan,))
    assert letters == ({(0, 0)}, {(3, 0)})
    (back,) = decode(p, *letters)
    states = [{(r.id, r.state) for r in found.replicas} for found in (back, plan)]
    assert states[0] == states[1]
    assert encode(p, (placement(("a", "n9/0", "WARM")),)) is None


def test_user_rows_in_any_linear_form_reach_highs() -> None:
    """A row written as a plain Pyomo expression counts: a may not go to n0/0 (and is
    fixed off n0/1), so 50 requests are refused."""
    p = problem(fleet(option("a")), [[0.5]])
    m = milp.build(index(p))
    m.mine = pyo.Constraint(expr=2 * m.a[0, 0] + 1 <= 2.5)
    m.a[1, 0].fix(0)
    solver, _ = hand_over(m)
    solver.run()
    assert solver.getInfo().objective_function_value == pytest.approx(3000.0)


def test_half_activations_would_be_worth_something() -> None:
    """Why z is whole: a is WARM on both GPUs and b on each, one instance of each is
    needed. Whole activations cover a or b, 10 of 20; half of all three would cover 15."""
    ab = fleet(option("a", 2), option("b"))
    p = problem(ab, [[0.0], [0.0]], [(1.0, [[8.0], [8.0]])])
    plan = placement(
        ("a", "n0/0 n0/1", "WARM"), ("b", "n0/0", "WARM"), ("b", "n0/1", "WARM")
    )
    letters = encode(index(p), (plan,))
    assert letters is not None
    elsewhere = 6.0 + 2.0  # three loads, rent of two GPUs
    assert referee.cost(p, (plan,)).total == pytest.approx(10.0 + elsewhere)
    assert _cost(p, letters[1], pyo.Binary) == pytest.approx(10.0 + elsewhere)
    assert _cost(p, letters[1], pyo.UnitInterval) == pytest.approx(5.0 + elsewhere)


def test_activations_of_single_gpus_are_whole_by_themselves() -> None:
    """With TP 1 and one instance each, the rows of z are those of a transport problem:
    relaxed and whole activations are worth the same on crowded placements."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        p = realistic(rng, 12, [8], 8)
        single = tuple(o for o in p.fleet.options if o.tp == 1)
        kept = [
            i
            for i, llm in enumerate(p.fleet.llms)
            if any(o.llm == llm.name for o in single)
        ]
        p = replace(
            p,
            fleet=replace(
                p.fleet,
                llms=tuple(p.fleet.llms[i] for i in kept),
                options=tuple(replace(o, concurrency=32) for o in single),
            ),
            demand_rps=((0.0,),) * len(kept),
            peak_load=tuple(tuple(rows[i] for i in kept) for rows in p.peak_load),
        )
        warm = _crowded(rng, p)
        whole = _cost(p, warm, pyo.Binary)
        assert _cost(p, warm, pyo.UnitInterval) == pytest.approx(whole)
        schedule = decode(index(p), set(), warm)
        assert whole == pytest.approx(referee.cost(p, schedule).total)


def _crowded(rng: np.random.Generator, p: Problem) -> set[Key]:
    """WARM replicas in random order, each that still fits."""
    letters = index(p)
    chosen: set[Key] = set()
    for r, t in rng.permutation(letters.prewarmable()):
        more = {*chosen, (int(r), int(t))}
        (plan,) = decode(letters, set(), more)
        if not any(referee.fleet_violations(p.fleet, plan)):
            chosen = more
    return chosen


def _cost(p: Problem, warm: set[Key], activation: object) -> float:
    """Cost of these WARM replicas and no ACTIVE ones by the MILP, z in ``activation``."""
    m = milp.build(index(p))
    for a in m.a.values():
        a.fix(0)
    for key, y in m.y.items():
        y.fix(int(key in warm))
    for z in m.z.values():
        z.domain = activation
    solver, _ = hand_over(m)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.run()
    return float(solver.getInfo().objective_function_value)


def test_cpsat_claims_what_its_answer_costs_not_its_rounded_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With costs in so few bits that rounding them down shows, the claim is still the
    referee's cost, and the bound still a bound."""
    drawn = realistic(np.random.default_rng(0), 4, (4,), 3)
    options = SolveOptions(time_limit_s=10.0, gap=0.01, in_process=True)
    exact = solve(drawn, "highs", options).report
    monkeypatch.setattr(cpsat, "LARGEST_COST", 2**34)
    rough = solve(drawn, "cpsat", options).report
    assert rough.status is not Status.ERROR, rough.message
    assert rough.bound <= exact.objective
