"""The rolling horizon: what it pays for, what it may know, and what its path costs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from foreserve.models import referee
from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Placement
from foreserve.models.problem import Prices, Problem
from foreserve.models.specs import GpuId
from foreserve.planner.facts import plan_facts
from foreserve.planner.intervals import (
    changes,
    cheapest_runs,
    histogram,
    intervals,
    share_changed,
)
from foreserve.planner.pipeline import Problems, plan_trace
from foreserve.planner.policies.rolling import Online
from foreserve.planner.replan import in_system, replan_now
from foreserve.planner.rolling import (
    Rolling,
    apart,
    cheapest_path,
    side_by_side,
    states,
)
from foreserve.planner.scenario import parse_scenario
from foreserve.solvers.base import solve, with_shares
from foreserve.solvers.result import SolveOptions
from foreserve.traces.trace import Trace
from tests.build import cluster, fleet, gpu, option, small_plan
from tests.problems import placement, problem, tiny

HERE = SolveOptions(in_process=True, time_limit_s=1.0)


def day(demand_rps: list[float], load_s: float = 16.0) -> list[Problem]:
    """a answers in 2 s on one GPU and in 1 s on two: at 0.5 requests/s and 0.1 a second
    that saves 5 an epoch of 100 s. It is on one; moving costs a load of ``load_s`` at
    half price, and 1 for stopping the other one. GPUs cost nothing."""
    f = fleet(
        option("a", exec_s=2.0),
        option("a", tp=2, load_s=load_s),
        on=cluster(2),
    )
    prices = Prices(usd_s=0.0, load_s=0.5, demote_s=1.0, slower_s=0.1)
    here = placement(("a", "n0/0", "ACTIVE"))
    return list(apart(problem(f, [demand_rps], initial=here, prices=prices)))


def test_a_load_is_paid_for_by_the_epochs_to_come():
    """Moving costs 9, staying 5 an epoch: one epoch ahead it never moves, four ahead at
    once; three epochs ahead of the end of the demand it stays."""
    window = day([0.5] * 4)
    before = window[0].initial
    for horizon, tp in ((1, 1), (4, 2)):
        with Rolling("greedy", HERE, horizon) as rolling:
            step = rolling.step(window[:horizon], before)
        assert step.schedule is not None
        assert [r.tp for r in step.schedule[0].replicas] == [tp]
    assert step.window_cost == pytest.approx(9.0)
    # Of the first epoch alone, so plans add up.
    assert step.report.objective == pytest.approx(9.0)
    assert step.report.bound <= 5.0
    with Rolling("greedy", HERE, 4) as rolling:
        step = rolling.step(day([0.5, 0.0, 0.0, 0.0]), before)
    assert step.schedule is not None
    assert [states(p) for p in step.schedule] == [states(before)] * 4


def test_one_epoch_ahead_is_the_solvers_answer():
    """No path, no second solve: a horizon of 1 hands on what the solver says."""
    window = day([0.5])
    with Rolling("greedy", HERE) as rolling:
        step = rolling.step(window, window[0].initial)
    solved = solve(window[0], "greedy", HERE, start=(window[0].initial,))
    assert (step.schedule, step.report.objective) == (
        solved.schedule,
        solved.report.objective,
    )


def test_the_rest_of_a_window_is_kept():
    """The second window begins with what the first one planned for its second epoch,
    which is known even though this window's solver would not find it."""
    window = day([0.5] * 4)
    with Rolling("greedy", HERE, 4) as rolling:
        first = rolling.step(window, window[0].initial)
        assert first.schedule is not None
        assert rolling.rest == first.schedule[1:]
        here = first.schedule[0]
        second = rolling.step([replace(p, initial=here) for p in window], here)
    assert second.schedule is not None
    assert states(second.schedule[0]) == states(here)
    assert second.window_cost == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(6))
def test_path_is_the_best_of_all_sequences(seed: int):
    """Over random problems of three epochs and pools from their solves: no sequence out
    of the pool costs less by the referee, and the path costs what it says."""
    rng = np.random.default_rng(seed)
    whole = tiny(rng, epochs=3)
    window = apart(whole)
    pool = [whole.initial]
    for p in window:
        solved = solve(p, "greedy", HERE)
        if solved.schedule:
            pool.append(solved.schedule[0])
    found, cost = cheapest_path(window, whole.initial, pool)
    costs = []
    possible = [c for c in pool if not any(referee.fleet_violations(whole.fleet, c))]
    for choice in product(possible, repeat=3):
        schedule = tuple(
            with_shares(p, 0, c) for p, c in zip(window, choice, strict=True)
        )
        if not referee.violations(whole, schedule):
            costs.append(referee.cost(whole, schedule).total)
    if found is None:
        assert not costs
    else:
        assert cost == pytest.approx(min(costs))
        assert referee.cost(whole, found).total == pytest.approx(cost)


