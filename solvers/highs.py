"""A linear Pyomo model, handed to HiGHS directly and searched.

Pyomo's own interfaces walk every expression and take longer than many of our solves;
rows made of `LinearExpression` are read as they are. Values come back in the model's
variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import highspy
import numpy as np
import pyomo.environ as pyo
from pyomo.core.expr import LinearExpression
from pyomo.repn import generate_standard_repn

from foreserve.models.errors import InvalidInput
from foreserve.solvers.matrix import INFINITY, Floats, Programme
from foreserve.solvers.result import SolveOptions
from foreserve.solvers.search import Run, load, search


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
    found = search(solver, options, start, began_s)
    if found.values is not None:
        for variable, value in zip(variables, found.values.tolist(), strict=True):
            variable.set_value(value, skip_validation=True)
    return found


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
        lower.append(-INFINITY if low is None else pyo.value(low) - constant)
        upper.append(INFINITY if high is None else pyo.value(high) - constant)
    cost = np.zeros(len(variables))
    objective = next(m.component_data_objects(pyo.Objective, active=True))
    offset, coefficients, over = _linear(objective.expr)
    for coefficient, variable in zip(coefficients, over, strict=True):
        cost[number[id(variable)]] += coefficient
    bounds = [(v.value, v.value) if v.fixed else v.bounds for v in variables]
    programme = Programme(
        cost=cost,
        offset=offset,
        column_lower=_array(-INFINITY if b[0] is None else b[0] for b in bounds),
        column_upper=_array(INFINITY if b[1] is None else b[1] for b in bounds),
        whole=np.array([not variable.is_continuous() for variable in variables]),
        row_lower=np.array(lower),
        row_upper=np.array(upper),
        begin=np.array(begin, dtype=np.int32),
        column=np.array(columns, dtype=np.int32),
        value=np.array(values, dtype=np.float64),
    )
    return load(programme), variables


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


def _array(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
