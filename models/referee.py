"""The formulation as plain Python: is a plan feasible, and what does it cost?

Knows no solver. Each function named after a label of docs/formulation.md states that row
or term for a `Problem` and one `Placement` per epoch; MILP and CP-SAT carry functions of
the same names, and a test compares the sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from foreserve.models.bursts import losses
from foreserve.models.placement import Placement, Replica, ReplicaId, diff
from foreserve.models.problem import Fleet, Problem

SHARE_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A broken row: its label, the epoch, and what is wrong in the user's words."""

    label: str
    epoch: int
    message: str

    def __str__(self) -> str:
        return f"({self.label}) epoch {self.epoch}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Objective of a schedule by label, in weighted seconds of delay."""

    terms: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def violations(
    problem: Problem, schedule: Sequence[Placement]
) -> tuple[Violation, ...]:
    """Every broken row of ``schedule`` (one placement per epoch); () if feasible."""
    if len(schedule) != problem.num_epochs:
        message = f"{len(schedule)} placements for {problem.num_epochs} epochs"
        return (Violation(label="plan", epoch=0, message=message),)
    found = []
    before = problem.initial
    for epoch, placement in enumerate(schedule):
        messages = list(fleet_violations(problem.fleet, placement))
        # The rows below look replicas up; they mean nothing for impossible ones.
        if not messages:
            for label, row in MOVING_ROWS.items():
                texts = row(problem, epoch, before, placement)
                messages += [(label, text) for text in texts]
        found += [Violation(label=k, epoch=epoch, message=text) for k, text in messages]
        before = placement
    return tuple(found)


def fleet_violations(fleet: Fleet, placement: Placement) -> Iterator[tuple[str, str]]:
    """(label, message) of the rows of one placement: possible at all, `STATIC_ROWS`."""
    impossible = list(_possible(fleet, placement))
    if impossible:
        yield from (("plan", text) for text in impossible)
        return
    for label, row in STATIC_ROWS.items():
        yield from ((label, text) for text in row(fleet, placement))


def _possible(fleet: Fleet, placement: Placement) -> Iterator[str]:
    for replica in placement.replicas:
        for gpu in replica.gpus:
            if not fleet.cluster.has(gpu):
                yield f"{replica.id}: the cluster has no GPU {gpu}"
                return
        if replica.llm not in fleet.llm_by_name:
            yield f"{replica.id}: unknown LLM {replica.llm!r}"
        elif len({gpu.node for gpu in replica.gpus}) > 1:
            yield f"{replica.id}: its GPUs are on several nodes"
        elif fleet.option_on(replica.llm, replica.gpus) is None:
            yield f"{replica.id}: TP {replica.tp} is not possible there"


