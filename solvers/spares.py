"""What spare GPUs may hold, by numbers of columns, and what was made of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreserve.solvers.ledger import Floats, Ledger

Ints = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Spares:
    """Items and memory of one class's spare GPUs."""

    columns: list[int]
    """[item] number of its column."""
    cover: Floats
    """[item, scenario] instances that one GPU's part of it covers."""
    row: Ints
    """[item, scenario] row of (LLM, scenario); where it has none, ``cover`` is 0."""
    load: Floats
    """[item] cost of loading one GPU's part, where it does not depend on the counts."""
    held: Ints
    """[item] its row of counts, -1 for most."""
    part: Floats
    """[item] 1 / tp."""
    weight: Ints
    llm: Ints
    usable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What a spare GPU of class ``group`` holds, by numbers of columns."""

    group: int
    columns: tuple[int, ...]
    amount: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """ACTIVE counts by column, and patterns for the spare GPUs."""

    value: float
    """What they cost, or would if patterns came in parts."""
    active: Floats
    patterns: tuple[Pattern, ...] = ()
    warm: Floats | None = None
    """WARM counts by column, where there are no patterns."""


def spare_items(ledger: Ledger, c: int) -> Spares:
    """Items of the spare GPUs of class c: what is asked for and fits one GPU."""
    usable = ledger.classes[c].usable
    row_of = {(s, m): r for r, (s, m, *_) in enumerate(ledger.needs)}
    scenarios = 1 + max((s for s, *_ in ledger.needs), default=-1)
    asked = {m for _, m, *_ in ledger.needs}
    own = [
        j
        for j, column in enumerate(ledger.columns)
        if column.group == c
        and column.llm in asked
        and column.option.resident_bytes <= usable
    ]
    cover = np.zeros((len(own), scenarios))
    row = np.zeros((len(own), scenarios), np.int64)
    for i, j in enumerate(own):
        column = ledger.columns[j]
        for s in range(scenarios):
            r = row_of.get((s, column.llm))
            if r is not None:
                row[i, s] = r
                counted = min(column.units, ledger.needs[r][2])
                cover[i, s] = counted / column.option.tp
    held = {j: h for h, j in enumerate(ledger.tied)}
    tps = np.array([ledger.columns[j].option.tp for j in own], np.float64)
    load = [0.0 if j in held else ledger.load[j] for j in own]
    return Spares(
        columns=own,
        cover=cover,
        row=row,
        load=np.array(load) / tps,
        held=np.array([held.get(j, -1) for j in own], np.int64),
        part=1 / tps,
        weight=np.array(
            [max(1, ledger.columns[j].option.resident_bytes) for j in own], np.int64
        ),
        llm=np.array([ledger.columns[j].llm for j in own], np.int64),
        usable=usable,
    )
