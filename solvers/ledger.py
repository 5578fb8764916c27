"""ACTIVE counts per class of equal nodes: what they serve and cost, as a linear model.

Nodes are of one class when GPU type, number of GPUs, closed GPUs and allowed LLMs agree.
Variables count replicas of an option in a class, not where they are, so the size of the
model does not grow with the number of nodes. `counts` and `arrange` add what spare GPUs
hold, each in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
from numpy.typing import NDArray

from foreserve.models.problem import Problem, ReplicaOption

Floats = NDArray[np.float64]
Terms = list[tuple[int, float]]
INFINITE = highspy.kHighsInf
FEASIBLE = highspy.SolutionStatus.kSolutionStatusFeasible
SLACK = 1e-7
"""Relative tolerance of HiGHS that a bound gives away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A class of nodes that are alike for every LLM."""

    gpu_type: str
    gpus: int
    """Of a node."""
    closed: tuple[int, ...]
    """Those of a node's GPUs that hold nothing (C10)."""
    nodes: tuple[str, ...]
    usable: int
    rent: float

    @property
    def open_gpus(self) -> int:
        """GPUs of all nodes that may hold something."""
        return len(self.nodes) * (self.gpus - len(self.closed))

    def blocks(self, tp: int) -> int:
        """Blocks of all nodes that a replica may be on."""
        shut = {g // tp for g in self.closed}
        return len(self.nodes) * sum(b not in shut for b in range(self.gpus // tp))


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


def groups(problem: Problem) -> list[Group]:
    """The classes of nodes, in the order of their first nodes."""
    fleet = problem.fleet
    found: dict[tuple[str, int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    shut: dict[str, list[int]] = {}
    for gpu in sorted(set(fleet.rules.closed)):
        shut.setdefault(gpu.node, []).append(gpu.index)
    tied = [(i, set(m.nodes)) for i, m in enumerate(fleet.llms) if m.nodes is not None]
    for node in fleet.cluster.nodes:
        barred = tuple(i for i, names in tied if node.name not in names)
        closed = tuple(shut.get(node.name, ()))
        found.setdefault((node.gpu, node.gpus, closed, barred), []).append(node.name)
    result = []
    for (kind, gpus, closed, _), names in found.items():
        price = fleet.cluster.type_by_name[kind].price_usd_per_h
        result.append(
            Group(
                gpu_type=kind,
                gpus=gpus,
                closed=closed,
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
            if (
                option.gpu_type != group.gpu_type
                or barred
                or not group.blocks(option.tp)
            ):
                continue
            held = before.get((c, option.llm, option.tp), [0, 0])
            found.append(
                Column(
                    group=c,
                    llm=fleet.number_of[option.llm],
                    option=option,
                    units=option.instances(llm.instance_concurrency),
                    resident=held[0],
                    active=held[1],
                )
            )
    return found


class Ledger:
    """What ACTIVE counts serve and cost, for one epoch: a linear model to be added to.

    Its first rows are one for each of ``needs``, one for each WARM count, and one for the
    spare GPUs of each class. WARM counts are those of ``tied`` columns; of the others a
    load costs what it costs, and ACTIVE ones pay it in their own price.
    ``switching``: the epoch follows ``problem.initial``; without it (O4) counts nothing.
    """

    def __init__(
        self,
        problem: Problem,
        epoch: int,
        *,
        switching: bool,
        classes: list[Group],
        columns: list[Column],
        tied: list[int],
    ) -> None:
        self.classes, self.columns, self.tied = classes, columns, tied
        self.needs = burst_rows(problem, epoch)
        self.load = [
            problem.prices.load_s * column.option.load_s * switching
            for column in columns
        ]
        self.feasible = True
        self._lines: list[tuple[Terms, float, float]] = []
        self._cost: list[float] = []
        self._upper: list[float] = []
        self._offset = 0.0
        self._serve(problem, epoch)
        self._stop(problem, switching)

    def new(self, cost: float, upper: float = INFINITE) -> int:
        """A variable; its number."""
        self._cost.append(cost)
        self._upper.append(upper)
        return len(self._cost) - 1

    def row(self, terms: Terms, low: float = -INFINITE, high: float = INFINITE) -> None:
        self._lines.append((terms, low, high))

    def extend(self, row: int, terms: Terms) -> None:
        """More terms of a row that is there."""
        self._lines[row][0].extend(terms)

    @property
    def num_rows(self) -> int:
        return len(self._lines)

    def most(self, j: int) -> int:
        """Replicas of a column that the class has blocks for."""
        return self.classes[self.columns[j].group].blocks(self.columns[j].option.tp)

    def _serve(self, problem: Problem, epoch: int) -> None:
        fleet, second = problem.fleet, problem.epoch_s
        of: list[list[int]] = [[] for _ in fleet.llms]
        tied = set(self.tied)
        self.active, self.limits = [], []
        for j, column in enumerate(self.columns):
            option, group = column.option, self.classes[column.group]
            alone = option.resident_bytes + option.active_bytes <= group.usable
            self.limits.append(float(self.most(j) if alone else 0))
            price = group.rent * option.tp + (0.0 if j in tied else self.load[j])
            self.active.append(self.new(price, self.limits[-1]))
            of[column.llm].append(j)
        self.miss = []
        for _, m, count, loss in self.needs:
            self.miss.append(self.new(loss))
            covers = [
                (self.active[j], float(min(self.columns[j].units, count)))
                for j in of[m]
            ]
            self.row([(self.miss[-1], 1.0), *covers], low=count)
        self.warm = [self.new(0.0) for _ in self.tied]
        for warm in self.warm:
            self.row([(warm, -1.0)], high=0)
        self.spare = [self.new(g.rent, g.open_gpus) for g in self.classes]
        for spare in self.spare:
            self.row([(spare, -1.0)], high=0)
        for c, group in enumerate(self.classes):
            serving = [
                (self.active[j], float(column.option.tp))
                for j, column in enumerate(self.columns)
                if column.group == c
            ]
            self.row([(self.spare[c], 1.0), *serving], high=group.open_gpus)
        counted = dict(zip(self.tied, self.warm, strict=True))
        for m, llm in enumerate(fleet.llms):
            demand, weight = problem.demand_rps[m][epoch], llm.weight * second
            if demand > 0:
                terms = [(self.new(weight * llm.unserved_s), 1.0)]
                for j in of[m]:
                    option = self.columns[j].option
                    served = self.new(weight * problem.slower_s(option))
                    terms.append((served, 1.0))
                    most_rps = min(option.rate_rps, demand)
                    self.row([(served, 1.0), (self.active[j], -most_rps)], high=0)
                self.row(terms, low=demand, high=demand)
            actives = [(self.active[j], 1.0) for j in of[m]]
            if llm.min_active:
                self.feasible = self.feasible and bool(actives)
                self.row(actives, low=llm.min_active)
            if llm.max_replicas is not None:
                warms = [(counted[j], 1.0) for j in of[m]]
                self.row([*actives, *warms], high=llm.max_replicas)

    def _stop(self, problem: Problem, switching: bool) -> None:
        """(O4): loads of tied columns, and ACTIVE replicas that stop."""
        prices = problem.prices
        for j, warm in zip(self.tied, self.warm, strict=True):
            if self.load[j] > 0:
                load = self.new(self.load[j])
                both = [(self.active[j], -1.0), (warm, -1.0)]
                self.row([(load, 1.0), *both], low=-self.columns[j].resident)
        for j, column in enumerate(self.columns):
            if column.active:
                stop = self.new(prices.demote_s)
                self.row([(stop, 1.0), (self.active[j], 1.0)], low=column.active)
        if switching:
            gone = sum(r.state == "ACTIVE" for r in problem.initial.replicas)
            gone -= sum(column.active for column in self.columns)
            self._offset = gone * prices.demote_s

    def hand_over(self) -> Any:
        """The model in HiGHS, quiet and on one thread."""
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self._cost), len(self._lines)
        lp.offset_ = self._offset
        lp.col_cost_ = np.array(self._cost)
        lp.col_lower_ = np.zeros(len(self._cost))
        lp.col_upper_ = np.array(self._upper)
        lp.row_lower_ = np.array([low for _, low, _ in self._lines])
        lp.row_upper_ = np.array([high for *_, high in self._lines])
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        sizes = [len(terms) for terms, *_ in self._lines]
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        lp.a_matrix_.index_ = np.array(
            [i for terms, *_ in self._lines for i, _ in terms], dtype=np.int32
        )
        lp.a_matrix_.value_ = np.array([v for ts, *_ in self._lines for _, v in ts])
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.passModel(lp)
        return solver


def run(solver: Any, limit_s: float) -> bool:
    """Whether HiGHS solved it to the end within the limit."""
    if limit_s <= 0:
        return False
    # HiGHS's limit counts from the first run of this object.
    solver.setOptionValue("time_limit", solver.getRunTime() + limit_s)
    solver.run()
    return bool(solver.getModelStatus() == highspy.HighsModelStatus.kOptimal)


def branch(
    solver: Any,
    kept: list[int],
    limit_s: float,
    gap: float,
    seed: int,
    nodes: int | None,
) -> float:
    """Search with whole numbers in the columns ``kept``, of at most ``nodes`` nodes; the
    bound on all that is left to find."""
    for j in kept:
        solver.changeColIntegrality(j, highspy.HighsVarType.kInteger)
    solver.setOptionValue("random_seed", seed % 2**31)
    solver.setOptionValue("mip_rel_gap", gap)
    if nodes is not None:
        solver.setOptionValue("mip_max_nodes", nodes)
    run(solver, limit_s)
    bound = solver.getInfo().mip_dual_bound
    return safe(bound) if np.isfinite(bound) else -INFINITE


def found_any(solver: Any) -> bool:
    """Whether it has a solution, best or not."""
    return bool(solver.getInfo().primal_solution_status == FEASIBLE)


def infeasible(solver: Any) -> bool:
    """Whether HiGHS found that there is no solution (costs are bounded below)."""
    status = highspy.HighsModelStatus
    return solver.getModelStatus() in (
        status.kInfeasible,
        status.kUnboundedOrInfeasible,
    )


def safe(bound: float) -> float:
    """A bound less the tolerance of HiGHS."""
    return bound - SLACK * abs(bound)


def needs(problem: Problem, epoch: int) -> list[tuple[dict[int, int], float]]:
    """Instances that each scenario asks for, of LLMs that it asks for, and its chance."""
    found = []
    for s, probability in enumerate(problem.scenario_probability):
        row = {m: problem.need(s, m, epoch) for m in range(len(problem.fleet.llms))}
        found.append(({m: count for m, count in row.items() if count}, probability))
    return [(row, probability) for row, probability in found if row and probability > 0]


def burst_rows(problem: Problem, epoch: int) -> list[tuple[int, int, int, float]]:
    """(scenario, LLM, instances needed, expected loss of one) where there is any."""
    llms = problem.fleet.llms
    return [
        (s, m, count, probability * llms[m].weight * llms[m].cold_loss_s)
        for s, (row, probability) in enumerate(needs(problem, epoch))
        for m, count in row.items()
        if llms[m].weight * llms[m].cold_loss_s > 0
    ]
