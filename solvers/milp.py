"""Placement, TP size and prewarming as a MILP (Pyomo, HiGHS).

Labels as in docs/formulation.md; `index` turns a problem into these letters, one function
per label adds its row or term, `decode` turns the answer back.

Sets   R candidate replicas (option on an aligned block), R_g those on GPU g, R_m those of
       LLM m; G GPUs, M LLMs, T epochs, S_t distinct scenarios of epoch t
Data   w[r], v[r] memory resident and KV, M[g] usable; mu[r] rate, u[r] instances, d[r]
       seconds slower than the fastest; D epoch length; lam[m,t] demand; pi[s,t],
       need[s,m,t]; x0[r], a0[r] resident and ACTIVE before
Vars   a[r,t], y[r,t] in {0,1} ACTIVE, WARM; used[g,t] in [0,1]; q[r,t] >= 0 served rate;
       lost[m,t] >= 0 unserved rate; z[s,r,t] in {0,1} activated; miss[s,m,t] >= 0
       missing instances; came[r,t], left[r,t] >= 0 for t > 0: loads, stops
Min    (O1) sum omega D penalty lost   (O2) sum pi omega loss miss   (O3) sum omega D d q
       (O4) sum price came + price left   (O5) sum rent used
s.t.   (C1) sum_{R_g} w (a + y) + v a <= M used      (C2) blocks are aligned
       (C3) sum_{R_g} a <= used                      (C4) sum_{R_g, R_m} a + y <= used
       (C5) sum_{R_m} q + lost = lam, q <= min(mu, lam) a
       (C10) sum_{R_m} a >= min_active, sum_{R_m} a + y <= max_replicas
       (O2) z <= y, sum_{R_g} z + a <= used,
            miss + sum_{R_m} min(u, need) (a + z) >= need
       (O4) came >= x - x', left >= a' - a, where x = a + y and ' is the epoch before

Where groups may share GPUs (`Sharing`), C is an aligned block, R_C the replicas on it and
l a level of load, with its cap c_l on the booked parts of rates, and

Vars   e[C,l,t] in {0,1}: C is a group loaded up to l; q[r,l,t]; turn[s,r,t] in {0,1}: its
       group serves ACTIVE r in s; busy[C,s,t] in [0,1]: some member is asked for in s
s.t.   (C3) sum_{C on g} sum_l e <= used, a <= sum_l e, sum_{R_C} a <= most
       (C5) sum_{R_C} q / mu <= c_l e, sum_l q / most_rl <= a
       (O2) turn <= a, sum_{R_C} phi turn <= 1, sum_{R_g} z + sum_{C on g} busy <= used,
            and turn stands for a in the covered need

Rows (C6) to (C9) are in `foreserve.solvers.milp_rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyomo.environ as pyo

from foreserve.solvers.index import Index, Key
from foreserve.solvers.milp_rules import (
    c6_host_ram,
    c7_load_bandwidth,
    c8_reachability,
    c9_failure_domains,
)
from foreserve.solvers.rows import Pairs, at_least, at_most, linear


def build(p: Index) -> pyo.ConcreteModel:
    """The Pyomo model: every label in turn, then the sum of the terms."""
    m = pyo.ConcreteModel()
    variables(m, p)
    for row in (c1_gpu_memory, c2_nesting, c3_equal_groups, c4_one_copy, c5_demand):
        row(m, p)
    for row in (
        c6_host_ram,
        c7_load_bandwidth,
        c8_reachability,
        c9_failure_domains,
        c10_rules,
    ):
        row(m, p)
    m.terms = {
        label: term(m, p)
        for label, term in (
            ("O1", o1_unserved),
            ("O2", o2_cold_starts),
            ("O3", o3_slowdown),
            ("O4", o4_switching),
            ("O5", o5_gpu_hours),
        )
    }
    pairs = [pair for added, _ in m.terms.values() for pair in added]
    constant = sum(offset for _, offset in m.terms.values())
    m.cost = pyo.Objective(expr=linear(pairs, constant))
    return m


def variables(m: Any, p: Index) -> None:
    every = [(r, t) for t in p.T for r in p.R]
    m.a = pyo.Var(every, domain=pyo.Binary)
    m.y = pyo.Var(p.prewarmable(), domain=pyo.Binary)
    m.used = pyo.Var([(g, t) for t in p.T for g in p.G], bounds=(0, 1))
    levels = None if p.sharing is None else range(len(p.sharing.levels))
    rates = p.served() if levels is None else _by_level(p.served(), levels)
    m.q = pyo.Var(rates, domain=pyo.NonNegativeReals)
    m.lost = pyo.Var(
        [(k, t) for t in p.T for k in p.M if p.demand[k][t] > 0],
        domain=pyo.NonNegativeReals,
    )
    exposed = p.exposed()
    m.miss = pyo.Var(exposed, domain=pyo.NonNegativeReals)
    m.z = pyo.Var(
        [(s, r, t) for s, k, t in exposed for r in p.of[k]], domain=pyo.Binary
    )
    if levels is not None:
        C = range(len(p.blocks))
        m.e = pyo.Var(
            [(c, i, t) for t in p.T for c in C for i in levels], domain=pyo.Binary
        )
        m.turn = pyo.Var(list(m.z), domain=pyo.Binary)
        m.busy = pyo.Var(
            [(c, s, t) for t in p.T for s in range(len(p.need[t])) for c in C],
            bounds=(0, 1),
        )
        m.groups_on = {
            (g, t): [m.e[c, i, t] for c in p.blocks_on[g] for i in levels]
            for g in p.G
            for t in p.T
        }
    later = [(r, t) for r, t in every if t > 0]
    m.came = pyo.Var(later, domain=pyo.NonNegativeReals)
    m.left = pyo.Var(later, domain=pyo.NonNegativeReals)
    # Plain dictionaries: a look-up in them is many times faster than in a Pyomo Var.
    m.x = {key: [m.a[key], m.y[key]] if key in m.y else [m.a[key]] for key in every}


def c1_gpu_memory(m: Any, p: Index) -> None:
    """(C1) sum over R_g of w (a + y) + v a <= M used   for all g, t"""
    # Numbers near 2^16, so that HiGHS's absolute tolerance is less than a byte.
    scale = 2.0 ** (max(p.usable).bit_length() - 17)

    def row(m: Any, g: int, t: int) -> Any:
        pairs: Pairs = [(-p.usable[g] / scale, m.used[g, t])]
        for r in p.on[g]:
            pairs.append(((p.resident[r] + p.kv[r]) / scale, m.a[r, t]))
            if (r, t) in m.y:
                pairs.append((p.resident[r] / scale, m.y[r, t]))
        return at_most(pairs, 0)

    m.c1 = pyo.Constraint(p.G, p.T, rule=row)


def c2_nesting(m: Any, p: Index) -> None:
    """(C2) holds by construction: every candidate is on an aligned block of a node."""


def c3_equal_groups(m: Any, p: Index) -> None:
    """(C3) sum over R_g of a <= used   for all g, t: ACTIVE replicas share no GPU; or
    sum over blocks on g of e <= used, a <= sum of e, sum over R_C of a <= most"""

    def row(m: Any, g: int, t: int) -> Any:
        if p.sharing is None:
            there = [(1, m.a[r, t]) for r in p.on[g]]
        else:
            there = [(1, e) for e in m.groups_on[g, t]]
        return at_most([*there, (-1, m.used[g, t])], 0)

    m.c3 = pyo.Constraint(p.G, p.T, rule=row)
    if p.sharing is None:
        return
    most, levels = p.sharing.most, p.sharing.levels

    def group(m: Any, r: int, t: int) -> Any:
        loads = [(-1, m.e[p.block[r], i, t]) for i in range(len(levels))]
        return at_most([(1, m.a[r, t]), *loads], 0)

    def members(m: Any, c: int, t: int) -> Any:
        return at_most([(1, m.a[r, t]) for r in p.blocks[c]], most)

    m.c3_group = pyo.Constraint(p.R, p.T, rule=group)
    m.c3_most = pyo.Constraint(range(len(p.blocks)), p.T, rule=members)


def c4_one_copy(m: Any, p: Index) -> None:
    """(C4) sum over R_g of m's a + y <= used   for all g, m, t"""

    def row(m: Any, g: int, k: int, t: int) -> Any:
        pairs = [(1, x) for r in p.on[g] if p.llm[r] == k for x in m.x[r, t]]
        return at_most([*pairs, (-1, m.used[g, t])], 0)

    m.c4 = pyo.Constraint(p.G, p.M, p.T, rule=row)


