"""Capacity under an SLO: by hand where lengths are equal, against the engine where not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreserve.models.capacity import capacity
from foreserve.models.lengths import Lengths
from foreserve.models.specs import Slo
from foreserve.runtime.simulated.engine import EngineLimits
from foreserve.runtime.simulated.replay import replay
from tests.build import TIME

LOOSE = Slo(ttft_s=100.0, tpot_s=100.0)


def held(lengths: Lengths, slo: Slo = LOOSE, **changes):
    limits = {"kv_tokens": 1e9, "max_num_seqs": 256, **changes}
    return capacity(TIME, slo, lengths, **limits)


def test_tpot_bounds_the_batch_by_hand():
    """TIME: a step takes 10 + 0.1 b ms; 1000 in and 10,000 out add b/10,000 prompts of
    10 ms: the mean, 10 + 0.101 b, is within 20 ms up to 99. A request's own TPOT has a
    standard deviation of sqrt(2 b) * 10 ms / 10,000 = 0.014 ms: at 99 half of them would
    be beyond it, at 98 it is seven deviations off."""
    found = held(Lengths.fixed(1000, 10_000), Slo(ttft_s=100, tpot_s=0.020))
    assert found.concurrency == 98
    assert found.tpot_s == pytest.approx(0.010 + 0.000101 * 98)


def test_short_answers_need_slack_by_hand():
    """With 100 out the mean 10 + 0.2 b allows 50, yet a request's own deviates by
    sqrt(b) * 10 ms / 100: one in a hundred is 2.33 deviations slower. At 42 those are
    1.51 ms of 1.6, at 43 1.53 of 1.4."""
    found = held(Lengths.fixed(1000, 100), Slo(ttft_s=100, tpot_s=0.020))
    assert found.concurrency == 42


def test_the_cache_bounds_the_batch_by_hand():
    """1100 tokens each, all alike: nine fit 10,000."""
    assert held(Lengths.fixed(1000, 100), kv_tokens=10_000).concurrency == 9


def test_state_per_sequence_takes_cache():
    """500 tokens' worth of state each: six fit."""
    found = held(Lengths.fixed(1000, 100), kv_tokens=10_000, state_tokens=500)
    assert found.concurrency == 6


def test_uneven_lengths_hold_less_than_their_mean():
    """Same means; the uneven sequences need a margin, and long ones are in flight."""
    even = Lengths.fixed(1000, 100)
    rng = np.random.default_rng(0)
    inputs = rng.lognormal(0, 1.0, 400)
    uneven = Lengths.of_requests(inputs, rng.lognormal(0, 1.0, 400)).scaled(1000, 100)
    assert uneven.mean_input == pytest.approx(1000)
    limits = {"kv_tokens": 60_000}
    assert held(uneven, **limits).concurrency < held(even, **limits).concurrency


def test_the_tail_of_prompts_bounds_the_ttft():
    """Nine prompts of 100 and one of 50,000: its 0.5 s alone breaks a target that the
    mean (5,090 tokens) would meet."""
    mixed = Lengths(np.array([100.0] * 9 + [50_000.0]), np.full(10, 100.0))
    slo = Slo(ttft_s=0.4, tpot_s=10.0)
    assert held(mixed, slo) is None
    assert held(Lengths.fixed(5090, 100), slo) is not None


def test_nothing_fits_an_impossible_target():
    """A step alone takes 10.1 ms."""
    assert held(Lengths.fixed(10, 10), Slo(ttft_s=1, tpot_s=0.005)) is None


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    tpot_s=st.floats(0.011, 0.2),
    ttft_s=st.floats(0.05, 5.0),
    kv_tokens=st.integers(2_000, 400_000),
)
def test_one_more_sequence_would_break_a_limit(seed, tpot_s, ttft_s, kv_tokens):
    """The answer is feasible and largest: allowed one more, it stays; a looser target
    never holds fewer."""
    rng = np.random.default_rng(seed)
    lengths = Lengths.of_requests(rng.integers(1, 4000, 50), rng.integers(1, 800, 50))
    slo = Slo(ttft_s=ttft_s, tpot_s=tpot_s)
    found = held(lengths, slo, kv_tokens=kv_tokens)
    if found is None:
        return
    assert found.tpot_s <= tpot_s
    assert found.ttft_s <= found.ttft_p99_s <= ttft_s
    if found.concurrency < 256:
        more = held(lengths, slo, kv_tokens=kv_tokens, max_num_seqs=512)
        assert more.concurrency == found.concurrency
    looser = Slo(ttft_s=2 * ttft_s, tpot_s=2 * tpot_s)
    assert held(lengths, looser, kv_tokens=kv_tokens).concurrency >= found.concurrency


def test_lengths_are_thinned_along_the_prompts():
    """100,000 requests to 512 with the same mean and 99th percentile, in 1 %; answers
    stay with their prompts."""
    rng = np.random.default_rng(0)
    inputs = rng.lognormal(6, 1, 100_000)
    found = Lengths.of_requests(inputs, 2 * inputs)
    assert len(found.input_tokens) == 512
    assert found.mean_input == pytest.approx(inputs.mean(), rel=0.01)
    exact = np.quantile(inputs, 0.99)
    assert np.quantile(found.input_tokens, 0.99) == pytest.approx(exact, rel=0.05)
    assert (found.output_tokens == 2 * found.input_tokens).all()


def simulated_ttft_p99_s(lengths: Lengths, rate_rps: float, kv_tokens: int) -> float:
    """Poisson arrivals at ``rate_rps`` on the simulated engine, 6,000 requests."""
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(1 / rate_rps, 6000))
    pick = rng.integers(0, len(lengths.input_tokens), 6000)
    rows = [
        (at, int(lengths.input_tokens[k]), int(lengths.output_tokens[k]))
        for at, k in zip(arrivals.tolist(), pick.tolist(), strict=True)
    ]
    found = replay(TIME, kv_tokens, EngineLimits(), rows)
    return float(np.quantile(found.first_token_s - arrivals, 0.99))


def test_the_engine_meets_the_ttft_at_the_predicted_rate():
    """Uneven lengths: at 80 % of the predicted rate the simulated P99 TTFT is within the
    target; at 250 % it is not."""
    rng = np.random.default_rng(1)
    inputs = np.minimum(rng.lognormal(6, 1.2, 500), 20_000).astype(int) + 1
    outputs = np.minimum(rng.lognormal(4.5, 1.0, 500), 2_000).astype(int) + 1
    lengths = Lengths.of_requests(inputs, outputs)
    slo = Slo(ttft_s=0.6, tpot_s=0.1)
    found = held(lengths, slo, kv_tokens=10**6)
    assert simulated_ttft_p99_s(lengths, 0.8 * found.rate_rps, 10**6) <= slo.ttft_s
    assert simulated_ttft_p99_s(lengths, 2.5 * found.rate_rps, 10**6) > slo.ttft_s


def test_capacity_needs_no_mean_of_zero():
    """Answers of one token: a pure prefill service."""
    found = held(Lengths.fixed(1000, 1), Slo(ttft_s=0.2, tpot_s=10))
    assert found.concurrency >= 1
    assert found.rate_rps > 0
    assert dataclasses.asdict(found)