def c1_gpu_memory(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """Weights of all residents and KV of the ACTIVE ones fit each GPU."""
    for gpu, replicas in placement.by_gpu.items():
        held = sum(fleet.bytes_on_gpu(replica) for replica in replicas)
        usable = fleet.cluster.usable_bytes(gpu)
        if held > usable:
            yield f"GPU {gpu} holds {held} bytes, {usable} are usable"


def c2_nesting(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """GPU sets of two replicas are nested or disjoint."""
    for replicas in placement.by_gpu.values():
        for one, other in combinations(replicas, 2):
            a, b = set(one.gpus), set(other.gpus)
            if not (a <= b or b <= a):
                yield f"{one.id} and {other.id} overlap without being nested"


def c3_equal_groups(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """ACTIVE replicas that share a GPU share the whole set, and are not too many."""
    most = None if fleet.sharing is None else fleet.sharing.most
    for gpus, members in placement.groups.items():
        if most is not None and len(members) > most:
            yield f"{len(members)} LLMs are ACTIVE on {gpus[0]}x{len(gpus)}, most={most}"
    for replicas in placement.by_gpu.values():
        active = [r for r in replicas if r.state == "ACTIVE"]
        for one, other in combinations(active, 2):
            if set(one.gpus) != set(other.gpus):
                yield f"{one.id} and {other.id} are ACTIVE on different sets"


def c4_one_copy(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """No GPU holds two replicas of one LLM."""
    for gpu, replicas in placement.by_gpu.items():
        names = [replica.llm for replica in replicas]
        for name in {name for name in names if names.count(name) > 1}:
            yield f"GPU {gpu} holds {name!r} more than once"


def c5_demand(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> Iterator[str]:
    """Traffic shares sum to at most 1, and no GPU group is booked over its rate; with
    `Sharing`, not over its last level, nor a replica over what its KV reserve holds
    (Little's law: rate times latency times tokens)."""
    fleet, sharing = problem.fleet, problem.fleet.sharing
    for replica in placement.replicas:
        if replica.state == "WARM" and replica.traffic_share > 0:
            yield f"{replica.id} is WARM but has traffic"
    for llm in fleet.llms:
        shares = sum(replica.traffic_share for replica in placement.of(llm.name))
        if shares > 1 + SHARE_TOLERANCE:
            yield f"traffic shares of {llm.name!r} sum to {shares}"
    for gpus, members in placement.groups.items():
        load = booked(problem, epoch, members)
        most = 1.0 if sharing is None else sharing.most_booked
        if load > most + SHARE_TOLERANCE:
            names = ", ".join(sorted(map(str, gpus)))
            yield f"GPUs {names} are booked at {load:.3f} of their rate, {most:g} at most"
        if sharing is None:
            continue
        slowdown = sharing.slowdown(load * sharing.booked_load)
        for replica in members:
            option = fleet.option_of(replica.llm, gpus)
            held = option.held_tokens(problem.served_rps(replica, epoch), slowdown)
            room = option.reserved_tokens
            if held > room * (1 + SHARE_TOLERANCE):
                yield f"{replica.id}: {held:.0f} tokens in flight, KV for {room:.0f}"


def c6_host_ram(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """The weights that each node keeps in host memory fit there, and are of LLMs that
    may run on it."""
    held: dict[str, int] = {}
    for copy in placement.hosted:
        if copy.node not in fleet.cluster.node_by_name:
            yield f"the cluster has no node {copy.node!r}"
        elif copy.llm not in fleet.llm_by_name:
            yield f"unknown LLM {copy.llm!r} in the host memory of {copy.node}"
        elif (copy.node, copy.llm) not in fleet.places:
            yield f"{copy.llm!r} cannot run on {copy.node}, which keeps its weights"
        else:
            held[copy.node] = held.get(copy.node, 0) + fleet.stored_bytes[copy.llm]
    for name, num_bytes in held.items():
        room = fleet.cluster.node_by_name[name].host_ram_bytes
        if num_bytes > room:
            yield f"node {name} keeps {num_bytes} bytes in host memory, it has {room}"


def c7_load_bandwidth(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> Iterator[str]:
    """Loads are done within the window: each GPU's link, each node's link and storage
    one after another."""
    fleet = problem.fleet
    window_s = fleet.rules.load_window_s
    if window_s is None:
        return
    links: dict[str, float] = {}
    loads = [a.replica for a in diff(before, placement) if a.kind == "load"]
    for key in loads:
        option, node = fleet.option_of(key.llm, key.gpus), key.gpus[0].node
        for gpu in key.gpus:
            name = f"the link of GPU {gpu}"
            links[name] = links.get(name, 0.0) + option.moving_s
        name = f"the link of node {node}"
        links[name] = links.get(name, 0.0) + fleet.host_link_s(option, node)
    for node, llm in sorted(reads(fleet, before, placement, loads)):
        name = f"the storage of node {node}"
        links[name] = links.get(name, 0.0) + fleet.read_s(llm, node)
    for name, seconds in links.items():
        if seconds > window_s * (1 + SHARE_TOLERANCE):
            yield f"{name} is busy for {seconds:.1f} s, the window is {window_s:g} s"


def reads(
    fleet: Fleet, before: Placement, placement: Placement, loads: Sequence[ReplicaId]
) -> set[tuple[str, str]]:
    """(node, LLM) whose weights are read from storage: kept in host memory from now on,
    or loaded without having been there."""
    if fleet.loading.host_cache in ("all", "lru"):
        return set()
    had = {(copy.node, copy.llm) for copy in before.hosted}
    wanted = {(copy.node, copy.llm) for copy in placement.hosted}
    return (wanted | {(key.gpus[0].node, key.llm) for key in loads}) - had


def c8_reachability(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> Iterator[str]:
    """Where moves must not break service: an LLM that is ACTIVE before and asked for has
    a replica that goes on, or a new one on GPUs where none is ACTIVE before."""
    if not problem.fleet.rules.keep_serving:
        return
    serving = {gpu for gpus in before.groups for gpu in gpus}
    for index, llm in enumerate(problem.fleet.llms):
        old = {r.gpus for r in before.of(llm.name, "ACTIVE")}
        old = {gpus for gpus in old if all(map(problem.fleet.cluster.has, gpus))}
        if not old or problem.demand_rps[index][epoch] <= 0:
            continue
        new = {r.gpus for r in placement.of(llm.name, "ACTIVE")}
        if not any(gpus in old or serving.isdisjoint(gpus) for gpus in new):
            yield f"{llm.name!r} cannot move without a break"


def c9_failure_domains(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """Whichever failure domain is lost, enough ACTIVE replicas are left where asked."""
    domain_of = fleet.cluster.domain_of
    for llm in fleet.llms:
        if not llm.min_after_loss:
            continue
        active = placement.of(llm.name, "ACTIVE")
        for domain in dict.fromkeys(domain_of.values()):
            left = sum(domain_of[r.gpus[0].node] != domain for r in active)
            if left < llm.min_after_loss:
                yield (
                    f"{llm.name!r}: {left} ACTIVE without {domain!r}, "
                    f"min_after_loss is {llm.min_after_loss}"
                )


def c10_rules(fleet: Fleet, placement: Placement) -> Iterator[str]:
    """The operator's rules: nodes, least ACTIVE and most replicas per LLM."""
    for llm in fleet.llms:
        replicas = placement.of(llm.name)
        active = sum(replica.state == "ACTIVE" for replica in replicas)
        if active < llm.min_active:
            yield f"{llm.name!r}: {active} ACTIVE, min_active is {llm.min_active}"
        if llm.max_replicas is not None and len(replicas) > llm.max_replicas:
            yield f"{llm.name!r}: {len(replicas)} replicas, max is {llm.max_replicas}"
        for replica in replicas:
            if llm.nodes is not None and replica.gpus[0].node not in llm.nodes:
                yield f"{replica.id} is not on one of {', '.join(llm.nodes)}"
    rules = fleet.rules
    for held in rules.held:
        there = placement.by_id.get(ReplicaId(llm=held.llm, gpus=held.gpus))
        if there is None or held.state not in (None, there.state):
            state = held.state or "resident"
            yield f"{held.llm!r} is to be {state} on {held.gpus[0]}x{len(held.gpus)}"
    for gpu, replicas in placement.by_gpu.items():
        if gpu in rules.closed:
            yield f"GPU {gpu} is closed, but holds {replicas[0].llm!r}"
        if (
            rules.max_llms_per_gpu is not None
            and len(replicas) > rules.max_llms_per_gpu
        ):
            yield (
                f"GPU {gpu} holds {len(replicas)} LLMs, "
                f"max_llms_per_gpu is {rules.max_llms_per_gpu}"
            )
        names = {replica.llm for replica in replicas}
        for pair in rules.apart:
            if names.issuperset(pair):
                yield f"GPU {gpu} holds both {pair[0]!r} and {pair[1]!r}"


STATIC_ROWS: Mapping[str, Callable[[Fleet, Placement], Iterator[str]]] = {
    "C1": c1_gpu_memory,
    "C2": c2_nesting,
    "C3": c3_equal_groups,
    "C4": c4_one_copy,
    "C6": c6_host_ram,
    "C9": c9_failure_domains,
    "C10": c10_rules,
}

MOVING_ROWS: Mapping[
    str, Callable[[Problem, int, Placement, Placement], Iterator[str]]
] = {
    "C5": c5_demand,
    "C7": c7_load_bandwidth,
    "C8": c8_reachability,
}
"""Rows that need an epoch's demand, or the placement before."""


def cost(problem: Problem, schedule: Sequence[Placement]) -> Cost:
    """Objective of a feasible schedule (one placement per epoch), by label."""
    terms = dict.fromkeys(TERMS, 0.0)
    before = problem.initial
    for epoch, placement in enumerate(schedule):
        for label, term in TERMS.items():
            terms[label] += term(problem, epoch, before, placement)
        before = placement
    return Cost(terms=terms)


def o1_unserved(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Requests of the mean demand that no ACTIVE replica serves, times unserved_s."""
    total = 0.0
    for index, llm in enumerate(problem.fleet.llms):
        served = sum(r.traffic_share for r in placement.of(llm.name))
        unserved = max(0.0, 1.0 - served)
        requests = problem.demand_rps[index][epoch] * problem.epoch_s * unserved
        total += llm.weight * llm.unserved_s * requests
    return total


def o2_cold_starts(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Expected cold-start loss over the scenarios, after the best activation of each.

    In large placements, after one that is good: the loss is never understated."""
    found = losses(problem, epoch, placement)
    return sum(
        probability * loss.seconds
        for probability, loss in zip(problem.scenario_probability, found, strict=True)
    )


def overstated(problem: Problem, schedule: Sequence[Placement]) -> float:
    """The most by which (O2) of ``schedule`` is too high: 0 where activations are best."""
    total = 0.0
    for epoch, placement in enumerate(schedule):
        found = losses(problem, epoch, placement, least=True)
        total += sum(
            probability * (loss.seconds - loss.least_s)
            for probability, loss in zip(
                problem.scenario_probability, found, strict=True
            )
        )
    return total


def o3_slowdown(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Delay of served requests beyond the LLM's fastest option alone, priced: e_mk - e_m,
    and with `Sharing` e_mk / (1 - level) - e_m at the level of the group's load."""
    fleet, total = problem.fleet, 0.0
    for gpus, members in placement.groups.items():
        slowdown = 1.0
        if fleet.sharing is not None:
            load = booked(problem, epoch, members) * fleet.sharing.booked_load
            slowdown = fleet.sharing.slowdown(load)
        for replica in members:
            index = fleet.number_of[replica.llm]
            requests = problem.demand_rps[index][epoch] * problem.epoch_s
            delay_s = problem.slower_s(fleet.option_of(replica.llm, gpus), slowdown)
            weight = fleet.llms[index].weight
            total += weight * requests * replica.traffic_share * delay_s
    return total


def booked(problem: Problem, epoch: int, members: Sequence[Replica]) -> float:
    """Parts of their rates that the members of a group are booked for, summed."""
    fleet = problem.fleet
    return sum(
        problem.served_rps(r, epoch) / fleet.option_of(r.llm, r.gpus).rate_rps
        for r in members
    )


def o4_switching(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Seconds of loading and stopped replicas on the way from ``before``; and the change
    itself, if there is any."""
    prices, fleet, total = problem.prices, problem.fleet, 0.0
    hosted = {(copy.node, copy.llm) for copy in before.hosted}
    actions = diff(before, placement)
    for action in actions:
        if action.kind == "load":
            option, node = fleet.option_of(action.llm, action.gpus), action.gpus[0].node
            total += prices.load_s * option.load_s
            if (node, action.llm) not in hosted:
                total += prices.load_s * fleet.storage_s(option, node)
        elif action.kind == "demote":
            total += prices.demote_s
    return total + (prices.replan_s if actions else 0.0)


def o5_gpu_hours(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Price of the GPUs that hold anything, in seconds of delay."""
    usd_per_h = sum(
        problem.fleet.cluster.type_of(gpu).price_usd_per_h for gpu in placement.by_gpu
    )
    return usd_per_h * problem.epoch_s / 3600 * problem.prices.usd_s


TERMS: Mapping[str, Callable[[Problem, int, Placement, Placement], float]] = {
    "O1": o1_unserved,
    "O2": o2_cold_starts,
    "O3": o3_slowdown,
    "O4": o4_switching,
    "O5": o5_gpu_hours,
}