def c5_demand(m: Any, p: Index) -> None:
    """(C5) sum over R_m of q + lost = lambda   and   q <= min(mu, lambda) a; or, by
    levels, sum over R_C of q / mu <= c e   and   sum over levels of q / most <= a"""

    def all_of(m: Any, k: int, t: int) -> Any:
        rates = [(1, q) for r in p.of[k] for q in _rates(m, p, r, t)]
        return p.demand[k][t], linear([*rates, (1, m.lost[k, t])]), p.demand[k][t]

    def each(m: Any, r: int, t: int) -> Any:
        most = min(p.rate[r], p.demand[p.llm[r]][t])
        return at_most([(1, m.q[r, t]), (-most, m.a[r, t])], 0)

    m.c5 = pyo.Constraint(list(m.lost), rule=all_of)
    if p.sharing is None:
        m.c5_rate = pyo.Constraint(list(m.q), rule=each)
        return
    levels, full = p.sharing.levels, p.sharing.booked_load

    def group(m: Any, c: int, i: int, t: int) -> Any:
        booked = [
            (1 / p.rate[r], m.q[r, i, t]) for r in p.blocks[c] if (r, i, t) in m.q
        ]
        return at_most([*booked, (-min(1.0, levels[i] / full), m.e[c, i, t])], 0)

    def member(m: Any, r: int, t: int) -> Any:
        rates = [
            (1 / p.most_rps(r, t, level), m.q[r, i, t])
            for i, level in enumerate(levels)
        ]
        return at_most([*rates, (-1, m.a[r, t])], 0)

    m.c5_group = pyo.Constraint(list(m.e), rule=group)
    m.c5_rate = pyo.Constraint(p.served(), rule=member)


