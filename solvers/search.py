"""HiGHS on a linear programme: what is handed over, how it searches, what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import highspy
import numpy as np

from foreserve.models.plan import Status
from foreserve.solvers.matrix import Floats, Numbers, Programme
from foreserve.solvers.result import Progress, SolveOptions

STATUS = {
    highspy.HighsModelStatus.kOptimal: Status.OPTIMAL,
    highspy.HighsModelStatus.kInfeasible: Status.INFEASIBLE,
    # No term of our objectives is negative, so none is unbounded.
    highspy.HighsModelStatus.kUnboundedOrInfeasible: Status.INFEASIBLE,
    highspy.HighsModelStatus.kTimeLimit: Status.TIME_LIMIT,
    highspy.HighsModelStatus.kSolutionLimit: Status.TIME_LIMIT,
    highspy.HighsModelStatus.kInterrupt: Status.TIME_LIMIT,
}


SIMPLEX_COLUMNS = 12_000
"""Above this the interior-point method solves the root sooner (measured: 3.9 s against
3.3 s at 9,000 columns, 6.9 s against 13.3 s at 18,000)."""


@dataclass(slots=True, kw_only=True)
class Run:
    """How HiGHS ended; without a solution, `objective` and `values` are None."""

    status: Status
    objective: float | None
    values: Floats | None
    """Of the columns."""
    bound: float
    progress: tuple[Progress, ...]
    time_to_first_s: float | None
    message: str


def load(p: Programme) -> highspy.Highs:
    """HiGHS, silent, loaded with ``p``."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(p.cost), len(p.row_lower)
    lp.col_cost_, lp.offset_ = p.cost, p.offset
    lp.col_lower_, lp.col_upper_ = p.column_lower, p.column_upper
    kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
    lp.integrality_ = [kinds[whole] for whole in p.whole.tolist()]
    lp.row_lower_, lp.row_upper_ = p.row_lower, p.row_upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = p.begin
    lp.a_matrix_.index_ = p.column
    lp.a_matrix_.value_ = p.value
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    return solver


def search(
    solver: highspy.Highs,
    options: SolveOptions,
    start: Mapping[int, float],
    began_s: float,
) -> Run:
    """Minimise from ``start``, values of some or all columns; time counts from
    ``began_s``."""
    if start:
        solver.setSolution(
            len(start),
            np.fromiter(start, dtype=np.int32),
            np.fromiter(start.values(), dtype=np.float64),
        )
    seen: list[Progress] = []

    def note(objective: float, bound: float) -> None:
        elapsed_s = perf_counter() - began_s
        point = Progress(elapsed_s, _finite(objective), _finite(bound))
        if not seen or seen[-1][1:] != point[1:]:
            seen.append(point)

    def note_both(event: Any) -> None:
        note(event.data_out.mip_primal_bound, event.data_out.mip_dual_bound)

    def note_answer(event: Any) -> None:
        # For an answer that it was given HiGHS states this as its bound too: not true.
        note(event.data_out.objective_function_value, -highspy.kHighsInf)

    solver.cbMipInterrupt.subscribe(note_both)
    solver.cbMipImprovingSolution.subscribe(note_answer)
    settings: dict[str, Any] = {
        "mip_rel_gap": options.gap,
        "random_seed": options.seed % 2**31,
        "threads": options.threads,
        "time_limit": max(0.0, options.time_limit_s - (perf_counter() - began_s)),
    }
    if solver.getNumCol() > SIMPLEX_COLUMNS:
        settings["mip_lp_solver"] = "ipm"
    if options.work_limit is not None:
        settings["mip_max_nodes"] = int(options.work_limit)
    for name, value in settings.items():
        solver.setOptionValue(name, value)
    # HiGHS keeps one pool of threads per process, made for the first count asked for.
    solver.resetGlobalScheduler(True)
    solver.run()

    info, ending = solver.getInfo(), solver.getModelStatus()
    objective, values = _finite(info.objective_function_value), None
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        objective = None
    else:
        values = np.array(solver.getSolution().col_value)
    firsts = (point.elapsed_s for point in seen if point.objective is not None)
    return Run(
        status=STATUS.get(ending, Status.ERROR),
        objective=objective,
        values=values,
        bound=_finite(info.mip_dual_bound) or 0.0,
        progress=tuple(seen),
        time_to_first_s=next(firsts, None),
        message=f"HiGHS: {solver.modelStatusToString(ending).lower()}",
    )


def bound(solver: highspy.Highs, columns: Numbers, low: Floats, high: Floats) -> None:
    """Give columns other bounds, and forget what was found within the old ones."""
    solver.changeColsBounds(len(columns), columns.astype(np.int32), low, high)
    solver.clearSolver()


def _finite(value: float) -> float | None:
    return value if abs(value) < highspy.kHighsInf else None
