"""One ACTIVE replica in virtual time: continuous batching, iteration by iteration, with
closed forms between events instead of work per token.

It schedules as vLLM's V1 engine does. In each iteration, within a budget of tokens:

1. Running requests in the order in which they joined: each that decodes takes one token,
   one whose prompt is not done takes as much of it as is left of the budget. Tokens live
   in blocks of the KV cache. When none is free, the request that joined last is preempted:
   its blocks are freed, it goes to the head of the waiting ones, and will compute its
   prompt and what it had answered again.
2. Unless one was preempted, waiting requests join, first come first served, while there
   are budget, blocks for their next tokens and fewer than ``max_num_seqs`` running.

All of it takes one iteration's time. A request whose tokens are all computed gets its next
one at the end of the iteration. A request that comes during an iteration is considered
at the end of it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from foreserve.models.cost import IterationTime
from foreserve.models.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits(Record):
    """vLLM's settings of these names."""

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    block_tokens: int = 16
    whole_prompts: bool = True
    """Requests join only when blocks for all their known tokens are free, not only for
    their first chunk (vLLM since 0.19, pull request 37307)."""
    mixes: bool = True
    """Prompts share iterations with decodes. False: they have iterations of their own,
    and decodes pause (SGLang, earlier engines)."""
    caches_prefixes: bool = True
    """Who was preempted finds those of its full blocks that nobody has taken since. Free
    blocks are taken in the order in which they became free, a request's last ones first."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs < self.max_num_batched_tokens:
            raise ValueError("engine: max_num_batched_tokens must exceed max_num_seqs")


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way. Mutable; its engine fills in the rest."""

    request: int
    llm: str
    arrival_s: float
    input_tokens: int
    output_tokens: int
    given: int = 0
    """Output tokens so far."""
    computed: int = 0
    """Tokens in the KV cache; while it decodes, as of the step that it began in."""
    first_token_s: float | None = None
    preemptions: int = 0
    # While it decodes: the engine's step before its first, and its count of joins.
    begun: int = 0
    joined: int = -1
    # Since it was preempted: tokens that were computed, and the engine's count of blocks
    # taken at which the first of its own goes.
    cached: int = 0
    lost_from: int = 0

    @property
    def kv_tokens(self) -> int:
        """Most tokens it has in the KV cache: its last one never gets there."""
        return self.input_tokens + self.output_tokens - 1

    def restart(self) -> None:
        """Forget all progress: its replica is lost, and with it the KV cache."""
        self.given, self.computed, self.first_token_s, self.joined = 0, 0, None, -1
        self.cached = 0


