"""One simulated engine in the time of the cost model: who gets which tokens when.

It schedules as `runtime.simulated.engine` says (vLLM's V1 rules), in plain Python and for
requests that come as they will and may leave again. All requests share the iterations.
Iterations that only decode are taken many at once: nothing changes in them but counts, so
the moment of every token follows from the cost model without stepping through it.

What it leaves out: prefix caches, so a preempted request computes all its tokens again.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from foreserve.models.cost import IterationTime

BLOCK_TOKENS = 16


@dataclass(slots=True, eq=False)
class Job:
    """One request. Times are None until they are known."""

    input_tokens: int
    output_tokens: int
    arrival_s: float
    given: int = 0
    """Output tokens by the end of the last change of its batch; see `Batch.given`."""
    joined_s: float | None = None
    first_s: float | None = None
    end_s: float | None = None
    preemptions: int = 0
    computed: int = 0
    """Tokens in the KV cache."""
    blocks: int = 0
    decodes: bool = False
    cancelled: bool = False


@dataclass(slots=True)
class _Stretch:
    """Iterations under way: one, or several that only decode."""

    start_s: float
    first_s: float
    """Length of the first; each further one is ``more_s`` longer."""
    more_s: float
    steps: int
    work: list[tuple[Job, int]]
    """Who computes how many tokens, in each of them."""

    def after_s(self, steps: int) -> float:
        """When the first ``steps`` are done."""
        return (
            self.start_s + steps * self.first_s + self.more_s * steps * (steps - 1) / 2
        )

    def done(self, now_s: float) -> int:
        """How many are done."""
        past_s = now_s - self.start_s
        if past_s < self.first_s:
            return 0
        if self.steps == 1:
            return 1
        # steps * first + more * steps (steps - 1) / 2 <= past, solved for steps.
        half = self.first_s - self.more_s / 2
        steps = int(
            2 * past_s / (half + math.sqrt(half * half + 2 * self.more_s * past_s))
        )
        steps = min(steps, self.steps)
        # Square roots are not exact, but off by one at most.
        if steps < self.steps and self.after_s(steps + 1) <= now_s:
            return steps + 1
        return steps - 1 if self.after_s(steps) > now_s else steps


@dataclass(slots=True)
class Totals:
    """Counted since the batch was made."""

    prompt_tokens: int = 0
    given_tokens: int = 0
    preemptions: int = 0
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """(seconds, how many) between tokens, until somebody takes them away."""


class Batch:
    """Requests of one engine. Time never goes back: each call's is at least the last's."""

    def __init__(
        self,
        time: IterationTime,
        room_tokens: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.time, self.block_tokens = time, block_tokens
        self.room = self.blocks = self.free = room_tokens // block_tokens
        self.max_num_seqs, self.budget = max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.totals = Totals()
        self._now_s = 0.0
        self._stretch: _Stretch | None = None

    # --- what there is -------------------------------------------------------------------

    def fits(self, job: Job) -> bool:
        """Whether it could ever end here."""
        return (
            job.input_tokens + job.output_tokens - 1 <= self.blocks * self.block_tokens
        )

    def given(self, job: Job, now_s: float) -> int:
        """Output tokens that it has; ``now_s`` is that of the last `advance`."""
        stretch = self._stretch
        if stretch is None or stretch.steps == 1 or not job.decodes:
            return job.given
        return job.given + stretch.done(now_s)

    @property
    def event_s(self) -> float:
        """When something happens next beside further tokens: a first token, an end, or a
        place for who waits; infinity if there is nothing to do."""
        return self._stretch.after_s(self._stretch.steps) if self._stretch else math.inf

    def token_s(self, now_s: float) -> float:
        """When the next token of any request comes, after ``now_s``."""
        stretch = self._stretch
        return stretch.after_s(stretch.done(now_s) + 1) if stretch else math.inf

    # --- what happens --------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """It has come, at its ``arrival_s``, to which the batch was advanced. It is
        considered at the end of the iteration under way."""
        if not self.fits(job):
            raise ValueError("the request would never fit")
        self.waiting.append(job)
        if self._stretch is None:
            self._now_s = max(self._now_s, job.arrival_s)
            self._begin()
        elif len(self.waiting) == 1 and len(self.running) < self.max_num_seqs:
            self._cut(job.arrival_s)

    def cancel(self, job: Job, now_s: float) -> None:
        """Its client has left. What it held is free after the iteration under way."""
        if job.end_s is not None or job.cancelled:
            return
        job.cancelled = True
        if job in self.waiting:
            self.waiting.remove(job)
        self._cut(now_s)

    def shrink(self) -> int:
        """Give up the blocks that nobody who is here can come to need: as many as were
        given up in all."""
        jobs = (*self.running, *self.waiting)
        needs = sum(self._needs(job.input_tokens + job.output_tokens) for job in jobs)
        unneeded = max(0, min(self.free, self.blocks - needs))
        self.blocks -= unneeded
        self.free -= unneeded
        return self.room - self.blocks

    def grow(self) -> None:
        """Have what was given up again."""
        self.free += self.room - self.blocks
        self.blocks = self.room

    def change_time(self, time: IterationTime, now_s: float) -> None:
        """What iterations take, from the next one on."""
        self.time = time
        self._cut(now_s)

    def advance(self, now_s: float) -> list[Job]:
        """Let everything happen up to and including ``now_s``; requests that got their
        first token or ended, in order."""
        changed: list[Job] = []
        while (stretch := self._stretch) and stretch.after_s(stretch.steps) <= now_s:
            self._finish(stretch, changed)
            self._begin()
        return changed

    def _cut(self, now_s: float) -> None:
        """Consider anew at the end of the iteration under way."""
        stretch = self._stretch
        if stretch is not None and stretch.steps > 1:
            stretch.steps = min(stretch.steps, stretch.done(now_s) + 1)

    def _finish(self, stretch: _Stretch, changed: list[Job]) -> None:
        self._now_s = end_s = stretch.after_s(stretch.steps)
        self._stretch = None
        steps, gone, gaps = stretch.steps, False, 0
        for job, tokens in stretch.work:
            if not job.decodes:
                job.computed += tokens
                if job.computed < job.input_tokens + job.given:
                    gone = gone or job.cancelled
                    continue
                job.decodes = True
                job.given += 1
                self.totals.given_tokens += 1
            else:
                job.computed += steps
                self._hold(job, job.computed)
                job.given += steps
                gaps += 1
            if job.cancelled:
                gone = True
                continue
            if job.first_s is None:
                job.first_s = end_s
                changed.append(job)
            if job.given >= job.output_tokens:
                job.end_s, gone = end_s, True
                if changed[-1:] != [job]:
                    changed.append(job)
        if gaps:
            self.totals.given_tokens += gaps * steps
            mean_s = (end_s - stretch.start_s) / steps
            self.totals.gaps.append((mean_s, gaps * steps))
        if gone:
            for job in self.running:
                if job.end_s is not None or job.cancelled:
                    self._release(job)
            self.running = [job for job in self.running if job.blocks]

    def _begin(self) -> None:
        """Schedule the next iteration, if there is anything to do."""
        budget, work, preempted = self.budget, [], False
        index = 0
        while index < len(self.running) and budget > 0:
            job = self.running[index]
            tokens = min(job.input_tokens + job.given - job.computed, budget)
            while not self._hold(job, job.computed + tokens):
                preempted = True
                victim = self.running.pop()
                self._preempt(victim)
                if victim is job:
                    break
            else:
                work.append((job, tokens))
                budget -= tokens
                index += 1
        only_decodes = all(job.decodes for job, _ in work)
        while self.waiting and budget > 0 and not preempted:
            job = self.waiting[0]
            known = job.input_tokens + job.given
            if len(self.running) >= self.max_num_seqs or self._needs(known) > self.free:
                break
            tokens = min(known, budget)
            self._hold(job, tokens)
            if job.joined_s is None:
                job.joined_s = self._now_s
                self.totals.prompt_tokens += job.input_tokens
            self.running.append(self.waiting.popleft())
            work.append((job, tokens))
            budget -= tokens
            only_decodes = False
        if not work:
            return
        # Who was preempted may find room again one iteration later.
        if only_decodes and len(work) == len(self.running) and not preempted:
            self._stretch = self._many(work)
        else:
            seconds = self._iteration_s(work)
            self._stretch = _Stretch(self._now_s, seconds, 0.0, 1, work)

    def _iteration_s(self, work: list[tuple[Job, int]]) -> float:
        decoding = [job for job, _ in work if job.decodes]
        prompts = [(job.computed, tokens) for job, tokens in work if not job.decodes]
        seconds = 0.0
        if prompts:
            tokens = sum(more for _, more in prompts)
            tokens2 = sum((had + more) ** 2 - had**2 for had, more in prompts)
            cost_s = self.time.chunk_s if decoding else self.time.prefill_s
            seconds += cost_s(tokens, tokens2)
        if decoding:
            context = sum(job.computed + 1 for job in decoding)
            seconds += self.time.decode_s(len(decoding), context)
        return seconds

    def _many(self, work: list[tuple[Job, int]]) -> _Stretch:
        """All iterations until somebody ends or the blocks run out."""
        size = len(work)
        context = sum(job.computed + 1 for job, _ in work)
        first_s = self.time.decode_s(size, context)
        more_s = self.time.decode_s(size, context + size) - first_s
        steps = min(job.output_tokens - job.given for job, _ in work)
        if size * (steps // self.block_tokens + 1) > self.free:
            low, high = 1, steps
            while low < high:
                middle = (low + high + 1) // 2
                need = sum(self._needs(j.computed + middle) - j.blocks for j, _ in work)
                low, high = (middle, high) if need <= self.free else (low, middle - 1)
            steps = low
        return _Stretch(self._now_s, first_s, more_s, max(1, steps), work)

    # --- blocks --------------------------------------------------------------------------

    def _needs(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def _hold(self, job: Job, tokens: int) -> bool:
        """Blocks for so many tokens, if there are any."""
        more = self._needs(tokens) - job.blocks
        if more > self.free:
            return False
        if more > 0:
            self.free -= more
            job.blocks += more
        return True

    def _release(self, job: Job) -> None:
        self.free += job.blocks
        job.blocks = 0

    def _preempt(self, job: Job) -> None:
        self._release(job)
        job.computed, job.decodes = 0, False
        if job.cancelled:
            return
        job.preemptions += 1
        self.totals.preemptions += 1
        self.waiting.appendleft(job)
