"""Planning while serving: proposals, modes, and what happens when planning fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from foreserve.models.observed import Observed
from foreserve.models.placement import Placement, Replica
from foreserve.models.problem import Fleet
from foreserve.planner.arrivals import Arrivals, trace_of
from foreserve.planner.fleet import (
    USUAL_OUTPUT_TOKENS,
    build_fleet,
    busy_s,
    request_lengths,
    with_usual_lengths,
)
from foreserve.planner.online import LivePolicy
from foreserve.planner.proposals import Mode
from foreserve.planner.scenario import Scenario, parse_scenario

TEXT = """
cluster: {nodes: [{name: n, gpu: h100, gpus: 2, host_ram: 1TiB}]}
models:
  - {name: a, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}
  - {name: b, llm: qwen2.5-7b, input_tokens: 500, output_tokens: 100}
epoch: 10s
forecast: {method: last}
solver: {name: greedy, time_limit: 5s}
"""


def test_llms_that_nothing_is_known_of_are_planned_as_usual() -> None:
    """A first start knows no requests: what the scenario does not state is taken from a
    usual chat service and told by name; what it states stays."""
    told = parse_scenario(TEXT)
    silent = parse_scenario(
        TEXT.replace("qwen2.5-7b, input_tokens: 500, ", "qwen2.5-7b, ")
    )
    bare = parse_scenario(TEXT.replace(", input_tokens: 500, output_tokens: 100", ""))
    assert with_usual_lengths(told, None) == (told, ())
    half, names = with_usual_lengths(silent, None)
    assert names == ("b",)
    assert (half.models[0], half.models[1].output_tokens) == (told.models[0], 100)
    known, names = with_usual_lengths(bare, None)
    assert names == ("a", "b")
    lengths = request_lengths(known, trace_of(("a", "b")), None)
    assert lengths["a"].mean_output == USUAL_OUTPUT_TOKENS


class Bench:
    """A policy, its clock in our hands, and how often it called for a decision."""

    def __init__(self, mode: Mode = "automatic") -> None:
        self.scenario: Scenario = parse_scenario(TEXT)
        self.now_s = 0.0
        self.woken = threading.Event()
        lengths = request_lengths(self.scenario, trace_of(("a", "b")), None)
        self.fleet: Fleet = build_fleet(self.scenario, lengths)
        self.arrivals = Arrivals(
            [llm.name for llm in self.fleet.llms],
            epoch_s=self.scenario.epoch,
            busy_s=partial(busy_s, self.fleet),
        )
        self.policy = LivePolicy(
            scenario=self.scenario,
            fleet=self.fleet,
            arrivals=self.arrivals,
            wake=self.woken.set,
            now_s=lambda: self.now_s,
            mode=mode,
        )

    def decide(self, now_s: float) -> list[tuple[str, str]]:
        """(LLM, state) wanted at ``now_s``."""
        self.now_s = now_s
        wish = self.policy.decide(now_s, Observed(now_s=now_s))
        return [(r.llm, r.state) for r in wish.replicas]

    def wait(self) -> None:
        """Until the planner has answered."""
        assert self.woken.wait(30.0)
        self.woken.clear()

    def busy(self, llm: str, start_s: float, count: int) -> None:
        for i in range(count):
            self.arrivals.add(start_s + i * 0.1, llm, 500, 100)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    with made.policy:
        yield made


def test_an_epoch_is_planned_from_what_has_come(bench: Bench) -> None:
    """Nothing is known of the first epoch, so nothing serves; a was busy in it, so it
    serves in the second, and its proposal carries a certificate."""
    assert not any(state == "ACTIVE" for _, state in bench.decide(0.0))
    bench.wait()
    bench.decide(0.1)
    bench.busy("a", 0.2, 90)
    began = time.monotonic()
    bench.decide(10.0)
    assert time.monotonic() - began < 1.0  # the solve is somebody else's
    bench.wait()
    assert ("a", "ACTIVE") in bench.decide(10.5)
    assert bench.policy.generation == 2
    latest = bench.policy.proposals[-1]
    assert latest.epoch == 1
    assert latest.failed == ""
    assert latest.report is not None
    assert latest.report.objective is not None
    assert {row.llm: row.rate_rps for row in latest.demand}["a"] == pytest.approx(9.0)


def test_late_proposals_change_nothing(bench: Bench) -> None:
    """An answer for the first epoch that is looked at in the third is not carried out,
    and says so."""
    bench.decide(0.0)
    bench.wait()
    bench.decide(20.0)
    assert bench.policy.generation == 0
    assert "came after its epoch" in bench.policy.proposals[0].failed


def test_a_recommendation_waits_for_approval() -> None:
    """Until `approve` names it, the plan before stays; in mode observe for ever."""
    bench = Bench("recommend")
    with bench.policy as policy:
        bench.busy("a", 0.0, 90)
        bench.decide(10.0)
        bench.wait()
        assert ("a", "ACTIVE") not in bench.decide(10.5)
        assert policy.pending is not None
        assert not policy.approve("another")
        assert policy.approve(policy.pending.id)
        bench.wait()
        assert ("a", "ACTIVE") in bench.decide(11.0)
        assert policy.generation == 1
        policy.set_mode("observe")
        bench.wait()
        bench.busy("b", 11.0, 50)
        bench.decide(20.0)
        bench.wait()
        bench.decide(20.5)
        assert policy.pending is None
        assert policy.generation == 1


def test_planning_that_fails_leaves_the_plan_alone() -> None:
    """A fault of the planner's own: the proposal says why, and serving goes on."""
    bench = Bench()
    with bench.policy as policy:
        bench.decide(0.0)
        bench.wait()
        bench.decide(0.5)
        policy.scenario = None  # type: ignore[assignment]
        scenario = bench.scenario
        bench.woken.clear()
        policy._ask(1.0, (), frozenset())
        bench.wait()
        policy.scenario = scenario
        assert policy.proposals[-1].placement is None
        assert "AttributeError" in policy.proposals[-1].failed
        before = bench.policy.generation
        bench.decide(2.0)
        assert bench.policy.generation == before


