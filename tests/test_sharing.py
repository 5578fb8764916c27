"""Estimators of sharing: check tables, limits by hand, and independent simulations.

The coefficients are fits to MuxServe's measured table for LLaMA on A100-80GB (the SeaLLM
reference, section 3); beyond 512 tokens they extrapolate.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest

from foreserve.models.cost import IterationTime
from foreserve.models.sharing import (
    Service,
    TpCost,
    batch_aware_s,
    best_tp,
    pareto,
    preemptive_priority_s,
    processor_sharing_s,
    tp_costs,
)


def fit(prefill: tuple[float, float, float], decode: tuple[float, float, float]):
    """Coefficients ``a + p * tokens + q * tokens^2 (or context)`` in milliseconds."""
    return IterationTime(
        prefill_base_s=prefill[0] / 1e3,
        prefill_s_per_token=prefill[1] / 1e3,
        prefill_s_per_token2=prefill[2] / 1e3,
        decode_base_s=decode[0] / 1e3,
        decode_s_per_seq=decode[1] / 1e3,
        decode_s_per_context_token=decode[2] / 1e3,
        relative_error=0.1,
        source="fit to MuxServe's table",
    )


LLAMA = {
    "7B": {
        1: fit((7.94, 0.0700, 3.1e-6), (11.16, 0.0573, 3.46e-4)),
        2: fit((12.5, 0.0400, 5.6e-7), (11.85, 0.0399, 1.38e-4)),
        4: fit((13.5, 0.0234, 1.1e-6), (12.32, 0.0238, 6.4e-5)),
        8: fit((14.8, 0.0159, 0), (13.09, 0.0167, 3.4e-5)),
    },
    "13B": {
        1: fit((12.9, 0.1256, 6.5e-6), (19.68, 0.0992, 5.25e-4)),
        2: fit((15.9, 0.0699, 4.6e-6), (15.02, 0.0773, 2.47e-4)),
        4: fit((15.8, 0.0405, 2.8e-6), (14.97, 0.0413, 1.04e-4)),
        8: fit((17.3, 0.0266, 0), (15.58, 0.0292, 4.9e-5)),
    },
    "30B": {2: fit((22.1, 0.1692, 6.7e-6), (28.85, 0.1489, 6.74e-4))},
    "65B": {
        4: fit((27.9, 0.1895, 1.7e-5), (32.51, 0.1647, 7.33e-4)),
        8: fit((31.3, 0.1092, 1.1e-5), (29.76, 0.0990, 5.06e-4)),
    },
}
FLAT = fit((100, 0, 0), (10, 0, 0))
"""A prompt takes 100 ms and a step 10 ms, whatever their sizes."""


def services(scale: float, kv_sequences: float = math.inf) -> list[Service]:
    """7B, 13B and 30B at TP 2 on one group, as in the check table of section 6."""
    return [
        Service(
            time=LLAMA[name][2],
            rate_rps=rate * scale,
            input_tokens=300,
            output_tokens=150,
            kv_sequences=kv_sequences,
        )
        for name, rate in (("7B", 2.0), ("13B", 1.0), ("30B", 0.4))
    ]


def flat(rate_rps: float, output_tokens: float = 11) -> Service:
    return Service(
        time=FLAT, rate_rps=rate_rps, input_tokens=5, output_tokens=output_tokens
    )


# --- E1 -------------------------------------------------------------------------------


def test_processor_sharing_by_hand():
    """Alone 100 + 10 * 10 = 200 ms; in batches of 11 a request takes 100 + 11 * 10 / 11 =
    110 ms of the group, so 5 a second load it to 0.55 and stretch it to 200 / 0.45."""
    assert flat(2.0).isolated_s == pytest.approx(0.2)
    assert flat(2.0).demand_s(11) == pytest.approx(0.11)
    shared = processor_sharing_s([flat(2.0), flat(3.0)], (11, 11))
    assert shared == pytest.approx((0.2 / 0.45,) * 2)


def test_processor_sharing_overloaded():
    """Ten a second at 110 ms each are too many."""
    assert processor_sharing_s([flat(10.0)], (11,)) == (math.inf,)


# --- E2 -------------------------------------------------------------------------------


def test_priority_matches_its_check_table():
    """Sizes 0.3, 1.5, 6 s, shares 60/30/10 %, CV 0.8 inside each, load 0.8 (section 6):
    0.333, 2.445, 29.7 s (simulated there: within 5 %)."""
    sizes, shares = np.array([0.3, 1.5, 6.0]), np.array([0.6, 0.3, 0.1])
    rates = shares * 0.8 / (sizes @ shares)
    latency_s = preemptive_priority_s(rates, sizes, sizes**2 * (1 + 0.8**2))
    assert latency_s == pytest.approx((0.333, 2.445, 29.7), rel=2e-3)


def test_priority_of_one_class_is_pollaczek_khinchine():
    """One class of exponential work: M/M/1, sojourn d / (1 - rho) = 0.5 / 0.6."""
    assert preemptive_priority_s([0.8], [0.5], [0.5]) == pytest.approx((0.5 / 0.6,))


def test_priority_shields_the_first_from_overload():
    """Loads 0.4 and 0.8: the first class never sees the second, which starves, and with
    it all below."""
    first, second, third = preemptive_priority_s(
        [0.4, 0.2, 0.001], [1.0, 4.0, 1.0], [1.0, 16.0, 1.0]
    )
    assert (first,) == preemptive_priority_s([0.4], [1.0], [1.0])
    assert second == third == math.inf


# --- E3 -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.25, (6.4, 6.8, 8.3)),
        (0.5, (8.5, 8.6, 9.3)),
        (1.0, (10.3, 10.3, 10.4)),
        (1.5, (11.8, 11.8, 11.9)),
        (2.0, (13.7, 13.7, 13.7)),
        (2.5, (16.2, 16.2, 16.3)),
    ],
)
def test_batch_aware_match_their_check_table(scale, expected):
    """Section 6, to the printed digit (8.55, 9.27 are printed as 8.6, 9.3)."""
    latency_s = batch_aware_s(services(scale))
    assert latency_s == pytest.approx(expected, abs=0.0501)


def test_batch_aware_of_one_idle_service_is_its_isolated_time():
    """Without load: the prompt, and one step of a batch of one per output token (E3 counts
    all 11 of them, the isolated time 10)."""
    (latency_s,) = batch_aware_s([flat(1e-9)])
    assert latency_s == pytest.approx(0.1 + 11 * 0.01, abs=2e-6)


def test_batch_aware_overloaded():
    """Prompts alone fill the group (U = 1); or batches grow without bound; or the KV
    cap is below what the rate needs, for the service that has it."""
    assert batch_aware_s([flat(10.0)]) == (math.inf,)
    assert max(batch_aware_s(services(5.0))) < math.inf
    assert sum(s.rate_rps * s.prefill_s for s in services(6.0)) < 1
    assert batch_aware_s(services(6.0)) == (math.inf,) * 3
    seven, thirteen, thirty = batch_aware_s(services(1.0, kv_sequences=12))
    assert seven == math.inf  # 2 req/s for 10 s need 20 slots
    assert thirteen < 10.5
    assert thirty < 10.5


def by_iterations(mix: list[Service], horizon_s: float, seed: int) -> list[float]:
    """Mean latencies by playing every iteration: one prompt at a time, first come first
    served and before any decoding; else the services take turns of one step."""
    rng = np.random.default_rng(seed)
    arrivals = sorted(
        (float(t), i)
        for i, s in enumerate(mix)
        for t in np.cumsum(rng.exponential(1 / s.rate_rps, int(2 * s.rate_rps * 1e4)))
        if t < horizon_s
    )
    coming, prompts = deque(arrivals), deque()
    batches: list[list[list[float]]] = [[] for _ in mix]  # [arrival, tokens out]
    took: list[list[float]] = [[] for _ in mix]
    now_s, turn = 0.0, 0
    while coming or prompts or any(batches):
        if not prompts and not any(batches):
            now_s = max(now_s, coming[0][0])
        while coming and coming[0][0] <= now_s:
            prompts.append(coming.popleft())
        if prompts:
            arrival_s, i = prompts.popleft()
            now_s += mix[i].prefill_s
            batches[i].append([arrival_s, 0.0])
            continue
        turn = next(
            i % len(mix) for i in range(turn + 1, turn + 4) if batches[i % len(mix)]
        )
        service, batch = mix[turn], batches[turn]
        context = sum(service.input_tokens + out for _, out in batch)
        now_s += service.time.decode_s(len(batch), context)
        for sequence in batch:
            sequence[1] += 1
            if sequence[1] == service.output_tokens:
                took[turn].append(now_s - sequence[0])
        batches[turn] = [s for s in batch if s[1] < service.output_tokens]
    return [float(np.mean(latencies)) for latencies in took]


def test_batch_aware_against_an_iteration_simulator():
    """The cell of scale 1.0, played out: within 7 %, as the reference says."""
    mix = services(1.0)
    simulated_s = by_iterations(mix, horizon_s=1500.0, seed=3)
    assert batch_aware_s(mix) == pytest.approx(simulated_s, rel=0.07)


# --- TP size --------------------------------------------------------------------------


def at_tp(name: str, input_tokens: float, output_tokens: float) -> dict[int, Service]:
    return {
        tp: Service(
            time=time,
            rate_rps=0.0,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        for tp, time in LLAMA[name].items()
    }


@pytest.mark.parametrize(
    ("name", "lengths", "isolated_s", "gpu_s"),
    [
        ("7B", (161, 337), (3.83, 4.03, 4.17, 4.42), (0.195, 0.345, 0.649, 1.32)),
        ("13B", (161, 337), (6.74, 5.13, 5.08, 5.27), (0.332, 0.478, 0.822, 1.61)),
        ("65B", (161, 337), (11.1, 10.1), (2.15, 3.62)),
        ("13B", (1155, 211), (4.46, 3.34, 3.25, 3.34), (0.457, 0.568, 0.806, 1.36)),
        ("7B", (2048, 28), (0.49, 0.43, 0.40, 0.40), (0.196, 0.232, 0.325, 0.49)),
        ("13B", (2048, 28), (0.86, 0.60, 0.52, 0.50), (0.348, 0.416, 0.523, 0.712)),
    ],
)
def test_tp_costs_match_their_table(name, lengths, isolated_s, gpu_s):
    """Section 7: isolated times and GPU-seconds per request at batch 32, within 1 % or
    the digits printed there."""
    costs = tp_costs(at_tp(name, *lengths))
    assert [c.tp for c in costs] == sorted(LLAMA[name])
    assert [c.isolated_s for c in costs] == pytest.approx(
        isolated_s, rel=0.005, abs=0.0051
    )
    assert [c.gpu_s for c in costs] == pytest.approx(gpu_s, rel=0.01)


def test_long_outputs_want_one_gpu_and_long_prompts_more():
    """The best TP size is a property of the traffic: 7B chat is best at TP 1 in both
    respects, 13B with long prompts trades up to TP 8 when GPUs cost nothing."""
    chat = tp_costs(at_tp("7B", 161, 337))
    assert [c.tp for c in pareto(chat)] == [1]
    code = tp_costs(at_tp("13B", 2048, 28))
    assert [c.tp for c in pareto(code)] == [1, 2, 4, 8]
    chosen = [best_tp(code, theta) for theta in (0.0, 0.2, 0.8, 5.0)]
    assert chosen == [8, 4, 2, 1]


def test_pareto_drops_what_is_slower_and_dearer():
    """TP 4 is slower and dearer than TP 2; of two equal sizes the smaller stays."""
    costs = [
        TpCost(tp=1, isolated_s=4.0, gpu_s=1.0),
        TpCost(tp=2, isolated_s=3.0, gpu_s=1.5),
        TpCost(tp=4, isolated_s=3.5, gpu_s=2.0),
        TpCost(tp=8, isolated_s=3.0, gpu_s=1.5),
    ]
    assert [c.tp for c in pareto(costs)] == [1, 2]
