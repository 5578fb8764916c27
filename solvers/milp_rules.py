"""Rows of the MILP that an operator may ask for: (C6) to (C9).

Letters as in `foreserve.solvers.milp`, and

Data   host[n] bytes of host memory, W[m] bytes of an LLM there; window the time for loads
Vars   h[n,m,t] in {0,1}: node n keeps m in host memory, where the plan decides that;
       read[n,m,t] in [0,1]: it is read from storage; cold[s,m,t] >= 0: instances missing
       while no node keeps m; slow[r,t] >= 0: loads that have to read it, for t > 0;
       bridge[r,t] in [0,1]: r takes over without a break, for t > 0
s.t.   (C6) sum_m W h <= host;  cold >= miss - need sum_n h;
            slow >= came - h' where h' is that of the epoch before
       (C7) sum_{R_g} copy came <= window, and so for the links and storages of nodes;
            read >= h - h', read >= came - h'
       (C8) bridge <= a, bridge <= a' + 1 - (any ACTIVE on g)' for each of its GPUs;
            sum_{R_m} bridge >= a' for each of R_m
       (C9) sum over R_m outside a failure domain of a >= min_after_loss
"""

from __future__ import annotations

from typing import Any

import pyomo.environ as pyo

from foreserve.solvers.index import Index
from foreserve.solvers.rows import Pairs, at_least, at_most


def came(m: Any, p: Index, r: int, t: int) -> Pairs:
    """The load of r at the start of epoch t, as a linear sum that is 0 or 1."""
    if t > 0:
        return [(1, m.came[r, t])]
    return [] if p.resident_before[r] else [(1, x) for x in m.x[r, 0]]


def c6_host_ram(m: Any, p: Index) -> None:
    """(C6) sum_m W h <= host; what it costs that LLMs are not there: storage_loss for
    instances missing while no node keeps them (O2), and longer loads (O4)"""
    m.cold_loss, m.long_loads = Pairs(), Pairs()
    m.h = pyo.Var(p.keeping(), domain=pyo.Binary)
    if not p.keeping():
        return
    fleet = p.problem.fleet
    stored = [fleet.stored_bytes[llm.name] for llm in fleet.llms]
    scale = 2.0 ** (max(stored).bit_length() - 17)

    def room(m: Any, n: str, t: int) -> Any:
        kept = [(stored[k] / scale, m.h[n, k, t]) for k in p.M if (n, k, t) in m.h]
        return at_most(kept, fleet.cluster.node_by_name[n].host_ram_bytes / scale)

    m.c6 = pyo.Constraint([n.name for n in fleet.cluster.nodes], p.T, rule=room)
    exposed = [key for key in m.miss if p.cold_cost[key[1]] > 0]
    m.cold = pyo.Var(exposed, domain=pyo.NonNegativeReals)

    def somewhere(m: Any, s: int, k: int, t: int) -> Any:
        need = p.need[t][s][1][k]
        kept = [(need, m.h[n, k, t]) for n in p.nodes_of[k]]
        return at_least([(1, m.cold[s, k, t]), (-1, m.miss[s, k, t]), *kept], 0)

    m.c6_cold = pyo.Constraint(exposed, rule=somewhere)
    m.cold_loss += [
        (p.need[t][s][0] * p.cold_cost[k], cold) for (s, k, t), cold in m.cold.items()
    ]
    read = [(r, t) for r in p.R for t in p.T if t > 0 and p.storage_cost[r] > 0]
    m.slow = pyo.Var(read, domain=pyo.NonNegativeReals)

    def longer(m: Any, r: int, t: int) -> Any:
        kept = m.h[p.node[r], p.llm[r], t - 1]
        return at_least([(1, m.slow[r, t]), (-1, m.came[r, t]), (1, kept)], 0)

    m.c6_slow = pyo.Constraint(read, rule=longer)
    m.long_loads += [(p.storage_cost[r], slow) for (r, _), slow in m.slow.items()]
    for r in p.R:
        if p.storage_cost[r] > 0 and (p.node[r], p.llm[r]) not in p.kept_before:
            m.long_loads += [(p.storage_cost[r] * c, x) for c, x in came(m, p, r, 0)]


