"""What is true now, as the cluster reports it: the controller never remembers better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from foreserve.models.placement import ReplicaId, replica_id
from foreserve.models.specs import GpuId

Phase = Literal["LOADING", "WARM", "ACTIVATING", "ACTIVE", "DRAINING"]
"""Where a resident replica is in its life. Weights count from LOADING on; the KV reserve
from ACTIVATING until the end of DRAINING, after which the replica is WARM."""

HOLDS_KV: frozenset[Phase] = frozenset({"ACTIVATING", "ACTIVE", "DRAINING"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedReplica:
    """One resident replica."""

    llm: str
    gpus: tuple[GpuId, ...]
    phase: Phase
    in_flight: int = 0
    """Requests it is working on."""
    idle_since_s: float | None = None
    """Since when it is ACTIVE without a request; None while it works or does not serve."""
    served_since_s: float | None = None
    """When it became ACTIVE last; None: not since it was loaded."""
    spare_bytes: int = 0
    """KV memory on each of its GPUs that it lends to others, or could lend now; it will be
    free for good only when it has drained."""

    @property
    def id(self) -> ReplicaId:
        return replica_id(self.llm, self.gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The cluster at one instant."""

    now_s: float
    replicas: tuple[ObservedReplica, ...] = ()
    waiting: Mapping[str, int] = field(default_factory=dict)
    """Requests per LLM that no replica has taken yet; LLMs without any may be absent."""
    unserved_since_s: Mapping[str, float] = field(default_factory=dict)
    """Of LLMs for which requests wait while no replica takes any: since when."""
    lost_gpus: frozenset[GpuId] = frozenset()
    """GPUs that are gone for now, with all that was on them."""
    busy: frozenset[ReplicaId] = frozenset()
    """Replicas that can take no action now: on their way out, or to be left alone for a
    while after a failure."""
