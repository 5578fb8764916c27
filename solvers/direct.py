"""The same problem for HiGHS directly: rows built as arrays, in a tighter form.

Letters and labels as in `foreserve.solvers.milp`, with changes of form. Epochs come in
runs, u, of one placement each; every epoch is a run of its own unless told otherwise.

Vars   a[u,r], y[u,r] in {0,1} ACTIVE, WARM; free[u,g] in [0,1]: used, and by no ACTIVE
       replica; number[u,k] whole: ACTIVE replicas of option k; part[k,t], lost[m,t]: shares
       of an LLM's requests that option k serves and that nobody serves; z[s,r] in {0,1}
       activated, miss[s,m] >= 0; came[u,r], left[u,r] >= 0 for u > 0

``used`` is free + sum over R_g of a. Replicas of one option serve alike, so (C5), (O1) and
(O3) need their number only, and (O2) counts them by it. In the last run a WARM replica on a
GPU with an ACTIVE one is worth nothing (it cannot be activated, and nothing comes after),
so there it is ruled out: a GPU's memory is then either an ACTIVE replica's or free for WARM
ones. Epochs of a run that ask for the same instances are one scenario, with their
probabilities added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np

from foreserve.models.problem import Problem
from foreserve.solvers import direct_groups
from foreserve.solvers.columns import Model
from foreserve.solvers.direct_rules import (
    c6_host_ram,
    c7_load_bandwidth,
    c8_reachability,
    c9_failure_domains,
    price_changes,
)
from foreserve.solvers.first_values import first_values
from foreserve.solvers.index import Index, decode, index
from foreserve.solvers.result import (
    Progress,
    Schedule,
    Solved,
    SolveOptions,
    SolveReport,
    curve,
)
from foreserve.solvers.search import bound, load, search

WARM_FIRST = 1_500
"""With more columns than this the ACTIVE replicas of the start are held at first."""
WARM_SHARE = 0.2
"""For at most this part of the time."""


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Build the matrix, let HiGHS search from ``start``, read its best answer."""
    return solve_runs(problem, options, start)


def solve_runs(
    problem: Problem,
    options: SolveOptions,
    start: Schedule | None = None,
    *,
    runs: Sequence[int] | None = None,
) -> Solved:
    """As `solve`, of schedules whose placement changes only between ``runs``.

    ``runs``: how many epochs each takes, in order; None: one each. Every epoch has its
    own split of the demand and its own activations. The bound is one on such schedules.
    Of ``start`` the placement of each run's first epoch counts.
    """
    began_s = perf_counter()
    p = index(problem)
    m = build(p, runs)
    hints = {} if start is None else first_values(m, start)
    solver = load(m.programme())
    seen: list[Progress] = []
    if hints and m.num_columns > WARM_FIRST:
        hints = _warm_first(m, solver, options, hints, began_s, seen)
    found = search(solver, options, hints, began_s)
    schedule = None
    if found.values is not None:
        active, warm = m.chosen(found.values)
        rates = direct_groups.served(m, found.values)
        schedule = decode(p, active, warm, rates, m.hosted(found.values))
    report = SolveReport(
        status=found.status,
        solver="highs",
        objective=found.objective,
        bound=found.bound,
        time_to_first_s=seen[0].elapsed_s if seen else found.time_to_first_s,
        progress=curve((*seen, *found.progress)),
        message=found.message,
    )
    return Solved(schedule=schedule, report=report)


def _warm_first(
    m: Model,
    solver: Any,
    options: SolveOptions,
    start: dict[int, float],
    began_s: float,
    seen: list[Progress],
) -> dict[int, float]:
    """The best WARM replicas beside the ACTIVE ones of ``start``, as far as a part of the
    time goes; ``seen`` gets the answers on the way (the bounds say nothing)."""
    columns = m.a[m.a >= 0]
    held = np.array([start[j] for j in columns.tolist()])
    bound(solver, columns, held, held)
    limited = replace(options, time_limit_s=WARM_SHARE * options.time_limit_s)
    found = search(solver, limited, start, began_s)
    bound(solver, columns, np.zeros(len(columns)), np.ones(len(columns)))
    if found.values is None:
        return start
    seen += [p._replace(bound=None) for p in found.progress if p.objective is not None]
    return dict(enumerate(found.values.tolist()))


def build(p: Index, runs: Sequence[int] | None = None) -> Model:
    """The matrix: every label in turn."""
    m = Model(p, runs)
    for row in (c1_gpu_memory, c2_nesting, c3_equal_groups, c4_one_copy, c5_demand):
        row(m)
    for row in (c6_host_ram, c7_load_bandwidth, c8_reachability, c9_failure_domains):
        row(m)
    c10_rules(m)
    for term in (o1_unserved, o2_cold_starts, o3_slowdown, o4_switching, o5_gpu_hours):
        term(m)
    order_blocks(m)
    return m