def c10_rules(m: Any, p: Index) -> None:
    """(C10) sum over R_m of a >= min_active, of a + y <= max_replicas   for all m, t;
    sum over R_g of a + y <= max_llms_per_gpu, <= 1 for LLMs apart; pins are there

    The nodes an LLM may use, and closed GPUs, are in the candidates already.
    """
    llms = p.problem.fleet.llms

    def least(m: Any, k: int, t: int) -> Any:
        # An LLM without candidates still gets its row, 0 >= min_active.
        pairs = [(1, m.a[r, t]) for r in p.of[k]] or [(0, m.used[0, t])]
        return at_least(pairs, llms[k].min_active)

    def most(m: Any, k: int, t: int) -> Any:
        pairs = [(1, x) for r in p.of[k] for x in m.x[r, t]]
        return at_most(pairs, llms[k].max_replicas)

    m.c10 = pyo.Constraint([k for k in p.M if llms[k].min_active], p.T, rule=least)
    bounded = [k for k in p.M if llms[k].max_replicas is not None]
    m.c10_most = pyo.Constraint(bounded, p.T, rule=most)
    rules = p.problem.fleet.rules

    def per_gpu(m: Any, g: int, t: int) -> Any:
        there = [(1, x) for r in p.on[g] for x in m.x[r, t]]
        return at_most(there, rules.max_llms_per_gpu)

    def apart(m: Any, i: int, g: int, t: int) -> Any:
        pair = rules.apart[i]
        there = [
            (1, x) for r in p.on[g] if p.replicas[r][0].llm in pair for x in m.x[r, t]
        ]
        return at_most(there, 1)

    def pinned(m: Any, i: int, t: int) -> Any:
        pin = rules.held[i]
        there = [
            (1, chosen[r, t])
            for r in p.R
            for state, chosen in (("ACTIVE", m.a), ("WARM", m.y))
            if (p.replicas[r][0].llm, p.replicas[r][1]) == (pin.llm, pin.gpus)
            and pin.state in (None, state)
        ]
        return at_least(there or [(0, m.used[0, t])], 1)

    if rules.max_llms_per_gpu is not None:
        m.c10_gpu = pyo.Constraint(p.G, p.T, rule=per_gpu)
    m.c10_apart = pyo.Constraint(range(len(rules.apart)), p.G, p.T, rule=apart)
    m.c10_held = pyo.Constraint(range(len(rules.held)), p.T, rule=pinned)


