"""Queueing theory through the engine of several LLMs: one request at a time, iterations of
10 ms (the size of a request is its tokens), seeds fixed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import ArrayLike

from foreserve.models.cost import IterationTime
from foreserve.models.lengths import Floats
from foreserve.models.sharing import preemptive_priority_s
from foreserve.runtime.scheduler import Fcfs, Policy, Profile, RoundRobin, Static
from foreserve.runtime.simulated.shared import Hosted, Pool, SharedEngine, SharedJob
from foreserve.runtime.turns import Rules

STEP_S = 0.01


def latency_s(
    policy: Policy, arrival_s: Floats, service: ArrayLike, tokens: ArrayLike
) -> Floats:
    """Seconds from arrival to end, by request, one at a time on the group."""
    services, outputs = np.array(service), np.array(tokens)
    time = IterationTime(
        prefill_base_s=STEP_S,
        prefill_s_per_token=0.0,
        prefill_s_per_token2=0.0,
        decode_base_s=STEP_S,
        decode_s_per_seq=0.0,
        decode_s_per_context_token=0.0,
        relative_error=0.0,
        source="test",
    )
    hosted = []
    for index in range(services.max() + 1):
        mean = float(outputs[services == index].mean())
        profile = Profile(reference_s=mean * STEP_S, decode_s=mean * STEP_S)
        hosted.append(
            Hosted(
                time=time,
                kv_bytes_per_token=1,
                profile=profile,
                input_tokens=1,
                output_tokens=mean,
                usual_output_tokens=1,
            )
        )
    pool = Pool(num_bytes=10**12, page_bytes=10**6)
    engine = SharedEngine(hosted, pool, policy, Rules(max_num_seqs=1, near=0.0))
    found = np.empty(len(arrival_s))
    rows = zip(arrival_s.tolist(), services.tolist(), outputs.tolist(), strict=True)
    for number, (at_s, index, output) in enumerate(rows):
        while engine.next_s < at_s:
            now_s = engine.next_s
            for job in engine.advance():
                found[job.request] = now_s - job.arrival_s
        engine.submit(
            SharedJob(
                request=number,
                service=index,
                arrival_s=at_s,
                input_tokens=1,
                output_tokens=output,
            ),
            at_s,
        )
    while list(engine.jobs()):
        now_s = engine.next_s
        for job in engine.advance():
            found[job.request] = now_s - job.arrival_s
    return found


def poisson(rate_rps: float, count: int, rng: np.random.Generator) -> Floats:
    return np.cumsum(rng.exponential(1 / rate_rps, count))


def in_order_s(arrival_s: Floats, size_s: float) -> Floats:
    """Latencies of one at a time, first come first served: Lindley's recursion."""
    end_s, ends_s = 0.0, []
    for at_s in arrival_s.tolist():
        end_s = max(end_s, at_s) + size_s
        ends_s.append(end_s)
    return np.array(ends_s) - arrival_s


def test_first_come_first_served_is_md1():
    """M/D/1, sizes of 1 s, load 0.5: mean wait rho / (2 (1 - rho)) = 0.5 s, by Lindley's
    recursion over 200,000 requests within 2 %. The engine's latencies are those of the
    recursion request by request, to rounding, at load 0.5 and at 0.9."""
    rng, count = np.random.default_rng(5), 5_000
    assert in_order_s(poisson(0.5, 200_000, rng), 1.0).mean() == pytest.approx(
        1.5, rel=0.02
    )
    for load in (0.5, 0.9):
        arrival_s = poisson(load, count, rng)
        found = latency_s(Fcfs(), arrival_s, [0] * count, [100] * count)
        assert found == pytest.approx(in_order_s(arrival_s, 1.0))


def shared_s(arrival_s: Floats, size_s: Floats) -> Floats:
    """Latencies of ideal processor sharing: each of n gets a n-th of the server. A request
    ends when the attained time of one that was always there has grown by its size."""
    now_s = attained_s = 0.0
    ends: list[tuple[float, int]] = []
    found = np.empty(len(arrival_s))

    def leave(until_s: float) -> None:
        nonlocal now_s, attained_s
        while ends and now_s + (ends[0][0] - attained_s) * len(ends) <= until_s:
            now_s += (ends[0][0] - attained_s) * len(ends)
            attained_s, number = heapq.heappop(ends)
            found[number] = now_s - arrival_s[number]
        if ends:
            attained_s += (until_s - now_s) / len(ends)
        now_s = until_s

    for number, (at_s, size) in enumerate(zip(arrival_s, size_s, strict=True)):
        leave(at_s)
        heapq.heappush(ends, (attained_s + size, number))
    leave(math.inf)
    return found


SIZES: dict[str, tuple[Sequence[int], Sequence[float]]] = {
    "equal": ((40,), (1.0,)),
    "few long": ((20, 220), (0.9, 0.1)),
    "uniform": (tuple(range(1, 80)), (1 / 79,) * 79),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_round_robin_is_processor_sharing(name):
    """M/G/1-PS at load 0.6, sizes of mean 0.4 s: mean latency d / (1 - rho) = 1 s whatever
    their distribution, and each size in proportion (ideal sharing, 200,000 requests,
    within 2 %); the engine's turns of 10 ms give on 2,000 of them what ideal sharing
    gives, within 2 %."""
    sizes, shares = SIZES[name]

    def draw(count: int) -> tuple[Floats, Floats]:
        rng = np.random.default_rng(2)
        arrival_s = poisson(0.6 / (40 * STEP_S), count, rng)
        return arrival_s, rng.choice(sizes, count, p=shares)

    arrival_s, tokens = draw(200_000)
    ideal = shared_s(arrival_s, tokens * STEP_S)
    assert ideal.mean() == pytest.approx(1.0, rel=0.02)
    for size in sizes if len(sizes) < 3 else ():
        mean_s = ideal[tokens == size].mean()
        assert mean_s == pytest.approx(size * STEP_S / 0.4, rel=0.02)
    arrival_s, tokens = draw(2_000)
    found = latency_s(RoundRobin(), arrival_s, [0] * 2_000, tokens)
    ideal = shared_s(arrival_s, tokens * STEP_S)
    assert found.mean() == pytest.approx(ideal.mean(), rel=0.02)


def test_static_order_is_preemptive_priority():
    """E2 for two LLMs of mean 0.4 and 1.6 s, outputs uniform from half to one and a half
    of it, load 0.7: each within 2 %."""
    rng, count = np.random.default_rng(9), 60_000
    service = rng.choice(2, count, p=[0.6, 0.4])
    low, high = np.array([20, 80])[service], np.array([60, 240])[service]
    tokens = rng.integers(low, high, endpoint=True)
    means = np.array([0.4, 1.6])
    squares = np.array(
        [np.mean((np.arange(a, b + 1) * STEP_S) ** 2) for a, b in ((20, 60), (80, 240))]
    )
    rate_rps = 0.7 / float(means @ [0.6, 0.4])
    arrival_s = poisson(rate_rps, count, rng)
    found = latency_s(Static(), arrival_s, service, tokens)
    expected = preemptive_priority_s([rate_rps * 0.6, rate_rps * 0.4], means, squares)
    by_llm = [found[service == s].mean() for s in (0, 1)]
    assert by_llm == pytest.approx(expected, rel=0.02)
