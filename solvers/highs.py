"""A linear Pyomo model, handed to HiGHS directly and searched.

Pyomo's own interfaces walk every expression and take longer than many of our solves;
rows made of `LinearExpression` are read as they are. Values come back in the model's
variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import highspy
import numpy as np
import pyomo.environ as pyo
from numpy.typing import NDArray
from pyomo.core.expr import LinearExpression
from pyomo.repn import generate_standard_repn

from foreserve.models.errors import InvalidInput
from foreserve.models.plan import Status
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
    """How HiGHS ended; without a solution, `objective` is None."""

    status: Status
    objective: float | None
    bound: float
    progress: tuple[Progress, ...]
    time_to_first_s: float | None
    message: str


def run(
    m: Any,
    options: SolveOptions,
    hints: Iterable[tuple[Any, float]],
    began_s: float,
) -> Run:
    """Minimise ``m`` from the partial solution ``hints``; time counts from ``began_s``."""
    solver, variables = hand_over(m)
    number = {id(variable): j for j, variable in enumerate(variables)}
    start = {number[id(variable)]: value for variable, value in hints}
    if start:
        solver.setSolution(
            len(start),
            np.array(list(start), dtype=np.int32),
            np.array(list(start.values())),
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
    if len(variables) > SIMPLEX_COLUMNS:
        settings["mip_lp_solver"] = "ipm"
    if options.work_limit is not None:
        settings["mip_max_nodes"] = int(options.work_limit)
    for name, value in settings.items():
        solver.setOptionValue(name, value)
    # HiGHS keeps one pool of threads per process, made for the first count asked for.
    solver.resetGlobalScheduler(True)
    solver.run()

    info, ending = solver.getInfo(), solver.getModelStatus()
    objective = _finite(info.objective_function_value)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        objective = None
    else:
        values = solver.getSolution().col_value
        for variable, value in zip(variables, values, strict=True):
            variable.set_value(value, skip_validation=True)
    firsts = (point.elapsed_s for point in seen if point.objective is not None)
    return Run(
        status=STATUS.get(ending, Status.ERROR),
        objective=objective,
        bound=_finite(info.mip_dual_bound) or 0.0,
        progress=tuple(seen),
        time_to_first_s=next(firsts, None),
        message=f"HiGHS: {solver.modelStatusToString(ending).lower()}",
    )


def hand_over(m: Any) -> tuple[highspy.Highs, list[Any]]:
    """HiGHS loaded with the model, and the variables of its columns in order."""
    variables = list(m.component_data_objects(pyo.Var))
    number = {id(variable): j for j, variable in enumerate(variables)}
    lower, upper, begin = [], [], [0]
    columns: list[int] = []
    values: list[float] = []
    for row in m.component_data_objects(pyo.Constraint):
        low, body, high = row.to_bounded_expression()
        constant, coefficients, over = _linear(body)
        columns += [number[id(variable)] for variable in over]
        values += coefficients
        begin.append(len(columns))
        lower.append(-highspy.kHighsInf if low is None else pyo.value(low) - constant)
        upper.append(highspy.kHighsInf if high is None else pyo.value(high) - constant)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(variables), len(lower)
    bounds = [(v.value, v.value) if v.fixed else v.bounds for v in variables]
    lp.col_lower_ = _array(-highspy.kHighsInf if b[0] is None else b[0] for b in bounds)
    lp.col_upper_ = _array(highspy.kHighsInf if b[1] is None else b[1] for b in bounds)
    lp.integrality_ = [
        highspy.HighsVarType.kContinuous
        if variable.is_continuous()
        else highspy.HighsVarType.kInteger
        for variable in variables
    ]
    lp.row_lower_, lp.row_upper_ = np.array(lower), np.array(upper)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(begin, dtype=np.int32)
    lp.a_matrix_.index_ = np.array(columns, dtype=np.int32)
    lp.a_matrix_.value_ = np.array(values, dtype=np.float64)
    cost = np.zeros(len(variables))
    objective = next(m.component_data_objects(pyo.Objective, active=True))
    lp.offset_, coefficients, over = _linear(objective.expr)
    for coefficient, variable in zip(coefficients, over, strict=True):
        cost[number[id(variable)]] += coefficient
    lp.col_cost_ = cost
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.passModel(lp)
    return solver, variables


def write(m: Any, path: str, name: Callable[[Any], str]) -> None:
    """Write ``m`` to an .lp or .mps file; ``name`` of a variable or a row must be one
    word, and its own."""
    solver, variables = hand_over(m)
    lp = solver.getLp()
    lp.col_names_ = [name(variable) for variable in variables]
    lp.row_names_ = [name(row) for row in m.component_data_objects(pyo.Constraint)]
    solver.passModel(lp)
    if solver.writeModel(path) != highspy.HighsStatus.kOk:
        raise InvalidInput("HiGHS cannot write a model there", file=path)


def _linear(body: Any) -> tuple[float, Sequence[float], Sequence[Any]]:
    """Constant, coefficients and variables of a linear expression."""
    if type(body) is not LinearExpression:
        body = generate_standard_repn(body)
        if not body.is_linear():
            raise ValueError(f"not linear: {body}")
    return body.constant, body.linear_coefs, body.linear_vars


def _array(values: Iterable[float]) -> NDArray[np.float64]:
    return np.fromiter(values, dtype=np.float64)


def _finite(value: float) -> float | None:
    return value if abs(value) < highspy.kHighsInf else None