class Engine:
    """Works on jobs. Its owner calls `advance` at `next_s`, and again as that changes."""

    def __init__(
        self, time: IterationTime, kv_tokens: int, limits: EngineLimits | None = None
    ) -> None:
        self.time = time
        self.limits = limits or EngineLimits()
        self.num_blocks = kv_tokens // self.limits.block_tokens
        self.next_s = math.inf
        """When something happens next: a first token, an end, or a join."""
        self.preemptions = 0
        self._free_blocks = self.num_blocks
        self._taken = 0
        """Blocks taken so far, but for those that were found again."""
        self._waiting: deque[Job] = deque()
        # Running: those that decode, by the order of joining, and at most one whose prompt
        # is under way, the last to join (the budget ended there).
        self._decoding: dict[Job, None] = {}
        self._prompt: Job | None = None
        self._ends: list[tuple[int, int, Job]] = []
        """Heap of (step after which it ends, count of joins, job); stale where the job
        was preempted."""
        self._context = 0
        """Tokens that the next step of the decoding jobs reads."""
        self._phase = [0] * self.limits.block_tokens
        """Decoding jobs by the step, modulo the block, in which they need a new one."""
        self._step = self._joins = 0
        # The stretch under way: `_count` iterations alike, begun at `_start_s`. With
        # prompts in it there is one, and `_chunks` says how much of each is computed.
        self._start_s = 0.0
        self._count = self._steps = 0
        """Iterations, and steps of each decoding job in them (0 or as many)."""
        self._chunks: list[tuple[Job, int]] = []
        self._resumed: Job | None = None
        """Whose prompt was under way before: the first chunk is its."""

    @property
    def running(self) -> int:
        return len(self._decoding) + (self._prompt is not None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def used_blocks(self) -> int:
        """At the begin of the stretch under way."""
        return self.num_blocks - self._free_blocks

    def can_hold(self, job: Job) -> bool:
        """Whether ``job`` fits the KV cache at all."""
        return self._blocks(job.kv_tokens) <= self.num_blocks

    def submit(self, job: Job, now_s: float) -> None:
        """Take ``job``, which `can_hold`. ``now_s`` is not after `next_s`."""
        if not self.can_hold(job):
            raise ValueError(
                f"request {job.request}: more tokens than the KV cache has"
            )
        self._waiting.append(job)
        if self.next_s == math.inf or now_s == self._start_s:
            self._undo()
            self._begin(now_s)
        elif (
            self._count > 1
            and len(self._waiting) == 1
            and self.running < self.limits.max_num_seqs
        ):
            self._count = self._steps = self._iterations_until(now_s)
            self.next_s = self._start_s + self._stretch_s(self._count)

    def advance(self) -> tuple[Job, ...]:
        """Go to `next_s`; return the jobs that end there."""
        now_s, batch = self.next_s, len(self._decoding)
        self._take(self._blocks_of_steps(self._steps) if batch else 0)
        self._step += self._steps
        self._context += batch * self._steps
        ended = []
        while self._ends and self._ends[0][0] <= self._step:
            _, joined, job = heapq.heappop(self._ends)
            if job.joined == joined:
                job.given = job.output_tokens
                self._leave(job)
                ended.append(job)
        for job, computed in self._chunks:
            job.computed = computed
            if computed < job.input_tokens + job.given:
                self._prompt = job
                continue
            job.given += 1
            if job.first_token_s is None:
                job.first_token_s = now_s
            if job.given == job.output_tokens:
                self._free_blocks += self._blocks(job.computed)
                ended.append(job)
            else:
                self._decode(job)
        self._chunks = []
        self._begin(now_s)
        return tuple(ended)

    def jobs(self) -> Iterable[Job]:
        """All jobs it has, in no particular order."""
        yield from self._waiting
        yield from self._decoding
        if self._prompt:
            yield self._prompt
        yield from (job for job, _ in self._chunks if job is not self._prompt)

    # --- running jobs ----------------------------------------------------------------

    def _decode(self, job: Job) -> None:
        """Its prompt is done, and blocks for it are booked: a token a step from now on."""
        self._joins += 1
        job.begun, job.joined = self._step, self._joins
        self._decoding[job] = None
        self._context += job.computed + 1
        self._phase[self._needs_at(job)] += 1
        end = self._step + job.output_tokens - job.given
        heapq.heappush(self._ends, (end, job.joined, job))

    def _leave(self, job: Job) -> None:
        """It decodes no more: its blocks are free."""
        del self._decoding[job]
        self._phase[self._needs_at(job)] -= 1
        job.computed += self._step - job.begun
        self._context -= job.computed + 1
        self._free_blocks += self._blocks(job.computed)
        job.joined = -1

    def _needs_at(self, job: Job) -> int:
        return (job.begun - job.computed) % self.limits.block_tokens

    def _take(self, blocks: int) -> None:
        self._free_blocks -= blocks
        self._taken += blocks

    def _found(self, job: Job) -> int:
        """Tokens of a waiting job that are still in its old blocks."""
        if not (self.limits.caches_prefixes and job.cached):
            return 0
        # This iteration's steps take theirs first.
        lost = max(0, self._taken + self._need_of_step() - job.lost_from)
        kept = self._blocks(job.cached) - lost
        full = job.cached // self.limits.block_tokens
        return max(0, min(full, kept)) * self.limits.block_tokens

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.limits.block_tokens)

    def _need_of_step(self) -> int:
        """Blocks that the next step takes, if prompts leave it its place."""
        if not self.limits.mixes:
            return 0
        return self._phase[self._step % self.limits.block_tokens]

    def _blocks_of_steps(self, count: int) -> int:
        """Blocks that the next ``count`` steps take."""
        rounds, rest = divmod(count, self.limits.block_tokens)
        found = rounds * len(self._decoding)
        for step in range(self._step, self._step + rest):
            found += self._phase[step % self.limits.block_tokens]
        return found

    def _steps_with(self, blocks: int) -> int:
        """Most steps that take no more than ``blocks``."""
        rounds = blocks // len(self._decoding)
        steps, left = rounds * self.limits.block_tokens, blocks
        left -= rounds * len(self._decoding)
        while (need := self._phase[(self._step + steps) % len(self._phase)]) <= left:
            left -= need
            steps += 1
        return steps

    def _make_room(self) -> None:
        """Preempt until the next step of those that decode has its blocks."""
        block = self.limits.block_tokens
        while self._decoding and self._phase[self._step % block] > self._free_blocks:
            self._preempt()

    def _preempt(self) -> None:
        """The one that joined last gives its blocks back and waits again."""
        lost_from = self._taken + self._free_blocks
        if (job := self._prompt) is not None:
            self._prompt = None
            self._free_blocks += self._blocks(job.computed)
        else:
            job = next(reversed(self._decoding))
            job.given += self._step - job.begun
            self._leave(job)
        job.cached, job.lost_from, job.computed = job.computed, lost_from, 0
        job.preemptions += 1
        self.preemptions += 1
        self._waiting.appendleft(job)

    # --- stretches -------------------------------------------------------------------

    def _begin(self, now_s: float) -> None:
        """Plan the next stretch from ``now_s``."""
        self._start_s = now_s
        before = self.preemptions
        if self.limits.mixes:
            self._make_room()
        self._fill(before)
        if not (self._chunks or self.limits.mixes):
            self._make_room()
        if self._chunks or (self._decoding and self.preemptions != before):
            # Whoever was preempted may join again in the next iteration.
            self._count = 1
            self._steps = int(self.limits.mixes or not self._chunks)
        elif self._decoding:
            while self._ends[0][2].joined != self._ends[0][1]:
                heapq.heappop(self._ends)
            to_end = self._ends[0][0] - self._step
            self._count = min(to_end, self._steps_with(self._free_blocks))
            self._steps = self._count
        else:
            self._count = self._steps = 0
            self.next_s = math.inf
            return
        self.next_s = now_s + self._stretch_s(self._count)

    def _fill(self, before: int) -> None:
        """Plan the chunks of one iteration; nobody joins if there were more preemptions
        than ``before``."""
        # Steps take their blocks when the stretch ends; chunks take theirs here.
        spare = self._free_blocks - self._need_of_step()
        budget = self.limits.max_num_batched_tokens
        budget -= len(self._decoding) if self.limits.mixes else 0
        self._resumed = None
        if self._prompt:
            job = self._prompt
            take = min(job.input_tokens + job.given - job.computed, budget)
            need = self._blocks(job.computed + take) - self._blocks(job.computed)
            if need > spare:
                self._preempt()
            else:
                self._chunks.append((job, job.computed + take))
                self._prompt, self._resumed = None, job
                self._take(need)
                spare -= need
                budget -= take
        running = len(self._decoding) + len(self._chunks)
        while (
            self._waiting
            and budget > 0
            and running < self.limits.max_num_seqs
            and self.preemptions == before
        ):
            job = self._waiting[0]
            known, found = job.input_tokens + job.given, self._found(job)
            take = min(known - found, budget)
            need = self._blocks(found + take)
            whole = self.limits.whole_prompts
            if (self._blocks(known) if whole else need) > spare:
                break
            self._waiting.popleft()
            job.computed = found
            self._chunks.append((job, found + take))
            self._take(need)
            self._taken -= self._blocks(found)
            spare -= need
            budget -= take
            running += 1

    def _undo(self) -> None:
        """Take back the stretch that was planned and of which nothing has passed."""
        for job, computed in reversed(self._chunks):
            self._take(self._blocks(job.computed) - self._blocks(computed))
            if job is self._resumed:
                self._prompt = job
            else:
                self._free_blocks += self._blocks(job.computed)
                job.computed = 0
                self._waiting.appendleft(job)
        self._chunks = []

    def _stretch_s(self, count: int) -> float:
        """Seconds of the first ``count`` iterations of the stretch.

        Decoding ``b`` sequences adds ``b`` tokens of context per step, so ``count`` steps
        from ``c`` tokens see ``count * c + b * count * (count - 1) / 2`` in all.
        """
        seconds, steps = 0.0, bool(self._steps and self._decoding)
        if steps:
            batch = len(self._decoding)
            context = count * self._context + batch * (count * (count - 1) // 2)
            seconds = count * self.time.decode_s(batch, 0.0)
            seconds += self.time.decode_s_per_context_token * context
        if self._chunks:
            # Attention of the tokens from p to q of a prompt: q^2 - p^2 of its square.
            tokens = sum(upto - job.computed for job, upto in self._chunks)
            tokens2 = sum(upto**2 - job.computed**2 for job, upto in self._chunks)
            # Beside decodes the weights are read anyway.
            cost_s = self.time.chunk_s if steps else self.time.prefill_s
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