def o1_unserved(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O1) sum of lost, each at omega D unserved_s"""
    return [(p.lost_cost[k], lost) for (k, _), lost in m.lost.items()], 0.0


def o2_cold_starts(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O2) sum of pi omega loss miss, after the best activation of each scenario:
    z <= y;   sum over R_g of z + a <= used;
    miss + sum over R_m of min(u, need) (a + z) >= need
    """

    def needs_warm(m: Any, s: int, r: int, t: int) -> Any:
        return at_most([(1, m.z[s, r, t]), (-1, m.y[r, t])], 0)

    def whole_set(m: Any, s: int, g: int, t: int) -> Any:
        pairs = [(1, m.z[s, r, t]) for r in p.on[g] if (s, r, t) in m.z]
        if not pairs:
            return pyo.Constraint.Skip
        if p.sharing is None:
            pairs += [(1, m.a[r, t]) for r in p.on[g]]
        else:
            pairs += [(1, m.busy[c, s, t]) for c in p.blocks_on[g]]
        return at_most([*pairs, (-1, m.used[g, t])], 0)

    def cover(m: Any, s: int, k: int, t: int) -> Any:
        need = p.need[t][s][1][k]
        pairs: Pairs = [(1, m.miss[s, k, t])]
        for r in p.of[k]:
            counts = min(p.instances[r], need)
            serves = m.a[r, t] if p.sharing is None else m.turn[s, r, t]
            pairs += [(counts, serves), (counts, m.z[s, r, t])]
        return at_least(pairs, need)

    scenarios = [(s, t) for t in p.T for s in range(len(p.need[t]))]
    m.o2_warm = pyo.Constraint(list(m.z), rule=needs_warm)
    m.o2_gpus = pyo.Constraint(
        [(s, g, t) for s, t in scenarios for g in p.G], rule=whole_set
    )
    m.o2_cover = pyo.Constraint(list(m.miss), rule=cover)
    if p.sharing is not None:
        _turns(m, p, scenarios, lends=p.sharing.idle_lends)
    missing = [
        (p.need[t][s][0] * p.miss_cost[k], miss) for (s, k, t), miss in m.miss.items()
    ]
    return [*missing, *m.cold_loss], 0.0


def _turns(
    m: Any, p: Index, scenarios: Sequence[tuple[int, int]], *, lends: bool
) -> None:
    """Which members a group serves in each scenario, and whether it is busy then:
    turn <= a,   sum over R_C of phi turn <= 1,   busy >= a of members that are asked for
    """

    def serves(m: Any, s: int, r: int, t: int) -> Any:
        return at_most([(1, m.turn[s, r, t]), (-1, m.a[r, t])], 0)

    def whole(m: Any, c: int, s: int, t: int) -> Any:
        parts = [
            (p.part(r, s, t), m.turn[s, r, t])
            for r in p.blocks[c]
            if (s, r, t) in m.turn
        ]
        return at_most(parts, 1)

    def busy(m: Any, r: int, s: int, t: int) -> Any:
        if (r, t) not in m.a or s >= len(p.need[t]):
            return pyo.Constraint.Skip
        if lends and p.load[t][s][p.llm[r]] <= 0:
            return pyo.Constraint.Skip
        return at_most([(1, m.a[r, t]), (-1, m.busy[p.block[r], s, t])], 0)

    m.o2_turn = pyo.Constraint(list(m.turn), rule=serves)
    m.o2_whole = pyo.Constraint(list(m.busy), rule=whole)
    m.o2_busy = pyo.Constraint(
        [(r, s, t) for s, t in scenarios for r in p.R], rule=busy
    )


