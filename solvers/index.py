"""A problem as letters and numbers, and an answer back: shared by the exact solvers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from foreserve.models.placement import Placement, Replica, ReplicaId
from foreserve.models.problem import Fleet, Problem, ReplicaOption
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
    resident_before: Sequence[bool]
    active_before: Sequence[bool]
    stopped: int
    """ACTIVE replicas before that are no candidates, so they stop whatever is planned."""
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

        In a single epoch that takes a scenario that needs the LLM. With more epochs, a
        replica may also stay WARM to become ACTIVE later without a load.
        """
        needed = {(m, t) for _, m, t in self.exposed()}
        many = len(self.T) > 1
        return [
            (r, t) for t in self.T for r in self.R if many or (self.llm[r], t) in needed
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
    number = {llm.name: m for m, llm in enumerate(fleet.llms)}
    llm = [number[option.llm] for option, _ in replicas]
    gpus = {gpu: g for g, gpu in enumerate(fleet.cluster.gpus)}
    on: list[list[int]] = [[] for _ in gpus]
    of: list[list[int]] = [[] for _ in fleet.llms]
    for r, (_, block) in enumerate(replicas):
        of[llm[r]].append(r)
        for gpu in block:
            on[gpus[gpu]].append(r)
    before = problem.initial.by_id
    active = {key for key, replica in before.items() if replica.state == "ACTIVE"}
    second = [m.weight * problem.epoch_s for m in fleet.llms]
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
        need=[_distinct_needs(problem, t) for t in range(problem.num_epochs)],
        resident_before=[key in before for key in keys],
        active_before=[key in active for key in keys],
        stopped=len(active - set(keys)),
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
    )


def _distinct_needs(
    problem: Problem, epoch: int
) -> list[tuple[float, tuple[int, ...]]]:
    merged: dict[tuple[int, ...], float] = {}
    for s, probability in enumerate(problem.scenario_probability):
        need = tuple(problem.need(s, m, epoch) for m in range(len(problem.fleet.llms)))
        merged[need] = merged.get(need, 0.0) + probability
    return [(probability, need) for need, probability in merged.items() if probability]


def decode(p: Index, active: Set[Key], warm: Set[Key]) -> Schedule:
    """The schedule in which these (r, t) are ACTIVE and WARM."""
    schedule = []
    for t in p.T:
        replicas = []
        for r, (option, block) in enumerate(p.replicas):
            if (r, t) in active:
                replicas.append(Replica(llm=option.llm, gpus=block, state="ACTIVE"))
            elif (r, t) in warm:
                replicas.append(Replica(llm=option.llm, gpus=block, state="WARM"))
        placement = Placement(replicas=tuple(replicas))
        schedule.append(with_shares(p.problem, t, placement))
    return tuple(schedule)


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
