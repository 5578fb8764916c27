"""How many GPUs a trace needs: the search by hand, the answer on a shipped trace."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.planner.scenario import ClusterPart, LlmPart, NodeSpec, Scenario
from foreserve.planner.sizing import Trial, perfect_gpus, resized, search, smallest
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


def test_size_of_a_shipped_trace(plan, tmp_path):
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
