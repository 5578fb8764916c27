"""Closed-loop runs by hand, and corrections found again in what they were put into."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from foreserve.models import catalog
from foreserve.models.perf.calibrate import Deployment, Slopes, fit, interval
from foreserve.models.perf.closed_loop import Benchmark, Scheduler, play
from foreserve.models.perf.measured import Corrections, MeasuredTiming
from foreserve.models.perf.timing import Estimate
from foreserve.planner.perf_calibration import (
    Served,
    calibrate_deployments,
    calibrate_requests,
)


class Flat:
    """10 ms a decode step and 1 ms per 100 prompt tokens, whatever else."""

    corrections = Corrections(request_s=0.0)

    def decode(self, batch: Any, context: Any) -> Estimate:
        return self._of(np.full(np.shape(batch), 0.010))

    def prefill(self, tokens: Any, *, past: Any = 0, prompts: Any = 1) -> Estimate:
        return self._of(np.asarray(tokens) * np.asarray(prompts) * 1e-5)

    def mixed(self, batch, context, tokens, *, past=0, prompts=1) -> Estimate:
        prompt = np.asarray(tokens) * np.asarray(prompts) * 1e-5
        return self._of(0.010 + prompt)

    @staticmethod
    def _of(seconds: Any) -> Estimate:
        return Estimate.within(seconds, (1, 1), False, "flat")


def run(timing: Any = None, *, mixes: bool = True, **changes: Any):
    values = {
        "input_tokens": 1000,
        "output_tokens": 11,
        "concurrency": 1,
        "spread": 0.0,
        "turnaround_s": 0.0,
        **changes,
    }
    kv_tokens = values.pop("kv_tokens", 1e9)
    return play(
        timing or Flat(),
        Benchmark(**values),
        Scheduler(mixes=mixes),
        kv_tokens=kv_tokens,
        rng=np.random.default_rng(0),
    )


def test_one_client_sees_its_prompt_and_its_steps():
    """1000 tokens: 10 ms to the first, then ten steps of 10 ms."""
    found = run()
    assert found.ttft_s == pytest.approx(0.010)
    assert found.tpot_s == pytest.approx(0.010)
    assert found.batch == pytest.approx(1.0)


def test_request_overhead_and_polling_are_added_to_the_ttft():
    """5 ms a request and three decode steps."""
    timing = Flat()
    timing.corrections = Corrections(request_s=0.005, admission_steps=3)
    assert run(timing).ttft_s == pytest.approx(0.010 + 0.005 + 0.030)


def test_two_clients_by_hand():
    """Prompts of 8000 take an iteration each (80 ms). Of 20 requests the first has its
    token after 80, the second after 80 + 10 + 80, the others after 80 + 10, beside a step
    of the other client, who waits 80 ms once in 100 steps."""
    found = run(concurrency=2, input_tokens=8000, output_tokens=101)
    assert found.ttft_s == pytest.approx((80 + 170 + 18 * 90) / 20e3, rel=0.01)
    assert found.tpot_s == pytest.approx(0.0108, rel=0.01)


def test_equal_requests_march_in_step():
    """Eight prompts of 1000 fit one iteration, end together and come again together:
    each waits for all (80 ms). Of random lengths they drift apart and wait less."""
    assert run(concurrency=8).ttft_s == pytest.approx(0.080)
    apart = run(concurrency=8, output_tokens=400, spread=0.5)
    assert apart.ttft_s < 0.045


def test_prefill_first_engines_make_nobody_wait_in_the_middle():
    """All prompts before any decode: TPOT is the step alone but for the first wave's."""
    found = run(concurrency=8, output_tokens=101, mixes=False)
    assert found.tpot_s == pytest.approx(0.010, rel=0.05)
    # Eight prompts of 10 ms fit one iteration of 8,192 tokens.
    assert found.ttft_s == pytest.approx(0.080, rel=0.1)


def test_a_small_cache_queues_requests():
    """Room for one of four: the others wait for whole requests."""
    free = run(concurrency=4, output_tokens=101)
    full = run(concurrency=4, output_tokens=101, kv_tokens=1200)
    assert full.batch == pytest.approx(1.0)
    assert full.ttft_s > 20 * free.ttft_s


