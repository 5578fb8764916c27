"""Groups that share GPUs in the direct MILP: what takes the place of dedicated replicas.

Letters as in `foreserve.solvers.direct` and, for groups, `foreserve.solvers.milp`; C is an
aligned block and l a level of load. A block is a group for a whole run, at a level of each
epoch: group[u,C] in {0,1}, level[C,l,t] in {0,1}. ``used`` is free + sum over C on g of
group. Rates are shares of the LLM's requests, by replica and level: rate[r,l,t].
"""

from __future__ import annotations

import numpy as np

from foreserve.solvers.columns import Model
from foreserve.solvers.index import Key
from foreserve.solvers.matrix import Floats, Numbers


def memory(m: Model, rows: Numbers, scale: float) -> None:
    """Of (C1): w + v of each member, and the GPUs of groups are there to be used."""
    m.put(
        rows[:, m.pair_g],
        m.a[:, m.pair_r],
        ((m.resident + m.kv) / scale)[m.pair_r],
    )
    m.put(rows[:, m.on_g], m.group[:, m.on_c], -m.usable[m.on_g] / scale)


def members(m: Model, rows: Numbers) -> None:
    """(C3) sum over blocks on g of group + free <= 1 (``rows`` hold free);
    a <= group;   sum over R_C of a <= most"""
    assert m.p.sharing is not None
    m.put(rows[:, m.on_g], m.group[:, m.on_c], 1)
    below = m.rows(m.a.shape, upper=0)
    m.put(below, m.a, 1)
    m.put(below, m.group[:, m.block], -1)
    m.put(m.rows(m.group.shape, upper=m.p.sharing.most)[:, m.block], m.a, 1)


def copies(m: Model, rows: Numbers) -> None:
    """Of (C4): the LLM's own ACTIVE replica counts, and any group has its GPUs in use."""
    m.put(rows[:, m.pair_g, m.llm[m.pair_r]], m.a[:, m.pair_r], 1)
    m.put(rows[:, m.on_g], m.group[:, m.on_c, None], -1)


def rates(m: Model, rows: Numbers) -> None:
    """(C5) sum over R_m of rate + lost = 1 (``rows`` hold lost);   sum over l of level =
    group;   sum over R_C of lam rate / mu <= c level;   sum over l of rate / most <= a"""
    sharing, p = m.p.sharing, m.p
    assert sharing is not None
    m.put(rows[m.llm][:, None], m.rate_at, 1)
    whole = m.rows((len(p.blocks), len(p.T)), lower=0, upper=0)
    m.put(whole[:, None], m.level, 1)
    m.put(whole, m.group[m.run_of].T, -1)
    caps = np.minimum(1.0, np.array(sharing.levels) / sharing.booked_load)
    booked = m.rows(m.level.shape, upper=0)
    m.put(booked, m.level, -caps[:, None])
    part = (m.demand[m.llm] / np.array(p.rate)[:, None])[:, None]
    m.put(booked[m.block], m.rate_at, part)
    own = m.rows((len(p.R), 1, len(p.T)), upper=0)
    m.put(own, m.rate_at, np.divide(1, m.most, where=m.most > 0, out=m.most * 0))
    m.put(own[:, 0], m.a[m.run_of].T, -1)


def slower(m: Model) -> None:
    """Of (O3): each rate at its level's delay."""
    assert m.p.sharing is not None
    cost = np.array(
        [[m.p.slow_cost_at(r, v) for v in m.p.sharing.levels] for r in m.p.R]
    ).reshape(m.rate_at.shape[:2])
    m.price(m.rate_at, cost[:, :, None] * m.demand[m.llm][:, None])


def turns(m: Model, gpu_rows: Numbers, keys: Numbers, cover: Numbers) -> None:
    """Of (O2): turn <= a;   sum over R_C of phi turn <= 1;   busy >= a of members that
    are asked for; busy groups keep their GPUs; turn counts in the cover

    ``keys`` are scenario x GPUs + GPU of each of ``gpu_rows``.
    """
    p, sharing = m.p, m.p.sharing
    assert sharing is not None
    rows = m.rows(len(m.turn), upper=0)
    m.put(rows, m.turn, 1)
    scenario = m.e_scenario[m.w_e]
    m.put(rows, m.a[m.s_run[scenario], m.w_r], -1)
    units = m.units[m.option[m.w_r]]
    unit = np.array([llm.instance_concurrency for llm in p.problem.fleet.llms])
    load = m.s_load[scenario, m.llm[m.w_r]]
    phi = np.minimum(1.0, load / (units * unit[m.llm[m.w_r]]))
    m.put(m.rows(m.busy.shape, upper=1)[scenario, m.block[m.w_r]], m.turn, phi)
    asked = m.s_load[:, m.llm] > 0 if sharing.idle_lends else True
    rows = np.where(asked, m.rows((len(m.s_run), len(p.R)), upper=0), -1)
    m.put(rows, m.a[m.s_run], 1)
    m.put(rows, m.busy[:, m.block], -1)
    for g in p.G:
        at = np.flatnonzero(keys % len(p.G) == g)
        blocks = np.array(p.blocks_on[g], dtype=np.int64)
        scenarios = keys[at] // len(p.G)
        m.put(gpu_rows[at, None], m.busy[scenarios][:, blocks], 1)
        m.put(gpu_rows[at, None], m.group[m.s_run[scenarios]][:, blocks], -1)
    m.put(cover[m.w_e], m.turn, np.minimum(units, m.e_need[m.w_e]))


def served(m: Model, values: Floats) -> dict[Key, float] | None:
    """Rates of the answer by (r, t); None where the best split is known without."""
    if m.p.sharing is None:
        return None
    share = np.where(m.rate_at >= 0, values[m.rate_at], 0.0).sum(axis=1)
    rps = share * m.demand[m.llm]
    return {(r, t): float(rps[r, t]) for r, t in np.argwhere(share > 0).tolist()}
