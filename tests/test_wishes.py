"""What the operator asks for by hand, on top of a plan: pure, on a cluster of two nodes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from foreserve.models.observed import Observed, ObservedReplica, Phase
from foreserve.models.placement import Action, Placement, Replica, ReplicaId
from foreserve.models.plan import Epoch, Plan, SolverInfo
from foreserve.models.referee import fleet_violations
from foreserve.models.specs import GpuId
from foreserve.planner.arrivals import trace_of
from foreserve.planner.fleet import build_fleet, request_lengths
from foreserve.planner.scenario import parse_scenario
from foreserve.planner.wishes import Hold, Wishes
from foreserve.runtime.ledger import Ledger
from foreserve.runtime.reconcile import reconcile
from foreserve.runtime.states import check_action

TEXT = """
cluster: {nodes: [{name: m, gpu: h100, gpus: 2, host_ram: 1TiB},
                  {name: n, gpu: h100, gpus: 2, host_ram: 1TiB}]}
models:
  - {name: a, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}
  - {name: b, llm: qwen2.5-7b, input_tokens: 500, output_tokens: 100}
"""
SCENARIO = parse_scenario(TEXT)
FLEET = build_fleet(SCENARIO, request_lengths(SCENARIO, trace_of(("a", "b")), None))
GPUS = {str(gpu): gpu for gpu in FLEET.cluster.gpus}


def on(llm: str, gpu: str, state: str = "ACTIVE") -> Replica:
    return Replica(llm=llm, gpus=(GPUS[gpu],), state=state)  # type: ignore[arg-type]


def plan(*replicas: Replica) -> Plan:
    return Plan(
        foreserve_version="0",
        fleet=FLEET,
        epochs=(
            Epoch(start_s=0.0, end_s=100.0, placement=Placement(replicas=replicas)),
        ),
        solver=SolverInfo(
            name="greedy", version="", seed=0, threads=1, time_limit_s=1.0, gap=0.0
        ),
        forecaster="last",
    )


def saw(llm: str, gpu: str, phase: Phase = "ACTIVE", work: int = 0) -> ObservedReplica:
    gpus: tuple[GpuId, ...] = (GPUS[gpu],)
    idle_s = 0.0 if phase == "ACTIVE" and not work else None
    return ObservedReplica(
        llm=llm, gpus=gpus, phase=phase, in_flight=work, idle_since_s=idle_s
    )


def want(
    wishes: Wishes, the_plan: Plan, *replicas: ObservedReplica, **waiting: int
) -> set[str]:
    """``llm@gpu state`` of all that is wanted at second 50."""
    observed = Observed(now_s=50.0, replicas=replicas, waiting=waiting)
    rule = wishes.rule(the_plan, 50.0, 5.0)
    wish = wishes.wanted(rule.decide(50.0, wishes.seen(observed, FLEET)), FLEET)
    return {f"{r.llm}@{r.gpus[0]} {r.state}" for r in wish.replicas}


def test_no_wishes_change_nothing() -> None:
    """The rule and what it sees are those of a plan without an operator."""
    observed = Observed(now_s=50.0, replicas=(saw("a", "m/0", work=3),))
    assert Wishes().seen(observed, FLEET) is observed
    assert want(Wishes(), plan(on("a", "m/0"))) == {"a@m/0 ACTIVE"}


def test_a_drained_node_is_replaced_elsewhere_before_it_is_left() -> None:
    """a serves on m, idle: with m drained its replica is wanted on n at once, and no more
    on m; b, which is on n already, stays where it is. Nothing new comes to m."""
    wishes = Wishes().drain("m")
    the_plan = plan(on("a", "m/0"), on("b", "n/0"))
    found = want(wishes, the_plan, saw("a", "m/0"), saw("b", "n/0"))
    assert {f for f in found if f.endswith(" ACTIVE")} == {
        "a@n/1 ACTIVE",
        "b@n/0 ACTIVE",
    }
    assert not any("@m" in f for f in found)


def test_requests_on_a_drained_node_count_as_need_elsewhere() -> None:
    """a was started on m on demand and works there; the plan knows nothing of it. Drained,
    m is left, and a's work asks for a replica on n."""
    found = want(Wishes().drain("m"), plan(on("b", "n/0")), saw("a", "m/0", work=2))
    assert found == {"a@n/1 ACTIVE", "b@n/0 ACTIVE"}


