"""How many GPUs a trace needs: the search by hand, the answer on a shipped trace."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.planner import pipeline
from foreserve.planner.scenario import ClusterPart, LlmPart, NodeSpec, Scenario
from foreserve.planner.sizing import (
    Trial,
    mixed,
    perfect_gpus,
    resized,
    search,
    smallest,
)
from foreserve.planner.sizing_mix import Needs, cheapest, mixtures, search_mix
from foreserve.traces.formats import read_trace, write_trace
from foreserve.traces.samples import sample_path
from foreserve.traces.trace import Trace
from tests.build import fleet, option


def trial(gpus: int, passed: bool) -> Trial:
    return Trial(
        gpu="g",
        gpus=gpus,
        usd_per_h=1.0,
        attainment=1.0,
        worst_llm="a",
        total_attainment=1.0,
        ttft_p99_s=0.1,
        busy_gpus=1.0,
        passed=passed,
    )


@pytest.mark.parametrize("need", [3, 4, 5, 17, 63, 64])
@pytest.mark.parametrize("step", [1, 3])
def test_search_finds_the_least_multiple(need, step):
    """Enough from ``need`` GPUs on: found exactly, in few attempts, the size below, too."""
    tried: list[int] = []

    def attempt(gpus: int) -> Trial:
        tried.append(gpus)
        return trial(gpus, gpus >= need)

    trials = search(attempt, least=3, most=66, step=step)
    answer = smallest(trials)
    least = -(-need // step) * step
    assert answer is not None
    assert answer.gpus == least
    assert [t.gpus for t in trials] == sorted(set(tried))
    assert least == 3 or least - step in tried
    assert len(tried) == len(set(tried)) <= 11


def test_nothing_is_enough():
    """All sizes up to the most fail; below the least nothing is tried."""
    trials = search(lambda gpus: trial(gpus, False), least=3, most=20)
    assert [t.gpus for t in trials] == [3, 6, 12, 20]
    assert smallest(trials) is None
    with pytest.raises(InvalidInput, match="at most 2 GPUs"):
        search(lambda gpus: trial(gpus, True), least=3, most=2)


def test_a_larger_size_that_fails_is_not_passed_over():
    """4 is enough and 6 is not: the answer is 8, above which nothing failed."""
    trials = [trial(4, True), trial(6, False), trial(8, True)]
    assert smallest(trials) == trials[2]


def test_a_perfect_system_by_hand():
    """a: 1 request/s a GPU, planned at 0.8 of what it holds, so 1.25; b: 1 on two GPUs.
    100 and 25 requests in 100 s: 1 / 1.25 + 0.25 x 2 / 1.25 GPUs; none in the second
    epoch but one of a."""
    f = fleet(option("a"), option("b", tp=2))
    times = [*np.linspace(0, 99, 125), 150.0]
    which = [0] * 100 + [1] * 25 + [0]
    order = np.argsort(times, kind="stable")
    trace = Trace(
        arrival_s=np.array(times)[order],
        llm=np.array(which, np.int32)[order],
        llms=("a", "b"),
        input_tokens=np.ones(126, np.int32),
        output_tokens=np.ones(126, np.int32),
    )
    peak, mean = perfect_gpus(f, trace, 100.0, 0.8)
    assert peak == pytest.approx(0.8 + 0.4)
    assert mean == pytest.approx((1.2 + 0.008) / 2)


def test_nodes_of_another_size():
    """19 GPUs in nodes of 8: two whole ones and one of 3; the first node's host RAM."""
    node = NodeSpec(name="x", gpu="a100-80gb", host_ram=5)
    base = Scenario(
        cluster=ClusterPart(nodes=(node,)), models=(LlmPart(name="llama-3.1-8b"),)
    )
    nodes = resized(base, "h100", 19, 8).cluster.nodes
    assert [(n.gpu, n.gpus, n.count, n.host_ram) for n in nodes] == [
        ("h100", 8, 2, 5),
        ("h100", 3, 1, 5),
    ]
    assert replace(nodes[0], count=1).nodes()[0].name == "n"


