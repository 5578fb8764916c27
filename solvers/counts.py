"""The cluster as counts per class of equal nodes: a first bound, and what to build.

Why it bounds. Take any schedule's placement of one epoch. WARM replicas that touch a GPU
with an ACTIVE one serve no scenario, so dropping them costs nothing; what is left splits
a class's used GPUs into serving ones (exactly one ACTIVE replica each) and spare ones.
Its counts obey every row below, and cost no more here than by the referee:

    tp-weighted ACTIVE counts + spare <= GPUs of the class                       (C3)
    tp-weighted WARM bytes <= usable * spare; of one LLM: <= spare               (C1), (C4)
    rates and least and most replicas as they are                                (C5), (C10)
    activations in a scenario: z <= WARM, tp-weighted z <= spare,
    miss + sum min(units, need) (ACTIVE + z) >= need                             (O2)
    loads >= replicas - those of that option there before                        (O4)
    stops >= ACTIVE before - ACTIVE                                              (O4)

Rows that are asked for on top (C9, and C10 of a GPU) are left out: fewer rows, a lower
bound that holds. `Ledger` has the rows that say nothing of what a spare GPU holds;
`CountModel` adds the others. `arrange` puts patterns in their place: this LP gives its
first prices, and is what there is where patterns take too long.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import numpy as np

from foreserve.models.placement import Replica
from foreserve.models.problem import Problem
from foreserve.solvers.ledger import (
    Floats,
    Ledger,
    Terms,
    branch,
    columns,
    groups,
    infeasible,
    run,
    safe,
)

DIVE = 0.1
"""Share of the counts in parts that a step of `dive` makes whole."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a solve of the counts found."""

    bound: float
    active: Floats
    """[column]"""
    warm: Floats
    prices: Floats
    """[row of needs] what one more instance there is worth."""


class CountModel:
    """The rows of the module's docstring for one epoch, in HiGHS."""

    def __init__(self, problem: Problem, epoch: int, switching: bool) -> None:
        self.classes = groups(problem)
        self.columns = columns(problem, self.classes, switching)
        every = list(range(len(self.columns)))
        self.ledger = Ledger(
            problem,
            epoch,
            switching=switching,
            classes=self.classes,
            columns=self.columns,
            tied=every,
        )
        self.feasible = self.ledger.feasible
        self._class_of = {n: c for c, g in enumerate(self.classes) for n in g.nodes}
        self._number = {
            (column.group, column.option.llm, column.option.tp): j
            for j, column in enumerate(self.columns)
        }
        self._hold()
        self._activate()
        self.solver = self.ledger.hand_over()

    def _hold(self) -> None:
        """Memory of spare GPUs, and one copy of an LLM on each."""
        ledger = self.ledger
        asked = {m for _, m, *_ in ledger.needs}
        for c, group in enumerate(self.classes):
            held: Terms = [(ledger.spare[c], -1.0)]
            own: dict[int, Terms] = {}
            for j, column in enumerate(self.columns):
                if column.group != c:
                    continue
                option = column.option
                if column.llm not in asked or option.resident_bytes > group.usable:
                    ledger.row([(ledger.warm[j], 1.0)], high=0)
                    continue
                share = option.tp * option.resident_bytes / group.usable
                held.append((ledger.warm[j], share))
                own.setdefault(column.llm, [(ledger.spare[c], -1.0)]).append(
                    (ledger.warm[j], float(option.tp))
                )
            ledger.row(held, high=0)
            for terms in own.values():
                ledger.row(terms, high=0)

    def _activate(self) -> None:
        ledger = self.ledger
        of: dict[int, list[int]] = {}
        for j, column in enumerate(self.columns):
            if column.option.resident_bytes <= self.classes[column.group].usable:
                of.setdefault(column.llm, []).append(j)
        taken: dict[tuple[int, int], Terms] = {}
        for row, (s, m, count, _) in enumerate(ledger.needs):
            for j in of.get(m, ()):
                column = self.columns[j]
                z = ledger.new(0.0)
                ledger.extend(row, [(z, float(min(column.units, count)))])
                ledger.row([(z, 1.0), (ledger.warm[j], -1.0)], high=0)
                used = taken.setdefault((s, column.group), [])
                used.append((z, float(column.option.tp)))
        for (_, c), activated in taken.items():
            ledger.row([*activated, (ledger.spare[c], -1.0)], high=0)

    def relax(self, limit_s: float) -> Counts | None:
        """The LP relaxation; None if it was not solved in time (or is infeasible)."""
        if not run(self.solver, limit_s):
            self.feasible = not infeasible(self.solver)
            return None
        return self._read(safe(self.solver.getInfo().objective_function_value))

    def dive(self, limit_s: float) -> Counts | None:
        """Whole ACTIVE counts, all within a step of the LP's: those nearest to a whole
        number are rounded, and the LP is solved again, until all are; demand that this
        leaves is for others to cover. None where the time or the room ends."""
        solver, actives = self.solver, self.ledger.active
        until_s = perf_counter() + limit_s
        found: Counts | None = None
        while run(solver, until_s - perf_counter()):
            amounts = np.array(solver.getSolution().col_value)[actives]
            off = np.abs(amounts - amounts.round())
            loose = np.flatnonzero(off > 1e-6)
            if not len(loose):
                found = self._read(0.0)
                break
            for i in loose[np.argsort(off[loose])][: 1 + int(DIVE * len(loose))]:
                whole = float(amounts[i].round())
                solver.changeColBounds(actives[i], whole, whole)
        for j, most in zip(actives, self.ledger.limits, strict=True):
            solver.changeColBounds(j, 0.0, most)
        return found

    def whole(self, limit_s: float, gap: float, seed: int, nodes: int | None) -> float:
        """The bound with whole ACTIVE counts, as far as the time goes, of at most so many
        nodes."""
        bound = branch(self.solver, self.ledger.active, limit_s, gap, seed, nodes)
        self.feasible = not infeasible(self.solver)
        return bound

    def _read(self, bound: float) -> Counts:
        solution = self.solver.getSolution()
        values = np.array(solution.col_value)
        prices = np.array(solution.row_dual)[: len(self.ledger.needs)]
        return Counts(
            bound=bound,
            active=values[self.ledger.active],
            warm=values[self.ledger.warm],
            prices=np.maximum(prices, 0.0),
        )

    def column_of(self, replica: Replica) -> int:
        """The column that counts a replica which is a candidate."""
        group = self._class_of[replica.gpus[0].node]
        return self._number[group, replica.llm, replica.tp]