def test_a_pin_stays_on_a_drained_node_only_without_room_elsewhere() -> None:
    """Everything on n works hard, so there is no room for the pinned a: it goes on serving
    on m. Without the pin it is given up."""
    the_plan = plan(on("a", "m/0"), on("b", "n/0"), on("b", "n/1"))
    limit = FLEET.option_of("b", (GPUS["n/0"],)).concurrency
    full = [saw("b", gpu, work=limit) for gpu in ("n/0", "n/1")]
    drained = Wishes().drain("m")
    pinned = want(drained.pin("a"), the_plan, saw("a", "m/0"), *full)
    assert "a@m/0 ACTIVE" in pinned
    assert not any("@m" in f for f in want(drained, the_plan, saw("a", "m/0"), *full))


def test_asleep_is_warm_and_unloaded_is_gone_whatever_the_plan_says() -> None:
    """Requests that wait do not change it: nobody is to serve them."""
    the_plan = plan(on("a", "m/0"), on("b", "n/0"))
    there = (saw("a", "m/0", work=1), saw("b", "n/0"))
    for level, expected in (("asleep", {"a@m/0 WARM"}), ("unloaded", set())):
        wishes = Wishes().hold(Hold(llm="a", level=level))  # type: ignore[arg-type]
        found = want(wishes, the_plan, *there, a=5)
        assert {f for f in found if f.startswith("a")} == expected
        assert "b@n/0 ACTIVE" in found
        assert wishes.refuses("a")


def test_waking_lasts_until_it_serves() -> None:
    """An LLM that nobody asks for is wanted ACTIVE, until it was seen to serve."""
    wishes = Wishes().hold(Hold(llm="a", level="unloaded")).wake("a")
    assert wishes.holds == ()
    assert {f[0] for f in want(wishes, plan())} == {"a"}
    loading = Observed(now_s=50.0, replicas=(saw("a", "m/0", "LOADING"),))
    assert wishes.after(loading) is wishes
    serving = Observed(now_s=50.0, replicas=(saw("a", "m/0"),))
    assert wishes.after(serving).waking == ()


def test_a_hold_until_need_ends_with_the_first_request() -> None:
    """As llama-swap's unload; one until woken goes on."""
    need = Observed(now_s=50.0, waiting={"a": 1, "b": 1})
    wishes = Wishes(
        holds=(
            Hold(llm="a", level="unloaded", until_need=True),
            Hold(llm="b", level="unloaded"),
        )
    )
    assert not wishes.refuses("a")
    assert [hold.llm for hold in wishes.after(need).holds] == ["b"]


def test_pinned_is_wanted_without_a_request_and_planned_for() -> None:
    """Also where the plan has nothing of it; the planner's fleet asks for one."""
    wishes = Wishes().pin("b")
    assert {f[0] for f in want(wishes, plan())} == {"b"}
    assert wishes.planned_for(FLEET).llm_by_name["b"].min_active == 1
    assert wishes.unpin("b").planned_for(FLEET) == FLEET
    assert Wishes().hold(Hold(llm="b", level="asleep")).pin("b").holds == ()


def test_wishes_of_another_fleet_are_forgotten() -> None:
    """A restart with other LLMs or nodes: what is no more is not wished for."""
    wishes = replace(
        Wishes(pinned=("a", "gone"), waking=("gone",), drained=("n", "gone")),
        holds=(Hold(llm="gone", level="asleep"),),
    )
    assert wishes.of(FLEET) == Wishes(pinned=("a",), drained=("n",))


