"""Why a placement is as it is: what binds, which LLM costs what, and why not elsewhere.

Everything here is a look at one placement. What needs another solve is in `what_if`, and
what holds where there is no placement at all in `conflict`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from foreserve.models import referee
from foreserve.models.bursts import instance_loss_s, losses
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import Placement, Replica, ReplicaId, State, diff
from foreserve.models.problem import Fleet, Problem
from foreserve.models.specs import ClusterSpec, GpuId

GIB = 2**30
BOOKED = 1 - 1e-6
"""Share of a rate from which on it counts as fully booked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLimit:
    """Memory of one GPU (C1)."""

    gpu: str
    held_bytes: int
    usable_bytes: int
    replicas: tuple[str, ...]
    """``llm STATE``, in canonical order."""
    least_bytes: int | None
    """The least that any LLM which is not there would take; None if all are there."""

    @property
    def free_bytes(self) -> int:
        return self.usable_bytes - self.held_bytes

    @property
    def binds(self) -> bool:
        """No further LLM fits."""
        return self.least_bytes is not None and self.least_bytes > self.free_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LlmLimit:
    """Demand (C5) and the operator's rules (C10) of one LLM."""

    llm: str
    demand_rps: float
    served_rps: float
    capacity_rps: float
    """What its ACTIVE replicas may be booked for."""
    active: int
    warm: int
    binds: tuple[str, ...]
    """Limits it has reached, with their numbers."""


def gpu_limits(fleet: Fleet, placement: Placement) -> tuple[GpuLimit, ...]:
    """One row for each GPU of the cluster."""
    found = []
    for node in fleet.cluster.nodes:
        sizes = {
            llm.name: min(
                (
                    option.resident_bytes
                    for option in fleet.options
                    if (option.llm, option.gpu_type) == (llm.name, node.gpu)
                    and option.tp <= node.gpus
                ),
                default=None,
            )
            for llm in fleet.llms
            if llm.nodes is None or node.name in llm.nodes
        }
        for gpu in node.gpu_ids():
            there = placement.by_gpu.get(gpu, ())
            absent = sizes.keys() - {replica.llm for replica in there}
            found.append(
                GpuLimit(
                    gpu=str(gpu),
                    held_bytes=sum(map(fleet.bytes_on_gpu, there)),
                    usable_bytes=fleet.cluster.usable_bytes(gpu),
                    replicas=tuple(f"{r.llm} {r.state}" for r in there),
                    least_bytes=min(
                        (size for llm in absent if (size := sizes[llm]) is not None),
                        default=None,
                    ),
                )
            )
    return tuple(found)


def llm_limits(
    fleet: Fleet, placement: Placement, demand_rps: Mapping[str, float]
) -> tuple[LlmLimit, ...]:
    """One row for each LLM; ``demand_rps`` by name, absent ones have none."""
    found = []
    for llm in fleet.llms:
        replicas, asked = placement.of(llm.name), demand_rps.get(llm.name, 0.0)
        active = placement.of(llm.name, "ACTIVE")
        served = asked * min(1.0, sum(r.traffic_share for r in active))
        capacity = sum(fleet.option_of(r.llm, r.gpus).rate_rps for r in active)
        binds = []
        if asked - served > (1 - BOOKED) * asked:
            binds.append(f"demand: {asked - served:.3g} of {asked:.3g}/s unserved")
        if active and asked > 0 and served >= BOOKED * capacity:
            binds.append(f"rate: all of {capacity:.3g}/s is booked")
        if llm.min_active and len(active) <= llm.min_active:
            binds.append(f"min_active: {llm.min_active}")
        if llm.max_replicas is not None and len(replicas) >= llm.max_replicas:
            binds.append(f"max_replicas: {llm.max_replicas}")
        if llm.nodes is not None:
            binds.append(f"nodes: only {', '.join(llm.nodes)}")
        found.append(
            LlmLimit(
                llm=llm.name,
                demand_rps=asked,
                served_rps=served,
                capacity_rps=capacity,
                active=len(active),
                warm=len(replicas) - len(active),
                binds=tuple(binds),
            )
        )
    return tuple(found)


