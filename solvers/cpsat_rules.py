"""Rows of the CP-SAT model that an operator may ask for: (C6) to (C9).

As in `foreserve.solvers.milp_rules`, with the same letters; seconds are whole millionths.
"""

from __future__ import annotations

from typing import Any

from foreserve.solvers.index import Index

MICRO = 10**6
Terms = list[tuple[float, Any]]
"""A linear sum of costs: (seconds of delay per unit, variable)."""


def came(m: Any, p: Index, r: int, t: int) -> list[Any]:
    """The load of r at the start of epoch t: literals of which one is true if it comes."""
    if t > 0:
        return [m.came[r, t]]
    return [] if p.resident_before[r] else list(m.x[r, 0])


def c6_host_ram(m: Any, p: Index) -> tuple[Terms, float]:
    """(C6) sum_m W h <= host; what it costs that LLMs are not there"""
    m.h = {key: m.new_bool_var(f"h{key}") for key in p.keeping()}
    terms: Terms = []
    if not m.h:
        return terms, 0.0
    fleet = p.problem.fleet
    for node in fleet.cluster.nodes:
        for t in p.T:
            kept = sum(
                fleet.stored_bytes[fleet.llms[k].name] * h
                for (n, k, epoch), h in m.h.items()
                if (n, epoch) == (node.name, t)
            )
            m.add(kept <= node.host_ram_bytes)
    for (s, k, t), miss in m.miss.items():
        if p.cold_cost[k] > 0:
            need = p.need[t][s][1][k]
            cold = m.new_int_var(0, need, f"cold{s, k, t}")
            m.add(cold >= miss - need * sum(m.h[n, k, t] for n in p.nodes_of[k]))
            terms.append((p.need[t][s][0] * p.cold_cost[k], cold))
    for r in p.R:
        cost, place = p.storage_cost[r], (p.node[r], p.llm[r])
        if cost <= 0:
            continue
        if place not in p.kept_before:
            terms += [(cost, x) for x in came(m, p, r, 0)]
        for t in p.T:
            if t > 0:
                slow = m.new_bool_var(f"slow{r, t}")
                m.add_bool_or([slow, ~m.came[r, t], m.h[*place, t - 1]])
                terms.append((cost, slow))
    return terms, 0.0


def c7_load_bandwidth(m: Any, p: Index) -> None:
    """(C7) seconds of loading on each GPU's link, each node's link and storage <= window"""
    fleet = p.problem.fleet
    if fleet.rules.load_window_s is None:
        return
    window = round(fleet.rules.load_window_s * MICRO)
    for t in p.T:
        for g in p.G:
            loads = [
                round(p.replicas[r][0].moving_s * MICRO) * x
                for r in p.on[g]
                for x in came(m, p, r, t)
            ]
            m.add(sum(loads) <= window)
        for node in fleet.cluster.nodes:
            loads = [
                round(fleet.host_link_s(p.replicas[r][0], node.name) * MICRO) * x
                for r in p.R
                if p.node[r] == node.name
                for x in came(m, p, r, t)
            ]
            m.add(sum(loads) <= window)
            if fleet.loading.host_cache not in ("all", "lru"):
                m.add(_reads(m, p, node.name, t) <= window)


def _reads(m: Any, p: Index, n: str, t: int) -> Any:
    """Millionths of seconds that the storage of n is busy: read >= h - h', came - h'."""
    total = 0
    for k in p.M:
        if n not in p.nodes_of[k]:
            continue
        read = m.new_bool_var(f"read{n, k, t}")
        had = [m.h[n, k, t - 1]] if (n, k, t - 1) in m.h else []
        if not (t == 0 and (n, k) in p.kept_before):
            wanted = [m.h[n, k, t]] if (n, k, t) in m.h else []
            for r in p.of[k]:
                if p.node[r] == n:
                    wanted += came(m, p, r, t)
            for literal in wanted:
                m.add_bool_or([read, ~literal, *had])
        total += (
            round(p.problem.fleet.read_s(p.problem.fleet.llms[k].name, n) * MICRO)
            * read
        )
    return total


def c8_reachability(m: Any, p: Index) -> None:
    """(C8) an LLM that is ACTIVE before and asked for has a replica that goes on, or one
    on GPUs where none is ACTIVE before"""
    if not p.problem.fleet.rules.keep_serving:
        return
    for k in p.M:
        if p.serves_before[k] and p.demand[k][0] > 0:
            m.add_bool_or([m.a[r, 0] for r in p.of[k] if p.bridges[r]])
        for t in p.T:
            if t == 0 or p.demand[k][t] <= 0:
                continue
            bridges = []
            for r in p.of[k]:
                bridge = m.new_bool_var(f"bridge{r, t}")
                bridges.append(bridge)
                m.add_implication(bridge, m.a[r, t])
                for g in p.G:
                    for q in p.on[g] if r in p.on[g] else ():
                        if q != r:
                            m.add_bool_or([~bridge, ~m.a[q, t - 1]])
            for r in p.of[k]:
                m.add_bool_or([*bridges, ~m.a[r, t - 1]])


def c9_failure_domains(m: Any, p: Index) -> None:
    """(C9) sum over R_m outside each failure domain of a >= min_after_loss"""
    fleet = p.problem.fleet
    domain_of = fleet.cluster.domain_of
    for k in p.M:
        least = fleet.llms[k].min_after_loss
        for domain in dict.fromkeys(domain_of.values()) if least else ():
            for t in p.T:
                left = [m.a[r, t] for r in p.of[k] if domain_of[p.node[r]] != domain]
                m.add(sum(left) >= least)
