"""Which replica takes a request."""

from __future__ import annotations

from foreserve.models.observed import ObservedReplica, Phase
from foreserve.models.placement import ReplicaId
from foreserve.runtime.router import choose
from tests.build import gpu


def replica(index: int, in_flight: int, phase: Phase = "ACTIVE") -> ObservedReplica:
    return ObservedReplica(
        llm="a", gpus=(gpu(index),), phase=phase, in_flight=in_flight
    )


def pick(*replicas: ObservedReplica, cap: int = 4) -> ReplicaId | None:
    return choose(replicas, {r.id: cap for r in replicas})


def test_fewest_in_flight_then_id():
    """1 beats 2 in flight; of two with 1 the smaller id is taken, in whatever order."""
    busy, one, other = replica(0, 2), replica(1, 1), replica(2, 1)
    assert pick(busy, one, other) == pick(other, one, busy) == one.id


def test_full_replicas_take_none():
    """At its concurrency a replica takes no more, and each replica has its own."""
    a, b = replica(0, 4), replica(1, 4)
    assert pick(a, b) is None
    assert choose((a, b), {a.id: 4, b.id: 5}) == b.id


def test_only_active_replicas_serve():
    """An empty DRAINING, WARM, LOADING or ACTIVATING replica is passed over."""
    phases: tuple[Phase, ...] = ("DRAINING", "WARM", "LOADING", "ACTIVATING")
    others = [replica(i, 0, phase) for i, phase in enumerate(phases)]
    assert pick(*others) is None
    assert pick(*others, replica(9, 3)) == replica(9, 3).id
