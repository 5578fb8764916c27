"""Each row and each term of the formulation, on instances added up by hand.

GPUs hold 100 bytes and cost 1.0 per epoch of 100 s; a replica takes 30 bytes, 20 more
when ACTIVE, serves 1 request/s, loads in 2 s and counts as one instance.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from foreserve.models import referee
from foreserve.models.placement import Placement
from foreserve.models.problem import Prices
from tests.build import cluster, fleet, option
from tests.problems import placement, problem

AB = fleet(option("a"), option("b"))
PAIR = fleet(option("a"), option("a", 2, exec_s=0.6), option("b"), on=cluster(4))


def labels(problem_, *schedule: Placement) -> set[str]:
    return {v.label for v in referee.violations(problem_, schedule)}


def share(placement_: Placement, share_: float) -> Placement:
    """Give every ACTIVE replica this share of its LLM's traffic."""
    return Placement(
        replicas=tuple(
            replace(r, traffic_share=share_ if r.state == "ACTIVE" else 0.0)
            for r in placement_.replicas
        )
    )


def terms(problem_, *schedule: Placement) -> dict[str, float]:
    assert referee.violations(problem_, schedule) == ()
    return dict(referee.cost(problem_, schedule).terms)


def test_feasible_plan_breaks_nothing() -> None:
    """One ACTIVE with all traffic, one WARM beside it: 50 + 30 of 100 bytes."""
    p = problem(AB, [[0.5], [0.0]])
    plan = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/0", "WARM"))
    assert labels(p, share(plan, 1.0)) == set()


def test_c1_gpu_memory() -> None:
    """Residents of 30 + 30 + 30 bytes and the KV of one, 20, exceed 100 bytes."""
    three = fleet(option("a"), option("b"), option("c"))
    p = problem(three, [[0.0]] * 3)
    warm = [("b", "n0/0", "WARM"), ("c", "n0/0", "WARM")]
    assert labels(p, placement(("a", "n0/0", "WARM"), *warm)) == set()
    assert labels(p, placement(("a", "n0/0", "ACTIVE"), *warm)) == {"C1"}


def test_c2_nesting() -> None:
    """{0, 1} and {1, 2} overlap; {0, 1} and {1} are nested."""
    pair = fleet(option("a", 2), option("b", 2), option("c"), on=cluster(4))
    p = problem(pair, [[0.0]] * 3)
    a, b = ("a", "n0/0 n0/1", "WARM"), ("b", "n0/1 n0/2", "WARM")
    assert labels(p, placement(a, b)) == {"C2"}
    assert labels(p, placement(a, ("c", "n0/1", "WARM"))) == set()


def test_c3_equal_groups() -> None:
    """ACTIVE on {0, 1} and on {1} is forbidden; on one and the same GPU it is not."""
    p = problem(PAIR, [[0.0], [0.0]])
    b = ("b", "n0/1", "ACTIVE")
    assert labels(p, placement(("a", "n0/0 n0/1", "ACTIVE"), b)) == {"C3"}
    assert labels(p, placement(("a", "n0/1", "ACTIVE"), b)) == set()


def test_c4_one_copy() -> None:
    """One LLM at TP 2 and at TP 1 on the same GPU."""
    p = problem(PAIR, [[0.0], [0.0]])
    plan = placement(("a", "n0/0 n0/1", "WARM"), ("a", "n0/1", "WARM"))
    assert labels(p, plan) == {"C4"}


def test_c5_demand() -> None:
    """All of 1.5 requests/s on a replica that takes 1; shares over 1; traffic on WARM."""
    one = placement(("a", "n0/0", "ACTIVE"))
    two = placement(("a", "n0/0", "ACTIVE"), ("a", "n0/1", "ACTIVE"))
    assert labels(problem(AB, [[1.5], [0.0]]), share(one, 1.0)) == {"C5"}
    assert labels(problem(AB, [[1.5], [0.0]]), share(two, 0.5)) == set()
    assert labels(problem(AB, [[0.5], [0.0]]), share(two, 0.6)) == {"C5"}
    warm = replace(placement(("a", "n0/0", "WARM")).replicas[0], traffic_share=0.1)
    p = problem(AB, [[0.5], [0.0]])
    assert labels(p, Placement(replicas=(warm,))) == {"C5"}


def test_c5_group_is_shared() -> None:
    """Two ACTIVE replicas on one GPU share its rate: 0.6 + 0.6 of it is too much."""
    plan = share(placement(("a", "n0/0", "ACTIVE"), ("b", "n0/0", "ACTIVE")), 1.0)
    assert labels(problem(AB, [[0.6], [0.6]]), plan) == {"C5"}
    assert labels(problem(AB, [[0.6], [0.4]]), plan) == set()


@pytest.mark.parametrize(
    "rule", [{"min_active": 2}, {"max_replicas": 0}, {"nodes": ("n1",)}]
)
def test_c10_rules(rule: dict[str, object]) -> None:
    """One ACTIVE replica on n0, where two, none, or one on n1 were asked for."""
    ruled = fleet(option("a"), on=cluster(2, nodes=2), **rule)
    p = problem(ruled, [[0.0]])
    assert labels(p, placement(("a", "n0/0", "ACTIVE"))) == {"C10"}


@pytest.mark.parametrize(
    ("llm", "gpus"), [("a", "n0/9"), ("z", "n0/0"), ("b", "n0/0 n0/1"), ("a", "n7/0")]
)
def test_impossible_replicas(llm: str, gpus: str) -> None:
    """No such GPU, LLM, TP size or node: reported as such, not as a crash."""
    p = problem(PAIR, [[0.0], [0.0]])
    assert labels(p, placement((llm, gpus, "WARM"))) == {"plan"}