def test_windows_and_problems_are_the_same_thing():
    """Apart and side by side again: the same problem; the loss is the epochs' mean."""
    whole = tiny(np.random.default_rng(3), epochs=3)
    window = apart(whole)
    assert [p.num_epochs for p in window] == [1, 1, 1]
    assert side_by_side(window) == whole
    llm = whole.fleet.llms[0]
    dearer = replace(
        whole.fleet, llms=(replace(llm, cold_loss_s=70.0), *whole.fleet.llms[1:])
    )
    cheaper = replace(
        whole.fleet, llms=(replace(llm, cold_loss_s=10.0), *whole.fleet.llms[1:])
    )
    pair = [replace(window[0], fleet=dearer), replace(window[1], fleet=cheaper)]
    assert side_by_side(pair).fleet.llms[0].cold_loss_s == 40.0


SCENARIO = """\
cluster: {nodes: [{name: n0, gpu: h100, gpus: 2, host_ram: 1TiB}]}
models: [{name: qwen2.5-7b}, {name: qwen3-8b}]
epoch: 60s
forecast: {method: last-or-yesterday, scenarios: 4, occasional_load: 0.05}
"""


def _trace(late: float) -> Trace:
    """Five minutes of one LLM; ``late`` times as long answers from the fourth on."""
    arrival_s = np.arange(300) * 1.0
    answers = np.where(arrival_s >= 180, 20 * late, 20.0)
    return Trace(
        arrival_s=arrival_s,
        llm=np.zeros(300, dtype=np.int32),
        llms=("qwen2.5-7b", "qwen3-8b"),
        input_tokens=np.full(300, 100, dtype=np.int32),
        output_tokens=answers.astype(np.int32),
    )


def test_windows_know_what_was_known_when_they_began():
    """A window of three is cut at the trace's end, its first epoch is the problem that a
    horizon of 1 has, and what comes after its start does not change it."""
    scenario = parse_scenario(
        SCENARIO.replace(
            "qwen3-8b}", "qwen3-8b, input_tokens: 100, output_tokens: 20}"
        ).replace("qwen2.5-7b}", "qwen2.5-7b, input_tokens: 100, output_tokens: 20}")
    )
    one = Problems(scenario, _trace(1), horizon=1)
    three = Problems(scenario, _trace(1), horizon=3)
    other = Problems(scenario, _trace(9), horizon=3)
    nothing = Placement()
    assert [len(three.window(i, nothing)) for i in range(5)] == [3, 3, 3, 2, 1]
    for epoch in range(5):
        assert three.window(epoch, nothing)[0] == one.at(epoch, nothing)
    for epoch in range(4):
        same = three.window(epoch, nothing) == other.window(epoch, nothing)
        assert same == (epoch <= 3)


def test_intervals_are_counted_from_change_to_change():
    """Changes at 2 and 5 of 9 epochs: intervals of 2, 3 and 4. One of two replicas
    stops, or the second of two is loaded: half of them change."""
    assert intervals((2, 5), 9) == (2, 3, 4)
    assert histogram((2, 3, 2)) == {2: 2, 3: 1}
    (change,) = changes(small_plan())
    assert (change.epoch, change.start_s, change.share) == (1, 300.0, 0.5)
    assert (change.loads, change.activations, change.drops) == (1, 0, 0)
    assert plan_facts(small_plan()).intervals == (1, 1)
    both = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "ACTIVE"))
    one = placement(("a", "n0/0", "ACTIVE"), ("b", "n0/1", "WARM"))
    assert share_changed(both, one) == 0.5
    assert share_changed(both, both) == 0.0
    assert share_changed(Placement(), Placement()) == 0.0