def order_blocks(m: Model) -> None:
    """Of interchangeable blocks of GPUs none has more ACTIVE GPUs than the one before
    it, added over the runs: every plan can be put in that order (`symmetry`)."""
    for group in m.classes:
        rows = m.rows((len(group) - 1, 1), lower=0)
        size = m.tp[m.option[group[0]]]
        for a in m.a:
            m.put(rows, a[group[:-1]], size)
            m.put(rows, a[group[1:]], -size)


def c1_gpu_memory(m: Model) -> None:
    """(C1) sum over R_g of w y <= M free + sum over R_g of (M - w - v) a   for all u, g,
    the last sum in no last run; there also, for k = 1, 2, 3,
    sum over R_g of floor((k + 1) w / (M + 1)) y <= k free"""
    # Numbers near 2^16, so that HiGHS's absolute tolerance is less than a byte.
    scale = 2.0 ** (int(m.usable.max()).bit_length() - 17)
    rows = m.rows(m.free.shape, upper=0)
    m.put(rows, m.free, -m.usable / scale)
    over = rows[:, m.pair_g]
    m.put(over, m.y[:, m.pair_r], (m.resident / scale)[m.pair_r])
    if m.shared:
        direct_groups.memory(m, rows, scale)
        return
    left = m.usable[m.pair_g] - (m.resident + m.kv)[m.pair_r]
    m.put(over[: m.loose], m.a[: m.loose, m.pair_r], -left / scale)

    # In whole (k + 1)ths of a GPU rounded down, at most k of them fit.
    for k in (1, 2, 3):
        rows = m.rows(m.free[m.loose :].shape, upper=0)
        m.put(rows, m.free[m.loose :], -k)
        parts = m.resident[m.pair_r] * (k + 1) // (m.usable[m.pair_g] + 1)
        m.put(rows[:, m.pair_g], m.y[m.loose :, m.pair_r], parts)


def c2_nesting(m: Model) -> None:
    """(C2) holds by construction: every candidate is on an aligned block of a node."""


def c3_equal_groups(m: Model) -> None:
    """(C3) sum over R_g of a + free <= 1   for all u, g: ACTIVE replicas share no GPU"""
    rows = m.rows(m.free.shape, upper=1)
    m.put(rows, m.free, 1)
    if m.shared:
        direct_groups.members(m, rows)
        return
    m.put(rows[:, m.pair_g], m.a[:, m.pair_r], 1)


def c4_one_copy(m: Model) -> None:
    """(C4) sum over R_g of m's y <= free + sum over R_g of the other LLMs' a
    for all u, g, m, the last sum in no last run"""
    rows = m.rows((len(m.lengths), len(m.p.G), len(m.p.M)), upper=0)
    own = rows[:, m.pair_g, m.llm[m.pair_r]]
    m.put(own, m.y[:, m.pair_r], 1)
    m.put(rows, m.free[:, :, None], -1)
    if m.shared:
        direct_groups.copies(m, rows)
        return
    for k in m.p.M:
        others = m.pair_r[m.llm[m.pair_r] != k]
        gpus = m.pair_g[m.llm[m.pair_r] != k]
        m.put(rows[: m.loose, gpus, k], m.a[: m.loose, others], -1)


def c5_demand(m: Model) -> None:
    """(C5) sum over options of part + lost = 1   for all m, t;
    part <= min(mu / lam, 1) number;   number = sum over R_k of a   for all u, k"""
    rows = m.rows(m.lost.shape, lower=m.demand > 0, upper=m.demand > 0)
    m.put(rows, m.lost, 1)
    if m.shared:
        direct_groups.rates(m, rows)
    m.put(rows[m.owner], m.part, 1)
    rows = m.rows(m.part.shape, upper=0)
    m.put(rows, m.part, 1)
    demand = m.demand[m.owner]
    most = np.divide(m.rate[:, None], demand, where=demand > 0, out=np.ones(rows.shape))
    number = m.number[m.run_of].T
    m.put(np.where(m.part >= 0, rows, -1), number, -np.minimum(most, 1.0))
    rows = m.rows(m.number.shape, lower=0, upper=0)
    m.put(rows, m.number, -1)
    m.put(rows[:, m.option], m.a, 1)


