"""One ACTIVE replica in virtual time: continuous batching, iteration by iteration, with
closed forms between events instead of work per token.

What an iteration does, in this order:

1. Requests that wait in the engine join, first come first served, as long as the KV cache
   has room for all their input and output tokens. They are reserved in full on joining,
   so nothing is ever preempted; one that does not fit holds up those behind it.
2. Prompts are prefilled, first come first served, up to `PROMPT_BUDGET` tokens per
   iteration; a longer prompt continues in the next one.
3. All sequences whose prompt is done make one decode step in the same iteration, which
   takes the sum of both times (`models.cost.capacity` counts the same sum).

The first token of a request comes at the end of the iteration that completes its prompt,
each further one at the end of an iteration. A request that comes during an iteration joins
at the end of it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from foreserve.models.cost import IterationTime

PROMPT_BUDGET = 8192
"""Prompt tokens per iteration."""


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. Mutable; its engine fills in the times."""

    request: int
    llm: str
    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefilled: int = 0
    first_token_s: float | None = None

    @property
    def kv_tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def restart(self) -> None:
        """Forget all progress: its replica is lost, and with it the KV cache."""
        self.prefilled, self.first_token_s = 0, None


class Engine:
    """Works on jobs. Its owner calls `advance` at `next_s`, and again as that changes."""

    def __init__(self, time: IterationTime, kv_tokens: int) -> None:
        self.time, self.kv_tokens = time, kv_tokens
        self.next_s = math.inf
        """When something happens next: a first token, an end, or a join."""
        self._waiting: deque[Job] = deque()
        self._prompts: deque[Job] = deque()
        """Joined, prompt not done."""
        self._decoding: list[tuple[int, int, Job]] = []
        """Heap of (step after which it ends, order of joining, job)."""
        self._free_tokens = kv_tokens
        self._context = 0
        """Input and output tokens so far of the decoding jobs."""
        self._step = 0
        self._joined = 0
        # The stretch under way: `_count` iterations alike, begun at `_start_s`. With
        # prompts in it there is one, and `_chunks` says up to where each prompt gets.
        self._start_s = 0.0
        self._count = 0
        self._chunks: list[tuple[Job, int]] = []

    def can_hold(self, job: Job) -> bool:
        """Whether ``job`` fits the KV cache at all."""
        return job.kv_tokens <= self.kv_tokens

    def submit(self, job: Job, now_s: float) -> None:
        """Take ``job``, which `can_hold`. ``now_s`` is not after `next_s`."""
        if not self.can_hold(job):
            raise ValueError(
                f"request {job.request}: more tokens than the KV cache has"
            )
        self._waiting.append(job)
        if self.next_s == math.inf or now_s == self._start_s:
            self._begin(now_s)
        elif (
            self._count > 1
            and len(self._waiting) == 1
            and job.kv_tokens <= self._free_tokens
        ):
            self._count = self._iterations_until(now_s)
            self.next_s = self._start_s + self._stretch_s(self._count)

    def advance(self) -> tuple[Job, ...]:
        """Go to `next_s`; return the jobs that end there."""
        now_s = self.next_s
        self._step += self._count
        self._context += len(self._decoding) * self._count
        ended = []
        while self._decoding and self._decoding[0][0] == self._step:
            job = heapq.heappop(self._decoding)[2]
            self._context -= job.kv_tokens
            ended.append(job)
        for job, prefilled in self._chunks:
            job.prefilled = prefilled
            if prefilled < job.input_tokens:
                continue
            self._prompts.popleft()
            job.first_token_s = now_s
            if job.output_tokens == 1:
                ended.append(job)
                continue
            self._context += job.input_tokens + 1
            last_step = self._step + job.output_tokens - 1
            heapq.heappush(self._decoding, (last_step, self._joined, job))
            self._joined += 1
        for job in ended:
            self._free_tokens += job.kv_tokens
        self._begin(now_s)
        return tuple(ended)

    def jobs(self) -> Iterable[Job]:
        """All jobs it has, in no particular order."""
        yield from self._waiting
        yield from self._prompts
        yield from (job for _, _, job in self._decoding)

    def _begin(self, now_s: float) -> None:
        """Plan the next stretch from ``now_s`` (again, if nothing of it has passed)."""
        while self._waiting and self._waiting[0].kv_tokens <= self._free_tokens:
            job = self._waiting.popleft()
            self._free_tokens -= job.kv_tokens
            self._prompts.append(job)
        self._start_s = now_s
        self._chunks = []
        budget = PROMPT_BUDGET
        for job in self._prompts:
            if budget == 0:
                break
            take = min(job.input_tokens - job.prefilled, budget)
            budget -= take
            self._chunks.append((job, job.prefilled + take))
        if self._chunks:
            self._count = 1
        elif self._decoding:
            self._count = self._decoding[0][0] - self._step
        else:
            self._count = 0
            self.next_s = math.inf
            return
        self.next_s = now_s + self._stretch_s(self._count)

    def _stretch_s(self, count: int) -> float:
        """Seconds of the first ``count`` iterations of the stretch.

        Decoding ``b`` sequences adds ``b`` tokens of context per step, so ``count`` steps
        from ``c`` tokens see ``count * c + b * count * (count - 1) / 2`` in all.
        """
        seconds = 0.0
        if self._decoding:
            batch = len(self._decoding)
            context = count * self._context + batch * (count * (count - 1) // 2)
            seconds = count * self.time.decode_s(batch, 0.0)
            seconds += self.time.decode_s_per_context_token * context
        if self._chunks:
            # Attention of the tokens from p to q of a prompt: q^2 - p^2 of its square.
            tokens = sum(upto - job.prefilled for job, upto in self._chunks)
            tokens2 = sum(upto**2 - job.prefilled**2 for job, upto in self._chunks)
            # Beside decodes the weights are read anyway.
            cost_s = self.time.chunk_s if self._decoding else self.time.prefill_s
            seconds += cost_s(tokens, tokens2)
        return seconds

    def _iterations_until(self, now_s: float) -> int:
        """Iterations of the stretch (decoding only) until the first end at or after
        ``now_s``: the root of the quadratic in `_stretch_s`, rounded up."""
        batch, time = len(self._decoding), self.time
        square = time.decode_s_per_context_token * batch / 2
        linear = time.decode_s(batch, self._context) - square
        passed_s = now_s - self._start_s
        root = linear + math.sqrt(linear**2 + 4 * square * passed_s)
        count = min(self._count, math.ceil(2 * passed_s / root))
        # Rounding may be off by one either way; the ends themselves decide.
        while count > 1 and self._start_s + self._stretch_s(count - 1) >= now_s:
            count -= 1
        while self._start_s + self._stretch_s(count) < now_s:
            count += 1
        return count
