"""The cluster as ACTIVE counts and patterns of spare GPUs: the lower bound.

Why it bounds. Take any schedule's placement of one epoch and drop its WARM replicas that
touch a GPU with an ACTIVE one: they serve no scenario. What is left uses, in each class of
equal nodes (`counts`), GPUs with exactly one ACTIVE replica and spare ones. Each spare GPU
holds a set of replicas that fits it and runs at most one of them in a scenario: a pattern
(`patterns`). A WARM replica of tp GPUs is in the patterns of all of them, and an activation
that counts for ``units`` instances is run by all of them: each contributes 1/tp. So

    tp-weighted ACTIVE counts + spare <= GPUs of the class, patterns <= spare       (C3)
    ACTIVE units + sum over patterns of units run / tp + miss >= need, by scenario  (O2)
    sum over patterns that hold j of 1/tp <= WARM_j, where WARM counts are limited  (C10)
    or where some were there before: loads >= ACTIVE + WARM - resident              (O4)

hold for the plan's own patterns, beside the rows for demand, rules and stops, at no more
than its cost. With prices e for instances run (by LLM and scenario) and f for WARM counts,
no spare GPU's pattern is worth more than `best_set`'s limit h, so for every e, f >= 0

    sum e run <= sum over classes of h spare + sum f WARM + loads                   (cut)

holds in every plan. Patterns are generated as columns of an LP; each price vector that it
asks about is also a cut, and the integer programme over counts, misses and cuts alone (no
patterns, no places) gives the bound. With its counts held fixed, columns are generated
again: that gives the cuts the counts were wrong about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from foreserve.models.problem import Problem
from foreserve.solvers.counts import CountModel
from foreserve.solvers.ledger import (
    INFINITE,
    Ledger,
    branch,
    found_any,
    infeasible,
    run,
    safe,
)
from foreserve.solvers.patterns import best_set, good_sets
from foreserve.solvers.spares import Arranged, Pattern, spare_items

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Dual = tuple[Floats, Floats, Floats]
"""Prices of instances run, of WARM counts, and of spare GPUs by class."""
WIDTH = 0.1
"""How far prices of the LP may be from the best so far, as a share."""
SMOOTH = 0.5
"""Part of the best prices so far in those that are asked about next."""
BRANCH = 0.6
"""Most of the time left that one search for whole counts takes."""
KEPT = 8
"""Cuts kept of those made for one choice of whole counts."""
STEPS = 400_000
"""Most steps of one search for the best pattern, times items."""
Key = tuple[int, tuple[int, ...], tuple[int, ...]]
"""Class, items, and which runs in each scenario."""
TRIED = 150
DIVE = 0.15
"""Share of the amounts in parts that a step of `dive` makes whole."""
FEW = 24
"""Most columns that one price vector adds per class."""


class PatternModel:
    """Bound and counts of one epoch. Mutable: `relax`, then `whole`."""

    def __init__(
        self, problem: Problem, epoch: int, counts: CountModel, switching: bool
    ) -> None:
        self.classes, self.columns = counts.classes, counts.columns
        self.tied = [
            j
            for j, column in enumerate(self.columns)
            if column.resident
            or problem.fleet.llms[column.llm].max_replicas is not None
        ]
        ledgers = [
            Ledger(
                problem,
                epoch,
                switching=switching,
                classes=self.classes,
                columns=self.columns,
                tied=self.tied,
            )
            for _ in range(2)
        ]
        self.ledger, outer = ledgers
        self.needs = self.ledger.needs
        self.bound, self.feasible = 0.0, self.ledger.feasible
        self.spares = [spare_items(self.ledger, c) for c in range(len(self.classes))]
        self.lp = self.ledger.hand_over()
        self._box = [self._artificial(r) for r in range(len(self.needs))]
        self._first = self.lp.getNumCol()
        self._runs = [outer.new(0.0) for _ in self.needs]
        for row, variable in enumerate(self._runs):
            outer.extend(row, [(variable, 1.0)])
        self._loads = outer.new(1.0)
        self._rows = outer.num_rows
        self.master = outer.hand_over()
        self._generated: list[tuple[int, tuple[int, ...]]] = []
        self._known: set[Key] = set()
        self._cuts: list[tuple[Floats, Floats]] = []
        self._parts: tuple[Pattern, ...] = ()

    def _artificial(self, row: int) -> tuple[int, int]:
        """Columns that keep the price of a row between limits: more, and less of it."""
        first = self.lp.getNumCol()
        for entry in (1.0, -1.0):
            self.lp.addCol(
                0.0, 0.0, 0.0, 1, np.array([row], np.int32), np.array([entry])
            )
        return first, first + 1

    def _confine(self, centre: Floats, width: float) -> None:
        """Prices of the LP within ``width`` (a share) of a centre; 0: wherever."""
        columns = np.array(self._box, np.int32).ravel()
        count = len(columns)
        if count == 0:
            return
        least = 0.1 * float(centre.mean())
        reach = width * np.maximum(centre, least)
        costs = np.stack([centre + reach, -np.maximum(0.0, centre - reach)], axis=1)
        most = np.full(count, INFINITE if width else 0.0)
        self.lp.changeColsCost(count, columns, costs.ravel())
        self.lp.changeColsBounds(count, columns, np.zeros(count), most)

    def _confined(self) -> bool:
        """Whether the limits on prices matter."""
        values = self.lp.getSolution().col_value
        return any(values[j] > 1e-9 for pair in self._box for j in pair)

    def relax(
        self, until_s: float, prices: Floats, gap: float, rounds: float | None
    ) -> Arranged | None:
        """Generate patterns until the clock of `perf_counter` says ``until_s``, or the
        bound is within ``gap`` of the LP; ``prices``: first guess, by row of needs;
        ``rounds``: at most 100 times so many LPs."""
        lp = self.lp
        self._ask(prices, np.zeros(len(self.tied)), None)
        centre = self._centre()
        found: Arranged | None = None
        smooth, width, done = SMOOTH, WIDTH, 0
        best = self.bound
        if centre is not None:
            self._confine(centre[0], width)
        while centre is not None and (rounds is None or done < 100 * rounds):
            done += 1
            if not run(lp, until_s - perf_counter()):
                break
            found = self._read()
            if found.value - self.bound <= gap * abs(found.value):
                if not width or not self._confined():
                    break
                width = 2 * width
                self._confine(centre[0], width)
                continue
            dual = self._duals()
            added = self._ask(*_between(centre, dual, smooth), dual)
            if not added:
                smooth = max(0.0, smooth - 0.1)
                added = self._ask(dual[0], dual[1], dual)
                if not added:
                    centre = self._centre() or centre
                    if not self._confined():
                        break
                    width = 2 * width
                    self._confine(centre[0], width)
            centre = self._centre() or centre
            if self.bound > best + 1e-3 * abs(found.value - best):
                best = self.bound
                self._confine(centre[0], width)
        self._confine(prices, 0.0)
        if run(lp, max(1.0, until_s - perf_counter())):
            found = self._read()
        self._parts = found.patterns if found else ()
        return found

    def _duals(self) -> Dual:
        dual = np.array(self.lp.getSolution().row_dual)
        ends = np.cumsum([len(self.needs), len(self.tied), len(self.classes)])
        prices, held, spare = np.split(dual[: ends[2]], ends[:2])
        return np.maximum(prices, 0), np.maximum(-held, 0), np.maximum(-spare, 0)

    def _centre(self) -> tuple[Floats, Floats] | None:
        """Bound by all cuts, and the prices behind it."""
        if not run(self.master, INFINITE):
            self.feasible = not infeasible(self.master)
            return None
        self.bound = max(
            self.bound, safe(self.master.getInfo().objective_function_value)
        )
        dual = np.array(self.master.getSolution().row_dual)[self._rows :]
        instances, held = np.zeros(len(self.needs)), np.zeros(len(self.tied))
        for part, (e, f) in zip(np.maximum(-dual, 0), self._cuts, strict=True):
            instances += part * e
            held += part * f
        return instances, held

    def _ask(self, prices: Floats, held: Floats, dual: Dual | None) -> int:
        """Best patterns at these prices: a cut, and columns that pay at ``dual``."""
        limits, added = np.zeros(len(self.classes)), 0
        for c, spares in enumerate(self.spares):
            if not spares.columns:
                continue
            extra = np.where(spares.held >= 0, held[spares.held] if len(held) else 0, 0)
            cost = spares.load + extra * spares.part
            value = spares.cover * prices[spares.row]
            shared = value, cost, spares.weight, spares.llm, spares.usable
            limits[c], _, items = best_set(*shared, 100 + STEPS // len(cost))
            sets = [np.sort(items)]
            if dual is not None:
                tried = np.flatnonzero(value.any(axis=1))
                tried = tried[
                    len(self._cuts) % (1 + len(tried) // TRIED) :: 1
                    + len(tried) // TRIED
                ]
                sets += [np.flatnonzero(mask) for mask in good_sets(*shared, tried)]
                added += self._add(c, sets, value, dual)
        self._cut(prices, held, limits)
        return added

    def _cut(self, prices: Floats, held: Floats, limits: Floats) -> None:
        self._cuts.append((prices, held))
        asked = np.flatnonzero(prices > 0)
        index = [
            *(self._runs[r] for r in asked),
            *self.ledger.warm,
            *self.ledger.spare,
            self._loads,
        ]
        entry = np.concatenate([prices[asked], -held, -limits, [-1.0]])
        self.master.addRow(-INFINITE, 0.0, len(index), np.array(index, np.int32), entry)

    def _add(
        self,
        c: int,
        sets: list[Ints],
        value: Floats,
        dual: Dual,
    ) -> int:
        spares, (prices, held, spare) = self.spares[c], dual
        choices = []
        for items in sets:
            if not len(items):
                continue
            which = items[np.argmax(value[items], axis=0)]
            which = np.where(value[items].max(axis=0) > 1e-12, which, -1)
            key = c, tuple(items.tolist()), tuple(which.tolist())
            if key in self._known:
                continue
            runs = np.flatnonzero(which >= 0)
            rows = spares.row[which[runs], runs]
            amounts = spares.cover[which[runs], runs]
            load = float(spares.load[items].sum())
            tied = items[spares.held[items] >= 0]
            cost = load + float(held[spares.held[tied]] @ spares.part[tied])
            reduced = cost + spare[c] - float(prices[rows] @ amounts)
            if reduced < -1e-9:
                choices.append((reduced, key, rows, amounts, load, tied))
        choices.sort(key=lambda choice: choice[0])
        taken = 0
        for _, key, rows, amounts, load, tied in choices[:FEW]:
            if key in self._known:
                continue
            self._known.add(key)
            first = len(self.needs)
            index = np.concatenate(
                [rows, first + spares.held[tied], [first + len(self.tied) + c]]
            )
            entry = np.concatenate([amounts, spares.part[tied], [1.0]])
            self.lp.addCol(
                load, 0.0, INFINITE, len(index), index.astype(np.int32), entry
            )
            self._generated.append((c, key[1]))
            taken += 1
        return taken

    def _read(self) -> Arranged:
        solver = self.lp
        values = np.array(solver.getSolution().col_value)
        amounts = values[self._first :]
        patterns = [
            Pattern(
                group=c,
                columns=tuple(self.spares[c].columns[i] for i in items),
                amount=float(amount),
            )
            for (c, items), amount in zip(self._generated, amounts, strict=True)
            if amount > 1e-9
        ]
        return Arranged(
            value=solver.getInfo().objective_function_value,
            active=values[self.ledger.active],
            patterns=tuple(patterns),
        )

    def whole(
        self, until_s: float, gap: float, seed: int, rounds: float | None
    ) -> Arranged | None:
        """The bound with whole ACTIVE counts; the best whole counts found, with patterns
        that may come in parts. ``rounds``: at most so many, of at
        most 1,000 nodes each times that."""
        solver, best = self.master, None
        kept = [*self.ledger.active, *self.ledger.spare]
        nodes = None if rounds is None else int(1000 * rounds)
        done, seen = 0, set[tuple[int, ...]]()
        while perf_counter() < until_s and (rounds is None or done < rounds):
            done += 1
            limit_s = BRANCH * (until_s - perf_counter())
            bound = branch(solver, kept, limit_s, gap, seed, nodes)
            if infeasible(solver):
                self.feasible = False
                return None
            self.bound = max(self.bound, bound)
            if not found_any(solver):
                break
            values = solver.getSolution().col_value
            counts = tuple(round(values[j]) for j in self.ledger.active)
            if counts in seen:
                break  # what its cuts say of it now is all that they can
            seen.add(counts)
            found = self._fixed(counts, until_s)
            if found is None and best is None:
                # No time for their patterns: those of parts must do.
                return Arranged(
                    value=solver.getInfo().objective_function_value,
                    active=np.array(counts, np.float64),
                    patterns=self._parts,
                )
            if found is not None and (best is None or found.value < best.value):
                best = found
            if best is None or best.value - self.bound <= gap * abs(best.value):
                break
        return best

    def _fixed(self, counts: Sequence[int], until_s: float) -> Arranged | None:
        """Patterns for whole counts, and cuts for what the master had wrong."""
        for j, count in zip(self.ledger.active, counts, strict=True):
            self.lp.changeColBounds(j, count, count)
        found: Arranged | None = None
        before, smooth = len(self._cuts), 0.7
        centre: tuple[Floats, Floats] | None = None
        while run(self.lp, until_s - perf_counter()):
            found, dual = self._read(), self._duals()
            centre = _between(centre or dual[:2], dual, smooth)
            if not self._ask(*centre, dual):
                smooth = max(0.0, smooth - 0.35)
                if not self._ask(dual[0], dual[1], dual):
                    break
        for j, most in zip(self.ledger.active, self.ledger.limits, strict=True):
            self.lp.changeColBounds(j, 0.0, most)
        # Only the last cuts are about the prices in the end.
        extra = len(self._cuts) - before - KEPT
        if extra > 0:
            gone = np.arange(before, before + extra, dtype=np.int32)
            self.master.deleteRows(extra, gone + self._rows)
            del self._cuts[before : before + extra]
        return found

    def dive(self, counts: Arranged, until_s: float) -> Arranged:
        """Whole patterns for whole ACTIVE counts: the LP again and again, each time with
        more of its largest amounts made whole; ``counts`` itself where time runs out."""
        lp, first = self.lp, self._first
        for j, count in zip(self.ledger.active, counts.active, strict=True):
            lp.changeColBounds(j, round(count), round(count))
        found = counts
        while run(lp, until_s - perf_counter()):
            found = self._read()
            amounts = np.array(lp.getSolution().col_value)[first:]
            part = amounts - np.floor(amounts + 1e-6)
            open_ = np.flatnonzero(part > 1e-6)
            if not len(open_):
                break
            room = np.zeros(len(self.classes))
            for c in range(len(self.classes)):
                own = [i for i in open_ if self._generated[i][0] == c]
                room[c] = math.floor(part[own].sum() + 1e-6)
            low = np.floor(amounts + 1e-6)
            chosen = 0
            for i in open_[np.argsort(-part[open_])]:
                c = self._generated[i][0]
                if room[c] >= 1 and (chosen < 1 + len(open_) * DIVE or part[i] > 0.8):
                    low[i] += 1
                    room[c] -= 1
                    chosen += 1
            for i in np.flatnonzero(amounts > 1e-6):
                most = INFINITE if chosen else low[i]
                lp.changeColBounds(first + int(i), low[i], most)
            dual = self._duals()
            self._ask(dual[0], dual[1], dual)
        for i in range(len(self._generated)):
            lp.changeColBounds(first + i, 0.0, INFINITE)
        for j, most in zip(self.ledger.active, self.ledger.limits, strict=True):
            lp.changeColBounds(j, 0.0, most)
        return found


def _between(
    centre: tuple[Floats, Floats], dual: Dual, smooth: float
) -> tuple[Floats, Floats]:
    """Prices between two, ``smooth`` of them the first."""
    return (
        smooth * centre[0] + (1 - smooth) * dual[0],
        smooth * centre[1] + (1 - smooth) * dual[1],
    )
