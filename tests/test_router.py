"""Which replica takes a request."""

from __future__ import annotations

from foreserve.runtime.router import NEVER, choose


def test_fewest_in_flight_then_first():
    """1 beats 2 in flight; of two with 1 the first is taken."""
    assert choose([2, 1, 1], [4, 4, 4], [99, 99, 99], 10) == 1


def test_full_replicas_take_none():
    """At its cap a replica takes no more, and each replica has its own."""
    assert choose([4, 4], [4, 4], [99, 99], 10) == -1
    assert choose([4, 4], [4, 5], [99, 99], 10) == 1


def test_only_those_with_room_take_it():
    """11 tokens pass over a cache of 10, however idle; where no cache holds them the
    answer is never, and where there is no replica it is not now."""
    assert choose([0, 3], [4, 4], [10, 11], 11) == 1
    assert choose([0, 4], [4, 4], [10, 11], 11) == -1
    assert choose([0, 3], [4, 4], [10, 10], 11) == NEVER
    assert choose([], [], [], 11) == -1
