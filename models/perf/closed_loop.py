"""What a closed-loop benchmark of one engine measures: mean TTFT and TPOT.

``concurrency`` clients each send their next request when the last one has ended. The
engine batches continuously: at most ``token_budget`` tokens an iteration, prompts first
come first served and cut into chunks, beside the running decodes (vLLM, TensorRT-LLM) or
in iterations of their own before them (SGLang). Requests of equal lengths march in step
and keep meeting in the queue, random lengths drift apart; the first ``concurrency``
requests arrive at once. All of that shows in a measured mean TTFT, so it is played
through, iteration by iteration (runs of pure decode steps at a stride).
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from foreserve.models.perf.kernels import Floats
from foreserve.models.perf.measured import MeasuredTiming
from foreserve.models.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Record):
    """A closed-loop run; the defaults are those of InferenceMAX."""

    input_tokens: int
    output_tokens: int
    concurrency: int
    requests_per_client: int = 10
    spread: float = 0.2
    """Lengths are uniform between ``1 - spread`` and 1 times the stated ones."""
    turnaround_s: float = 0.004
    """From the end of a request to the arrival of the client's next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduler(Record):
    """How an engine fills its iterations."""

    token_budget: int = 8192
    mixes: bool = True
    """Chunks of prompts run beside decodes; else in iterations of their own, first."""
    max_num_seqs: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyState(Record):
    """Means over the run."""

    ttft_s: float
    tpot_s: float
    batch: float
    """Sequences that decode together, mean over the decode steps."""
    extrapolated: bool


def play(
    timing: MeasuredTiming,
    run: Benchmark,
    scheduler: Scheduler,
    *,
    kv_tokens: float,
    rng: np.random.Generator,
) -> SteadyState:
    """Play ``run`` through on an engine whose cache holds ``kv_tokens`` tokens.

    The timing's `request_s` and `admission_steps` decode steps are added to the TTFT.
    """
    costs = _Costs.of(timing, run, scheduler)
    mean = 1 - run.spread / 2
    held = mean * (run.input_tokens + run.output_tokens)
    slots = max(1, min(run.concurrency, scheduler.max_num_seqs, int(kv_tokens / held)))
    total = run.concurrency * run.requests_per_client
    shares = 1 - run.spread * rng.random((total, 2))
    inputs = np.maximum(1, run.input_tokens * shares[:, 0]).astype(int).tolist()
    outputs = np.maximum(2, run.output_tokens * shares[:, 1]).astype(int).tolist()
    delays = (run.turnaround_s * (0.5 + rng.random(total))).tolist()

    now_s, step, issued = 0.0, 0, min(run.concurrency, total)
    arriving = [(delays[i], i) for i in range(issued)]
    heapq.heapify(arriving)
    queue: deque[list[float]] = deque()  # arrival, request, prompt tokens still to do
    running: list[tuple[int, float, int]] = []  # last step, first token at, request
    ttft_s = tpot_s = 0.0
    steps = batch_steps = done = 0
    while done < total:
        while arriving and arriving[0][0] <= now_s:
            arrival_s, new = heapq.heappop(arriving)
            queue.append([arrival_s, new, inputs[new]])
        batch = len(running)
        if queue and batch < slots:
            left: float = scheduler.token_budget - (batch if scheduler.mixes else 0)
            tokens = 0.0
            first: list[list[float]] = []
            while queue and left > 0 and batch + len(first) < slots:
                chunk = min(queue[0][2], left)
                queue[0][2] -= chunk
                left, tokens = left - chunk, tokens + chunk
                if queue[0][2] > 0:
                    break
                first.append(queue.popleft())
            now_s += costs.prefill_s(tokens)
            if scheduler.mixes:
                if batch:
                    now_s += costs.decode_s(batch)
                    steps, batch_steps = steps + 1, batch_steps + batch
                step += 1
            for arrival_s, request, _ in first:
                i = int(request)
                ttft_s += now_s - arrival_s
                heapq.heappush(running, (step + outputs[i] - 1, now_s, i))
        elif batch:
            step_s = costs.decode_s(batch)
            stride = running[0][0] - step
            if arriving and batch < slots:
                wait = (arriving[0][0] - now_s) / step_s
                stride = min(stride, max(1, int(np.ceil(wait))))
            stride = max(1, stride)
            now_s, step = now_s + stride * step_s, step + stride
            steps, batch_steps = steps + stride, batch_steps + stride * batch
        else:
            now_s = max(now_s, arriving[0][0])
        while running and running[0][0] <= step:
            _, first_s, i = heapq.heappop(running)
            tpot_s += (now_s - first_s) / (outputs[i] - 1)
            done += 1
            if issued < total:
                heapq.heappush(arriving, (now_s + delays[issued], issued))
                issued += 1
    known, mean_tpot_s = timing.corrections, tpot_s / total
    admission_s = known.request_s + known.admission_steps * mean_tpot_s
    return SteadyState(
        ttft_s=ttft_s / total + admission_s,
        tpot_s=mean_tpot_s,
        batch=batch_steps / max(1, steps),
        extrapolated=costs.extrapolated,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Costs:
    """Iteration times at the run's mean lengths, for any batch and chunk."""

    batches: Floats
    decode: Floats
    tokens: Floats
    prefill: Floats
    extrapolated: bool

    @classmethod
    def of(cls, timing: MeasuredTiming, run: Benchmark, scheduler: Scheduler) -> _Costs:
        mean = 1 - run.spread / 2
        prompt = max(1.0, run.input_tokens * mean)
        context = prompt + run.output_tokens * mean / 2
        batches = np.unique(np.geomspace(1, max(2, run.concurrency), 12).round())
        decode = timing.decode(batches, context)
        # A chunk of several prompts, or a part of one: cost of a prompt's later chunks
        # is spread evenly over the prompt.
        budget = float(scheduler.token_budget)
        tokens = np.unique(np.geomspace(min(64.0, prompt), max(prompt, budget), 10))
        prompts = np.maximum(1.0, tokens / prompt)
        part = np.minimum(tokens, prompt)
        beside = float(run.concurrency) if scheduler.mixes else 0.0
        past = np.maximum(0.0, (prompt - part) / 2)
        if beside:
            whole = timing.mixed(beside, context, part, past=past, prompts=prompts)
            alone = timing.decode(beside, context).seconds
        else:
            whole = timing.prefill(part, past=past, prompts=prompts)
            alone = np.zeros(())
        marginal = np.maximum.accumulate(np.maximum(whole.seconds - alone, 1e-5))
        return cls(
            batches=batches,
            decode=decode.seconds,
            tokens=np.concatenate([[0.0], tokens]),
            prefill=np.concatenate([[0.0], marginal]),
            extrapolated=bool(decode.extrapolated.any() or whole.extrapolated.any()),
        )

    def decode_s(self, batch: int) -> float:
        return float(np.interp(batch, self.batches, self.decode))

    def prefill_s(self, tokens: float) -> float:
        """Time that ``tokens`` prompt tokens add to an iteration."""
        return float(np.interp(tokens, self.tokens, self.prefill))
