"""The exact solver that was measured to be better at the problem's size.

One thread, gap 1e-3, start from greedy; mean seconds to that gap over six random
problems each, by LLMs x GPUs x scenarios:

    8 x 8 x 8: CP-SAT 0.13, HiGHS 0.39      16 x 16 x 8:  CP-SAT 3.5, HiGHS 1.8
    12 x 8 x 8: CP-SAT 0.10, HiGHS 0.15     16 x 32 x 20: gap after 10 s 0.60, 0.37

The sizes are about 800, 1,100, 4,300 and 18,000 binary choices. Beyond that neither gets
near its bound, and `scale` does (docs/solving_at_scale.md). Rows that have to be asked for
(`models.problem.OPTIONAL`) are MILP's.
"""

from __future__ import annotations

from foreserve.models.problem import Problem, asks_for
from foreserve.solvers import cpsat, milp, scale
from foreserve.solvers.base import Solver
from foreserve.solvers.index import candidate_count, index
from foreserve.solvers.result import Schedule, Solved, SolveOptions

CPSAT_CHOICES = 2_500
"""CP-SAT takes problems of up to this many binary choices, HiGHS larger ones."""
SCALE_CHOICES = 8_000
"""And `scale` those above this."""


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """As the chosen solver, whose name the report carries."""
    solver: Solver = scale.solve
    if asks_for(problem):
        solver = milp.solve
    elif candidate_count(problem.fleet) <= SCALE_CHOICES:
        count = choices(problem)
        if count <= CPSAT_CHOICES:
            solver = cpsat.solve
        elif count <= SCALE_CHOICES:
            solver = milp.solve
    return solver(problem, options, start)


def choices(problem: Problem) -> int:
    """Binary choices of a problem: ACTIVE, WARM, and activations in scenarios."""
    p = index(problem)
    activations = sum(len(p.of[m]) for _, m, _ in p.exposed())
    return len(p.R) * len(p.T) + len(p.prewarmable()) + activations
