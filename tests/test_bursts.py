"""What groups serve in a burst, and what is left for WARM replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foreserve.models import bursts, referee
from foreserve.models.bursts import losses
from foreserve.models.problem import Problem
from foreserve.models.rules import Sharing
from tests.build import cluster, fleet, option
from tests.problems import placement, problem

SHARING = Sharing(most=4, booked_load=0.8, levels=(0.4, 0.8))


def shared(
    *peaks: tuple[float, list[list[float]]], llms: str = "ab", gpus: int = 2
) -> Problem:
    """LLMs whose instance is 8 requests; one that is missing costs 10, of b 30."""
    made = fleet(
        *(option(name, resident_bytes=10, kv_bytes=10) for name in llms),
        on=cluster(gpus),
    )
    served = tuple(
        replace(llm, cold_loss_s=30.0 if llm.name == "b" else 10.0) for llm in made.llms
    )
    return problem(
        replace(made, llms=served, sharing=SHARING), [[0.0]] * len(llms), peaks
    )


GROUP = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/0", "ACTIVE"))


def test_a_group_serves_those_that_fit_together() -> None:
    """3 and 5 requests of 8 take 3/8 + 5/8 of the group: nothing is missing. 4 and 6 take
    more than all of it: it serves b, which loses more, and a's instance is missing."""
    both = shared((0.5, [[3.0], [5.0]]), (0.5, [[4.0], [6.0]]))
    found = losses(both, 0, GROUP, by_llm=True, least=True)
    assert [loss.seconds for loss in found] == [0.0, 10.0]
    assert found[1].missing == {"a": 1, "b": 0}
    # Nobody who looks at members alone can tell that they do not fit together.
    assert found[1].least_s == 0.0
    assert referee.o2_cold_starts(both, 0, GROUP, GROUP) == 5.0


def test_who_is_not_served_goes_to_a_warm_replica() -> None:
    """With a copy of b elsewhere the group serves a, and the copy is started for b; a copy
    of a is as good. One on the group's own GPU is not."""
    busy = shared((1.0, [[8.0], [8.0]]))
    for llm, gpu, lost in (("b", "n0/1", 0.0), ("a", "n0/1", 0.0)):
        more = placement(
            ("a", "n0/0", "ACTIVE"), ("b", "n0/0", "ACTIVE"), (llm, gpu, "WARM")
        )
        assert losses(busy, 0, more)[0].seconds == lost
    three = shared((1.0, [[8.0], [8.0], [8.0]]), llms="abc")
    beside = placement(
        ("a", "n0/0", "ACTIVE"), ("b", "n0/0", "ACTIVE"), ("c", "n0/0", "WARM")
    )
    assert losses(three, 0, beside)[0].seconds == 20.0


def test_an_idle_group_lends_its_gpus() -> None:
    """Nobody asks for a or b, c has a burst: its copy beside them may be started, unless
    the rule is off."""
    idle = shared((1.0, [[0.0], [0.0], [8.0]]), llms="abc")
    beside = placement(
        ("a", "n0/0", "ACTIVE"), ("b", "n0/0", "ACTIVE"), ("c", "n0/0", "WARM")
    )
    assert losses(idle, 0, beside)[0].seconds == 0.0
    strict = replace(SHARING, idle_lends=False)
    keeps = replace(idle, fleet=replace(idle.fleet, sharing=strict))
    assert losses(keeps, 0, beside)[0].seconds == 10.0


def test_too_many_ways_are_never_understated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups, and no more than one way to look at: each is decided by itself, for the
    LLM that loses most, though the other group has that one too. The loss is that of
    something that can be done, and `least_s` is below the best."""
    peaks = (1.0, [[8.0], [8.0]])
    twice = placement(
        ("a", "n0/0", "ACTIVE"),
        ("b", "n0/0", "ACTIVE"),
        ("a", "n0/1", "ACTIVE"),
        ("b", "n0/1", "ACTIVE"),
    )
    best = losses(shared(peaks), 0, twice, least=True)[0]
    assert best.seconds == 0.0
    monkeypatch.setattr(bursts, "WAYS", 1)
    rough = losses(shared(peaks), 0, twice, least=True)[0]
    assert rough.seconds >= best.seconds
    assert rough.least_s <= best.seconds