def needs(
    gpu_s: list[list[float]], rates: list[float], usd: tuple[float, ...] = (2.0, 1.0)
) -> Needs:
    """Types x, y, ... at so many dollars; one epoch."""
    return Needs(
        types=tuple("xyz"[: len(usd)]),
        usd_per_h=np.array(usd),
        gpu_s=np.array(gpu_s),
        rate_rps=np.array(rates)[:, None],
    )


def tried(counts: dict[str, int], usd_per_h: float, passed: bool) -> Trial:
    return replace(
        trial(sum(counts.values()), passed), counts=counts, usd_per_h=usd_per_h
    )


def test_a_perfect_mixture_by_hand():
    """a takes 1 GPU-second of x or 4 of y, b 1 of either; one request/s each. Cheapest: a
    on x for 2 dollars, b on y for 1. One x and one y hold that, two y do not; and where a
    runs on x alone, no number of y does."""
    n = needs([[1.0, 4.0], [1.0, 1.0]], [1.0, 1.0])
    assert n.bound_usd_per_h == pytest.approx(3.0)
    assert n.may_serve((1, 1))
    assert not n.may_serve((0, 2))
    assert n.may_serve((0, 5))
    assert not needs([[1.0, np.inf]], [1.0]).may_serve((0, 9))


@pytest.mark.parametrize("seed", range(30))
def test_what_two_types_may_serve_is_what_they_can(seed: int):
    """Against filling x first with the LLMs that gain most there, which is best: the
    duals say yes and no where that does."""
    rng = np.random.default_rng(seed)
    gpu_s, rates = rng.uniform(0.5, 3, (4, 2)), rng.uniform(0, 2, 4)
    n = needs(gpu_s.tolist(), rates.tolist())
    for counts in ((a, b) for a in range(9) for b in range(9)):
        room, rest = float(counts[0]), 0.0
        for m in sorted(range(4), key=lambda m: gpu_s[m, 0] / gpu_s[m, 1]):
            there = min(rates[m], room / gpu_s[m, 0])
            room -= there * gpu_s[m, 0]
            rest += (rates[m] - there) * gpu_s[m, 1]
        if abs(rest - counts[1]) > 1e-6:
            assert n.may_serve(counts) == (rest <= counts[1])


@pytest.mark.parametrize("seed", range(20))
def test_mixtures_are_searched_to_the_cheapest(seed: int):
    """Enough is what a random rule says in which more GPUs never harm: the cheapest of all
    mixtures is found, in far fewer attempts than there are, and nothing is left open."""
    rng = np.random.default_rng(seed)
    usd = tuple(rng.uniform(1, 3, 2 + seed % 2))
    n = needs([[0.1] * len(usd)], [1.0], usd)
    weight, need = rng.uniform(0.5, 2, len(usd)), rng.uniform(2, 6)

    def enough(counts: tuple[int, ...]) -> bool:
        return float(weight @ np.array(counts)) >= need

    def attempt(counts: dict[str, int]) -> Trial:
        whole = tuple(counts.get(gpu, 0) for gpu in n.types)
        return tried(dict(counts), n.price(whole), enough(whole))

    every = list(mixtures(n, most=14, step=1, below_usd=np.inf))
    found = search_mix(attempt, n, [], most=14, step=1, attempts=1000)
    answer = cheapest(found.trials)
    assert answer is not None
    assert answer.usd_per_h == pytest.approx(
        min(n.price(c) for c in every if enough(c))
    )
    assert found.undecided == ()
    assert len(found.trials) < len(every) / 3
    dear = search_mix(attempt, n, [answer], most=14, step=1, attempts=3)
    assert all(t.usd_per_h < answer.usd_per_h for t in dear.trials)
    assert len(dear.trials) <= 3


