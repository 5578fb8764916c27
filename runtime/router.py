"""Which replica takes a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from foreserve.models.observed import Phase
from foreserve.models.placement import ReplicaId


class Routable(Protocol):
    """What the choice depends on (`ObservedReplica` is one)."""

    @property
    def id(self) -> ReplicaId: ...
    @property
    def phase(self) -> Phase: ...
    @property
    def in_flight(self) -> int: ...


def choose(
    replicas: Iterable[Routable], cap: Mapping[ReplicaId, int]
) -> ReplicaId | None:
    """The ACTIVE replica with the fewest requests in flight, ties by id; None if each
    has as many as its ``cap``. All ``replicas`` are of the request's LLM."""
    best: tuple[int, ReplicaId] | None = None
    for replica in replicas:
        if replica.phase != "ACTIVE" or replica.in_flight >= cap[replica.id]:
            continue
        if best is None or (replica.in_flight, replica.id) < best:
            best = (replica.in_flight, replica.id)
    return best[1] if best else None