def c10_rules(m: Model) -> None:
    """(C10) sum over R_m of a >= min_active, of a + y <= max_replicas   for all u, m;
    sum over R_g of a + y <= max_llms_per_gpu, <= 1 for LLMs apart; pins are there

    The nodes an LLM may use, and closed GPUs, are in the candidates already.
    """
    llms = m.p.problem.fleet.llms
    least = np.array([llm.min_active for llm in llms])
    most = [np.inf if llm.max_replicas is None else llm.max_replicas for llm in llms]
    shape = len(m.lengths), len(llms)
    rows = np.where(least > 0, m.rows(shape, lower=least), -1)
    m.put(rows[:, m.owner], m.number, 1)
    rows = np.where(np.isfinite(most), m.rows(shape, upper=np.array(most)), -1)
    m.put(rows[:, m.owner], m.number, 1)
    m.put(rows[:, m.llm], m.y, 1)
    rules = m.p.problem.fleet.rules
    if rules.max_llms_per_gpu is not None:
        rows = m.rows(m.free.shape, upper=rules.max_llms_per_gpu)
        for x in (m.a, m.y):
            m.put(rows[:, m.pair_g], x[:, m.pair_r], 1)
    names = [llm.name for llm in llms]
    for pair in rules.apart:
        own = np.isin(m.llm[m.pair_r], [names.index(n) for n in pair if n in names])
        rows = m.rows(m.free.shape, upper=1)
        for x in (m.a, m.y):
            m.put(rows[:, m.pair_g[own]], x[:, m.pair_r[own]], 1)
    for pin in rules.held:
        rows = m.rows((len(m.lengths), 1), lower=1)
        there = np.array(
            [(o.llm, gpus) == (pin.llm, pin.gpus) for o, gpus in m.p.replicas],
            dtype=bool,
        )
        for state, x in (("ACTIVE", m.a), ("WARM", m.y)):
            if pin.state in (None, state):
                m.put(rows, x[:, there], 1)


def o1_unserved(m: Model) -> None:
    """(O1) sum of lost, each at omega D unserved_s lam"""
    m.price(m.lost, m.lost_cost[:, None] * m.demand)


def o2_cold_starts(m: Model) -> None:
    """(O2) sum of pi omega loss miss, after the best activation of each scenario:
    z <= y;   sum over R_g of z <= free   for all s, g;
    miss + sum of min(u, need) (number + z) >= need   for all s, m
    """
    rows = m.rows(len(m.z), upper=0)
    m.put(rows, m.z, 1)
    m.put(rows, m.z_y, -1)
    # Each z once for each of its GPUs.
    sizes = np.diff(m.first_pair)[m.z_r]
    each = np.repeat(np.arange(len(m.z)), sizes)
    pair = np.arange(len(each)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    gpu = m.pair_g[m.first_pair[m.z_r[each]] + pair]
    scenario = m.e_scenario[m.z_e[each]]
    keys, row_of = np.unique(scenario * len(m.p.G) + gpu, return_inverse=True)
    rows = m.rows(len(keys), upper=0)
    m.put(rows[row_of], m.z[each], 1)
    m.put(rows, m.free[m.s_run[keys // len(m.p.G)], keys % len(m.p.G)], -1)
    gpu_rows, rows = rows, m.rows(len(m.miss), lower=m.e_need)
    m.put(rows, m.miss, 1)
    m.price(m.miss, m.e_weight * np.array(m.p.miss_cost)[m.e_llm])
    m.put(rows[m.z_e], m.z, np.minimum(m.units[m.option[m.z_r]], m.e_need[m.z_e]))
    if m.shared:
        direct_groups.turns(m, gpu_rows, keys, rows)
        return
    e, k = np.nonzero(m.e_llm[:, None] == m.owner)
    number = m.number[m.s_run[m.e_scenario[e]], k]
    m.put(rows[e], number, np.minimum(m.units[k], m.e_need[e]))


def o3_slowdown(m: Model) -> None:
    """(O3) sum of part, each at omega D d lam"""
    m.price(m.part, m.slow[:, None] * m.demand[m.owner])
    if m.shared:
        direct_groups.slower(m)


def o4_switching(m: Model) -> None:
    """(O4) price of what loads and of what stops being ACTIVE, with x = a + y:
    x where not resident before and 1 - a where ACTIVE before, in the first run;
    came >= x - x' and left >= a' - a after it; and that of any change
    """
    p = m.p
    price_changes(m)
    load = np.array(p.load_cost)
    m.price(m.a[0], load * m.absent)
    m.price(m.y[0], load * m.absent)
    active = np.array(p.active_before, dtype=bool)
    m.price(m.a[0], -p.demote_cost * active)
    m.offset += p.demote_cost * (p.stopped + int(active.sum()))
    rows = m.rows(m.came.shape, lower=0)
    m.put(rows, m.came, 1)
    for columns in (m.a, m.y):
        m.put(rows, columns[1:], -1)
        m.put(rows, columns[:-1], 1)
    rows = m.rows(m.left.shape, lower=0)
    m.put(rows, m.left, 1)
    m.put(rows, m.a[1:], 1)
    m.put(rows, m.a[:-1], -1)
    m.price(m.came, load)
    m.price(m.left, p.demote_cost)


def o5_gpu_hours(m: Model) -> None:
    """(O5) sum of rent (free + sum over R_g of a), for each epoch of a run"""
    rent = np.array(m.p.rent)
    m.price(m.free, m.lengths[:, None] * rent)
    if m.shared:
        m.price(m.group[:, m.on_c], m.lengths[:, None] * rent[m.on_g])
        return
    m.price(m.a[:, m.pair_r], m.lengths[:, None] * rent[m.pair_g])