def test_a_larger_mixture_that_fails_is_not_passed_over():
    """2 + 1 is enough, but 3 + 1 was not: the answer is 1 + 4, dearer though it is."""
    trials = [
        tried({"x": 2, "y": 1}, 5.0, True),
        tried({"x": 3, "y": 1}, 7.0, False),
        tried({"x": 1, "y": 4}, 6.0, True),
    ]
    assert cheapest(trials) == trials[2]
    assert cheapest([]) is None


def test_nodes_of_two_types():
    """Names tell the types apart; each has its whole nodes and its rest."""
    base = Scenario(
        cluster=ClusterPart(nodes=(NodeSpec(name="n", gpu="h100"),)),
        models=(LlmPart(name="llama-3.1-8b"),),
    )
    nodes = mixed(base, {"h100": 9, "a100-80gb": 2}, 8).cluster.nodes
    assert [(n.name, n.gpu, n.gpus) for n in nodes] == [
        ("h100-n", "h100", 8),
        ("h100-rest", "h100", 1),
        ("a100-80gb-rest", "a100-80gb", 2),
    ]


@pytest.fixture
def quick(monkeypatch):
    """Solves in this process: a child takes longer to start than greedy to plan."""
    found = pipeline.solve_options
    monkeypatch.setattr(
        pipeline, "solve_options", lambda s: replace(found(s), in_process=True)
    )


def test_size_of_a_shipped_trace(plan, tmp_path, quick):
    """Two services on H100 for 90 %: an answer whose plan is written, the size below it
    tried and not enough, the perfect system smaller. With at most 2 GPUs: exit 3."""
    base = "size --trace sample:azure-2023 --scenario sample:azure-2023 --gpu h100"
    base += " --target 90 --solver greedy --json"
    out = tmp_path / "plan.json"
    code, found, _ = plan(base, "--most 16 -o", out)
    assert code == 0
    (sizing,) = json.loads(found)["sizings"]
    gpus = sizing["answer"]["gpus"]
    by_size = {t["gpus"]: t["passed"] for t in sizing["trials"]}
    assert (by_size[gpus], by_size[gpus - 1]) == (True, False)
    assert sizing["mean_gpus"] < sizing["bound_gpus"] < gpus
    assert len(json.loads(out.read_text())["fleet"]["cluster"]["nodes"]) == 1
    assert plan(base, "--most 2")[0] == 3


def test_mixture_for_a_shipped_trace(plan, tmp_path, quick):
    """Two types, few attempts: the mixture's row comes last, is no dearer than either
    alone, says which LLM and epoch bind, and the picture is drawn. One type cannot mix."""
    short = read_trace(sample_path("azure-2023")).between(0.0, 900.0)
    write_trace(short, tmp_path / "t.csv")
    base = f"size --trace {tmp_path}/t.csv --scenario sample:azure-2023 --target 90"
    base += (
        " --gpu h100 --gpu a100-80gb --solver greedy --mix --most 12 --step 2 --json"
    )
    picture = tmp_path / "size.svg"
    code, found, _ = plan(base, "--attempts 1 --picture", picture)
    assert code == 0
    *alone, mix = json.loads(found)["sizings"]
    prices = [s["answer"]["usd_per_h"] for s in alone if s["answer"]]
    assert len(alone) == 2
    assert len(mix["trials"]) == 1
    for one in mix["trials"]:
        assert one["usd_per_h"] < min(prices)
        assert sum(one["counts"].values()) == one["gpus"]
        assert set(one["by_llm"]) == {"conv", "code"}
        worst = one["binding"][0]
        assert 0 < worst["missed"] <= worst["requests"]
    assert mix["bound_usd_per_h"] <= min(s["bound_usd_per_h"] for s in alone) + 1e-9
    assert picture.read_text().startswith("<?xml")
    assert plan("size --trace t --scenario sample:azure-2023 --gpu h100 --mix")[0] == 2
