"""A problem as letters and numbers, and an answer back: shared by the exact solvers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from foreserve.models.placement import HostCopy, Placement, Replica, ReplicaId
from foreserve.models.problem import Fleet, Problem, ReplicaOption
from foreserve.models.rules import Sharing
from foreserve.models.specs import GpuId
from foreserve.solvers.result import Schedule
from foreserve.solvers.shares import with_shares

Key = tuple[int, int]

GREEDY_CANDIDATES = 4_000
"""More candidate replicas than this and greedy takes longer than it is worth: 0.5 s at
800, 43 s at 7,700."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Sets and data in the letters of docs/formulation.md.

    ``r`` is a candidate replica, ``g`` a GPU, ``m`` an LLM, ``t`` an epoch, ``s`` a
    scenario: all counted from 0. Scenarios that ask for the same instances are one.
    Costs are weighted seconds of delay per unit of their variable.
    """

    problem: Problem
    replicas: Sequence[tuple[ReplicaOption, tuple[GpuId, ...]]]
    R: range
    G: range
    M: range
    T: range
    on: Sequence[Sequence[int]]
    """R_g: replicas on GPU g."""
    of: Sequence[Sequence[int]]
    """R_m: replicas of LLM m."""
    llm: Sequence[int]
    """m of r."""
    instances: Sequence[int]
    """u_r: instances a replica counts for."""
    resident: Sequence[int]
    """w_r: bytes on each of its GPUs while resident."""
    kv: Sequence[int]
    """v_r: further bytes while ACTIVE."""
    usable: Sequence[int]
    """M_g: bytes."""
    demand: Sequence[Sequence[float]]
    """lambda[m][t], requests per second."""
    rate: Sequence[float]
    """mu_r."""
    need: Sequence[Sequence[tuple[float, tuple[int, ...]]]]
    """[t][s]: probability, and instances needed of each m."""
    load: Sequence[Sequence[tuple[float, ...]]]
    """L[t][s][m]: requests in flight; where groups may share GPUs, scenarios are one only
    if they agree in it."""
    resident_before: Sequence[bool]
    active_before: Sequence[bool]
    stopped: int
    """ACTIVE replicas before that are no candidates, so they stop whatever is planned."""
    gone: bool
    """Whether anything resident before is no candidate, so that it goes in any case."""
    lost_cost: Sequence[float]
    """[m] per request/s unserved (O1)."""
    miss_cost: Sequence[float]
    """[m] per missing instance (O2)."""
    slow_cost: Sequence[float]
    """[r] per request/s served (O3)."""
    load_cost: Sequence[float]
    """[r] per load (O4)."""
    demote_cost: float
    """Per ACTIVE replica that stops (O4)."""
    rent: Sequence[float]
    """[g] per GPU that holds anything (O5)."""
    sharing: Sharing | None
    blocks: Sequence[Sequence[int]]
    """R_C: replicas on block C."""
    block: Sequence[int]
    """C of r."""
    blocks_on: Sequence[Sequence[int]]
    """C that hold GPU g."""
    node: Sequence[str]
    """Of r."""
    nodes_of: Sequence[Sequence[str]]
    """Nodes that m may be on."""
    kept_before: Set[tuple[str, int]]
    """(node, m) in host memory."""
    cold_cost: Sequence[float]
    """[m] per missing instance while no node keeps the weights (C6)."""
    storage_cost: Sequence[float]
    """[r] per load that has to read storage (C6)."""
    serves_before: Sequence[bool]
    """[m]: it has an ACTIVE replica on GPUs that are there."""
    bridges: Sequence[bool]
    """[r]: it is ACTIVE before, or nothing is on its GPUs (C8)."""

    def keeping(self) -> list[tuple[str, int, int]]:
        """(node, m, t) that the plan may keep in host memory, if it decides that."""
        if self.problem.fleet.loading.host_cache != "planned":
            return []
        return [(n, m, t) for m in self.M for n in self.nodes_of[m] for t in self.T]

    def slow_cost_at(self, r: int, level: float) -> float:
        """Per request/s that r serves on a group at ``level`` (O3)."""
        option = self.replicas[r][0]
        llm = self.problem.fleet.llms[self.llm[r]]
        delay_s = self.problem.slower_s(option, 1 / (1 - level))
        return llm.weight * self.problem.epoch_s * delay_s

    def most_rps(self, r: int, t: int, level: float) -> float:
        """What r may be booked for on a group at ``level``: its part of the rate, the
        demand, what its KV reserve holds (C5)."""
        assert self.sharing is not None
        option = self.replicas[r][0]
        part = min(1.0, level / self.sharing.booked_load)
        held = option.held_tokens(1.0, 1 / (1 - level))
        room_rps = option.reserved_tokens / held if held > 0 else math.inf
        return min(self.rate[r] * part, self.demand[self.llm[r]][t], room_rps)

    def part(self, r: int, s: int, t: int) -> float:
        """phi: what r takes of its group when scenario s comes (O2)."""
        unit = self.problem.fleet.llms[self.llm[r]].instance_concurrency
        return min(1.0, self.load[t][s][self.llm[r]] / (self.instances[r] * unit))

    def served(self) -> list[Key]:
        """(r, t) whose LLM has demand."""
        return [
            (r, t) for t in self.T for r in self.R if self.demand[self.llm[r]][t] > 0
        ]

    def exposed(self) -> list[tuple[int, int, int]]:
        """(s, m, t) with a need."""
        return [
            (s, m, t)
            for t in self.T
            for s, (_, need) in enumerate(self.need[t])
            for m in self.M
            if need[m] > 0
        ]

    def prewarmable(self) -> list[Key]:
        """(r, t) where WARM may be worth something.

        In a single epoch that takes a scenario that needs the LLM, a pin, or a price of
        every change. With more epochs, a replica may also stay WARM to become ACTIVE
        later without a load.
        """
        needed = {(m, t) for _, m, t in self.exposed()}
        many = len(self.T) > 1
        stays = self.problem.prices.replan_s > 0
        held = {(h.llm, h.gpus) for h in self.problem.fleet.rules.held}
        return [
            (r, t)
            for t in self.T
            for r in self.R
            if many
            or (self.llm[r], t) in needed
            or (stays and self.resident_before[r])
            or (held and (self.replicas[r][0].llm, self.replicas[r][1]) in held)
        ]


def candidate_count(fleet: Fleet) -> int:
    """Candidate replicas on a cluster that every LLM may use all of."""
    nodes = Counter((node.gpu, node.gpus) for node in fleet.cluster.nodes)
    return sum(
        count * (gpus // option.tp)
        for option in fleet.options
        for (kind, gpus), count in nodes.items()
        if kind == option.gpu_type
    )


def compiles(problem: Problem, solver: str) -> bool:
    """Whether a solve may run compiled code, which the first one has to wait for."""
    count = candidate_count(problem.fleet)
    return solver == "scale" or count > (500 if solver == "auto" else GREEDY_CANDIDATES)


def index(problem: Problem) -> Index:
    fleet, prices = problem.fleet, problem.prices
    replicas = list(fleet.candidates())
    keys = [ReplicaId(llm=option.llm, gpus=block) for option, block in replicas]
    number = fleet.number_of
    llm = [number[option.llm] for option, _ in replicas]
    gpus = {gpu: g for g, gpu in enumerate(fleet.cluster.gpus)}
    on: list[list[int]] = [[] for _ in gpus]
    of: list[list[int]] = [[] for _ in fleet.llms]
    for r, (_, block) in enumerate(replicas):
        of[llm[r]].append(r)
        for gpu in block:
            on[gpus[gpu]].append(r)
    blocks: dict[tuple[GpuId, ...], list[int]] = {}
    for r, (_, gpu_ids) in enumerate(replicas):
        blocks.setdefault(gpu_ids, []).append(r)
    number_of = {gpu_ids: c for c, gpu_ids in enumerate(blocks)}
    before = problem.initial.by_id
    serving = {gpu for group in problem.initial.groups for gpu in group}
    active = {key for key, replica in before.items() if replica.state == "ACTIVE"}
    second = [m.weight * problem.epoch_s for m in fleet.llms]
    scenarios = [_distinct(problem, t) for t in range(problem.num_epochs)]
    return Index(
        problem=problem,
        replicas=replicas,
        R=range(len(replicas)),
        G=range(len(gpus)),
        M=range(len(fleet.llms)),
        T=range(problem.num_epochs),
        on=on,
        of=of,
        llm=llm,
        instances=[
            option.instances(fleet.llms[m].instance_concurrency)
            for (option, _), m in zip(replicas, llm, strict=True)
        ],
        resident=[option.resident_bytes for option, _ in replicas],
        kv=[option.active_bytes for option, _ in replicas],
        usable=[fleet.cluster.usable_bytes(gpu) for gpu in gpus],
        demand=problem.demand_rps,
        rate=[option.rate_rps for option, _ in replicas],
        need=[[(pi, need) for pi, need, _ in epoch] for epoch in scenarios],
        load=[[load for _, _, load in epoch] for epoch in scenarios],
        resident_before=[key in before for key in keys],
        active_before=[key in active for key in keys],
        stopped=len(active - set(keys)),
        gone=not set(before) <= set(keys),
        lost_cost=[s * m.unserved_s for s, m in zip(second, fleet.llms, strict=True)],
        miss_cost=[m.weight * m.cold_loss_s for m in fleet.llms],
        slow_cost=[
            second[m] * problem.slower_s(option)
            for (option, _), m in zip(replicas, llm, strict=True)
        ],
        load_cost=[prices.load_s * option.load_s for option, _ in replicas],
        demote_cost=prices.demote_s,
        rent=[
            fleet.cluster.type_of(gpu).price_usd_per_h
            * problem.epoch_s
            / 3600
            * prices.usd_s
            for gpu in gpus
        ],
        sharing=fleet.sharing,
        blocks=list(blocks.values()),
        block=[number_of[gpu_ids] for _, gpu_ids in replicas],
        blocks_on=[sorted({number_of[replicas[r][1]] for r in held}) for held in on],
        node=[gpu_ids[0].node for _, gpu_ids in replicas],
        nodes_of=[
            list(dict.fromkeys(replicas[r][1][0].node for r in own)) for own in of
        ],
        kept_before={
            (copy.node, number[copy.llm])
            for copy in problem.initial.hosted
            if copy.llm in number
        },
        cold_cost=[m.weight * m.storage_loss_s for m in fleet.llms],
        storage_cost=[
            prices.load_s * fleet.storage_s(option, gpu_ids[0].node)
            for option, gpu_ids in replicas
        ],
        serves_before=[
            any(
                all(map(fleet.cluster.has, replica.gpus))
                for replica in problem.initial.of(m.name, "ACTIVE")
            )
            for m in fleet.llms
        ],
        bridges=[key in active or serving.isdisjoint(key.gpus) for key in keys],
    )


def _distinct(
    problem: Problem, epoch: int
) -> list[tuple[float, tuple[int, ...], tuple[float, ...]]]:
    """Probability, needs and loads of the scenarios that differ."""
    merged: dict[object, tuple[float, tuple[int, ...], tuple[float, ...]]] = {}
    for s, probability in enumerate(problem.scenario_probability):
        need = tuple(problem.need(s, m, epoch) for m in range(len(problem.fleet.llms)))
        load = tuple(row[epoch] for row in problem.peak_load[s])
        key = need if problem.fleet.sharing is None else load
        known = merged[key][0] if key in merged else 0.0
        merged[key] = known + probability, need, load
    return [scenario for scenario in merged.values() if scenario[0]]


def decode(
    p: Index,
    active: Set[Key],
    warm: Set[Key],
    served_rps: Mapping[Key, float] | None = None,
    hosted: Set[tuple[str, int, int]] = frozenset(),
) -> Schedule:
    """The schedule in which these (r, t) are ACTIVE and WARM.

    The split of the demand is the best one (`with_shares`) unless ``served_rps`` gives
    the rates, as it has to where groups share GPUs. ``hosted``: (node, m, t) kept in host
    memory; what else fits there of what was, stays.
    """
    schedule = []
    had = p.problem.initial.hosted
    for t in p.T:
        replicas = []
        for r, (option, block) in enumerate(p.replicas):
            share, demand = 0.0, p.demand[p.llm[r]][t]
            if served_rps is not None and demand > 0:
                share = min(1.0, max(0.0, served_rps.get((r, t), 0.0) / demand))
            if (r, t) in active:
                replicas.append(
                    Replica(
                        llm=option.llm, gpus=block, state="ACTIVE", traffic_share=share
                    )
                )
            elif (r, t) in warm:
                replicas.append(Replica(llm=option.llm, gpus=block, state="WARM"))
        kept = tuple(
            HostCopy(node=node, llm=p.problem.fleet.llms[m].name)
            for node, m, epoch in sorted(hosted)
            if epoch == t
        )
        placement = Placement(
            replicas=tuple(replicas), hosted=stay(p.problem.fleet, kept, had)
        )
        had = placement.hosted
        if served_rps is None:
            placement = with_shares(p.problem, t, placement)
        schedule.append(placement)
    return tuple(schedule)


def stay(
    fleet: Fleet, kept: tuple[HostCopy, ...], had: tuple[HostCopy, ...]
) -> tuple[HostCopy, ...]:
    """``kept`` in host memory, and of what was there before whatever still fits."""
    if fleet.loading.host_cache != "planned":
        return ()
    room = {n.name: n.host_ram_bytes for n in fleet.cluster.nodes}
    chosen: list[HostCopy] = []
    for copy in (*kept, *had):
        if copy in chosen or (copy.node, copy.llm) not in fleet.places:
            continue
        if fleet.stored_bytes[copy.llm] <= room[copy.node]:
            room[copy.node] -= fleet.stored_bytes[copy.llm]
            chosen.append(copy)
    return tuple(chosen)


def encode(p: Index, schedule: Schedule) -> tuple[set[Key], set[Key]] | None:
    """(r, t) that are ACTIVE, and WARM; None where a replica is no candidate."""
    number = {
        ReplicaId(llm=option.llm, gpus=block): r
        for r, (option, block) in enumerate(p.replicas)
    }
    active: set[Key] = set()
    warm: set[Key] = set()
    for t, placement in enumerate(schedule):
        for replica in placement.replicas:
            if replica.id not in number:
                return None
            chosen = active if replica.state == "ACTIVE" else warm
            chosen.add((number[replica.id], t))
    return active, warm
