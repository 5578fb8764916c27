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
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import pyomo.environ as pyo
from pyomo.core.expr import LinearExpression

from foreserve.models.placement import ReplicaId
from foreserve.models.plan import Status
from foreserve.models.problem import Problem
from foreserve.solvers import highs
from foreserve.solvers.index import Index, Key, decode, encode, index
from foreserve.solvers.result import Schedule, Solved, SolveOptions, SolveReport

Pairs = list[tuple[float, Any]]
"""A linear sum: (coefficient, Pyomo variable)."""


def solve(
    problem: Problem, options: SolveOptions, start: Schedule | None = None
) -> Solved:
    """Build the model, let HiGHS search from ``start``, read its best answer."""
    began_s = perf_counter()
    p = index(problem)
    m = build(p)
    return _search(p, m, options, start, began_s)


def solve_with(
    problem: Problem, options: SolveOptions, replica: ReplicaId, epoch: int = 0
) -> Solved:
    """As `solve`, of schedules that hold ``replica`` in ``epoch``, in either state
    (WARM only where a scenario asks for its LLM: elsewhere that is worth nothing).

    INFEASIBLE where it is no candidate. Runs where it is called, and is not refereed.
    """
    began_s = perf_counter()
    p = index(problem)
    m = build(p)
    held = [
        x
        for r, (option, block) in enumerate(p.replicas)
        if (option.llm, block) == (replica.llm, replica.gpus)
        for x in m.x[r, epoch]
    ]
    if not held:
        report = SolveReport(status=Status.INFEASIBLE, solver="milp")
        return Solved(schedule=None, report=report)
    m.held = pyo.Constraint(expr=_at_least([(1, x) for x in held], 1))
    return _search(p, m, options, None, began_s)


def _search(
    p: Index, m: Any, options: SolveOptions, start: Schedule | None, began_s: float
) -> Solved:
    chosen = None if start is None else encode(p, start)
    hints = [] if chosen is None else _hints(m, *chosen)
    run = highs.run(m, options, hints, began_s)
    schedule = None
    if run.objective is not None:
        active = {key for key, a in m.a.items() if a.value > 0.5}
        warm = {key for key, y in m.y.items() if y.value > 0.5}
        schedule = decode(p, active, warm)
    report = SolveReport(
        status=run.status,
        solver="milp",
        objective=run.objective,
        bound=run.bound,
        time_to_first_s=run.time_to_first_s,
        progress=run.progress,
        message=run.message,
    )
    return Solved(schedule=schedule, report=report)


def _hints(m: Any, active: set[Key], warm: set[Key]) -> list[tuple[Any, float]]:
    """Values of all first-stage choices; HiGHS finds the rest, which they imply."""
    hints = [(a, float(key in active)) for key, a in m.a.items()]
    return hints + [(y, float(key in warm)) for key, y in m.y.items()]


def build(p: Index) -> pyo.ConcreteModel:
    """The Pyomo model: every label in turn, then the sum of the terms."""
    m = pyo.ConcreteModel()
    variables(m, p)
    for row in (c1_gpu_memory, c2_nesting, c3_equal_groups, c4_one_copy, c5_demand):
        row(m, p)
    c10_rules(m, p)
    pairs: Pairs = []
    constant = 0.0
    for term in (o1_unserved, o2_cold_starts, o3_slowdown, o4_switching, o5_gpu_hours):
        added, offset = term(m, p)
        pairs += added
        constant += offset
    m.cost = pyo.Objective(expr=_sum(pairs, constant))
    return m


