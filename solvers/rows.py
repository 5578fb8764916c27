"""Linear sums and rows for Pyomo models, quick to build and to read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyomo.environ as pyo
from pyomo.core.expr import LinearExpression

Pairs = list[tuple[float, Any]]
"""A linear sum: (coefficient, Pyomo variable)."""


def linear(pairs: Sequence[tuple[float, Any]], constant: float = 0.0) -> Any:
    return LinearExpression(
        constant=constant,
        linear_coefs=[coefficient for coefficient, _ in pairs],
        linear_vars=[variable for _, variable in pairs],
    )


def at_most(pairs: Sequence[tuple[float, Any]], bound: float | None) -> Any:
    # Pyomo refuses rows without variables; none of ours says anything then.
    return (None, linear(pairs), bound) if pairs else pyo.Constraint.Skip


def at_least(pairs: Sequence[tuple[float, Any]], bound: float) -> Any:
    return bound, linear(pairs), None
