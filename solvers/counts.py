"""The cluster as counts per class of equal nodes: a lower bound, and what to build.

Nodes are of one class when GPU type, number of GPUs and allowed LLMs agree. Variables
count replicas of an option in a class, not where they are, so the size of the model does
not grow with the number of nodes.

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

A cut sum a_j tp_j WARM_j <= spare holds when no set of options that fits one spare GPU
(at most one per LLM) has more than 1 in a: each spare GPU adds at most 1 to the left.
`separate` finds such a, with weights rounded down, so that it errs on the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from foreserve.models.placement import Replica
from foreserve.models.problem import Problem, ReplicaOption
from foreserve.solvers.anneal import best_pattern

Floats = NDArray[np.float64]
GRID = 1024
"""Steps into which a GPU's memory is cut for `separate`."""
VIOLATED = 1e-4
"""A cut must be broken by at least this share of the spare GPUs."""
SLACK = 1e-7
"""Relative tolerance of HiGHS that a bound gives away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A class of nodes that are alike for every LLM."""

    gpu_type: str
    gpus: int
    nodes: tuple[str, ...]
    usable: int
    rent: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """An option in a class: ``group`` and ``llm`` are numbers."""

    group: int
    llm: int
    option: ReplicaOption
    units: int
    resident: int
    """Blocks of this option in this class with the LLM resident before."""
    active: int
    """Of those: ACTIVE."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """What a solve of the counts found."""

    bound: float
    active: Floats
    """[column]"""
    warm: Floats


def groups(problem: Problem) -> list[Group]:
    """The classes of nodes, in the order of their first nodes."""
    fleet = problem.fleet
    found: dict[tuple[str, int, tuple[int, ...]], list[str]] = {}
    tied = [(i, set(m.nodes)) for i, m in enumerate(fleet.llms) if m.nodes is not None]
    for node in fleet.cluster.nodes:
        barred = tuple(i for i, names in tied if node.name not in names)
        found.setdefault((node.gpu, node.gpus, barred), []).append(node.name)
    result = []
    for (kind, gpus, _), names in found.items():
        price = fleet.cluster.type_by_name[kind].price_usd_per_h
        result.append(
            Group(
                gpu_type=kind,
                gpus=gpus,
                nodes=tuple(names),
                usable=fleet.cluster.usable_bytes(
                    fleet.cluster.node_by_name[names[0]].gpu_ids()[0]
                ),
                rent=price * problem.epoch_s / 3600 * problem.prices.usd_s,
            )
        )
    return result


def columns(problem: Problem, classes: list[Group], switching: bool) -> list[Column]:
    """Every option in every class that holds it; what was there before counts only with
    ``switching``."""
    fleet = problem.fleet
    number = {llm.name: i for i, llm in enumerate(fleet.llms)}
    class_of = {name: c for c, group in enumerate(classes) for name in group.nodes}
    before: dict[tuple[int, str, int], list[int]] = {}
    for replica in problem.initial.replicas if switching else ():
        if fleet.is_candidate(replica.id):
            key = (class_of[replica.gpus[0].node], replica.llm, replica.tp)
            held = before.setdefault(key, [0, 0])
            held[0] += 1
            held[1] += replica.state == "ACTIVE"
    found = []
    for c, group in enumerate(classes):
        for option in fleet.options:
            llm = fleet.llm_by_name[option.llm]
            barred = llm.nodes is not None and group.nodes[0] not in llm.nodes
            if option.gpu_type != group.gpu_type or option.tp > group.gpus or barred:
                continue
            held = before.get((c, option.llm, option.tp), [0, 0])
            found.append(
                Column(
                    group=c,
                    llm=number[option.llm],
                    option=option,
                    units=option.instances(llm.instance_concurrency),
                    resident=held[0],
                    active=held[1],
                )
            )
    return found


class CountModel:
    """The rows of the module's docstring for one epoch, in HiGHS.

    ``switching``: the epoch follows ``problem.initial``; without it (O4) counts nothing.
    """

    def __init__(self, problem: Problem, epoch: int, switching: bool) -> None:
        self.classes = groups(problem)
        self.columns = columns(problem, self.classes, switching)
        self._class_of = {n: c for c, g in enumerate(self.classes) for n in g.nodes}
        self._number = {
            (column.group, column.option.llm, column.option.tp): j
            for j, column in enumerate(self.columns)
        }
        self.feasible = True
        self.bound = 0.0
        self._rows: list[tuple[list[int], list[float], float, float]] = []
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._offset = 0.0
        self._build(problem, epoch, switching)
        self.solver = self._hand_over()

    def _new(self, cost: float, upper: float = highspy.kHighsInf) -> int:
        self._cost.append(cost)
        self._upper.append(upper)
        return len(self._cost) - 1

    def _row(
        self,
        terms: list[tuple[int, float]],
        low: float = -highspy.kHighsInf,
        high: float = highspy.kHighsInf,
    ) -> None:
        self._rows.append(([i for i, _ in terms], [v for _, v in terms], low, high))

    def _build(self, problem: Problem, epoch: int, switching: bool) -> None:
        fleet, prices = problem.fleet, problem.prices
        second = problem.epoch_s
        need = needs(problem, epoch)
        wanted = {m for row, _ in need for m in row}
        self.spare = [self._new(g.rent, len(g.nodes) * g.gpus) for g in self.classes]
        self.active, self.warm = [], []
        of: list[list[int]] = [[] for _ in fleet.llms]
        within: list[list[int]] = [[] for _ in self.classes]
        for j, column in enumerate(self.columns):
            option, group = column.option, self.classes[column.group]
            most = len(group.nodes) * (group.gpus // option.tp)
            alone = option.resident_bytes + option.active_bytes <= group.usable
            held = option.resident_bytes <= group.usable and column.llm in wanted
            self.active.append(self._new(group.rent * option.tp, most if alone else 0))
            self.warm.append(self._new(0.0, most if held else 0))
            of[column.llm].append(j)
            within[column.group].append(j)
            if switching and prices.load_s * option.load_s > 0:
                load = self._new(prices.load_s * option.load_s)
                both = [(self.active[j], -1.0), (self.warm[j], -1.0)]
                self._row([(load, 1.0), *both], low=-column.resident)
            if column.active:
                stop = self._new(prices.demote_s)
                self._row([(stop, 1.0), (self.active[j], 1.0)], low=column.active)
        if switching:
            gone = sum(r.state == "ACTIVE" for r in problem.initial.replicas)
            gone -= sum(column.active for column in self.columns)
            self._offset = gone * prices.demote_s
        for c, group in enumerate(self.classes):
            tps = [(j, float(self.columns[j].option.tp)) for j in within[c]]
            serving = [(self.active[j], tp) for j, tp in tps]
            self._row(
                [(self.spare[c], 1.0), *serving], high=len(group.nodes) * group.gpus
            )
            held_share = [
                (
                    self.warm[j],
                    tp * self.columns[j].option.resident_bytes / group.usable,
                )
                for j, tp in tps
            ]
            self._row([*held_share, (self.spare[c], -1.0)], high=0)
            for m in sorted({self.columns[j].llm for j in within[c]} & wanted):
                own = [(self.warm[j], tp) for j, tp in tps if self.columns[j].llm == m]
                self._row([*own, (self.spare[c], -1.0)], high=0)
        for m, llm in enumerate(fleet.llms):
            demand, weight = problem.demand_rps[m][epoch], llm.weight * second
            if demand > 0:
                terms = [(self._new(weight * llm.unserved_s), 1.0)]
                for j in of[m]:
                    option = self.columns[j].option
                    served = self._new(weight * problem.slower_s(option))
                    terms.append((served, 1.0))
                    most_rps = min(option.rate_rps, demand)
                    self._row([(served, 1.0), (self.active[j], -most_rps)], high=0)
                self._row(terms, low=demand, high=demand)
            actives = [(self.active[j], 1.0) for j in of[m]]
            if llm.min_active:
                self.feasible = self.feasible and bool(actives)
                self._row(actives, low=llm.min_active)
            if llm.max_replicas is not None:
                warms = [(self.warm[j], 1.0) for j in of[m]]
                self._row([*actives, *warms], high=llm.max_replicas)
        for row, probability in need:
            taken: list[list[tuple[int, float]]] = [[] for _ in self.classes]
            for m, count in row.items():
                loss = fleet.llms[m].weight * fleet.llms[m].cold_loss_s
                if loss <= 0:
                    continue
                terms = [(self._new(probability * loss), 1.0)]
                for j in of[m]:
                    column = self.columns[j]
                    covers = float(min(column.units, count))
                    terms.append((self.active[j], covers))
                    if self._upper[self.warm[j]] > 0:
                        z = self._new(0.0)
                        terms.append((z, covers))
                        taken[column.group].append((z, float(column.option.tp)))
                        self._row([(z, 1.0), (self.warm[j], -1.0)], high=0)
                self._row(terms, low=count)
            for c, activated in enumerate(taken):
                if activated:
                    self._row([*activated, (self.spare[c], -1.0)], high=0)

    def _hand_over(self) -> Any:
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self._cost), len(self._rows)
        lp.offset_ = self._offset
        lp.col_cost_ = np.array(self._cost)
        lp.col_lower_ = np.zeros(len(self._cost))
        lp.col_upper_ = np.array(self._upper)
        lp.row_lower_ = np.array([low for *_, low, _ in self._rows])
        lp.row_upper_ = np.array([high for *_, high in self._rows])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        sizes = [len(indices) for indices, *_ in self._rows]
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        lp.a_matrix_.index_ = np.array(
            [i for indices, *_ in self._rows for i in indices], dtype=np.int32
        )
        lp.a_matrix_.value_ = np.array([v for _, vs, *_ in self._rows for v in vs])
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.passModel(lp)
        self._rows = []
        return solver

    def relax(self, until_s: float, rounds: int = 30) -> Counts | None:
        """The LP relaxation, cut by single-GPU patterns until ``until_s`` on the clock of
        `perf_counter`; None if it was not solved in time (or is infeasible)."""
        found: Counts | None = None
        for _ in range(rounds):
            left_s = until_s - perf_counter()
            if left_s <= 0:
                break
            # HiGHS's limit counts from the first run of this object.
            self.solver.setOptionValue("time_limit", self.solver.getRunTime() + left_s)
            self.solver.run()
            ending = self.solver.getModelStatus()
            if ending in (
                highspy.HighsModelStatus.kInfeasible,
                highspy.HighsModelStatus.kUnboundedOrInfeasible,
            ):
                self.feasible = False
                return None
            if ending != highspy.HighsModelStatus.kOptimal:
                break
            value = self.solver.getInfo().objective_function_value
            values = np.array(self.solver.getSolution().col_value)
            found = self._read(values, value)
            if not self._cut(values, until_s):
                break
        return found

    def whole(
        self, time_limit_s: float, gap: float, seed: int, nodes: float | None
    ) -> Counts | None:
        """As `relax`, with whole numbers of replicas, as far as the time goes."""
        kind = highspy.HighsVarType.kInteger
        for j in [*self.active, *self.warm]:
            self.solver.changeColIntegrality(j, kind)
        settings = {
            "time_limit": self.solver.getRunTime() + time_limit_s,
            "mip_rel_gap": gap,
            "random_seed": seed % 2**31,
        }
        if nodes is not None:
            settings["mip_max_nodes"] = int(nodes)
        for name, setting in settings.items():
            self.solver.setOptionValue(name, setting)
        self.solver.run()
        info = self.solver.getInfo()
        if self.solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            self.feasible = False
            return None
        if np.isfinite(info.mip_dual_bound):
            self.bound = max(self.bound, _safe(info.mip_dual_bound))
        feasible = highspy.SolutionStatus.kSolutionStatusFeasible
        if info.primal_solution_status != feasible:
            return None
        values = np.array(self.solver.getSolution().col_value)
        return self._read(values, info.mip_dual_bound)

    def column_of(self, replica: Replica) -> int:
        """The column that counts a replica which is a candidate."""
        group = self._class_of[replica.gpus[0].node]
        return self._number[group, replica.llm, replica.tp]

    def _read(self, values: Floats, bound: float) -> Counts:
        self.bound = max(self.bound, _safe(bound))
        return Counts(
            bound=self.bound,
            active=values[self.active],
            warm=values[self.warm],
        )

    def _cut(self, values: Floats, until_s: float) -> bool:
        """Add the deepest pattern cut of each class; False if none is broken."""
        added = False
        for c, group in enumerate(self.classes):
            spare = values[self.spare[c]]
            own = [
                j
                for j, column in enumerate(self.columns)
                if column.group == c and values[self.warm[j]] > 1e-7
            ]
            if spare < 1e-6 or len(own) < 2 or perf_counter() > until_s:
                continue
            tp = np.array([self.columns[j].option.tp for j in own], dtype=np.float64)
            share = tp * values[[self.warm[j] for j in own]] / spare
            weights = [
                self.columns[j].option.resident_bytes * GRID // group.usable
                for j in own
            ]
            llms = [self.columns[j].llm for j in own]
            slope = separate(
                share, np.array(weights, dtype=np.int64), np.array(llms, dtype=np.int64)
            )
            if slope is None:
                continue
            used = [i for i in range(len(own)) if slope[i] > 0]
            self.solver.addRow(
                -highspy.kHighsInf,
                0.0,
                len(used) + 1,
                np.array([*(self.warm[own[i]] for i in used), self.spare[c]], np.int32),
                np.array([*(slope[i] * tp[i] for i in used), -1.0]),
            )
            added = True
        return added


def _safe(bound: float) -> float:
    return bound - SLACK * abs(bound)


def needs(problem: Problem, epoch: int) -> list[tuple[dict[int, int], float]]:
    """Instances that each scenario asks for, of LLMs that it asks for, and its chance."""
    found = []
    for s, probability in enumerate(problem.scenario_probability):
        row = {m: problem.need(s, m, epoch) for m in range(len(problem.fleet.llms))}
        found.append(({m: count for m, count in row.items() if count}, probability))
    return [(row, probability) for row, probability in found if row and probability > 0]


def separate(
    share: Floats, weight: NDArray[np.int64], llm: NDArray[np.int64]
) -> Floats | None:
    """a >= 0 with a x <= 1 for every set x that fits a GPU, and a ``share`` > 1; None if
    there is none. ``share``: mean number of each item on a spare GPU; ``weight``: memory
    in `GRID` parts of a GPU; at most one item per ``llm`` fits.

    Row generation: maximise a ``share`` over the sets known so far, ask a dynamic
    programme for the set that breaks a most, repeat. At the end a is divided by the
    worst set's value, so that it is valid wherever the loop stops.
    """
    order = np.argsort(llm, kind="stable")
    weight, llm, share = weight[order], llm[order], share[order]
    master = highspy.Highs()
    master.setOptionValue("output_flag", False)
    for value in share:
        master.addVar(0.0, 1.0)
        master.changeColCost(master.getNumCol() - 1, -float(value))
    slope = np.ones(len(share))
    for _ in range(200):
        worth, chosen = best_pattern(slope, weight, llm, GRID)
        if worth <= 1 + 1e-9:
            break
        items = np.flatnonzero(chosen).astype(np.int32)
        if len(items) == 0:
            break
        master.addRow(-highspy.kHighsInf, 1.0, len(items), items, np.ones(len(items)))
        master.run()
        if -master.getInfo().objective_function_value <= 1 + VIOLATED:
            return None
        slope = np.maximum(0.0, np.array(master.getSolution().col_value))
    worth, _ = best_pattern(slope, weight, llm, GRID)
    slope = slope / max(1.0, worth * (1 + 1e-9))
    if slope @ share <= 1 + VIOLATED:
        return None
    result = np.empty(len(share))
    result[order] = slope
    return result
