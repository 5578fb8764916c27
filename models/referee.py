"""The formulation as plain Python: is a plan feasible, and what does it cost?

Knows no solver. Each function named after a label of docs/formulation.md states that row
or term for a `Problem` and one `Placement` per epoch; MILP and CP-SAT carry functions of
the same names, and a test compares the sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from foreserve.models.placement import Placement, diff
from foreserve.models.problem import Fleet, Problem
from foreserve.models.recourse import Spare, covered_at_most, covered_value
from foreserve.models.specs import GpuId

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
    for epoch, placement in enumerate(schedule):
        messages = list(fleet_violations(problem.fleet, placement))
        # The rows below look replicas up; they mean nothing for impossible ones.
        if not messages:
            messages = [("C5", text) for text in c5_demand(problem, epoch, placement)]
        found += [Violation(label=k, epoch=epoch, message=text) for k, text in messages]
    return tuple(found)


def fleet_violations(fleet: Fleet, placement: Placement) -> Iterator[tuple[str, str]]:
    """(label, message) of the rows that need no demand: possible at all, C1-C4, C10."""
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
    """ACTIVE replicas that share a GPU share the whole set."""
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


def c5_demand(problem: Problem, epoch: int, placement: Placement) -> Iterator[str]:
    """Traffic shares sum to at most 1, and no GPU group is booked over its rate."""
    booked: dict[frozenset[GpuId], float] = {}
    for index, llm in enumerate(problem.fleet.llms):
        shares = 0.0
        for replica in placement.of(llm.name):
            shares += replica.traffic_share
            if replica.state == "WARM" and replica.traffic_share > 0:
                yield f"{replica.id} is WARM but has traffic"
            option = problem.fleet.option_of(replica.llm, replica.gpus)
            load = problem.demand_rps[index][epoch] * replica.traffic_share
            group = frozenset(replica.gpus)
            booked[group] = booked.get(group, 0.0) + load / option.rate_rps
        if shares > 1 + SHARE_TOLERANCE:
            yield f"traffic shares of {llm.name!r} sum to {shares}"
    for group, load in booked.items():
        if load > 1 + SHARE_TOLERANCE:
            names = ", ".join(sorted(map(str, group)))
            yield f"GPUs {names} are booked at {load:.3f} of their rate"


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


STATIC_ROWS: Mapping[str, Callable[[Fleet, Placement], Iterator[str]]] = {
    "C1": c1_gpu_memory,
    "C2": c2_nesting,
    "C3": c3_equal_groups,
    "C4": c4_one_copy,
    "C10": c10_rules,
}


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
    spare, value, needs = _bursts(problem, epoch, placement)
    covered = covered_value(spare, value, needs)
    total = 0.0
    for probability, need, saved in zip(
        problem.scenario_probability, needs, covered, strict=True
    ):
        exposed = sum(value[name] * count for name, count in need.items())
        total += probability * (exposed - saved)
    return total


def overstated(problem: Problem, schedule: Sequence[Placement]) -> float:
    """The most by which (O2) of ``schedule`` is too high: 0 where activations are best."""
    total = 0.0
    for epoch, placement in enumerate(schedule):
        bursts = _bursts(problem, epoch, placement)
        pairs = zip(covered_at_most(*bursts), covered_value(*bursts), strict=True)
        total += sum(
            probability * (most - covered)
            for probability, (most, covered) in zip(
                problem.scenario_probability, pairs, strict=True
            )
        )
    return total


def _bursts(
    problem: Problem, epoch: int, placement: Placement
) -> tuple[list[Spare], dict[str, float], list[dict[str, int]]]:
    """WARM replicas that may be activated, what an instance of each LLM is worth, and the
    instances that each scenario asks for beyond the ACTIVE ones."""
    fleet = problem.fleet
    active_gpus = {g for r in placement.replicas if r.state == "ACTIVE" for g in r.gpus}
    ready = dict.fromkeys(fleet.llm_by_name, 0)
    spare: list[Spare] = []
    for replica in placement.replicas:
        unit = fleet.llm_by_name[replica.llm].instance_concurrency
        units = fleet.option_of(replica.llm, replica.gpus).instances(unit)
        if replica.state == "ACTIVE":
            ready[replica.llm] += units
        elif active_gpus.isdisjoint(replica.gpus):
            spare.append((replica.llm, replica.gpus, units))
    value = {llm.name: llm.weight * llm.cold_loss_s for llm in fleet.llms}
    needs = [
        {
            llm.name: max(0, problem.need(scenario, index, epoch) - ready[llm.name])
            for index, llm in enumerate(fleet.llms)
        }
        for scenario in range(len(problem.scenario_probability))
    ]
    return spare, value, needs


def o3_slowdown(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Delay of served requests beyond the LLM's fastest option (e_mk - e_m), priced."""
    total = 0.0
    for index, llm in enumerate(problem.fleet.llms):
        requests = problem.demand_rps[index][epoch] * problem.epoch_s
        for replica in placement.of(llm.name, "ACTIVE"):
            option = problem.fleet.option_of(replica.llm, replica.gpus)
            delay_s = problem.slower_s(option)
            total += llm.weight * requests * replica.traffic_share * delay_s
    return total


def o4_switching(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> float:
    """Seconds of loading and stopped replicas on the way from ``before``."""
    prices, total = problem.prices, 0.0
    for action in diff(before, placement):
        if action.kind == "load":
            option = problem.fleet.option_of(action.llm, action.gpus)
            total += prices.load_s * option.load_s
        elif action.kind == "demote":
            total += prices.demote_s
    return total


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
