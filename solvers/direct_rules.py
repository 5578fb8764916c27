"""Rows of the direct MILP that an operator may ask for: (C6) to (C9), and a price of every
change.

Letters as in `foreserve.solvers.direct` and `foreserve.solvers.milp_rules`, by runs u: a
node keeps the same in host memory through a run, and loads are at its start.
"""

from __future__ import annotations

import numpy as np

from foreserve.solvers.columns import Model
from foreserve.solvers.matrix import Floats


def c6_host_ram(m: Model) -> None:
    """(C6) sum_m W h <= host; cold >= miss - need sum_n h; stored >= came - h'"""
    if not m.keeps:
        return
    p, fleet = m.p, m.p.problem.fleet
    stored = np.array([fleet.stored_bytes[llm.name] for llm in fleet.llms])
    scale = 2.0 ** (int(stored.max()).bit_length() - 17)
    room = np.array([node.host_ram_bytes for node in fleet.cluster.nodes]) / scale
    m.put(m.rows((*m.h.shape[:2], 1), upper=room[:, None]), m.h, stored / scale)
    rows = np.where(m.cold >= 0, m.rows(len(m.cold), lower=0), -1)
    m.put(rows, m.cold, 1)
    m.put(rows, m.miss, -1)
    kept = m.h[m.s_run[m.e_scenario], :, m.e_llm]
    m.put(rows[:, None], kept, m.e_need[:, None])
    m.price(m.cold, m.e_weight * np.array(p.cold_cost)[m.e_llm])
    rows = np.where(m.stored >= 0, m.rows(m.stored.shape, lower=0), -1)
    m.put(rows, m.stored, 1)
    m.put(rows, m.came, -1)
    m.put(rows, m.h[:-1, m.node, m.llm], 1)
    cost = np.array(p.storage_cost)
    m.price(m.stored, cost)
    first = cost * m.absent * ~m.kept_before[m.node, m.llm]
    m.price(m.a[0], first)
    m.price(m.y[0], first)


def c7_load_bandwidth(m: Model) -> None:
    """(C7) seconds of loading on each GPU's link, each node's link and storage <= window"""
    p, fleet = m.p, m.p.problem.fleet
    window_s = fleet.rules.load_window_s
    if window_s is None:
        return
    names = [node.name for node in fleet.cluster.nodes]
    moving = np.array([option.moving_s for option, _ in p.replicas])
    rows = m.rows(m.free.shape, upper=window_s)
    _put_came(m, rows[:, m.pair_g], m.pair_r, moving[m.pair_r])
    link = np.array(
        [
            fleet.host_link_s(option, node)
            for (option, _), node in zip(p.replicas, p.node, strict=True)
        ]
    )
    every = np.arange(len(p.R))
    rows = m.rows((m.last + 1, len(names)), upper=window_s)
    _put_came(m, rows[:, m.node], every, link)
    if not m.reads:
        return
    # read >= h - h' and read >= came - h'
    had = np.zeros(m.read.shape)
    had[0] = m.kept_before
    rows = m.rows(m.read.shape, lower=-had)
    m.put(rows, m.read, 1)
    m.put(rows, m.h, -1)
    m.put(rows[1:], m.h[:-1], 1)
    rows = m.rows(m.a.shape, lower=-had[:, m.node, m.llm])
    m.put(rows, m.read[:, m.node, m.llm], 1)
    m.put(rows[1:], m.h[:-1, m.node, m.llm], 1)
    _put_came(m, rows, every, -np.ones(len(p.R)))
    seconds = np.array(
        [[fleet.read_s(llm.name, name) for llm in fleet.llms] for name in names]
    )
    m.put(m.rows((*m.read.shape[:2], 1), upper=window_s), m.read, seconds)


def _put_came(m: Model, rows: np.ndarray, replica: np.ndarray, value: Floats) -> None:
    """Add ``value`` for each load of ``replica`` at the start of each run."""
    for x in (m.a, m.y):
        m.put(rows[0], x[0, replica], value * m.absent[replica])
    m.put(rows[1:], m.came[:, replica], value)


def c8_reachability(m: Model) -> None:
    """(C8) an LLM that is ACTIVE before and asked for has a replica that goes on, or one
    on GPUs where none is ACTIVE before"""
    p = m.p
    if not p.problem.fleet.rules.keep_serving:
        return
    first = np.array(p.serves_before) & (m.demand[:, 0] > 0)
    rows = np.where(first, m.rows(len(p.M), lower=first), -1)
    m.put(rows[m.llm], m.a[0], np.array(p.bridges, dtype=bool))
    rows = m.rows(m.bridge.shape, upper=0)
    m.put(rows, m.bridge, 1)
    m.put(np.where(m.bridge >= 0, rows, -1), m.a[1:], -1)
    # One row for each GPU of each replica, with all that may be ACTIVE there before.
    rows = m.rows((m.last, len(m.pair_r)), upper=1)
    m.put(rows, m.bridge[:, m.pair_r], 1)
    if m.shared:
        m.put(rows, m.a[:-1, m.pair_r], -1)
    for g in p.G:
        pairs, there = np.flatnonzero(m.pair_g == g), np.array(p.on[g], int)
        other = m.pair_r[pairs][:, None] != there
        before = np.where(other, m.a[:-1, there][:, None, :], -1)
        if m.shared:
            before = m.group[:-1, None, np.array(p.blocks_on[g], int)]
        where = (m.bridge[:, m.pair_r[pairs]] >= 0)[:, :, None]
        m.put(rows[:, pairs, None], np.where(where, before, -1), 1)
    for k in p.M:
        own = np.array(p.of[k], dtype=np.int64)
        asked = (m.bridge[:, own] >= 0).any(axis=1, keepdims=True)
        rows = np.where(asked, m.rows((m.last, len(own)), lower=0), -1)
        m.put(rows[:, :, None], m.bridge[:, None, own], 1)
        m.put(rows, m.a[:-1, own], -1)


def c9_failure_domains(m: Model) -> None:
    """(C9) sum over R_m outside each failure domain of a >= min_after_loss"""
    p, fleet = m.p, m.p.problem.fleet
    domain_of = fleet.cluster.domain_of
    domain = np.array([domain_of[name] for name in p.node])
    for k, llm in enumerate(fleet.llms):
        if not llm.min_after_loss:
            continue
        for lost in dict.fromkeys(domain_of.values()):
            rows = m.rows((m.last + 1, 1), lower=llm.min_after_loss)
            left = np.flatnonzero((m.llm == k) & (domain != lost))
            m.put(rows, m.a[:, left], 1)


def price_changes(m: Model) -> None:
    """change >= |x - x'| and |a - a'| for all r, if a change as such has a price (O4)"""
    p, price = m.p, m.p.problem.prices.replan_s
    if price <= 0:
        return
    m.price(m.change, price)
    if p.gone:
        m.offset += price
    for held, before in (
        ((m.a,), p.active_before),
        ((m.a, m.y), p.resident_before),
    ):
        was = np.array(before, dtype=float)
        for sign in (1, -1):
            upper = np.zeros(m.a.shape)
            upper[0] = np.where(m.change[0] >= 0, sign * was, np.inf)
            rows = m.rows(m.a.shape, upper=upper)
            rows = np.where((m.change >= 0)[:, None], rows, -1)
            m.put(rows, m.change[:, None], -1)
            for x in held:
                m.put(rows, x, sign)
                m.put(rows[1:], x[:-1], -sign)
