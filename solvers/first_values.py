"""Values of all columns of the direct MILP from a schedule, so that HiGHS starts there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foreserve.models.activation import Activation, Group
from foreserve.solvers.columns import Model
from foreserve.solvers.index import encode
from foreserve.solvers.matrix import Floats
from foreserve.solvers.result import Schedule
from foreserve.solvers.symmetry import in_order


def first_values(m: Model, start: Schedule) -> dict[int, float]:
    """A value for every column that is always there, and for host memory, from the
    placements of ``start``; nothing where one of its replicas is no candidate. WARM
    replicas that are worth nothing are left out."""
    chosen = encode(m.p, start)
    if chosen is None:
        return {}
    first = np.searchsorted(m.run_of, np.arange(m.last + 1)).tolist()
    a, y = (np.zeros(m.a.shape, dtype=bool) for _ in range(2))
    for on, keys in ((a, chosen[0]), (y, chosen[1])):
        for u, t in enumerate(first):
            on[u, [r for r, epoch in keys if epoch == t]] = True
    in_order(m.classes, m.tp[m.option], a, y)
    serving = m.on_gpus(a)
    a &= m.a >= 0
    y &= m.y >= 0
    for u in range(m.loose, m.last + 1):
        y[u, m.pair_r[serving[u, m.pair_g]]] = False
    values = np.zeros(m.num_columns)
    values[m.a[a]] = 1
    values[m.y[y]] = 1
    if m.shared:  # loads and turns of groups are for HiGHS to find
        chosen_columns = np.concatenate([m.a[m.a >= 0], m.y[m.y >= 0]])
        return {j: float(values[j]) for j in chosen_columns.tolist()}
    values[m.free] = m.on_gpus(y) & ~serving
    number = np.zeros(m.number.shape)
    np.add.at(number, (np.nonzero(a)[0], m.option[np.nonzero(a)[1]]), 1)
    values[m.number] = number
    _split(m, values, number)
    _activate(m, values, number, y, serving)
    x = a | y
    values[m.came] = x[1:] & ~x[:-1]
    values[m.left] = a[:-1] & ~a[1:]
    # What is asked for on top follows from these, and HiGHS finds it.
    known = dict(enumerate(values[: m.always].tolist()))
    if m.keeps:
        llms = {llm.name: k for k, llm in enumerate(m.p.problem.fleet.llms)}
        nodes = {node.name: n for n, node in enumerate(m.p.problem.fleet.cluster.nodes)}
        kept = np.zeros(m.h.shape)
        for u, t in enumerate(first):
            for copy in start[t].hosted:
                kept[u, nodes[copy.node], llms[copy.llm]] = 1
        there = m.h >= 0
        known |= dict(zip(m.h[there].tolist(), kept[there].tolist(), strict=True))
    return known


def _split(m: Model, values: Floats, number: Floats) -> None:
    """The fastest options are filled first."""
    left = (m.demand > 0).astype(np.float64)
    for k in np.argsort(m.slow, kind="stable").tolist():
        there = np.flatnonzero(m.part[k] >= 0)
        llm = m.owner[k]
        demand = m.demand[llm, there]
        most = np.minimum(m.rate[k] / demand, 1.0) * number[m.run_of[there], k]
        part = np.minimum(left[llm, there], most)
        values[m.part[k, there]] = part
        left[llm, there] -= part
    values[m.lost[m.lost >= 0]] = left[m.lost >= 0]


def _activate(
    m: Model,
    values: Floats,
    number: Floats,
    y: NDArray[np.bool_],
    serving: NDArray[np.bool_],
) -> None:
    """A good activation of each scenario, and what it leaves missing."""
    names = [llm.name for llm in m.p.problem.fleet.llms]
    value = dict(zip(names, m.p.miss_cost, strict=True))
    spare = []
    for u in range(m.last + 1):
        free = [
            r
            for r in np.flatnonzero(y[u]).tolist()
            if not serving[u, m.gpus_of(r)].any()
        ]
        groups: list[Group] = [
            (names[m.llm[r]], tuple(m.gpus_of(r).tolist()), int(m.units[m.option[r]]))
            for r in free
        ]
        on: list[list[int]] = [[] for _ in m.p.G]
        of: dict[str, list[int]] = {}
        for i, (name, gpus, _) in enumerate(groups):
            of.setdefault(name, []).append(i)
            for gpu in gpus:
                on[gpu].append(i)
        spare.append((free, groups, on, of))
    run = m.s_run[m.e_scenario]
    ready = np.zeros((m.last + 1, len(names)))
    np.add.at(ready.T, m.owner, (m.units * number).T)
    clipped = np.minimum(m.units, m.e_need[:, None]) * (m.e_llm[:, None] == m.owner)
    covered = (clipped * number[run]).sum(axis=1)
    entry = {
        (s, k): e
        for e, (s, k) in enumerate(
            zip(m.e_scenario.tolist(), m.e_llm.tolist(), strict=True)
        )
    }
    column = {
        key: z
        for key, z in zip(
            zip(m.z_e.tolist(), m.z_r.tolist(), strict=True), m.z.tolist(), strict=True
        )
    }
    need: list[dict[str, int]] = [{} for _ in m.s_run]
    for (s, k), e in entry.items():
        left = int(m.e_need[e] - ready[run[e], k])
        if left > 0:
            need[s][names[k]] = left
    for s, u in enumerate(m.s_run.tolist()):
        free, groups, on, of = spare[u]
        search = Activation(groups, on, of, value, need[s])
        search.covered()
        for i in {i for i in search.running if i >= 0}:
            r = free[i]
            e = entry[s, int(m.llm[r])]
            values[column[e, r]] = 1
            covered[e] += clipped[e, m.option[r]]
    values[m.miss] = np.maximum(0, m.e_need - covered)
