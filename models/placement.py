"""Replicas, placements of them, and the actions that lead from one to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from foreserve.models.errors import InvalidInput
from foreserve.models.record import Record
from foreserve.models.specs import GpuId

State = Literal["ACTIVE", "WARM"]
"""ACTIVE serves; WARM holds weights only and can become ACTIVE in milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ReplicaId:
    """Which weights on which GPUs: what stays the same while the state changes."""

    llm: str
    gpus: tuple[GpuId, ...]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.llm, self.gpus)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        # As for `GpuId`: a copy in another process computes its own hash.
        return (replica_id, (self.llm, self.gpus))

    def __str__(self) -> str:
        return f"{self.llm}@{self.gpus[0]}x{len(self.gpus)}"


@lru_cache(maxsize=65_536)
def replica_id(llm: str, gpus: tuple[GpuId, ...]) -> ReplicaId:
    """The id of ``llm`` on ``gpus``; the same object each time, since ids are keys of
    everything that decides."""
    return ReplicaId(llm=llm, gpus=gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica(Record):
    """One LLM's weights on a set of GPUs of one node, and what they are for."""

    llm: str
    gpus: tuple[GpuId, ...]
    state: State
    traffic_share: float = 0.0
    """Share of the LLM's mean demand this replica is planned to serve; 0 when WARM."""

    def __post_init__(self) -> None:
        if not self.gpus:
            raise InvalidInput(f"replica of {self.llm!r}: no GPUs")
        if len(set(self.gpus)) < len(self.gpus):
            twice = next(g for g in self.gpus if self.gpus.count(g) > 1)
            raise InvalidInput(f"replica of {self.llm!r}: duplicate GPU {twice}")
        if not 0 <= self.traffic_share <= 1:
            raise InvalidInput(
                f"replica of {self.llm!r}: traffic_share={self.traffic_share}, "
                "expected 0..1"
            )

    @property
    def id(self) -> ReplicaId:
        return replica_id(self.llm, self.gpus)

    @property
    def tp(self) -> int:
        return len(self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HostCopy(Record):
    """Weights of an LLM in the pinned host memory of a node."""

    node: str
    llm: str


@dataclass(frozen=True, kw_only=True)
class Placement(Record):
    """A set of replicas, kept in canonical order (by GPUs, then LLM)."""

    replicas: tuple[Replica, ...] = ()
    hosted: tuple[HostCopy, ...] = ()
    """Empty unless the plan decides what host memory keeps (C6)."""

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.replicas, key=lambda r: (r.gpus, r.llm)))
        object.__setattr__(self, "replicas", ordered)
        object.__setattr__(self, "hosted", tuple(sorted(set(self.hosted))))
        if len(self.by_id) < len(ordered):
            raise InvalidInput("placement: the same LLM twice on the same GPUs")

    @cached_property
    def by_id(self) -> Mapping[ReplicaId, Replica]:
        return {replica.id: replica for replica in self.replicas}

    @cached_property
    def groups(self) -> Mapping[tuple[GpuId, ...], tuple[Replica, ...]]:
        """ACTIVE replicas by their GPUs: more than one where they share them."""
        found: dict[tuple[GpuId, ...], list[Replica]] = {}
        for replica in self.replicas:
            if replica.state == "ACTIVE":
                found.setdefault(replica.gpus, []).append(replica)
        return {gpus: tuple(replicas) for gpus, replicas in found.items()}

    @cached_property
    def by_gpu(self) -> Mapping[GpuId, tuple[Replica, ...]]:
        """Replicas on each GPU that holds any."""
        held: dict[GpuId, list[Replica]] = {}
        for replica in self.replicas:
            for gpu in replica.gpus:
                held.setdefault(gpu, []).append(replica)
        return {gpu: tuple(replicas) for gpu, replicas in sorted(held.items())}

    def without(self, lost_gpus: frozenset[GpuId]) -> Placement:
        """Those that touch none of ``lost_gpus``."""
        if lost_gpus.isdisjoint(self.by_gpu):
            return self
        kept = (r for r in self.replicas if lost_gpus.isdisjoint(r.gpus))
        return Placement(replicas=tuple(kept), hosted=self.hosted)

    def of(self, llm: str, state: State | None = None) -> tuple[Replica, ...]:
        """Replicas of ``llm``, in canonical order, optionally in one state only."""
        return tuple(
            r for r in self.replicas if r.llm == llm and state in (None, r.state)
        )


Kind = Literal["demote", "drop", "load", "activate"]
"""demote: stop admitting, finish what is in flight, end WARM; drop: free the weights;
load: bring the weights in, end WARM; activate: WARM to ACTIVE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action(Record):
    """One step on one replica."""

    kind: Kind
    llm: str
    gpus: tuple[GpuId, ...]

    @property
    def replica(self) -> ReplicaId:
        return replica_id(self.llm, self.gpus)


def diff(before: Placement, after: Placement) -> tuple[Action, ...]:
    """Steps from one placement to the next: demotes, drops, loads, activates.

    The referee prices exactly these (O4); the controller performs the same steps, each
    as soon as it is safe.
    """
    steps: dict[Kind, list[Action]] = {
        "demote": [],
        "drop": [],
        "load": [],
        "activate": [],
    }
    for key in _union(before, after):
        old, new = before.by_id.get(key), after.by_id.get(key)
        was_active = old is not None and old.state == "ACTIVE"
        is_active = new is not None and new.state == "ACTIVE"
        kinds: list[Kind] = []
        if was_active and not is_active:
            kinds.append("demote")
        if new is None:
            kinds.append("drop")
        if old is None:
            kinds.append("load")
        if is_active and not was_active:
            kinds.append("activate")
        for kind in kinds:
            steps[kind].append(Action(kind=kind, llm=key.llm, gpus=key.gpus))
    return tuple(action for actions in steps.values() for action in actions)


def _union(before: Placement, after: Placement) -> Iterable[ReplicaId]:
    return sorted({*before.by_id, *after.by_id}, key=lambda r: (r.gpus, r.llm))
