"""Simulated engines: who gets which token when."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foreserve.models.cost import IterationTime
from foreserve.runtime.engines.batch import Batch, Job
from foreserve.runtime.simulated.engine import EngineLimits
from tests import per_token

TIME = IterationTime(
    prefill_base_s=0.01,
    prefill_s_per_token=1e-4,
    prefill_s_per_token2=1e-9,
    decode_base_s=0.008,
    decode_s_per_seq=1e-4,
    decode_s_per_context_token=1e-7,
    relative_error=0.0,
    source="test",
    prefill_floor_s=0.012,
)


def batch(room_tokens=16_000, max_num_seqs=32, budget=512) -> Batch:
    return Batch(
        TIME, room_tokens, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget
    )


def drive(engine: Batch, jobs: list[Job], steps_s=()) -> None:
    """Submit each at its arrival; look also at ``steps_s``, which must change nothing."""
    moments = sorted([(job.arrival_s, 1, job) for job in jobs], key=lambda m: m[0])
    looks = [(at_s, 0, None) for at_s in steps_s]
    for at_s, _, job in sorted([*moments, *looks], key=lambda m: m[:2]):
        engine.advance(at_s)
        if job is not None:
            engine.submit(job)
    while engine.event_s < math.inf:
        engine.advance(engine.event_s)


def test_one_request_takes_its_prefill_and_its_decode_steps():
    """100 tokens in, 4 out, alone: the prefill's time, then three steps with a context
    that grows by one, each token where the cost model says."""
    engine, job = batch(), Job(100, 4, arrival_s=2.0)
    engine.advance(2.0)
    engine.submit(job)
    first_s = 2.0 + TIME.prefill_s(100, 100**2)
    ends = [first_s]
    for context in (101, 102, 103):
        ends.append(ends[-1] + TIME.decode_s(1, context))
    assert engine.event_s == pytest.approx(first_s)
    for number, end_s in enumerate(ends):
        assert engine.token_s(end_s - 1e-6) == pytest.approx(end_s)
        engine.advance(end_s - 1e-6)
        assert engine.given(job, end_s - 1e-6) == number
        engine.advance(end_s + 1e-9)
        assert engine.given(job, end_s + 1e-9) == number + 1
    assert (job.first_s, job.end_s) == pytest.approx((ends[0], ends[3]))
    assert engine.event_s == math.inf
    assert engine.free == engine.blocks


@pytest.mark.parametrize(
    ("room_tokens", "max_num_seqs"), [(16_000, 32), (2_000, 32), (16_000, 3), (700, 8)]
)
@pytest.mark.parametrize("seed", range(6))
def test_same_moments_as_the_plain_reference(seed, room_tokens, max_num_seqs):
    """Many iterations at once, and looking in between, change nothing: first tokens, ends
    and preemptions are those of an engine that takes every iteration by itself."""
    rng = np.random.default_rng(seed)
    count = 40
    arrivals = np.cumsum(rng.exponential(0.05, count))
    lengths = [(int(a), int(b)) for a, b in rng.integers(1, 300, (count, 2))]
    ours = [
        Job(a, b, arrival_s=float(t))
        for (a, b), t in zip(lengths, arrivals, strict=True)
    ]
    engine = batch(room_tokens, max_num_seqs)
    drive(engine, ours, steps_s=rng.uniform(0, 5, 50))
    theirs = [
        per_token.Job(number, job.arrival_s, job.input_tokens, job.output_tokens)
        for number, job in enumerate(ours)
    ]
    limits = EngineLimits(
        max_num_batched_tokens=512, max_num_seqs=max_num_seqs, caches_prefixes=False
    )
    ends = per_token.per_token(TIME, room_tokens, theirs, limits)
    for number, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.first_s == pytest.approx(reference.first_token_s, abs=1e-9)
        assert mine.end_s == pytest.approx(ends[number], abs=1e-9)
        assert mine.preemptions == reference.preemptions
    assert (room_tokens > 2_000) or engine.totals.preemptions > 0
    assert engine.free == engine.blocks
    assert engine.totals.prompt_tokens == sum(job.input_tokens for job in ours)


def test_who_leaves_frees_its_place_after_the_iteration_under_way():
    """One place, two requests: the first leaves in its third decode step, the second joins
    at that step's end, as if the first had ended there."""
    engine = batch(max_num_seqs=1)
    first, second = Job(10, 1000, arrival_s=0.0), Job(10, 1, arrival_s=0.0)
    engine.submit(first)
    engine.submit(second)
    begin_s = engine.event_s
    steps = [TIME.decode_s(1, 11 + i) for i in range(3)]
    leaves_s = begin_s + sum(steps[:2]) + steps[2] / 2
    engine.advance(leaves_s)
    engine.cancel(first, leaves_s)
    joins_s = begin_s + sum(steps)
    assert engine.event_s == pytest.approx(joins_s)
    engine.advance(joins_s + 1e-9)
    assert engine.running == [second]
    assert engine.event_s == pytest.approx(joins_s + TIME.prefill_s(10, 100))
    engine.advance(10.0)
    assert (first.end_s, second.given, engine.free) == (None, 1, engine.blocks)


def test_a_request_that_never_fits_is_refused():
    """10 blocks hold 160 tokens; the last answer token is never stored."""
    engine = batch(room_tokens=160)
    assert engine.fits(Job(100, 61, arrival_s=0.0))
    assert not engine.fits(Job(100, 62, arrival_s=0.0))
    with pytest.raises(ValueError, match="never fit"):
        engine.submit(Job(100, 62, arrival_s=0.0))


def test_what_drains_gives_up_what_nobody_can_need():
    """Of 1000 blocks a request of 100 + 60 tokens may come to need 10: 990 are given up,
    none more later, its times stay the same, and after `grow` all are there again."""
    jobs = [Job(100, 60, arrival_s=0.0) for _ in range(2)]
    alone, engine = batch(), batch()
    drive(alone, jobs[:1])
    engine.submit(jobs[1])
    engine.advance(0.1)
    assert engine.shrink() == engine.shrink() == 990
    assert (engine.blocks, engine.fits(Job(100, 61, arrival_s=0.1))) == (10, True)
    assert not engine.fits(Job(100, 62, arrival_s=0.1))
    while engine.event_s < math.inf:
        engine.advance(engine.event_s)
    assert jobs[0].end_s == jobs[1].end_s
    engine.grow()
    assert engine.free == engine.blocks == 1000