def variables(m: Any, p: Index) -> None:
    every = [(r, t) for t in p.T for r in p.R]
    m.a = pyo.Var(every, domain=pyo.Binary)
    m.y = pyo.Var(p.prewarmable(), domain=pyo.Binary)
    m.used = pyo.Var([(g, t) for t in p.T for g in p.G], bounds=(0, 1))
    m.q = pyo.Var(p.served(), domain=pyo.NonNegativeReals)
    m.lost = pyo.Var(
        [(k, t) for t in p.T for k in p.M if p.demand[k][t] > 0],
        domain=pyo.NonNegativeReals,
    )
    exposed = p.exposed()
    m.miss = pyo.Var(exposed, domain=pyo.NonNegativeReals)
    m.z = pyo.Var(
        [(s, r, t) for s, k, t in exposed for r in p.of[k]], domain=pyo.Binary
    )
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
        return _at_most(pairs, 0)

    m.c1 = pyo.Constraint(p.G, p.T, rule=row)


def c2_nesting(m: Any, p: Index) -> None:
    """(C2) holds by construction: every candidate is on an aligned block of a node."""


def c3_equal_groups(m: Any, p: Index) -> None:
    """(C3) sum over R_g of a <= used   for all g, t: ACTIVE replicas share no GPU"""

    def row(m: Any, g: int, t: int) -> Any:
        return _at_most([(1, m.a[r, t]) for r in p.on[g]] + [(-1, m.used[g, t])], 0)

    m.c3 = pyo.Constraint(p.G, p.T, rule=row)


def c4_one_copy(m: Any, p: Index) -> None:
    """(C4) sum over R_g of m's a + y <= used   for all g, m, t"""

    def row(m: Any, g: int, k: int, t: int) -> Any:
        pairs = [(1, x) for r in p.on[g] if p.llm[r] == k for x in m.x[r, t]]
        return _at_most([*pairs, (-1, m.used[g, t])], 0)

    m.c4 = pyo.Constraint(p.G, p.M, p.T, rule=row)


def c5_demand(m: Any, p: Index) -> None:
    """(C5) sum over R_m of q + lost = lambda   and   q <= min(mu, lambda) a"""

    def all_of(m: Any, k: int, t: int) -> Any:
        pairs = [(1, m.q[r, t]) for r in p.of[k]] + [(1, m.lost[k, t])]
        return p.demand[k][t], _sum(pairs), p.demand[k][t]

    def each(m: Any, r: int, t: int) -> Any:
        most = min(p.rate[r], p.demand[p.llm[r]][t])
        return _at_most([(1, m.q[r, t]), (-most, m.a[r, t])], 0)

    m.c5 = pyo.Constraint(list(m.lost), rule=all_of)
    m.c5_rate = pyo.Constraint(list(m.q), rule=each)


def c10_rules(m: Any, p: Index) -> None:
    """(C10) sum over R_m of a >= min_active, of a + y <= max_replicas   for all m, t

    The nodes an LLM may use are in the candidates already.
    """
    llms = p.problem.fleet.llms

    def least(m: Any, k: int, t: int) -> Any:
        # An LLM without candidates still gets its row, 0 >= min_active.
        pairs = [(1, m.a[r, t]) for r in p.of[k]] or [(0, m.used[0, t])]
        return _at_least(pairs, llms[k].min_active)

    def most(m: Any, k: int, t: int) -> Any:
        pairs = [(1, x) for r in p.of[k] for x in m.x[r, t]]
        return _at_most(pairs, llms[k].max_replicas)

    m.c10 = pyo.Constraint([k for k in p.M if llms[k].min_active], p.T, rule=least)
    bounded = [k for k in p.M if llms[k].max_replicas is not None]
    m.c10_most = pyo.Constraint(bounded, p.T, rule=most)


