"""A linear programme put together in whole blocks of columns and rows (numpy only)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers = NDArray[np.int64]
"""Numbers of columns or rows, in any shape; -1 stands for one that there is not."""
Floats = NDArray[np.float64]

INFINITY = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Programme:
    """Minimise ``cost`` x + ``offset``, rows by rows (CSR): ``begin``, ``column``,
    ``value``; the columns in ``whole`` are integers."""

    cost: Floats
    offset: float
    column_lower: Floats
    column_upper: Floats
    whole: NDArray[np.bool_]
    row_lower: Floats
    row_upper: Floats
    begin: NDArray[np.int32]
    column: NDArray[np.int32]
    value: Floats


class Matrix:
    """Columns, rows and entries as they are added; `programme` sorts them by row."""

    def __init__(self) -> None:
        self.num_columns = self.num_rows = 0
        self.offset = 0.0
        self._columns: list[tuple[Floats, Floats, Floats, NDArray[np.bool_]]] = []
        self._rows: list[tuple[Floats, Floats]] = []
        self._entries: list[tuple[Numbers, Numbers, Floats]] = []
        self._priced: list[tuple[Numbers, Floats]] = []

    def columns(
        self,
        shape: int | Sequence[int],
        *,
        upper: ArrayLike = INFINITY,
        whole: bool = False,
        where: NDArray[np.bool_] | None = None,
    ) -> Numbers:
        """Numbers of new columns from 0 to ``upper``, -1 where not ``where``."""
        numbers = np.full(shape, -1, dtype=np.int64)
        chosen = np.broadcast_to(True if where is None else where, numbers.shape)
        count = int(chosen.sum())
        numbers[chosen] = self.num_columns + np.arange(count)
        top = np.broadcast_to(np.asarray(upper, dtype=np.float64), numbers.shape)
        self._columns.append(
            (np.zeros(count), top[chosen], np.zeros(count), np.full(count, whole))
        )
        self.num_columns += count
        return numbers

    def price(self, columns: Numbers, cost: ArrayLike) -> None:
        """Add ``cost`` per unit of these columns."""
        columns, costs = np.broadcast_arrays(columns, np.asarray(cost, np.float64))
        there = columns >= 0
        self._priced.append((columns[there], costs[there]))

    def rows(
        self,
        shape: int | Sequence[int],
        *,
        lower: ArrayLike = -INFINITY,
        upper: ArrayLike = INFINITY,
    ) -> Numbers:
        """Numbers of new rows, empty so far."""
        count = int(np.prod(shape))
        low, high = (
            np.broadcast_to(np.asarray(bound, np.float64), shape).ravel()
            for bound in (lower, upper)
        )
        self._rows.append((low, high))
        numbers = self.num_rows + np.arange(count, dtype=np.int64)
        self.num_rows += count
        return numbers.reshape(shape)

    def put(self, rows: Numbers, columns: Numbers, values: ArrayLike) -> None:
        """Add entries; the three are broadcast. A row names each column once."""
        rows, columns, numbers = np.broadcast_arrays(
            rows, columns, np.asarray(values, dtype=np.float64)
        )
        there = (columns >= 0) & (rows >= 0) & (numbers != 0)
        self._entries.append((rows[there], columns[there], numbers[there]))

    def programme(self) -> Programme:
        lower, upper, cost, whole = (
            np.concatenate(parts) for parts in zip(*self._columns, strict=True)
        )
        for columns, added in self._priced:
            np.add.at(cost, columns, added)
        row_lower, row_upper = (
            np.concatenate(parts) for parts in zip(*self._rows, strict=True)
        )
        row, column, value = (
            np.concatenate(parts) for parts in zip(*self._entries, strict=True)
        )
        order = np.argsort(row, kind="stable")
        begin = np.zeros(self.num_rows + 1, dtype=np.int32)
        np.cumsum(np.bincount(row, minlength=self.num_rows), out=begin[1:])
        return Programme(
            cost=cost,
            offset=self.offset,
            column_lower=lower,
            column_upper=upper,
            whole=whole,
            row_lower=row_lower,
            row_upper=row_upper,
            begin=begin,
            column=column[order].astype(np.int32),
            value=value[order],
        )