def _by_level(keys: Sequence[Key], levels: range) -> list[tuple[int, int, int]]:
    return [(r, i, t) for r, t in keys for i in levels]


def _rates(m: Any, p: Index, r: int, t: int) -> list[Any]:
    """q of r, at every level."""
    if p.sharing is None:
        return [m.q[r, t]]
    return [m.q[r, i, t] for i in range(len(p.sharing.levels))]


def o3_slowdown(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O3) sum of q, each at omega D d; by levels, d grows with the group's load"""
    if p.sharing is not None:
        levels = p.sharing.levels
        return [(p.slow_cost_at(r, levels[i]), q) for (r, i, _), q in m.q.items()], 0.0
    return [(p.slow_cost[r], q) for (r, _), q in m.q.items()], 0.0


def o4_switching(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O4) price of what loads and of what stops being ACTIVE, with x = a + y:
    x where not resident before and 1 - a where ACTIVE before, in the first epoch;
    came >= x - x' and left >= a' - a after it; and that of any change
    """
    pairs, constant = _replans(m, p)
    constant += p.stopped * p.demote_cost
    for r in p.R:
        if not p.resident_before[r]:
            pairs += [(p.load_cost[r], x) for x in m.x[r, 0]]
        if p.active_before[r]:
            pairs.append((-p.demote_cost, m.a[r, 0]))
            constant += p.demote_cost

    def loads(m: Any, r: int, t: int) -> Any:
        held = [(-1, x) for x in m.x[r, t]] + [(1, x) for x in m.x[r, t - 1]]
        return at_least([(1, m.came[r, t]), *held], 0)

    def stops(m: Any, r: int, t: int) -> Any:
        served = [(1, m.a[r, t]), (-1, m.a[r, t - 1])]
        return at_least([(1, m.left[r, t]), *served], 0)

    m.o4_came = pyo.Constraint(list(m.came), rule=loads)
    m.o4_left = pyo.Constraint(list(m.left), rule=stops)
    pairs += [(p.load_cost[r], came) for (r, _), came in m.came.items()]
    pairs += [(p.demote_cost, left) for left in m.left.values()]
    return [*pairs, *m.long_loads], constant


def _replans(m: Any, p: Index) -> tuple[Pairs, float]:
    """change >= |x - x'| and |a - a'| for all r, if a change as such has a price"""
    price = p.problem.prices.replan_s
    if price <= 0:
        return [], 0.0
    m.change = pyo.Var(p.T, bounds=(0, 1))
    if p.gone:
        m.change[0].setlb(1)
    was = {(r, True): float(v) for r, v in enumerate(p.active_before)}
    was |= {(r, False): float(v) for r, v in enumerate(p.resident_before)}

    def differs(m: Any, r: int, t: int, active: bool, sign: int) -> Any:
        now = [m.a[r, t]] if active else m.x[r, t]
        pairs = [(sign, v) for v in now] + [(-1, m.change[t])]
        if t == 0:
            return at_most(pairs, sign * was[r, active])
        then = [m.a[r, t - 1]] if active else m.x[r, t - 1]
        return at_most([*pairs, *((-sign, v) for v in then)], 0)

    m.o4_change = pyo.Constraint(p.R, p.T, (True, False), (1, -1), rule=differs)
    return [(price, change) for change in m.change.values()], 0.0


def o5_gpu_hours(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O5) sum of rent used; (C1), (C3) and (C4) tie used to what a GPU holds"""
    return [(p.rent[g], used) for (g, _), used in m.used.items()], 0.0