def deployments(known: Corrections, noise: float = 0.0) -> list[Deployment]:
    """Runs whose measurements are what ``known`` predicts, with some scatter."""
    rng, made = np.random.default_rng(5), []
    llms = ("llama-3.1-8b", "qwen2.5-14b", "llama-3.1-70b")
    sizes = ((1024, 256), (4096, 128), (256, 512))
    for llm, (isl, osl), clients in itertools.product(llms, sizes, (1, 16, 64)):
        gpu, tp = catalog.gpu("h100"), 4
        timing = MeasuredTiming(llm=catalog.llm(llm), gpu=gpu, tp=tp)
        bench = Benchmark(input_tokens=isl, output_tokens=osl, concurrency=clients)
        draft = Deployment(
            timing=timing,
            run=bench,
            scheduler=Scheduler(),
            kv_tokens=1e7,
            ttft_s=1.0,
            tpot_s=1.0,
            pair=(gpu.name, llm),
        )
        truth = draft.predict(known)
        ttft, tpot = np.exp(noise * rng.standard_normal(2))
        made.append(
            replace(draft, ttft_s=truth.ttft_s * ttft, tpot_s=truth.tpot_s * tpot)
        )
    return made


HIDDEN = Corrections(
    kernel_factor=1.15,
    prefill_factor=1.25,
    layer_s=5e-6,
    step_s=1.5e-3,
    request_s=40e-3,
    admission_steps=4.0,
)


def test_corrections_are_found_again():
    """Three LLMs, 27 runs: predictions with the fit are within 3 % of the truth, where
    the defaults are 15 to 40 % off."""
    found = calibrate_deployments(deployments(HIDDEN), Corrections())
    assert found.before["tpot"] > 0.10
    assert found.before["ttft"] > 0.20
    assert max(found.after.values()) < 0.03
    assert max(found.held_out.values()) < 0.04
    assert set(found.corrections) == {"vllm"}
    assert found.groups == 3


def test_runs_gone_wrong_do_not_move_the_fit():
    """Three of 27 runs are ten times too slow: the others are met all the same."""
    runs = deployments(HIDDEN, noise=0.02)
    slow = [
        replace(r, ttft_s=10 * r.ttft_s, tpot_s=10 * r.tpot_s) if i % 9 == 0 else r
        for i, r in enumerate(runs)
    ]
    slopes = Slopes.of(slow)
    ttft, tpot = slopes.log_errors(fit(slopes))
    good = np.arange(len(runs)) % 9 != 0
    assert np.median(np.abs(tpot[good])) < 0.05
    assert np.median(np.abs(ttft[good])) < 0.05


def test_nothing_measured_leaves_the_defaults():
    """Runs that the defaults predict exactly keep them."""
    slopes = Slopes.of(deployments(Corrections())[:6])
    found = dict(zip(("kernels", "prefill"), fit(slopes), strict=False))
    assert found["kernels"] == pytest.approx(1.0, abs=0.01)
    assert found["prefill"] == pytest.approx(1.0, abs=0.01)


def test_the_interval_holds_what_it_should():
    """Errors of -9 .. +9 %: the measurement is predicted / (1 + error); with many groups
    the interval covers nine in ten, with two it takes in nearly all."""
    errors = np.log1p(np.linspace(-0.09, 0.09, 1001))
    low, high = interval(errors, groups=1000)
    inside = (np.exp(-errors) >= low) & (np.exp(-errors) <= high)
    assert inside.mean() == pytest.approx(0.9, abs=0.01)
    wide = interval(errors, groups=2)
    assert wide[0] < low
    assert wide[1] > high


def journal(timing: MeasuredTiming) -> list[Served]:
    """A replica that serves requests one after another, as ``timing`` says."""
    rng, now_s, made = np.random.default_rng(1), 0.0, []
    for _ in range(200):
        inputs, outputs = int(rng.integers(100, 4000)), int(rng.integers(20, 400))
        first_s = now_s + timing.corrections.request_s
        first_s += float(timing.prefill(inputs).seconds)
        step_s = float(timing.decode(1, inputs + outputs / 2).seconds)
        end_s = first_s + (outputs - 1) * step_s
        made.append(
            Served(
                replica=(timing.llm.name, ("n0/0",)),
                arrival_s=now_s,
                first_token_s=first_s,
                end_s=end_s,
                input_tokens=inputs,
                output_tokens=outputs,
            )
        )
        now_s = end_s + 1.0
    return made


def test_a_journal_calibrates():
    """Requests of a slower engine: TPOT and TTFT are met after, not before."""
    plain = MeasuredTiming(
        llm=catalog.llm("llama-3.1-8b"), gpu=catalog.gpu("h100"), tp=1
    )
    slow = replace(plain, corrections=replace(HIDDEN, admission_steps=0.0))
    found = calibrate_requests(lambda replica: plain, journal(slow), Corrections())
    assert found.before["tpot"] > 0.15
    assert found.after["tpot"] < 0.03
    assert found.after["ttft"] < 0.05
    assert found.held_out == {}
