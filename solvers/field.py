"""One epoch's placement in the arrays of `anneal`, and the search on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.placement import Placement, Replica, ReplicaId, State
from foreserve.models.problem import Problem, ReplicaOption
from foreserve.models.rules import Held
from foreserve.solvers import anneal
from foreserve.solvers.anneal import Data
from foreserve.solvers.counts import CountModel
from foreserve.solvers.ledger import needs
from foreserve.solvers.shares import with_shares
from foreserve.solvers.spares import Arranged, Pattern

MACHINE: Any = anneal
"""Compiled functions, typed by what they are called with."""
NOTES = 1 << 20
"""Writes that one move may take back."""
CROWD = 6
"""Replicas per GPU, on average, that there is room for."""
SLOTS = 12
"""Most replicas on one GPU."""


class Field:
    """A placement of one epoch that a search changes in place.

    It holds dedicated replicas on aligned blocks, and WARM ones only on GPUs without an
    ACTIVE one. ``cost`` is never below the referee's.
    """

    def __init__(
        self, problem: Problem, epoch: int, before: Placement, seed: int
    ) -> None:
        self.problem, self.epoch, self.before = problem, epoch, before
        self.gpus = problem.fleet.cluster.gpus
        self.number = {gpu: g for g, gpu in enumerate(self.gpus)}
        self.options = _options(problem)
        self.at = {(o.llm, o.gpu_type, o.tp): j for j, o in enumerate(self.options)}
        self.data = self._data()
        scenarios, llms = self.data.need.shape
        self.layout = anneal.layout(
            scenarios,
            len(self.gpus),
            llms,
            len(self.options),
            len(self.gpus) * CROWD + 1,
            1 + int(self.data.domain.max()),
            1 + int(self.data.spread.max()),
            min(SLOTS, problem.fleet.rules.max_llms_per_gpu or SLOTS),
        )
        self._notes = np.ones(NOTES, np.int64), np.zeros(NOTES, np.int64)
        self._rng = np.random.default_rng(seed).integers(1, 2**63, 1, np.uint64)
        self._moved = np.zeros((3 + scenarios // 16, 16), np.int64)
        self._gone = np.zeros(16, np.int64)
        self._warm = (self.data.need > 0).any(axis=0) & (self.data.loss > 0)
        self.clear()

    def clear(self) -> None:
        """No replicas but pins; ``pinned``: whether all could be held."""
        d = self.data
        self.state = anneal.empty(d, self.layout)
        stopped = sum(r.state == "ACTIVE" for r in self.before.replicas) * d.demote
        missing = float(d.chance @ (d.need @ d.loss))
        self.cost = float(d.demand @ d.lost) + missing + stopped
        self.cost += self.problem.prices.replan_s
        self.pinned = all([self._pin(held) for held in self.problem.fleet.rules.held])

    def _pin(self, held: Held) -> bool:
        """Hold a pin for good, ACTIVE where that is left open and there is demand."""
        fleet = self.problem.fleet
        if not fleet.is_candidate(ReplicaId(llm=held.llm, gpus=held.gpus)):
            return False
        kind = fleet.cluster.type_of(held.gpus[0]).name
        j = self.at.get((held.llm, kind, len(held.gpus)))
        if j is None:
            return False
        d, at, g = self.data, self.layout, self.number[held.gpus[0]]
        active = held.state == "ACTIVE" or (
            held.state is None and bool(d.demand[d.llm[j]] > 0)
        )
        if not self.fits(j, g, active):
            return False
        self.add(j, g, active)
        place = at.held + g * at.slots + int(self.state[at.residents + g]) - 1
        self.state[at.fixed + self.state[place]] = 1
        return True

    def obeys(self) -> bool:
        """Whether every row holds: of those that are not kept at all times, least numbers
        of ACTIVE replicas (C9, C10) and pins."""
        return self.pinned and bool(MACHINE.obeys(self.data, self.layout, self.state))

    def search(self, heat: float, moves: int, *, actives: bool = True) -> None:
        """Random moves, also of ACTIVE replicas or not; ``heat`` is the rise in cost that
        is taken with probability 1/e."""
        self.cost += MACHINE.search(
            self.data,
            self.layout,
            self.state,
            *self._notes,
            self._rng,
            self._moved,
            self._gone,
            self._warm,
            anneal.ALL if actives else anneal.WARM,
            heat,
            moves,
        )

    def unit(self) -> float:
        """Mean loss of one missing instance in one scenario."""
        d = self.data
        losses = (d.chance[:, None] * d.loss[None, :])[(d.need > 0) & (d.loss > 0)]
        return float(losses.mean()) if losses.size else 0.0

    def cover(self) -> None:
        """ACTIVE replicas as a greedy rule adds them: first of LLMs that need large groups,
        then of those whose demand is dear."""
        d = self.data
        least_tp = np.full(len(d.loss), 99)
        np.minimum.at(least_tp, d.llm, d.tp)
        order = np.lexsort((-d.demand * d.lost, -least_tp))
        shared = d, self.layout, self.state, *self._notes
        self.cost += MACHINE.cover(*shared, self._moved, order)

    def fits(self, j: int, g: int, active: bool) -> bool:
        """Whether a replica of option j may be added from GPU g on."""
        d, at, st = self.data, self.layout, self.state
        m, block = int(d.llm[j]), range(g, g + int(d.tp[j]))
        if st[at.number + m] >= d.most[m] or st[at.unused] < 1:
            return False
        if active:
            enough = d.resident[j] + d.extra[j] <= d.usable[g]
            return bool(enough) and all(st[at.residents + k] == 0 for k in block)
        room = MACHINE.room_for(d, at, st, j, g)
        return bool(st[at.warms + m] < at.each and room == 0)

    def add(self, j: int, g: int, active: bool) -> None:
        """A replica that `fits`."""
        self._notes[0][0] = 1
        shared = self.data, self.layout, self.state, *self._notes, j, g
        if active:
            self.cost += MACHINE.add_active(*shared)
        else:
            self.cost += MACHINE.add_warm(*shared, self._moved)

    def take(self, placement: Placement, *, cover: bool = False) -> None:
        """As much of a placement as this space has, ACTIVE replicas first; with `cover`
        before the WARM ones."""
        for active in (True, False):
            if cover and not active:
                self.cover()
            for replica in placement.replicas:
                wanted = (replica.state == "ACTIVE") == active
                if wanted and self.problem.fleet.is_candidate(replica.id):
                    node = self.problem.fleet.cluster.node_by_name[replica.gpus[0].node]
                    j = self.at.get((replica.llm, node.gpu, replica.tp))
                    g = self.number[replica.gpus[0]]
                    if j is not None and self.fits(j, g, active):
                        self.add(j, g, active)

    def set_out(self, model: CountModel, counts: Arranged) -> None:
        """ACTIVE counts (rounded down) on blocks: first where the LLM was before, then the
        largest groups first, on the first blocks that have room; demand that rounding left
        is covered. Then patterns on spare GPUs, or WARM counts likewise."""
        left = np.floor(counts.active + 1e-6).astype(int)
        for replica in self.placement().replicas:  # pins
            left[model.column_of(replica)] -= replica.state == "ACTIVE"
        for replica in self.before.replicas:
            if self.problem.fleet.is_candidate(replica.id):
                c, g = model.column_of(replica), self.number[replica.gpus[0]]
                j = self._option(model, c)
                if j is not None and left[c] > 0 and self.fits(j, g, True):
                    self.add(j, g, True)
                    left[c] -= 1
        order = sorted(range(len(left)), key=lambda c: -model.columns[c].option.tp)
        for c in order:
            j = self._option(model, c)
            if j is not None and left[c] > 0:
                self._lay(j, int(left[c]), True)
        self.cover()
        if counts.warm is not None:
            warm = np.floor(counts.warm + 1e-6).astype(int)
            for c in order:
                j = self._option(model, c)
                if j is not None and warm[c] > 0:
                    self._lay(j, int(warm[c]), False)
        for c, group in enumerate(model.classes):
            own = [p for p in counts.patterns if p.group == c]
            nodes = set(group.nodes)
            st, at = self.state, self.layout
            spare = [
                g
                for g, gpu in enumerate(self.gpus)
                if gpu.node in nodes and st[at.residents + g] == 0
            ]
            for g, columns in zip(spare, _dealt(model, own, len(spare)), strict=False):
                for column in columns:
                    j = self._option(model, column)
                    start = None if j is None else self._block(j, g)
                    if (
                        j is not None
                        and start is not None
                        and self.fits(j, start, False)
                    ):
                        self.add(j, start, False)

    def _block(self, j: int, g: int) -> int | None:
        """First GPU of the block of option j around GPU g."""
        d, tp = self.data, int(self.data.tp[j])
        n = int(np.searchsorted(d.node_gpu, g, side="right")) - 1
        first = int(d.node_gpu[n])
        start = first + (g - first) // tp * tp
        return start if start + tp <= first + d.node_size[n] else None

    def _lay(self, j: int, count: int, active: bool) -> None:
        # Serving ones are packed; WARM ones of two LLMs should not meet on every GPU.
        skip = 0 if active else 7 * int(self.data.llm[j])
        shared = self.data, self.layout, self.state, *self._notes
        _, change = MACHINE.lay(*shared, j, count, active, skip, self._moved)
        self.cost += change

    def _option(self, model: CountModel, c: int) -> int | None:
        option = model.columns[c].option
        return self.at.get((option.llm, option.gpu_type, option.tp))

    def placement(self) -> Placement:
        """What is held, with the best traffic shares."""
        at, st = self.layout, self.state
        replicas = []
        for r in np.flatnonzero(st[at.option : at.start] >= 0).tolist():
            option = self.options[st[at.option + r]]
            g = int(st[at.start + r])
            state: State = "ACTIVE" if st[at.active + r] else "WARM"
            gpus = self.gpus[g : g + option.tp]
            replicas.append(Replica(llm=option.llm, gpus=gpus, state=state))
        placement = Placement(replicas=tuple(replicas))
        return with_shares(self.problem, self.epoch, placement)

    def _data(self) -> Data:
        problem, fleet = self.problem, self.problem.fleet
        cluster, second = fleet.cluster, self.problem.epoch_s
        number = fleet.number_of
        llm = np.array([number[o.llm] for o in self.options], np.int64)
        first_gpu = np.cumsum([0, *(node.gpus for node in cluster.nodes)])
        on, first_node = [], [0]
        for option in self.options:
            on += _nodes(problem, option)
            first_node.append(len(on))
        before = np.zeros((len(self.options), len(self.gpus)), np.int8)
        for replica in self.before.replicas:
            if fleet.is_candidate(replica.id):
                kind = cluster.type_of(replica.gpus[0]).name
                j = self.at.get((replica.llm, kind, replica.tp))
                if j is not None:
                    active = replica.state == "ACTIVE"
                    before[j, self.number[replica.gpus[0]]] = 1 + active
        rows = needs(problem, self.epoch)
        need = np.zeros((len(rows), len(fleet.llms)), np.int64)
        for s, (row, _) in enumerate(rows):
            for m, count in row.items():
                need[s, m] = count
        weight = np.array([m.weight for m in fleet.llms])
        prices = problem.prices
        hour = second / 3600 * prices.usd_s
        domain_of = cluster.domain_of
        domains = {name: i for i, name in enumerate(dict.fromkeys(domain_of.values()))}
        after = _ints(m.min_after_loss for m in fleet.llms)
        apart = np.eye(len(fleet.llms), dtype=np.int8)
        for one, other in ((number[a], number[b]) for a, b in fleet.rules.apart):
            apart[one, other] = apart[other, one] = 1
        return Data(
            tp=_ints(o.tp for o in self.options),
            units=_ints(
                o.instances(fleet.llm_by_name[o.llm].instance_concurrency)
                for o in self.options
            ),
            resident=_ints(o.resident_bytes for o in self.options),
            extra=_ints(o.active_bytes for o in self.options),
            load=_floats(prices.load_s * o.load_s for o in self.options),
            rate=_floats(o.rate_rps for o in self.options),
            slow=_floats(problem.slower_s(o) for o in self.options)
            * weight[llm]
            * second,
            llm=llm,
            first_option=np.searchsorted(llm, np.arange(len(fleet.llms) + 1)),
            first_node=_ints(first_node),
            nodes=_ints(on),
            node_gpu=first_gpu[:-1].astype(np.int64),
            node_size=_ints(node.gpus for node in cluster.nodes),
            usable=_ints(cluster.usable_bytes(gpu) for gpu in self.gpus),
            rent=_floats(cluster.type_of(g).price_usd_per_h * hour for g in self.gpus),
            chance=_floats(probability for _, probability in rows),
            need=need,
            loss=weight * _floats(m.cold_loss_s for m in fleet.llms),
            lost=weight * second * _floats(m.unserved_s for m in fleet.llms),
            demand=_floats(row[self.epoch] for row in problem.demand_rps),
            least=_ints(m.min_active for m in fleet.llms),
            after=after,
            spread=np.where(after > 0, np.cumsum(after > 0) - 1, -1),
            domain=_ints(domains[domain_of[gpu.node]] for gpu in self.gpus),
            apart=apart,
            closed=np.isin(
                np.arange(len(self.gpus)),
                [self.number[g] for g in fleet.rules.closed if g in self.number],
            ).astype(np.int8),
            most=_ints(
                1 << 30 if m.max_replicas is None else m.max_replicas
                for m in fleet.llms
            ),
            before=before,
            demote=prices.demote_s,
        )


def _dealt(
    model: CountModel, patterns: Sequence[Pattern], gpus: int
) -> list[tuple[int, ...]]:
    """One pattern per GPU: amounts rounded, and patterns that share large groups next to
    each other."""
    total = sum(p.amount for p in patterns)
    shrink = min(1.0, gpus / total) if total else 1.0
    amounts = [p.amount * shrink for p in patterns]
    counts = [int(amount + 1e-6) for amount in amounts]
    missing = min(gpus, round(sum(amounts))) - sum(counts)
    nearest = sorted(range(len(patterns)), key=lambda i: counts[i] - amounts[i])
    for i in nearest[:missing]:
        counts[i] += 1
    dealt = [p.columns for p, n in zip(patterns, counts, strict=True) for _ in range(n)]

    def large(columns: tuple[int, ...]) -> list[tuple[int, int]]:
        tps = [(-model.columns[c].option.tp, c) for c in columns]
        return sorted(pair for pair in tps if pair[0] < -1)

    return sorted(dealt, key=lambda columns: (large(columns) or [(0, 0)], columns))


def _options(problem: Problem) -> list[ReplicaOption]:
    """Options that fit some node, those of an LLM together and the fastest first."""
    fleet = problem.fleet
    fitting = [o for o in fleet.options if _nodes(problem, o)]
    return sorted(fitting, key=lambda o: (fleet.number_of[o.llm], o.exec_s))


def _nodes(problem: Problem, option: ReplicaOption) -> list[int]:
    """Numbers of the nodes that an option may be on."""
    cluster = problem.fleet.cluster
    kind = cluster.type_by_name[option.gpu_type]
    if option.resident_bytes > int(kind.memory_bytes * cluster.usable_fraction):
        return []
    allowed = problem.fleet.llm_by_name[option.llm].nodes
    return [
        n
        for n, node in enumerate(cluster.nodes)
        if node.gpu == option.gpu_type
        and node.gpus >= option.tp
        and (allowed is None or node.name in allowed)
    ]


def _ints(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _floats(values: Iterable[float]) -> NDArray[np.float64]:
    return np.fromiter(values, np.float64)
