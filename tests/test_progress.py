"""What was known when: the incumbents and bounds that every solver hands back."""

from __future__ import annotations

import numpy as np
import pytest

from foreserve.models import referee
from foreserve.solvers.base import SolveOptions, solve
from foreserve.solvers.result import Progress, curve
from tests.problems import realistic


def test_a_curve_keeps_the_best_so_far():
    """Points out of order, one that is worse and one that is nothing new: two remain,
    and the bound and the objective are each the best that was known."""
    points = [
        Progress(3.0, 9.0, 2.0),
        Progress(1.0, 8.0, None),
        Progress(2.0, None, 1.0),
        Progress(4.0, 8.0, 2.0),
    ]
    assert curve(points) == ((1.0, 8.0, None), (2.0, 8.0, 1.0), (3.0, 8.0, 2.0))


@pytest.mark.parametrize("name", ["greedy", "milp", "cpsat"])
def test_solvers_say_what_they_knew_when(name):
    """Times rise, objectives fall, bounds rise; the first point is greedy's answer and the
    last is what the referee found, in the order of the solve's own clock."""
    problem = realistic(np.random.default_rng(3), 4, [4], 3)
    solved = solve(problem, name, SolveOptions(time_limit_s=20))
    points, report = solved.report.progress, solved.report
    assert points == curve(points)
    first, last = points[0].objective, points[-1]
    greedy = solve(problem, "greedy").report
    assert first == pytest.approx(greedy.objective)
    assert solved.schedule is not None
    assert last.objective == pytest.approx(referee.cost(problem, solved.schedule).total)
    assert last.bound == pytest.approx(report.bound)
    assert last.elapsed_s <= report.wall_s + 1e-9
    optimum = 1e-6 + (report.objective or 0.0)
    assert all(p.bound is None or p.bound <= optimum for p in points)
    assert len(greedy.progress) == 1


def test_the_child_says_how_much_memory_it_took():
    """A Python process with a solver in it takes more than 10 MB, and less than the whole
    of a small machine."""
    solved = solve(realistic(np.random.default_rng(3), 3, [2], 2), "greedy")
    assert solved.report.peak_bytes is not None
    assert 10e6 < solved.report.peak_bytes < 4e9