@pytest.mark.parametrize("node", ["m", "n"])
def test_resume_undoes_drain(node: str) -> None:
    """Twice drained is once."""
    assert Wishes().drain(node).drain(node).resume(node) == Wishes()


class Toy:
    """A cluster whose steps take random times, under the controller's rules; no requests
    but those that it is given."""

    def __init__(self, seed: int, *replicas: Replica) -> None:
        self.rng = np.random.default_rng(seed)
        self.phases: dict[ReplicaId, Phase] = {r.id: r.state for r in replicas}
        self.work: dict[ReplicaId, int] = {}
        self.now_s = 0.0
        self.asked: list[Action] = []

    def step(self, wishes: Wishes, the_plan: Plan) -> None:
        """A second passes; then one turn of the controller."""
        self.now_s += 1.0
        for key, phase in list(self.phases.items()):
            ends = self.rng.random() < 0.4 and not self.work.get(key)
            if phase in ("LOADING", "DRAINING") and ends:
                self.phases[key] = "WARM"
            elif phase == "ACTIVATING" and ends:
                self.phases[key] = "ACTIVE"
        seen = Observed(
            now_s=self.now_s,
            replicas=tuple(
                ObservedReplica(
                    llm=key.llm,
                    gpus=key.gpus,
                    phase=phase,
                    in_flight=self.work.get(key, 0),
                    idle_since_s=0.0 if phase == "ACTIVE" else None,
                )
                for key, phase in self.phases.items()
            ),
        )
        assert min(Ledger.of(FLEET, seen).free_bytes.values()) >= 0
        rule = wishes.rule(the_plan, self.now_s, 5.0)
        wish = rule.decide(self.now_s, wishes.seen(seen, FLEET))
        wish = wishes.wanted(wish, FLEET)
        assert not list(fleet_violations(FLEET, wish))
        for action in reconcile(wish, seen, FLEET):
            after = check_action(
                action.kind, action.replica, self.phases.get(action.replica)
            )
            if after is None:
                del self.phases[action.replica]
            else:
                self.phases[action.replica] = after
            self.asked.append(action)

    def serving(self, llm: str) -> int:
        return sum(
            key.llm == llm and phase == "ACTIVE" for key, phase in self.phases.items()
        )

    def on(self, node: str) -> set[str]:
        return {key.llm for key in self.phases if key.gpus[0].node == node}


@pytest.mark.parametrize("seed", range(25))
def test_drains_in_any_order_leave_nothing_and_break_nothing(seed: int) -> None:
    """a and b, each with a replica in the plan; nodes are drained and resumed at random,
    never both. While there is room elsewhere neither LLM is ever without a replica that
    serves, memory is kept at every moment, nothing begins on a drained node, and in the
    end nothing is there; a request that is under way is waited for."""
    the_plan = plan(on("a", "m/0"), on("b", "n/0"))
    toy = Toy(seed, *the_plan.epochs[0].placement.replicas)
    busy = the_plan.epochs[0].placement.replicas[0].id
    toy.work[busy] = 1
    wishes = Wishes()
    for _ in range(12):
        node = "mn"[toy.rng.integers(2)]
        other = "n" if node == "m" else "m"
        wishes = wishes.resume(other).drain(node)
        for _ in range(int(toy.rng.integers(1, 40))):
            toy.asked.clear()
            toy.step(wishes, the_plan)
            assert toy.serving("a")
            assert toy.serving("b")
            begun = [a for a in toy.asked if a.kind in ("load", "activate")]
            assert node not in {a.gpus[0].node for a in begun}
            if busy in toy.phases and toy.rng.random() < 0.1:
                toy.work[busy] = 0
    toy.work.clear()
    for _ in range(60):
        toy.step(wishes, the_plan)
    assert not toy.on(wishes.drained[0])
    for _ in range(60):
        toy.step(Wishes(), the_plan)
    wanted = {r.id: "ACTIVE" for r in the_plan.epochs[0].placement.replicas}
    assert wanted.items() <= toy.phases.items()
