"""Two plans side by side: what is elsewhere, in which state, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from foreserve.models.placement import Placement, Replica
from foreserve.models.plan import Epoch, Plan
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.models.transitions import Transition, transition

SHARE = 0.005
"""Traffic shares that differ by less are the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One replica that is different in the second plan."""

    kind: str
    """appears, leaves, moves, state or share."""
    llm: str
    gpus: str
    """In the second plan; in the first one where it leaves."""
    was: str
    now: str
    moved_bytes: int
    """Weights to load for it, on all of its GPUs."""
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochDiff:
    """A stretch of time in which neither plan changes its placement."""

    start_s: float
    end_s: float
    changes: tuple[Change, ...]
    costs: Mapping[str, tuple[float | None, float | None]]
    """Term by label, and total, of both plans' epochs; None without certificate."""
    transition: Transition
    """From the first plan's placement to the second's, were one to switch over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDiff:
    """All that is different; `same` says whether anything is."""

    fleet: tuple[str, ...]
    """How the fleets differ, in words."""
    epochs: tuple[EpochDiff, ...]
    spans: tuple[str, ...]
    """How the times differ that the plans are for, in words."""

    @property
    def same(self) -> bool:
        return not (
            self.fleet or self.spans or any(epoch.changes for epoch in self.epochs)
        )


def diff_plans(first: Plan, second: Plan) -> PlanDiff:
    """Differences of ``second`` against ``first``, on the time that both are for."""
    times = sorted(
        {
            t
            for plan in (first, second)
            for epoch in plan.epochs
            for t in (epoch.start_s, epoch.end_s)
        }
    )
    start_s = max(first.start_s, second.start_s)
    end_s = min(first.end_s, second.end_s)
    pieces = [(a, b) for a, b in pairwise(times) if start_s <= a and b <= end_s]
    return PlanDiff(
        fleet=tuple(_fleets(first.fleet, second.fleet)),
        epochs=tuple(
            _epoch(first, second, first.at(a), second.at(a), a, b) for a, b in pieces
        ),
        spans=tuple(_spans(first, second)),
    )


def _epoch(
    first: Plan, second: Plan, old: Epoch, new: Epoch, start_s: float, end_s: float
) -> EpochDiff:
    costs: dict[str, tuple[float | None, float | None]] = {}
    terms = [e.certificate.terms if e.certificate else {} for e in (old, new)]
    for label in sorted({*terms[0], *terms[1]}):
        costs[label] = (terms[0].get(label), terms[1].get(label))
    totals = [e.certificate.objective if e.certificate else None for e in (old, new)]
    costs["total"] = (totals[0], totals[1])
    demand = {row.llm: row.rate_rps for row in new.demand} or None
    return EpochDiff(
        start_s=start_s,
        end_s=end_s,
        changes=tuple(
            _changes(first.fleet, second.fleet, old.placement, new.placement)
        ),
        costs=costs,
        transition=transition(second.fleet, old.placement, new.placement, demand),
    )


def _changes(
    old_fleet: Fleet, new_fleet: Fleet, old: Placement, new: Placement
) -> Iterator[Change]:
    """In the order of the second placement, then what leaves."""
    gone = [r for r in old.replicas if r.id not in new.by_id]
    for replica in new.replicas:
        was = old.by_id.get(replica.id)
        if was is None:
            # The nearest thing to the same replica elsewhere: state and size, then LLM.
            source = min(
                (r for r in gone if r.llm == replica.llm),
                key=lambda r: (r.state != replica.state, r.tp != replica.tp),
                default=None,
            )
            if source is not None:
                gone.remove(source)
            yield _came(new_fleet, replica, source)
        elif was.state != replica.state:
            yield _stays("state", replica, was.state, replica.state)
        elif abs(was.traffic_share - replica.traffic_share) > SHARE:
            yield _stays(
                "share",
                replica,
                f"{was.traffic_share:.0%} of the traffic",
                f"{replica.traffic_share:.0%}",
            )
    for replica in gone:
        yield Change(
            kind="leaves",
            llm=replica.llm,
            gpus=block(replica.gpus),
            was=replica.state,
            now="",
            moved_bytes=0,
            load_s=0.0,
        )


def _came(fleet: Fleet, replica: Replica, source: Replica | None) -> Change:
    option = fleet.option_of(replica.llm, replica.gpus)
    return Change(
        kind="appears" if source is None else "moves",
        llm=replica.llm,
        gpus=block(replica.gpus),
        was="" if source is None else f"{source.state} on {block(source.gpus)}",
        now=replica.state,
        moved_bytes=option.shard_bytes * option.tp,
        load_s=option.load_s,
    )


def _stays(kind: str, replica: Replica, was: str, now: str) -> Change:
    return Change(
        kind=kind,
        llm=replica.llm,
        gpus=block(replica.gpus),
        was=was,
        now=now,
        moved_bytes=0,
        load_s=0.0,
    )


def block(gpus: tuple[GpuId, ...]) -> str:
    """``n0/3`` or ``n0/0-3``."""
    ordered = sorted(gpus)
    first, last = ordered[0].index, ordered[-1].index
    if last - first + 1 != len(ordered):
        return " ".join(map(str, ordered))
    return str(ordered[0]) if first == last else f"{ordered[0]}-{last}"


def _fleets(first: Fleet, second: Fleet) -> Iterator[str]:
    """Differences of two fleets, each in one line."""
    old_nodes, new_nodes = (f.cluster.node_by_name for f in (first, second))
    for name in sorted(old_nodes.keys() - new_nodes.keys()):
        node = old_nodes[name]
        yield f"node {name} ({node.gpus} {node.gpu}) is in the first only"
    for name in sorted(new_nodes.keys() - old_nodes.keys()):
        node = new_nodes[name]
        yield f"node {name} ({node.gpus} {node.gpu}) is in the second only"
    for name in sorted(old_nodes.keys() & new_nodes.keys()):
        if old_nodes[name] != new_nodes[name]:
            yield f"node {name} differs: {_fields(old_nodes[name], new_nodes[name])}"
    old_types, new_types = (f.cluster.type_by_name for f in (first, second))
    for name in sorted(old_types.keys() & new_types.keys()):
        if old_types[name] != new_types[name]:
            yield f"GPU type {name}: {_fields(old_types[name], new_types[name])}"
    old_share, new_share = (f.cluster.usable_fraction for f in (first, second))
    if old_share != new_share:
        yield f"usable_fraction: {old_share} and {new_share}"
    old_llms, new_llms = first.llm_by_name, second.llm_by_name
    for name in sorted(old_llms.keys() ^ new_llms.keys()):
        where = "first" if name in old_llms else "second"
        yield f"LLM {name} is in the {where} only"
    for name in sorted(old_llms.keys() & new_llms.keys()):
        if old_llms[name] != new_llms[name]:
            yield f"LLM {name}: {_fields(old_llms[name], new_llms[name])}"
        old_options, new_options = (
            {(o.gpu_type, o.tp): o for o in f.options if o.llm == name}
            for f in (first, second)
        )
        if old_options != new_options:
            yield f"LLM {name}: what its replicas take and give differs"
    rules = [
        replace(f, cluster=first.cluster, llms=(), options=()) for f in (first, second)
    ]
    if rules[0] != rules[1]:
        yield "rules of loading or serving differ"


def _fields(old: object, new: object) -> str:
    """Fields of two equal records that differ."""
    names = [name for name in old.__slots__ if not name.startswith("_")]  # type: ignore[attr-defined]
    return ", ".join(
        f"{name} {getattr(old, name)!r} and {getattr(new, name)!r}"
        for name in names
        if getattr(old, name) != getattr(new, name)
    )


def _spans(first: Plan, second: Plan) -> Iterator[str]:
    if (first.start_s, first.end_s) != (second.start_s, second.end_s):
        yield (
            f"the first is for {first.start_s:g} to {first.end_s:g} s, "
            f"the second for {second.start_s:g} to {second.end_s:g} s"
        )
    sizes = {e.end_s - e.start_s for plan in (first, second) for e in plan.epochs}
    if len(sizes) > 1:
        yield "epochs have different lengths; costs are those of whole epochs"
