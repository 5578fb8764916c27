"""The exact solver that was measured to be better at the problem's size.

One thread, gap 1e-3, start from greedy, seconds of the processor, by LLMs x GPUs x
scenarios (`benchmarks/exact_solvers.py`; means over four problems, two at 16 x 32):

    8 x 8 x 8:  CP-SAT 0.19, HiGHS 0.47     16 x 16 x 8:  gap after 20 s 0.024, 0.024
    12 x 8 x 8: CP-SAT 0.42, HiGHS 0.42     16 x 32 x 20: gap after 20 s 0.92, 0.73

The sizes are about 800, 1,100, 2,700 and 12,300 binary choices; HiGHS is `highs`, Pyomo's
`milp` is slower at each. Beyond that neither gets near its bound, and `scale` does
(docs/solving_at_scale.md). Rows that have to be asked for (`models.problem.OPTIONAL`) are
for HiGHS, whatever the size, unless `scale` knows them.
"""

from __future__ import annotations

from foreserve.models.problem import Problem, asks_for
from foreserve.solvers import cpsat, direct, scale
from foreserve.solvers.base import CARRIES, Solver
from foreserve.solvers.index import candidate_count, index
from foreserve.solvers.result import Schedule, Solved, SolveOptions

CPSAT_CHOICES = 2_000
"""CP-SAT takes problems of up to this many binary choices, HiGHS larger ones."""
SCALE_CHOICES = 8_000
"""And `scale` those above this."""


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """As the chosen solver, whose name the report carries."""
    if options.lexicographic:
        # Pyomo takes half a second to import, and nothing else here needs it.
        from foreserve.solvers import milp_solve

        return milp_solve.solve(problem, options, start)
    asked = asks_for(problem)
    many = candidate_count(problem.fleet) > SCALE_CHOICES
    count = SCALE_CHOICES + 1 if many else choices(problem)
    solver: Solver = direct.solve
    if count <= CPSAT_CHOICES and not asked:
        solver = cpsat.solve
    elif count > SCALE_CHOICES and asked <= CARRIES["scale"]:
        solver = scale.solve
    return solver(problem, options, start)


def choices(problem: Problem) -> int:
    """Binary choices of a problem: ACTIVE, WARM, and activations in scenarios."""
    p = index(problem)
    activations = sum(len(p.of[m]) for _, m, _ in p.exposed())
    return len(p.R) * len(p.T) + len(p.prewarmable()) + activations