def test_replica_over_two_nodes_is_impossible() -> None:
    """TP never crosses a node."""
    two = fleet(option("a", 2), on=cluster(2, nodes=2))
    assert labels(problem(two, [[0.0]]), placement(("a", "n0/1 n1/0", "WARM"))) == {
        "plan"
    }


def test_one_placement_per_epoch() -> None:
    """A schedule that is too short is no plan."""
    assert labels(problem(AB, [[0.0, 0.0], [0.0, 0.0]]), Placement()) == {"plan"}


def test_o1_unserved() -> None:
    """0.5 requests/s for 100 s at 60 s each, of which 40 % are served: 1800 of 3000."""
    p = problem(AB, [[0.5], [0.0]])
    assert terms(p, Placement())["O1"] == pytest.approx(3000)
    plan = share(placement(("a", "n0/0", "ACTIVE")), 0.4)
    assert terms(p, plan)["O1"] == pytest.approx(1800)


def test_o2_cold_starts() -> None:
    """With 1/4, a peak of 16 asks for two instances at 10 s each: 5.0; each replica that
    is ACTIVE, or WARM where nothing is ACTIVE, saves 2.5."""
    p = problem(AB, [[0.0], [0.0]], [(0.25, [[16], [0]]), (0.75, [[0], [0]])])
    a, warm = ("a", "n0/0", "ACTIVE"), ("a", "n0/1", "WARM")
    assert terms(p, Placement())["O2"] == pytest.approx(5.0)
    assert terms(p, placement(a))["O2"] == pytest.approx(2.5)
    assert terms(p, placement(warm))["O2"] == pytest.approx(2.5)
    assert terms(p, placement(a, warm))["O2"] == pytest.approx(0.0)
    busy = placement(("b", "n0/1", "ACTIVE"), warm)
    assert terms(p, busy)["O2"] == pytest.approx(5.0)


def test_o2_bursts_that_coincide() -> None:
    """a and b WARM on one GPU: bursts that never meet are both covered, bursts that
    come together only one of the two."""
    both = placement(("a", "n0/0", "WARM"), ("b", "n0/0", "WARM"))
    apart = problem(AB, [[0.0], [0.0]], [(0.5, [[8], [0]]), (0.5, [[0], [8]])])
    together = problem(AB, [[0.0], [0.0]], [(0.5, [[8], [8]]), (0.5, [[0], [0]])])
    assert terms(apart, both)["O2"] == pytest.approx(0.0)
    assert terms(together, both)["O2"] == pytest.approx(5.0)


def test_o2_instances() -> None:
    """A WARM replica of concurrency 16 counts for two instances of 8."""
    large = fleet(option("a", concurrency=16))
    p = problem(large, [[0.0]], [(1.0, [[24]])])
    assert terms(p, placement(("a", "n0/0", "WARM")))["O2"] == pytest.approx(10.0)


def test_o3_slowdown() -> None:
    """TP 1 takes 1.0 s, TP 2 takes 0.6 s: 50 requests at TP 1 are 20 s slower."""
    p = problem(PAIR, [[0.5], [0.0]])
    tp1 = share(placement(("a", "n0/0", "ACTIVE")), 1.0)
    tp2 = share(placement(("a", "n0/0 n0/1", "ACTIVE")), 1.0)
    assert terms(p, tp1)["O3"] == pytest.approx(20.0)
    assert terms(p, tp2)["O3"] == pytest.approx(0.0)
    half = replace(p, prices=Prices(slower_s=0.5))
    assert terms(half, tp1)["O3"] == pytest.approx(10.0)


def test_o4_switching() -> None:
    """A load is 2.0, a stop 1.0; going from WARM to ACTIVE and dropping WARM are free."""
    before = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "WARM"))
    p = problem(AB, [[0.0], [0.0]], initial=before)
    assert terms(p, before)["O4"] == pytest.approx(0.0)
    turned = placement(("a", "n0/0", "WARM"), ("b", "n0/1", "ACTIVE"))
    assert terms(p, turned)["O4"] == pytest.approx(1.0)
    assert terms(p, placement(("a", "n0/1", "ACTIVE")))["O4"] == pytest.approx(3.0)
    assert terms(p, placement(("a", "n0/0", "ACTIVE")))["O4"] == pytest.approx(0.0)


def test_o5_gpu_hours() -> None:
    """3.60 dollars an hour for 100 s at 10 s of delay per dollar: 1.0 per GPU in use,
    however much is on it."""
    p = problem(AB, [[0.0], [0.0]])
    both = placement(("a", "n0/0", "WARM"), ("b", "n0/0", "WARM"))
    assert terms(p, both)["O5"] == pytest.approx(1.0)
    assert terms(p, placement(("a", "n0/0", "WARM"), ("b", "n0/1", "WARM")))[
        "O5"
    ] == pytest.approx(2.0)


def test_epochs_add_up() -> None:
    """Each epoch is priced from the placement of the one before, not from the first."""
    p = problem(AB, [[0.0, 0.0], [0.0, 0.0]])
    plan = placement(("a", "n0/0", "WARM"))
    cost = terms(p, plan, plan)
    assert cost["O4"] == pytest.approx(2.0)
    assert cost["O5"] == pytest.approx(2.0)
    assert referee.cost(p, (plan, plan)).total == pytest.approx(4.0)