def test_cheapest_runs_are_the_best_of_all_cuts():
    """Over random costs of six epochs: as the best of the 32 ways to cut them. Without
    the pairs that end at 3, no run may end there."""
    rng = np.random.default_rng(0)
    costs = {(a, b): float(rng.random()) for b in range(1, 7) for a in range(b)}
    totals = []
    for cuts in product((False, True), repeat=5):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), 6]
        totals.append(sum(costs[pair] for pair in pairwise(edges)))
    total, begins = cheapest_runs(costs, 6)
    assert total == pytest.approx(min(totals))
    edges = [0, *begins, 6]
    found = sum(costs[pair] for pair in pairwise(edges))
    assert found == pytest.approx(total)
    left = {pair: cost for pair, cost in costs.items() if pair[1] != 3}
    assert 3 not in cheapest_runs(left, 6)[1]
    assert cheapest_runs({}, 1)[0] == float("inf")


def test_only_what_the_plan_cannot_take_is_a_reason():
    """a holds 8 at once on n0/0, its instance, and was expected below 5: 6 at once are
    above the bound, but there is room; 11 are too few for a plan; 12 are a reason."""
    plan = small_plan()
    f, epoch = plan.fleet, plan.epochs[1]
    assert replan_now(f, epoch, {"a": 6}) == ()
    assert replan_now(f, epoch, {"a": 11}) == ()
    (reason,) = replan_now(f, epoch, {"a": 12})
    assert (reason.llm, reason.factor) == ("a", 2.4)
    assert reason.text == (
        "12 requests of a at once: 95 % of the peaks were expected below 5, its "
        "replicas hold 8"
    )
    # A plan that says nothing of b's demand has nothing to be wrong about.
    assert replan_now(f, epoch, {"b": 99}) == ()


def test_lost_gpus_are_a_reason_while_the_plan_uses_them():
    """n0/1 holds b in the second epoch and nothing in the first."""
    plan, lost = small_plan(), frozenset({gpu(1)})
    assert replan_now(plan.fleet, plan.epochs[0], {}, lost) == ()
    (reason,) = replan_now(plan.fleet, plan.epochs[1], {}, lost)
    assert reason.lost_gpus == (gpu(1),)
    assert reason.text == "1 GPUs of n0 are lost, planned for b"


def test_requests_in_the_system_wait_or_are_worked_on():
    """Two wait and three are worked on: five."""
    seen = ObservedReplica(llm="a", gpus=(gpu(0),), phase="ACTIVE", in_flight=3)
    observed = Observed(now_s=0.0, replicas=(seen,), waiting={"a": 2, "b": 0})
    assert in_system(observed) == {"a": 5}


def _asked(at_s: float, waiting: int, lost: frozenset[GpuId]) -> Observed:
    queue = {"qwen2.5-7b": waiting}
    return Observed(now_s=at_s, waiting=queue, lost_gpus=lost)


def test_the_policy_plans_again_on_triggers_alone():
    """It plans each epoch once; then on a burst that no replica can take, at most every
    30 s; and on a lost GPU, without which it plans then. Asked again in the same instant
    it answers the same."""
    text = SCENARIO.replace(
        "}]\nepoch", ", input_tokens: 100, output_tokens: 20}]\nepoch"
    )
    text = text.replace("7b}", "7b, input_tokens: 100, output_tokens: 20}")
    scenario = parse_scenario(text)
    trace = _trace(1)
    planned = plan_trace(scenario, trace, solver="greedy", options=HERE).plan
    online = Online(problems=Problems(scenario, trace), solver="greedy", options=HERE)
    with online.policy(planned, 30.0) as policy:
        none: frozenset[GpuId] = frozenset()
        first = policy.decide(60.0, _asked(60.0, 0, none))
        assert policy.decide(60.0, _asked(60.0, 0, none)) == first
        assert [s.epoch for s in online.solves] == [1]
        policy.decide(80.0, _asked(80.0, 9000, none))
        assert len(online.solves) == 1
        policy.decide(90.0, _asked(90.0, 9000, none))
        policy.decide(90.0, _asked(90.0, 9000, none))
        assert [s.at_s for s in online.solves] == [60.0, 90.0]
        assert [r.llm for r in online.solves[1].reasons] == ["qwen2.5-7b"]
        policy.decide(120.0, _asked(120.0, 0, none))
        planned_now = policy.plan.epochs[2].placement
        used = planned_now.of("qwen2.5-7b", "ACTIVE")[0].gpus[0]
        lost = frozenset({used})
        wanted = policy.decide(121.0, _asked(121.0, 0, lost))
        assert used in online.solves[-1].reasons[0].lost_gpus
        assert lost.isdisjoint(wanted.by_gpu)
        assert wanted.of("qwen2.5-7b", "ACTIVE")