def c7_load_bandwidth(m: Any, p: Index) -> None:
    """(C7) seconds of loading on each GPU's link, each node's link and storage <= window"""
    fleet = p.problem.fleet
    window_s = fleet.rules.load_window_s
    if window_s is None:
        return
    nodes = [node.name for node in fleet.cluster.nodes]

    def gpu(m: Any, g: int, t: int) -> Any:
        loads = [
            (p.replicas[r][0].moving_s * c, v)
            for r in p.on[g]
            for c, v in came(m, p, r, t)
        ]
        return at_most(loads, window_s)

    def link(m: Any, n: str, t: int) -> Any:
        loads = [
            (fleet.host_link_s(p.replicas[r][0], n) * c, v)
            for r in p.R
            if p.node[r] == n
            for c, v in came(m, p, r, t)
        ]
        return at_most(loads, window_s)

    m.c7_gpu = pyo.Constraint(p.G, p.T, rule=gpu)
    m.c7_link = pyo.Constraint(nodes, p.T, rule=link)
    if fleet.loading.host_cache in ("all", "lru"):
        return
    places = [(n, k, t) for k in p.M for n in p.nodes_of[k] for t in p.T]
    m.read = pyo.Var(places, bounds=(0, 1))

    def before(m: Any, n: str, k: int, t: int) -> tuple[Pairs, float]:
        if (n, k, t - 1) in m.h:
            return [(1, m.h[n, k, t - 1])], 0.0
        return [], float(t == 0 and (n, k) in p.kept_before)

    def kept(m: Any, n: str, k: int, t: int) -> Any:
        if (n, k, t) not in m.h:
            return pyo.Constraint.Skip
        had, constant = before(m, n, k, t)
        return at_least([(1, m.read[n, k, t]), (-1, m.h[n, k, t]), *had], -constant)

    def loaded(m: Any, r: int, t: int) -> Any:
        n, k = p.node[r], p.llm[r]
        had, constant = before(m, n, k, t)
        loads = [(-c, v) for c, v in came(m, p, r, t)]
        return at_least([(1, m.read[n, k, t]), *loads, *had], -constant)

    def storage(m: Any, n: str, t: int) -> Any:
        reads = [
            (fleet.read_s(fleet.llms[k].name, n), m.read[n, k, t])
            for k in p.M
            if (n, k, t) in m.read
        ]
        return at_most(reads, window_s)

    m.c7_kept = pyo.Constraint(places, rule=kept)
    m.c7_read = pyo.Constraint(p.R, p.T, rule=loaded)
    m.c7_storage = pyo.Constraint(nodes, p.T, rule=storage)


def c8_reachability(m: Any, p: Index) -> None:
    """(C8) an LLM that is ACTIVE before and asked for has a replica that goes on, or one
    on GPUs where none is ACTIVE before"""
    if not p.problem.fleet.rules.keep_serving:
        return
    first = [k for k in p.M if p.serves_before[k] and p.demand[k][0] > 0]

    def bridged(m: Any, k: int) -> Any:
        bridges = [(1, m.a[r, 0]) for r in p.of[k] if p.bridges[r]]
        # An LLM without any still gets its row, 0 >= 1.
        return at_least(bridges or [(0, m.used[0, 0])], 1)

    m.c8_first = pyo.Constraint(first, rule=bridged)
    later = [(r, t) for t in p.T if t > 0 for r in p.R if p.demand[p.llm[r]][t] > 0]
    m.bridge = pyo.Var(later, bounds=(0, 1))

    def serves(m: Any, r: int, t: int) -> Any:
        return at_most([(1, m.bridge[r, t]), (-1, m.a[r, t])], 0)

    def free(m: Any, r: int, g: int, t: int) -> Any:
        if (r, t) not in m.bridge or r not in p.on[g]:
            return pyo.Constraint.Skip
        if p.sharing is None:
            others = [(1, m.a[q, t - 1]) for q in p.on[g] if q != r]
            return at_most([(1, m.bridge[r, t]), *others], 1)
        others = [(1, e) for e in m.groups_on[g, t - 1]]
        return at_most([(1, m.bridge[r, t]), (-1, m.a[r, t - 1]), *others], 1)

    def kept(m: Any, r: int, t: int) -> Any:
        bridges = [(1, m.bridge[q, t]) for q in p.of[p.llm[r]]]
        return at_least([*bridges, (-1, m.a[r, t - 1])], 0)

    epochs = [t for t in p.T if t > 0]
    m.c8 = pyo.Constraint(later, rule=serves)
    m.c8_free = pyo.Constraint(p.R, p.G, epochs, rule=free)
    m.c8_kept = pyo.Constraint(later, rule=kept)


def c9_failure_domains(m: Any, p: Index) -> None:
    """(C9) sum over R_m outside each failure domain of a >= min_after_loss"""
    fleet = p.problem.fleet
    asked = [k for k in p.M if fleet.llms[k].min_after_loss]
    domain_of = fleet.cluster.domain_of

    def left(m: Any, k: int, domain: str, t: int) -> Any:
        others = [(1, m.a[r, t]) for r in p.of[k] if domain_of[p.node[r]] != domain]
        return at_least(others or [(0, m.used[0, t])], fleet.llms[k].min_after_loss)

    domains = list(dict.fromkeys(domain_of.values()))
    m.c9 = pyo.Constraint(asked, domains, p.T, rule=left)