def terms_by_llm(
    problem: Problem, epoch: int, before: Placement, placement: Placement
) -> Mapping[str, Mapping[str, float]]:
    """The referee's terms of an epoch, by LLM: sums over LLMs are the referee's numbers.

    (O2) by one best activation in each scenario; the price of a change as such (O4) in
    equal parts by its steps; the rent of a GPU (O5) by the bytes that its replicas hold.
    """
    fleet, prices = problem.fleet, problem.prices
    found = {llm.name: dict.fromkeys(referee.TERMS, 0.0) for llm in fleet.llms}
    for index, llm in enumerate(fleet.llms):
        # Of a problem in which nobody else asks for anything.
        rows = tuple(
            row if i == index else (0.0,) * len(row)
            for i, row in enumerate(problem.demand_rps)
        )
        alone = replace(problem, demand_rps=rows)
        found[llm.name]["O1"] = referee.o1_unserved(alone, epoch, before, placement)
    for name, delay_s in _slowdown(problem, epoch, placement):
        found[name]["O3"] += delay_s
    value = instance_loss_s(problem, placement)
    for probability, loss in zip(
        problem.scenario_probability,
        losses(problem, epoch, placement, by_llm=True),
        strict=True,
    ):
        for name, missing in loss.missing.items():
            found[name]["O2"] += probability * value[name] * missing
    hosted = {(copy.node, copy.llm) for copy in before.hosted}
    actions = diff(before, placement)
    # An LLM that is served no more is still stopped, at nobody's expense here.
    ours = [action for action in actions if action.llm in found]
    for action in ours:
        own = found[action.llm]
        own["O4"] += prices.replan_s / len(ours)
        if action.kind == "load":
            option, node = fleet.option_of(action.llm, action.gpus), action.gpus[0].node
            own["O4"] += prices.load_s * option.load_s
            if (node, action.llm) not in hosted:
                own["O4"] += prices.load_s * fleet.storage_s(option, node)
        elif action.kind == "demote":
            own["O4"] += prices.demote_s
    for gpu, replicas in placement.by_gpu.items():
        usd_per_h = fleet.cluster.type_of(gpu).price_usd_per_h
        rent = usd_per_h * problem.epoch_s / 3600 * problem.prices.usd_s
        held = {r.llm: fleet.bytes_on_gpu(r) for r in replicas}
        for name, num_bytes in held.items():
            found[name]["O5"] += rent * num_bytes / sum(held.values())
    return found


def _slowdown(
    problem: Problem, epoch: int, placement: Placement
) -> Iterator[tuple[str, float]]:
    """LLM and (O3) of each ACTIVE replica, at the load of its whole group."""
    fleet, sharing = problem.fleet, problem.fleet.sharing
    asked_rps = {
        llm.name: row[epoch]
        for llm, row in zip(fleet.llms, problem.demand_rps, strict=True)
    }
    for gpus, members in placement.groups.items():
        slowdown = 1.0
        if sharing is not None:
            load = referee.booked(problem, epoch, members) * sharing.booked_load
            slowdown = sharing.slowdown(load)
        for replica in members:
            delay_s = problem.slower_s(fleet.option_of(replica.llm, gpus), slowdown)
            requests = asked_rps[replica.llm] * problem.epoch_s * replica.traffic_share
            weight = fleet.llm_by_name[replica.llm].weight
            yield replica.llm, weight * requests * delay_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """A limit that keeps a replica from being somewhere in a state."""

    state: State
    label: str
    text: str


def parse_block(text: str, cluster: ClusterSpec) -> tuple[GpuId, ...]:
    """GPUs of ``n0/3`` or ``n0/0-3``."""
    first, _, last = text.partition("-") if "/" in text else ("", "", "")
    if "-" in text.rpartition("/")[0]:  # a node's name may hold dashes
        node, _, indices = text.rpartition("/")
        start, _, last = indices.partition("-")
        first = f"{node}/{start}"
    try:
        one = GpuId.parse(first)
        end = int(last) if last else one.index
    except ValueError:
        raise InvalidInput(f"block {text!r}: expected n0/3 or n0/0-3") from None
    gpus = tuple(GpuId(node=one.node, index=i) for i in range(one.index, end + 1))
    for gpu in gpus:
        if not cluster.has(gpu):
            raise InvalidInput(f"block {text!r}: the cluster has no GPU {gpu}")
    if not gpus:
        raise InvalidInput(f"block {text!r}: it ends before it begins")
    return gpus