def test_what_is_handed_in_waits_and_outlives_solves_under_way() -> None:
    """In mode automatic: a placement of the operator's is pending beside the planner's,
    which is carried out. Approved, it is in force, and a solve that had begun before does
    not take its place; the next epoch's does."""
    bench = Bench()
    with bench.policy as policy:
        bench.busy("a", 0.0, 90)
        bench.decide(0.0)
        bench.wait()
        gpus = bench.fleet.cluster.gpus
        mine = Placement(replicas=(Replica(llm="b", gpus=(gpus[1],), state="ACTIVE"),))
        handed = policy.hand_in(mine)
        bench.decide(10.0)  # asks
        bench.wait()
        bench.decide(10.1)
        assert policy.pending == handed
        policy._ask(10.2, (), frozenset())
        bench.wait()
        bench.now_s = 10.3
        assert policy.approve(handed.id)
        assert bench.decide(10.3) == [("b", "ACTIVE")]
        assert policy.plan_id == handed.id
        assert [p.fate for p in policy.proposals[-2:]] == ["carried out", "replaced"]
        bench.woken.clear()
        bench.decide(20.0)
        bench.wait()
        bench.decide(20.1)
        latest = policy.proposals[-1]
        assert (latest.origin, latest.fate) == ("planner", "carried out")


def test_rejected_is_forgotten() -> None:
    """It cannot be approved any more, and says so in the history."""
    bench = Bench("recommend")
    with bench.policy as policy:
        bench.decide(0.0)
        bench.wait()
        bench.decide(0.1)
        assert policy.pending is not None
        plan_id = policy.pending.id
        assert policy.proposed.reject(plan_id)
        assert not policy.approve(plan_id)
        assert not policy.proposed.reject(plan_id)
        found = policy.proposed.find(plan_id)
        assert found is not None
        assert found.fate == "rejected"


def test_a_drain_is_planned_around() -> None:
    """The operator's change is a reason to plan again at once, without the node's GPUs."""
    bench = Bench()
    with bench.policy as policy:
        bench.busy("a", 0.0, 90)
        for now_s in (0.0, 10.0):
            bench.decide(now_s)
            bench.wait()
            bench.decide(now_s + 0.1)
        assert policy.plan.at(10.1).placement.replicas
        policy.wish(lambda wishes: wishes.drain("n"), "the operator: drain n")
        bench.woken.clear()
        assert bench.decide(10.2) == []
        bench.wait()
        bench.decide(10.3)
        latest = policy.proposals[-1]
        texts = [reason.text for reason in latest.reasons]
        assert texts[0] == "the operator: drain n"
        assert any("are drained, planned for a" in text for text in texts)
        assert latest.placement == Placement()
