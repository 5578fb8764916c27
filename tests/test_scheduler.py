"""Scheduling policies: cases by hand, invariants, optimality, and queueing theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.errors import InvalidInput
from foreserve.models.sharing import preemptive_priority_s
from foreserve.runtime.scheduler import (
    POLICIES,
    DoublingBudget,
    Fcfs,
    Mlfq,
    Oracle,
    Policy,
    Profile,
    Progress,
    RoundRobin,
    Static,
    finished,
    pick,
)
from tests.single_server import Load, iterate, serve

Jobs = Sequence[tuple[int, int]]
"""(arrival, service) in order of arrival."""


def profiles_of(*sizes_s: float, jobs: Jobs = ()) -> tuple[Profile, ...]:
    """Services of these mean sizes, all of it decode; ``jobs`` are counted as rates."""
    return tuple(
        Profile(
            reference_s=size_s,
            decode_s=size_s,
            rate_rps=float(sum(s == service for _, s in jobs)) or 1.0,
        )
        for service, size_s in enumerate(sizes_s)
    )


def requests_of(jobs: Jobs, *sizes_s: float) -> list[Progress]:
    """All requests of a service have its size."""
    return [request(i, s, at, sizes_s[s]) for i, (at, s) in enumerate(jobs)]


def request(
    index: int = 0, service: int = 0, arrival_s: float = 0.0, size_s: float = 1.0
) -> Progress:
    return Progress(
        request=index,
        service=service,
        arrival_s=arrival_s,
        prefill_s=0.0,
        size_s=size_s,
    )


def order(policy: Policy, jobs: Jobs, *sizes_s: float) -> list[int]:
    """Which request runs in each second, one at a time."""
    log = iterate(requests_of(jobs, *sizes_s), policy, profiles_of(*sizes_s))
    return [batch[0] for batch in log if batch]


def stretch(policy: Policy, jobs: Jobs, *sizes_s: float) -> float:
    """Sum of latency / size."""
    requests = requests_of(jobs, *sizes_s)
    latency_s = serve(requests, policy, profiles_of(*sizes_s, jobs=jobs))
    return float(np.sum(latency_s / [r.size_s for r in requests]))


# One case each, by hand


def test_fcfs():
    """Nothing is preempted by what comes later, however short."""
    assert order(Fcfs(), [(0, 0), (1, 1)], 3, 1) == [0, 0, 0, 1]


def test_round_robin():
    """Turns. At 2 request 0, which ran until 1, and 2, which came at 1, are unserved for
    as long: the earlier arrival goes first, and ends."""
    jobs = [(0, 0), (0, 0), (1, 0)]
    assert order(RoundRobin(), jobs, 2) == [0, 1, 0, 2, 1, 2]


def test_static():
    """The shorter service preempts; inside a service the earlier goes first."""
    jobs = [(0, 1), (0, 1), (1, 0)]
    assert order(Static(), jobs, 1, 2) == [0, 2, 0, 1, 1]


@pytest.mark.parametrize(
    ("prefill_s", "level"), [(0.0, 0), (0.009, 0), (0.01, 0), (0.0101, 1), (0.045, 3)]
)
def test_mlfq_skips_levels_on_joining(prefill_s, level):
    """Levels last 10, 20, 40, 80 ms: the first that holds the prefill."""
    new = Progress(request=0, service=0, arrival_s=0.0, prefill_s=prefill_s)
    assert Mlfq().arrive(new, ()).level == level


def test_mlfq_sinks_when_a_level_is_used_up():
    """With levels of 1, 2, 4 s an iteration of 0.5 s changes nothing, the second one (1 s
    in all) sinks it, and the time on the new level starts again: 1 + 2 = 3 s."""
    policy = Mlfq(quantum_s=1.0)
    state = policy.arrive(request(arrival_s=5.0), ())
    assert (state.level, state.place_s, state.budget_s) == (0, 5.0, 1.0)
    state = policy.ran(state, 0.5, 6.0)
    assert (state.level, state.place_s, state.last_run_s) == (0, 5.0, 6.0)
    state = policy.ran(state, 0.5, 7.0)
    assert (state.level, state.place_s, state.budget_s) == (1, -7.0, 3.0)
    assert policy.ran(state, 2.5, 10.0).budget_s == 3.5 + 4.0


def test_mlfq_order():
    """0 sinks at 1 to level 1, where it runs until 1 comes at 2, which takes level 0; at
    3 there are 0 (one of two seconds used) and 1 on level 1: 1 has just sunk to its
    front, or to its back."""
    jobs = [(0, 0), (2, 0)]
    assert order(Mlfq(quantum_s=1.0), jobs, 4) == [0, 0, 1, 1, 1, 0, 0, 1]
    back = Mlfq(quantum_s=1.0, sink_to="back")
    assert order(back, jobs, 4) == [0, 0, 1, 0, 1, 1, 0, 1]


def test_doubling_budget_readings():
    """e = 2, first budget 2 (0.5 of it prompt). After 3 s: budget 4, left 1."""
    profiles = (Profile(reference_s=2.0, decode_s=1.5, rate_rps=3.0),)
    new = Progress(request=0, service=0, arrival_s=0.0, prefill_s=0.5)
    expected = {"level": (2, 4), "mean": (4, 2), "prod": (4, 4)}
    for reading, costs in expected.items():
        policy = DoublingBudget(reading=reading)
        first = policy.arrive(new, profiles)
        later = policy.ran(policy.ran(first, 1.5, 1.5), 1.5, 3.0)
        assert (first.budget_s, later.budget_s) == (2.0, 4.0)
        for state, cost in zip((first, later), costs, strict=True):
            assert policy.key(state, 9.0, profiles)[0] == cost
            weighted = DoublingBudget(reading=reading, weighted=True)
            assert weighted.key(state, 9.0, profiles)[0] == 3 * cost
    assert DoublingBudget(base=1.5).arrive(new, profiles).budget_s == 3.0


def test_one_iteration_may_double_twice():
    """Of a budget of 1, one iteration of 2 s uses 1 and then 2 up; 4 is left."""
    profiles = profiles_of(1.0)
    state = DoublingBudget().arrive(request(), profiles)
    assert DoublingBudget().ran(state, 2.0, 2.0).budget_s == 4.0


def test_oracle():
    """Size 6 of which 2 are done, e = 3: 6 x 4, or 3 x 4; no time left is the least."""
    profiles = profiles_of(3.0)
    state = Oracle().ran(request(size_s=6.0), 2.0, 2.0)
    assert Oracle().key(state, 2.0, profiles)[0] == 24
    assert Oracle(factor="service").key(state, 2.0, profiles)[0] == 12
    assert Oracle().key(Oracle().ran(state, 9.0, 11.0), 11.0, profiles)[0] == 0


@pytest.mark.parametrize(
    "policy",
    [
        Static(),
        Oracle(factor="service"),
        *(DoublingBudget(reading=r) for r in ("level", "mean", "prod")),
    ],
)
def test_ties(policy):
    """Equal costs (both services of e = 2; sizes as profiled): earlier arrival first, then
    id; nobody shares, so the first ends at 2, not 3."""
    assert order(policy, [(0, 0), (0, 1), (0, 0)], 2, 2) == [0, 0, 1, 1, 2, 2]


def test_equal_costs_go_to_the_smaller_service():
    """e x left: 2 x 3 (2 fresh, of size 3) against 3 x 2 (one of 3 s done)."""
    profiles = profiles_of(2, 3)
    fresh = request(0, 0, arrival_s=1.0, size_s=3.0)
    begun = Oracle().ran(request(1, 1, size_s=3.0), 1.0, 1.0)
    chosen = pick(
        (begun, fresh),
        Oracle(factor="service"),
        now_s=1.0,
        profiles=profiles,
        limit=1,
    )
    assert chosen == (fresh,)


def test_registry():
    """Each name makes a policy of its own, with a line that says what it does, and all
    of them serve a mix of jobs without idling: 3 + 1 + 3 + 1 seconds of work in 8."""
    assert len({known.make() for known in POLICIES.values()}) == len(POLICIES)
    assert len({known.about for known in POLICIES.values()}) == len(POLICIES)
    for known in POLICIES.values():
        ran = order(known.make(), [(0, 1), (1, 0), (1, 1), (6, 0)], 1, 3)
        assert sorted(ran) == [0, 0, 0, 1, 2, 2, 2, 3]


def test_profiles_follow_what_finishes():
    """A first guess of 1 s counted once: after 2 s the mean is 1.5, after 3 s it is 2;
    with a window of 2 the second counts half: 2.25. e_s stays."""
    profile = profiles_of(1.0)[0]
    after = finished(profile, 2.0)
    assert (after.decode_s, after.reference_s) == (1.5, 1.0)
    assert finished(after, 3.0).decode_s == pytest.approx(2.0)
    assert finished(after, 3.0, window=2).decode_s == pytest.approx(2.25)


def test_settings_that_make_no_sense_are_refused():
    """Levels and budgets of 0 s would never end; a margin of 1 would never give way."""
    with pytest.raises(InvalidInput, match="above 0"):
        Mlfq(quantum_s=0.0)
    with pytest.raises(InvalidInput, match="above 0"):
        DoublingBudget(base=0.0)
    with pytest.raises(InvalidInput, match="below 1"):
        pick((), Fcfs(), now_s=0.0, profiles=(), limit=1, margin=1.0)
    with pytest.raises(ValueError, match="expected to take 0"):
        DoublingBudget().arrive(request(), profiles_of(0.0))


# Doubling budget: invariants


@given(
    st.integers(1, 64), st.lists(st.integers(1, 40), max_size=30), st.floats(0.25, 4.0)
)
def test_budgets_stay_near_what_was_attained(mean, used, base):
    """attained <= B <= max(first B, 2 x attained) after every iteration, and at most
    ceil(log2(size / first B)) doublings of a request that needs a little more yet."""
    policy, profiles = DoublingBudget(base=base), profiles_of(float(mean))
    state = first = policy.arrive(request(), profiles)
    doublings = 0
    for now_s, used_s in enumerate(used, 1):
        after = policy.ran(state, float(used_s), float(now_s))
        assert after.attained_s == state.attained_s + used_s
        assert after.attained_s <= after.budget_s
        assert after.budget_s <= max(first.budget_s, 2 * after.attained_s)
        doublings += round(math.log2(after.budget_s / state.budget_s))
        size_s = math.nextafter(after.attained_s, math.inf)
        most = max(math.ceil(math.log2(size_s / first.budget_s)), 0)
        # log2 rounds a size just above a power of two to that power.
        assert doublings <= most + (size_s > first.budget_s * 2**most)
        state = after


# Optimality and its limits


def least_stretch(jobs: Jobs, sizes: Sequence[int], weights: Sequence[float]) -> float:
    """The least sum of weight x latency of all preemptive schedules, by trying all."""

    @cache
    def rest(now: int, left: tuple[int, ...]) -> float:
        there = [i for i, (at, _) in enumerate(jobs) if at <= now and left[i]]
        if not there:
            later = [at for at, _ in jobs if at > now]
            return rest(min(later), left) if later else 0.0
        least = math.inf
        for i in there:
            after = (*left[:i], left[i] - 1, *left[i + 1 :])
            cost = 0.0 if after[i] else weights[jobs[i][1]] * (now + 1 - jobs[i][0])
            least = min(least, cost + rest(now + 1, after))
        return least

    return rest(0, tuple(sizes[service] for _, service in jobs))


def random_jobs(rng: np.random.Generator, services: int) -> Jobs:
    """Two to five jobs that come in the first ten seconds, one of each service at least."""
    count = int(rng.integers(max(services, 2), 6))
    service = [*range(services), *rng.integers(0, services, count - services).tolist()]
    arrival = rng.integers(0, 10, count).tolist()
    return sorted(zip(arrival, service, strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_two_services_of_equal_sizes_are_served_optimally(weighted):
    """1,000 instances against all schedules: the mean over requests (weight 1 / e) and
    that over services (1 / (N e)), each with its own key; budgets that are right know as
    much as the oracle. Not every order does as well: static order loses over 10 %."""
    rng = np.random.default_rng(1)
    static = 1.0
    for _ in range(500):
        jobs = random_jobs(rng, 2)
        sizes = rng.choice(np.arange(1, 6), 2, replace=False).tolist()
        profiles = profiles_of(*sizes, jobs=jobs)
        weights = [
            1 / (p.reference_s * (p.rate_rps if weighted else 1.0)) for p in profiles
        ]
        best = least_stretch(jobs, sizes, weights)
        requests = requests_of(jobs, *sizes)
        found = [
            np.dot(
                [weights[service] for _, service in jobs],
                serve(requests, policy, profiles),
            )
            for policy in (
                Oracle(factor="service", weighted=weighted),
                DoublingBudget(weighted=weighted),
                Static(),
            )
        ]
        assert found[:2] == pytest.approx([best] * 2), (jobs, sizes)
        static = max(static, found[2] / best)
    assert static > 1.1


def test_three_services_are_not_always():
    """Sizes 2, 3, 5, arrivals 8, 6, 3: at 6 the key 3 x 3 preempts 5 x 2, which costs
    1.5 + 1 + 2 = 4.5; the long one first costs 1 + 7/3 + 1."""
    jobs, sizes = [(3, 2), (6, 1), (8, 0)], (2, 3, 5)
    assert stretch(Oracle(factor="service"), jobs, *sizes) == pytest.approx(4.5)
    best = least_stretch(jobs, sizes, [1 / size for size in sizes])
    assert best == pytest.approx(13 / 3)


class LargerFirst(Oracle):
    """The same key with ties to the larger e_s."""

    __slots__ = ()

    def key(self, request, now_s, profiles):
        cost, reference_s, *rest = super().key(request, now_s, profiles)
        return (cost, -reference_s, *rest)


def test_ties_matter():
    """Sizes 1, 2, 4, arrivals {1, 7, 8}, {5}, {2}: 6.0, the optimum, with ties to the
    smaller service; 6.5 with ties to the larger."""
    jobs, sizes = [(1, 0), (2, 2), (5, 1), (7, 0), (8, 0)], (1, 2, 4)
    assert stretch(Oracle(factor="service"), jobs, *sizes) == pytest.approx(6.0)
    assert stretch(LargerFirst(factor="service"), jobs, *sizes) == pytest.approx(6.5)
    best = least_stretch(jobs, sizes, [1 / size for size in sizes])
    assert best == pytest.approx(6.0)


# The choice


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=8),
    st.sampled_from(["fcfs", "static", "db-level", "db-mean", "db-prod", "oracle"]),
)
@settings(max_examples=60)
def test_choosing_each_second_serves_like_a_heap_of_fixed_keys(jobs, name):
    """With whole seconds nothing else can happen between; latencies are the same."""
    jobs, sizes, policy = sorted(jobs), (1, 2, 4), POLICIES[name].make()
    requests, profiles = requests_of(jobs, *sizes), profiles_of(*sizes)
    log = iterate(requests, policy, profiles)
    last = {i: second + 1 for second, batch in enumerate(log) for i in batch}
    latency_s = [last[r.request] - r.arrival_s for r in requests]
    assert serve(requests, policy, profiles).tolist() == pytest.approx(latency_s)


def test_pick_takes_the_best_up_to_the_limit():
    """Two of three, best first; all if there are fewer; none of none."""
    profiles = profiles_of(1, 2, 3)
    waiting = [request(i, service) for i, service in enumerate((2, 0, 1))]

    def ids(limit: int) -> list[int]:
        chosen = pick(waiting, Static(), now_s=0.0, profiles=profiles, limit=limit)
        return [r.request for r in chosen]

    assert ids(2) == [1, 2]
    assert ids(9) == [1, 2, 0]
    assert pick((), Static(), now_s=0.0, profiles=profiles, limit=1) == ()


@pytest.mark.parametrize(
    ("margin", "keeps"), [(0.0, False), (0.1, True), (0.09, False)]
)
def test_a_margin_keeps_what_runs(margin, keeps):
    """Running: key 5 x 2 = 10; newcomer: 3 x 3 = 9. It takes less than 0.9 x 10 to
    displace with a margin of a tenth, and 9 is not less; 9.1 is more than 9."""
    profiles = profiles_of(3, 5)
    policy = Oracle(factor="service")
    begun = policy.ran(request(0, 1, size_s=5.0), 3.0, 3.0)
    newcomer = request(1, 0, arrival_s=3.0, size_s=3.0)
    chosen = pick(
        (newcomer, begun),
        policy,
        now_s=3.0,
        profiles=profiles,
        limit=1,
        running={0},
        margin=margin,
    )
    assert (chosen == (begun,)) is keeps


def test_a_margin_does_not_reorder_what_waits():
    """Neither runs; keys of 5 x 5 and 3 x 3 decide as ever."""
    waiting = [request(0, 1, size_s=5.0), request(1, 0, size_s=3.0)]
    chosen = pick(
        waiting,
        Oracle(factor="service"),
        now_s=1.0,
        profiles=profiles_of(3, 5),
        limit=2,
        running={7},
        margin=0.5,
    )
    assert [r.request for r in chosen] == [1, 0]


def test_a_margin_does_not_lengthen_turns():
    """Where keys are no costs (seconds, levels) a share of one means nothing: 0 ran until
    10, 1 waits since 8 and has the turn."""
    ran = RoundRobin().ran(request(0), 1.0, 10.0)
    newcomer = request(1, arrival_s=8.0)
    chosen = pick(
        (ran, newcomer),
        RoundRobin(),
        now_s=10.0,
        profiles=profiles_of(1),
        limit=1,
        running={0},
        margin=0.5,
    )
    assert chosen == (newcomer,)


def test_patience_lets_the_starved_in():
    """Short jobs of 1 s come each second; a long one (e = 4) waits for their end, or with
    a patience of 2 runs one second when it has been unserved for more than 8."""
    jobs = [(0, 1), *((second, 0) for second in range(30))]
    jobs.sort()
    requests, profiles = requests_of(jobs, 1, 4), profiles_of(1, 4)
    long = next(r.request for r in requests if r.service == 1)

    def seconds(patience: float) -> list[int]:
        log = iterate(requests, Static(), profiles, patience=patience)
        return [second for second, batch in enumerate(log) if long in batch]

    assert seconds(math.inf) == [30, 31, 32, 33]
    assert seconds(2.0)[:2] == [9, 19]


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=12),
    st.sampled_from(list(POLICIES)),
    st.integers(1, 2),
    st.floats(0.5, 4.0),
)
@settings(max_examples=60)
def test_nobody_waits_much_beyond_patience(jobs, name, limit, patience):
    """Longest overdue first: unserved for at most patience x e_s and one iteration for
    each other request, under every policy, and all are served in the end."""
    jobs, sizes = sorted(jobs), (1, 2, 5)
    requests = requests_of(jobs, *sizes)
    log = iterate(
        requests,
        POLICIES[name].make(),
        profiles_of(*sizes),
        limit=limit,
        margin=0.1,
        patience=patience,
    )
    for r in requests:
        starts = [second for second, batch in enumerate(log) if r.request in batch]
        assert len(starts) == r.size_s
        since = [r.arrival_s, *(start + 1 for start in starts[:-1])]
        longest = max(start - s for start, s in zip(starts, since, strict=True))
        assert longest <= patience * r.size_s + len(jobs)


# Queueing theory


def mean_latency_s(load: Load, policy: Policy, count: int, **how: float) -> list[float]:
    """By service."""
    requests = load.draw(count, np.random.default_rng(7))
    latency_s = serve(requests, policy, load.profiles(), **how)
    service = np.array([r.service for r in requests])
    return [float(latency_s[service == s].mean()) for s in range(len(load.shares))]


def test_fcfs_is_the_md1_queue():
    """M/D/1 at load 0.6: 1 + 0.6 / (2 x 0.4) = 1.75 sizes."""
    load = Load(means_s=(1.0,), shares=(1.0,), cv=0.0, load=0.6)
    assert mean_latency_s(load, Fcfs(), 100_000) == pytest.approx([1.75], rel=0.02)


def test_static_order_is_preemptive_priority():
    """M/G/1 with preemptive priority (estimator E2) for sizes of means 1 and 2, CV 0.5,
    load 0.6; each service within 2 %."""
    load = Load(means_s=(1.0, 2.0), shares=(0.5, 0.5), cv=0.5, load=0.6)
    means = np.array(load.means_s)
    rates = load.rate_rps * np.array(load.shares)
    expected = preemptive_priority_s(
        rates.tolist(), means.tolist(), (means**2 * 1.25).tolist()
    )
    found = mean_latency_s(load, Static(), 150_000)
    assert found == pytest.approx(expected, rel=0.02)


def test_round_robin_is_processor_sharing():
    """With turns of a 50th of the size at load 0.5 each service takes twice its size,
    whatever its size."""
    load = Load(means_s=(1.0, 2.0), shares=(0.5, 0.5), cv=0.0, load=0.5)
    found = mean_latency_s(load, RoundRobin(), 20_000, quantum_s=0.03)
    assert found == pytest.approx([2.0, 4.0], rel=0.02)


def test_without_variance_budgets_and_oracles_are_the_static_order():
    """Equal sizes inside each of three services, load 0.85: D1 within 3 %."""
    load = Load(cv=0.0, load=0.85)

    def d1(policy: Policy) -> float:
        latency_s = mean_latency_s(load, policy, 10_000)
        return float(np.mean(np.array(latency_s) / load.means_s))

    others = [Oracle(), *(DoublingBudget(reading=r) for r in ("level", "mean", "prod"))]
    static = d1(Static())
    assert [d1(policy) for policy in others] == pytest.approx([static] * 4, rel=0.03)


def test_order_of_policies_under_variance():
    """CV 0.8, load 0.85: FCFS far behind MLFQ, then doubling budget, then the oracle."""
    load = Load(cv=0.8, load=0.85)
    fcfs, mlfq, budget, oracle = (
        np.mean(np.array(mean_latency_s(load, policy, 20_000)) / load.means_s)
        for policy in (Fcfs(), Mlfq(quantum_s=0.015), DoublingBudget(), Oracle())
    )
    assert fcfs > 3 * mlfq
    assert mlfq > 1.1 * budget
    assert budget > 1.2 * oracle
