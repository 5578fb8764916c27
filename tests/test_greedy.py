"""WarmServe's planner on its test vectors, and the greedy schedule built on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from foreserve.models import referee
from foreserve.models.placement import Placement, ReplicaId
from foreserve.models.plan import Status
from foreserve.models.specs import GpuId
from foreserve.solvers import greedy
from foreserve.solvers.board import Board
from foreserve.solvers.prewarm import Copy, Wanted, copies, place, scores
from foreserve.solvers.result import SolveOptions
from foreserve.solvers.shares import perfect_bound, with_shares
from tests.build import cluster, fleet, gpu, option
from tests.problems import placement, problem, realistic

GIB, PAGE = 2**30, 2**21
LLMS = {
    # bytes, TP
    "7B": (13_476_831_232, 1),
    "13B": (26_032_558_080, 2),
    "70B": (137_961_209_856, 4),
}
EIGHT = {"7B": (40, 100), "13B": (30, 70), "70B": (20, 45)}
OPTIONS = SolveOptions()


def prewarm(
    gpus: int,
    loads: Mapping[str, tuple[float, float]],
    running: Mapping[str, int],
    busy: int = 0,
    existing: list[Copy] | None = None,
) -> list[Copy]:
    """WarmServe's plan: 70 GiB per GPU, none on the first ``busy``, 32 GiB/s links."""
    node = cluster(gpus).nodes[0]
    free = {g: 0 if g.index < busy else 70 * GIB for g in node.gpu_ids()}
    wanted = []
    for llm, (mean, peak) in loads.items():
        size, tp = LLMS[llm]
        load_s = size / (tp * 32 * GIB)
        wanted.append(
            Wanted(
                llm=llm,
                resident_bytes=-(-(size // tp) // PAGE) * PAGE,
                blocks=node.blocks(tp),
                scores=scores(mean, peak, running.get(llm, 0), load_s),
            )
        )
    by_llm = {want.llm: want for want in wanted}
    for copy in existing or []:
        for g in copy.gpus:
            free[g] -= by_llm[copy.llm].resident_bytes
    ids = [ReplicaId(llm=copy.llm, gpus=copy.gpus) for copy in existing or []]
    return place(wanted, free, ids)


def rows(placed: list[Copy]) -> list[str]:
    return [
        f"{copy.llm} {copy.score:.3f} {copy.gpus[0].index}-{copy.gpus[-1].index} "
        f"{'master' if copy.master else 'low'} {copy.touched:.3f}"
        for copy in placed
    ]


V1 = """7B 20 40, 13B 10 40, 70B 5 20 on 4
70B 1.004 0-3 master 0.000
13B 0.919 0-1 low 1.004
7B 0.476 2-2 low 1.004
7B 0.392 3-3 low 1.004
13B 0.379 2-3 low 1.872"""
V2 = """8 GPUs
70B 1.370 0-3 master 0.000
70B 1.004 4-7 master 0.000
13B 0.633 4-5 low 1.004
7B 0.595 6-6 low 1.004
7B 0.463 7-7 low 1.004
13B 0.454 0-1 low 1.370
7B 0.392 2-2 low 1.370
13B 0.379 2-3 low 1.762
7B 0.305 4-4 low 1.637"""
V3 = """0-3 run a 70B
70B 2.259 4-7 master 0.000
13B 0.633 4-5 low 2.259
7B 0.595 6-6 low 2.259
7B 0.463 7-7 low 2.259
13B 0.454 6-7 low 3.316
7B 0.392 4-4 low 2.892
7B 0.305 5-5 low 2.892"""


@pytest.mark.parametrize(
    ("gpus", "loads", "running", "busy", "expected"),
    [
        (4, {"7B": (20, 40), "13B": (10, 40), "70B": (5, 20)}, {}, 0, V1),
        (8, EIGHT, {}, 0, V2),
        (8, EIGHT, {"70B": 1}, 4, V3),
    ],
    ids=["V1", "V2", "V3"],
)
def test_published_vectors(
    gpus: int,
    loads: Mapping[str, tuple[float, float]],
    running: Mapping[str, int],
    busy: int,
    expected: str,
) -> None:
    """Group, kind and sum of every copy as worked out twice independently; in V3 the
    last 13B finds no group without one; a second run on the result adds nothing."""
    placed = prewarm(gpus, loads, running, busy)
    assert rows(placed) == expected.splitlines()[1:]
    assert prewarm(gpus, loads, running, busy, existing=placed) == []


@pytest.mark.parametrize(("mean", "peak"), [(0, 0), (-3, -1), (0, -5)])
def test_no_load_no_copies(mean: float, peak: float) -> None:
    """No division by a mean of zero, no copies for a negative forecast."""
    assert copies(mean, peak, 0) == (0, 0)
    assert scores(mean, peak, 0, 1.0) == ()


def test_burst_without_mean() -> None:
    """A peak of 40 over a mean of 0 asks for two copies, scored as if the mean were 1."""
    assert scores(0, 40, 0, 0.5) == pytest.approx((20.0, 20.0 * np.exp(-0.5)))


def test_existing_replicas_take_the_first_scores() -> None:
    """Of two wanted copies one is there: the other one is placed at the second score."""
    want = Wanted(
        llm="a",
        resident_bytes=10,
        blocks=[(gpu(0),), (gpu(1),)],
        scores=(2.0, 1.0),
    )
    there = [ReplicaId(llm="a", gpus=(gpu(0),))]
    placed = place([want], {gpu(0): 90, gpu(1): 100}, there)
    assert [(copy.gpus, copy.score) for copy in placed] == [((gpu(1),), 1.0)]


def test_shares_fill_the_fastest_first() -> None:
    """1.5 requests/s: 1.0 on TP 2 (0.6 s each), the other third on TP 1 (1.0 s)."""
    pair = fleet(option("a"), option("a", 2, exec_s=0.6), on=cluster(4))
    p = problem(pair, [[1.5]])
    plan = placement(("a", "n0/0", "ACTIVE"), ("a", "n0/2 n0/3", "ACTIVE"))
    shares = [r.traffic_share for r in with_shares(p, 0, plan).replicas]
    assert shares == pytest.approx([1 / 3, 2 / 3])


def test_shares_refuse_what_costs_more_to_serve() -> None:
    """Where serving is 40 s slower than the best option and refusing costs 10 s, an
    ACTIVE replica gets no traffic."""
    slow = fleet(option("a", exec_s=40.6), option("a", 2, exec_s=0.6), unserved_s=10.0)
    p = problem(slow, [[0.5]])
    plan = with_shares(p, 0, placement(("a", "n0/0", "ACTIVE")))
    assert plan.replicas[0].traffic_share == 0.0


def test_keeps_what_still_pays() -> None:
    """Serving where it serves now costs no load; an idle replica whose rent (1.0) is
    below a load (2.0) elsewhere stays put."""
    before = placement(("a", "n0/1", "ACTIVE"))
    p = problem(fleet(option("a"), option("b")), [[0.5], [0.0]], initial=before)
    solved = greedy.solve(p, OPTIONS)
    assert solved.schedule is not None
    assert [str(r.id) for r in solved.schedule[0].replicas] == ["a@n0/1x1"]
    assert referee.cost(p, solved.schedule).terms["O4"] == 0.0


def test_prewarms_where_it_pays() -> None:
    """A burst of b costs 10 x 0.5; a WARM b costs its load (2.0) and, beside nothing
    else, the rent of a GPU (1.0)."""
    p = problem(
        fleet(option("a"), option("b")),
        [[0.5], [0.0]],
        [(0.5, [[0], [8]]), (0.5, [[0], [0]])],
    )
    solved = greedy.solve(p, OPTIONS)
    assert solved.schedule is not None
    states = {r.llm: r.state for r in solved.schedule[0].replicas}
    assert states == {"a": "ACTIVE", "b": "WARM"}
    assert referee.cost(p, solved.schedule).total == pytest.approx(2 + 2 + 2)
    rare = replace(p, scenario_probability=(0.1, 0.9))
    solved = greedy.solve(rare, OPTIONS)
    assert solved.schedule is not None
    assert [r.llm for r in solved.schedule[0].replicas] == ["a"]


def test_min_active_on_the_only_node_allowed() -> None:
    """b may use n0 only, a any node: each must serve, so a has to go to n1."""
    two = fleet(option("a"), option("b"), on=cluster(1, nodes=2), min_active=1)
    a, b = two.llms
    two = replace(two, llms=(a, replace(b, nodes=("n0",))))
    solved = greedy.solve(problem(two, [[0.0], [0.0]]), OPTIONS)
    assert solved.schedule is not None
    assert {str(r.id) for r in solved.schedule[0].replicas} == {"a@n1/0x1", "b@n0/0x1"}


@pytest.mark.parametrize(
    "rule",
    [
        {"min_active": 3},
        {"min_active": 2, "max_replicas": 1},
        {"min_active": 1, "nodes": ("n9",)},
    ],
)
def test_plainly_impossible_rules(rule: dict[str, object]) -> None:
    """Three ACTIVE on two GPUs, two of at most one, one on a node that is not there."""
    ruled = fleet(option("a"), **rule)
    solved = greedy.solve(problem(ruled, [[0.0]]), OPTIONS)
    assert solved.schedule is None
    assert solved.report.status is Status.INFEASIBLE
    assert "'a'" in solved.report.message


def test_board_never_overcommits() -> None:
    """What does not fit the memory, or would be a second copy, is refused."""
    ab = fleet(option("a"), option("b", resident_bytes=60))
    board = Board(problem(ab, [[0.0], [0.0]]), 0, Placement())
    a, b = ab.options
    board.add(a, (gpu(0),), "ACTIVE")
    assert not board.fits(a, (gpu(0),), "WARM")
    assert not board.fits(b, (gpu(0),), "WARM")
    assert board.fits(b, (gpu(1),), "WARM")


def test_perfect_bound_is_a_bound() -> None:
    """50 requests on a GPU that takes 100 in the epoch are half its rent of 1.0; refused
    they would cost 3000."""
    p = problem(fleet(option("a")), [[0.5]])
    assert perfect_bound(p) == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(4))
def test_feasible_at_every_size(seed: int) -> None:
    """16 LLMs on 4 x 8 GPUs, 20 scenarios: referee-clean, and prewarming or not, never
    dearer than serving alone."""
    p = realistic(np.random.default_rng(seed), 16, [8] * 4, 20)
    solved = greedy.solve(p, OPTIONS)
    assert solved.schedule is not None
    assert referee.violations(p, solved.schedule) == ()
    total = referee.cost(p, solved.schedule).total
    assert solved.report.objective == total
    bare = tuple(
        Placement(replicas=tuple(r for r in q.replicas if r.state == "ACTIVE"))
        for q in solved.schedule
    )
    assert solved.report.bound <= total <= referee.cost(p, bare).total


def test_replicas_of_unknown_things_are_dropped() -> None:
    """A placement before that names a lost GPU and a retired LLM does no harm."""
    before = placement(("a", "gone/0", "ACTIVE"), ("z", "n0/0", "WARM"))
    p = problem(fleet(option("a")), [[0.5]], initial=before)
    solved = greedy.solve(p, OPTIONS)
    assert solved.schedule is not None
    assert referee.violations(p, solved.schedule) == ()
    gone = {GpuId(node="gone", index=0)}
    assert not gone & set(solved.schedule[0].by_gpu)