def obstacles(
    fleet: Fleet, placement: Placement, key: ReplicaId
) -> tuple[Obstacle, ...]:
    """Why ``key`` cannot join ``placement`` as it is: all limits of each state, the
    plainest first. () for a state that is possible, or that it has already."""
    found: list[Obstacle] = []
    for state in ("ACTIVE", "WARM"):
        limits = chain(
            _never(fleet, key), _rules(fleet, placement, key, state),
            _beside(fleet, placement, key, state),
        )  # fmt: skip
        found += [Obstacle(state=state, label=k, text=text) for k, text in limits]
    return tuple(found)


def _never(fleet: Fleet, key: ReplicaId) -> Iterator[tuple[str, str]]:
    node = fleet.cluster.node_by_name[key.gpus[0].node]
    if fleet.option_on(key.llm, key.gpus) is None:
        sizes = sorted(
            o.tp for o in fleet.options if (o.llm, o.gpu_type) == (key.llm, node.gpu)
        )
        known = f"TP {', '.join(map(str, sizes))} do" if sizes else "no TP size does"
        yield "plan", f"TP {len(key.gpus)} does not hold its SLO on {node.gpu}; {known}"
    elif key.gpus not in node.blocks(len(key.gpus)):
        starts = f"multiples of {len(key.gpus)}"
        yield "C2", f"blocks of {len(key.gpus)} GPUs start at {starts}"


def _rules(
    fleet: Fleet, placement: Placement, key: ReplicaId, state: State
) -> Iterator[tuple[str, str]]:
    rules, there = fleet.rules, {gpu: placement.by_gpu.get(gpu, ()) for gpu in key.gpus}
    for held in rules.held:
        if (held.llm, held.gpus) == (key.llm, key.gpus) and held.state not in (
            None,
            state,
        ):
            yield "C10", f"it is held {held.state} there"
    for gpu, replicas in there.items():
        names = {replica.llm for replica in replicas} | {key.llm}
        if gpu in rules.closed:
            yield "C10", f"GPU {gpu} is closed"
        if rules.max_llms_per_gpu is not None and len(names) > rules.max_llms_per_gpu:
            yield "C10", f"GPU {gpu} holds max_llms_per_gpu={rules.max_llms_per_gpu}"
        for pair in rules.apart:
            if key.llm in pair and names.issuperset(pair):
                other = pair[1] if pair[0] == key.llm else pair[0]
                yield "C10", f"it lies apart from {other!r}, which is on GPU {gpu}"
    llm, node = fleet.llm_by_name[key.llm], key.gpus[0].node
    if llm.nodes is not None and node not in llm.nodes:
        yield "C10", f"its rule allows {', '.join(llm.nodes)}, not {node}"
    count = len(placement.of(key.llm))
    if (
        llm.max_replicas is not None
        and key not in placement.by_id
        and count >= llm.max_replicas
    ):
        yield "C10", f"max_replicas={llm.max_replicas}, it has {count}"


def _beside(
    fleet: Fleet, placement: Placement, key: ReplicaId, state: State
) -> Iterator[tuple[str, str]]:
    """Limits by what else is on these GPUs."""
    option = fleet.option_on(key.llm, key.gpus)
    group = [r for r in placement.groups.get(key.gpus, ()) if r.id != key]
    if state == "ACTIVE" and fleet.sharing and len(group) >= fleet.sharing.most:
        yield "C3", f"{len(group)} LLMs share these GPUs, most={fleet.sharing.most}"
    for gpu in key.gpus:
        others = [r for r in placement.by_gpu.get(gpu, ()) if r.id != key]
        for other in others:
            if other.llm == key.llm:
                yield "C4", f"{other.id} is {other.state} on GPU {gpu} already"
            elif state == other.state == "ACTIVE":
                if fleet.sharing is None:
                    yield "C3", f"{other.id} serves on GPU {gpu}"
                elif other.gpus != key.gpus:
                    yield "C3", f"{other.id} serves on another set with GPU {gpu}"
        if option is None:
            continue
        here = Replica(llm=key.llm, gpus=key.gpus, state=state)
        free = fleet.cluster.usable_bytes(gpu) - sum(map(fleet.bytes_on_gpu, others))
        if (needed := fleet.bytes_on_gpu(here)) > free:
            yield (
                "C1",
                f"GPU {gpu} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} are "
                "needed",
            )