def o1_unserved(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O1) sum of lost, each at omega D unserved_s"""
    return [(p.lost_cost[k], lost) for (k, _), lost in m.lost.items()], 0.0


def o2_cold_starts(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O2) sum of pi omega loss miss, after the best activation of each scenario:
    z <= y;   sum over R_g of z + a <= used;
    miss + sum over R_m of min(u, need) (a + z) >= need
    """

    def needs_warm(m: Any, s: int, r: int, t: int) -> Any:
        return _at_most([(1, m.z[s, r, t]), (-1, m.y[r, t])], 0)

    def whole_set(m: Any, s: int, g: int, t: int) -> Any:
        pairs = [(1, m.z[s, r, t]) for r in p.on[g] if (s, r, t) in m.z]
        if not pairs:
            return pyo.Constraint.Skip
        pairs += [(1, m.a[r, t]) for r in p.on[g]]
        return _at_most([*pairs, (-1, m.used[g, t])], 0)

    def cover(m: Any, s: int, k: int, t: int) -> Any:
        need = p.need[t][s][1][k]
        pairs: Pairs = [(1, m.miss[s, k, t])]
        for r in p.of[k]:
            counts = min(p.instances[r], need)
            pairs += [(counts, m.a[r, t]), (counts, m.z[s, r, t])]
        return _at_least(pairs, need)

    scenarios = [(s, t) for t in p.T for s in range(len(p.need[t]))]
    m.o2_warm = pyo.Constraint(list(m.z), rule=needs_warm)
    m.o2_gpus = pyo.Constraint(
        [(s, g, t) for s, t in scenarios for g in p.G], rule=whole_set
    )
    m.o2_cover = pyo.Constraint(list(m.miss), rule=cover)
    return [
        (p.need[t][s][0] * p.miss_cost[k], miss) for (s, k, t), miss in m.miss.items()
    ], 0.0


def o3_slowdown(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O3) sum of q, each at omega D d"""
    return [(p.slow_cost[r], q) for (r, _), q in m.q.items()], 0.0


def o4_switching(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O4) price of what loads and of what stops being ACTIVE, with x = a + y:
    x where not resident before and 1 - a where ACTIVE before, in the first epoch;
    came >= x - x' and left >= a' - a after it
    """
    pairs: Pairs = []
    constant = p.stopped * p.demote_cost
    for r in p.R:
        if not p.resident_before[r]:
            pairs += [(p.load_cost[r], x) for x in m.x[r, 0]]
        if p.active_before[r]:
            pairs.append((-p.demote_cost, m.a[r, 0]))
            constant += p.demote_cost

    def loads(m: Any, r: int, t: int) -> Any:
        held = [(-1, x) for x in m.x[r, t]] + [(1, x) for x in m.x[r, t - 1]]
        return _at_least([(1, m.came[r, t]), *held], 0)

    def stops(m: Any, r: int, t: int) -> Any:
        served = [(1, m.a[r, t]), (-1, m.a[r, t - 1])]
        return _at_least([(1, m.left[r, t]), *served], 0)

    m.o4_came = pyo.Constraint(list(m.came), rule=loads)
    m.o4_left = pyo.Constraint(list(m.left), rule=stops)
    pairs += [(p.load_cost[r], came) for (r, _), came in m.came.items()]
    pairs += [(p.demote_cost, left) for left in m.left.values()]
    return pairs, constant


def o5_gpu_hours(m: Any, p: Index) -> tuple[Pairs, float]:
    """(O5) sum of rent used; (C1), (C3) and (C4) tie used to what a GPU holds"""
    return [(p.rent[g], used) for (g, _), used in m.used.items()], 0.0


def _sum(pairs: Sequence[tuple[float, Any]], constant: float = 0.0) -> Any:
    return LinearExpression(
        constant=constant,
        linear_coefs=[coefficient for coefficient, _ in pairs],
        linear_vars=[variable for _, variable in pairs],
    )


def _at_most(pairs: Sequence[tuple[float, Any]], bound: float | None) -> Any:
    # Pyomo refuses rows without variables; none of ours says anything then.
    return (None, _sum(pairs), bound) if pairs else pyo.Constraint.Skip


def _at_least(pairs: Sequence[tuple[float, Any]], bound: float) -> Any:
    return bound, _sum(pairs), None
