"""Columns of the direct MILP by letter, and the sets and data of `Index` as arrays.

Letters as in `foreserve.solvers.direct`. Arrays of columns are indexed by run or epoch and
by replica, GPU, option or LLM; -1 where a choice is worth nothing and has no column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.solvers.index import Index, Key
from foreserve.solvers.matrix import Floats, Matrix, Numbers
from foreserve.solvers.symmetry import classes


class Model(Matrix):
    """Columns by letter, and the sets and data of `Index` as arrays."""

    def __init__(self, p: Index, runs: Sequence[int] | None) -> None:
        super().__init__()
        self.p = p
        lengths = [1] * len(p.T) if runs is None else list(runs)
        if sum(lengths) != len(p.T) or min(lengths) < 1:
            raise InvalidInput(f"runs={runs}: they must sum to {len(p.T)} epochs")
        self.lengths = np.array(lengths)
        self.run_of = np.repeat(np.arange(len(lengths)), lengths)
        self.last = len(lengths) - 1
        fleet = p.problem.fleet
        self.keeps = fleet.loading.host_cache == "planned"
        self.classes = classes(p, nodes=not self.keeps)
        # A change that has a price, or a pin, may keep a WARM replica of no other use.
        idle = p.problem.prices.replan_s > 0 or bool(fleet.rules.held)
        self.shared = p.sharing is not None
        self.loose = len(lengths) if idle or self.shared else self.last
        self._data()
        self._scenarios()
        runs_and_replicas = (len(lengths), len(p.R))
        self.a = self.columns(runs_and_replicas, upper=1, whole=True, where=self.fits)
        self.y = self.columns(
            runs_and_replicas, upper=1, whole=True, where=self._worth_warm()
        )
        self.free = self.columns((len(lengths), len(p.G)), upper=1)
        self.number = self.columns((len(lengths), len(self.tp)), whole=True)
        pays = self.slow[:, None] <= self.lost_cost[self.owner][:, None]
        asked = self.demand > 0
        self.part = self.columns(
            (len(self.tp), len(p.T)), where=pays & asked[self.owner] & (not self.shared)
        )
        self.lost = self.columns(asked.shape, where=asked)
        self.miss = self.columns(len(self.e_llm), upper=self.e_need)
        pairs = [
            np.array([(e, r) for r in p.of[k]], dtype=np.int64).reshape(-1, 2)
            for e, k in enumerate(self.e_llm)
        ]
        z = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
        self.w_e, self.w_r = z.T
        z = z[self.y[self.s_run[self.e_scenario[z[:, 0]]], z[:, 1]] >= 0]
        self.z_e, self.z_r = z.T
        self.z_y = self.y[self.s_run[self.e_scenario[self.z_e]], self.z_r]
        self.z = self.columns(len(z), upper=1, whole=True)
        later = (len(lengths) - 1, len(p.R))
        self.came, self.left = self.columns(later), self.columns(later)
        self.always = self.num_columns
        if self.shared:
            self._groups()
        self._asked()

    def _groups(self) -> None:
        """Columns of groups that share GPUs, see `foreserve.solvers.direct_groups`."""
        p = self.p
        assert p.sharing is not None
        self.block: Numbers = np.array(p.block, int)
        self.on_g = np.repeat(np.arange(len(p.G)), [len(on) for on in p.blocks_on])
        self.on_c = np.array([c for on in p.blocks_on for c in on], dtype=np.int64)
        levels, blocks = len(p.sharing.levels), len(p.blocks)
        self.group = self.columns((self.last + 1, blocks), upper=1, whole=True)
        self.level = self.columns((blocks, levels, len(p.T)), upper=1, whole=True)
        # [r, l, t]: most of the LLM's requests that r may serve on a group at level l.
        self.most = np.zeros((len(p.R), levels, len(p.T)))
        for r, t in p.served():
            for i, level in enumerate(p.sharing.levels):
                self.most[r, i, t] = p.most_rps(r, t, level) / p.demand[p.llm[r]][t]
        self.rate_at = self.columns(self.most.shape, where=self.most > 0)
        self.turn = self.columns(len(self.w_e), upper=1, whole=True)
        self.busy = self.columns((len(self.s_run), blocks), upper=1)

    def _asked(self) -> None:
        """Columns of what is asked for on top, see `foreserve.solvers.direct_rules`."""
        p, fleet = self.p, self.p.problem.fleet
        nodes = {node.name: n for n, node in enumerate(fleet.cluster.nodes)}
        self.node: Numbers = np.array([nodes[name] for name in p.node], int)
        place = np.zeros((len(nodes), len(p.M)), dtype=bool)
        place[self.node, self.llm] = True
        shape = (self.last + 1, *place.shape)
        self.kept_before = np.zeros(place.shape, dtype=bool)
        for name, k in p.kept_before:
            self.kept_before[nodes[name], k] = True
        self.h = self.columns(shape, upper=1, whole=True, where=place & self.keeps)
        costs = np.array(p.cold_cost)[self.e_llm] > 0
        self.cold = self.columns(len(self.miss), where=costs & self.keeps)
        later = (self.last, len(p.R))
        slower = np.array(p.storage_cost) > 0
        self.stored = self.columns(later, where=slower & self.keeps)
        window = fleet.rules.load_window_s is not None
        self.reads = window and fleet.loading.host_cache not in ("all", "lru")
        self.read = self.columns(shape, upper=1, where=place & self.reads)
        start = np.searchsorted(self.run_of, np.arange(1, self.last + 1))
        asked = self.demand[self.llm][:, start].T > 0
        moves = asked & fleet.rules.keep_serving
        self.bridge = self.columns(later, upper=1, where=moves)
        priced = np.full(self.last + 1, p.problem.prices.replan_s > 0)
        priced[0] &= not p.gone  # then there is a change whatever is planned
        self.change = self.columns(self.last + 1, upper=1, where=priced)

    def _data(self) -> None:
        p, fleet = self.p, self.p.problem.fleet
        options = {id(option): k for k, option in enumerate(fleet.options)}
        self.option: Numbers = np.array([options[id(o)] for o, _ in p.replicas], int)
        self.llm: Numbers = np.array(p.llm, int)
        names = {llm.name: k for k, llm in enumerate(fleet.llms)}
        self.owner = np.array([names[option.llm] for option in fleet.options])
        self.tp = np.array([option.tp for option in fleet.options])
        self.rate = np.array([option.rate_rps for option in fleet.options])
        self.units = np.array(
            [
                option.instances(fleet.llms[k].instance_concurrency)
                for option, k in zip(fleet.options, self.owner, strict=True)
            ]
        )
        self.lost_cost = np.array(p.lost_cost)
        second = [llm.weight * p.problem.epoch_s for llm in fleet.llms]
        self.slow = np.array(
            [
                second[k] * p.problem.slower_s(option)
                for option, k in zip(fleet.options, self.owner, strict=True)
            ]
        )
        self.demand = np.array(p.demand, dtype=np.float64).reshape(len(p.M), len(p.T))
        self.resident, self.kv = np.array(p.resident), np.array(p.kv)
        self.usable = np.array(p.usable)
        # (GPU, replica): one pair for each GPU of each candidate, ordered by replica.
        gpu = np.repeat(np.arange(len(p.G)), [len(on) for on in p.on])
        replica = np.array([r for on in p.on for r in on], dtype=np.int64)
        order = np.argsort(replica, kind="stable")
        self.pair_g, self.pair_r = gpu[order], replica[order]
        self.first_pair = np.searchsorted(self.pair_r, np.arange(len(p.R) + 1))
        room = np.full(len(p.R), np.iinfo(np.int64).max)
        np.minimum.at(room, self.pair_r, self.usable[self.pair_g])
        self.fits = self.resident + self.kv <= room
        self.fits_warm = self.resident <= room
        self.absent = ~np.array(p.resident_before, dtype=bool)

    def _scenarios(self) -> None:
        """Distinct needs of each run, and e: the (scenario, LLM) with a need."""
        cold = self.p.cold_cost if self.keeps else [0.0] * len(self.p.M)
        worth = [a + b > 0 for a, b in zip(self.p.miss_cost, cold, strict=True)]
        merged: dict[tuple[int, tuple[int, ...], tuple[float, ...]], float] = {}
        for t, run in enumerate(self.run_of.tolist()):
            for (probability, need), load in zip(
                self.p.need[t], self.p.load[t], strict=True
            ):
                counts = tuple(n * w for n, w in zip(need, worth, strict=True))
                key = run, counts, load if self.shared else ()
                merged[key] = merged.get(key, 0.0) + probability
        self.s_run = np.array([run for run, _, _ in merged], dtype=np.int64)
        loads = np.array([load for _, _, load in merged], dtype=np.float64)
        self.s_load = loads.reshape(len(merged), len(self.p.M) if self.shared else 0)
        found = [
            (s, k, n, weight)
            for s, ((_, need, _), weight) in enumerate(merged.items())
            for k, n in enumerate(need)
            if n > 0
        ]
        columns = np.array(found, dtype=np.float64).reshape(-1, 4).T
        self.e_scenario, self.e_llm, self.e_need = columns[:3].astype(np.int64)
        self.e_weight = columns[3]

    def _worth_warm(self) -> NDArray[np.bool_]:
        """[u, r]: where WARM may be worth something, see `Index.prewarmable`."""
        p, rules = self.p, self.p.problem.fleet.rules
        worth = np.ones((len(self.lengths), len(p.M)), dtype=bool)
        worth[self.last] = False
        worth[self.s_run[self.e_scenario], self.e_llm] = True
        found = worth[:, self.llm]
        if p.problem.prices.replan_s > 0:
            found[self.last] |= np.array(p.resident_before, dtype=bool) | (
                self.last > 0
            )
        pins = {(held.llm, held.gpus) for held in rules.held}
        found |= np.array([(o.llm, gpus) in pins for o, gpus in p.replicas], dtype=bool)
        return found & self.fits_warm

    def on_gpus(self, held: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """[u, g]: GPUs that the replicas ``held`` [u, r] are on."""
        found = np.zeros(self.free.shape, dtype=bool)
        u, pair = np.nonzero(held[:, self.pair_r])
        found[u, self.pair_g[pair]] = True
        return found

    def gpus_of(self, r: int) -> Numbers:
        """GPUs of a candidate."""
        return self.pair_g[self.first_pair[r] : self.first_pair[r + 1]]

    def chosen(self, values: Floats) -> tuple[set[Key], set[Key]]:
        """(r, t) that are ACTIVE, and WARM."""
        found = []
        for columns in (self.a, self.y):
            on = (columns >= 0) & (values[columns] > 0.5)
            found.append(
                {
                    (r, t)
                    for t, run in enumerate(self.run_of.tolist())
                    for r in np.flatnonzero(on[run]).tolist()
                }
            )
        return found[0], found[1]

    def hosted(self, values: Floats) -> set[tuple[str, int, int]]:
        """(node, m, t) kept in host memory."""
        names = [node.name for node in self.p.problem.fleet.cluster.nodes]
        kept = (self.h >= 0) & (values[self.h] > 0.5)
        return {
            (names[n], k, t)
            for t, run in enumerate(self.run_of.tolist())
            for n, k in np.argwhere(kept[run]).tolist()
        }
