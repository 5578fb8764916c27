"""A plain engine, each iteration and token on its own: what the compiled one must be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from foreserve.models.cost import IterationTime
from foreserve.runtime.simulated.engine import EngineLimits


@dataclass(slots=True, eq=False)
class Job:
    """One request, and what comes of it."""

    request: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    first_token_s: float | None = None
    preemptions: int = 0


def per_token(
    time: IterationTime, kv_tokens: int, jobs: list[Job], limits: EngineLimits
) -> dict[int, float]:
    """Reference engine, every iteration on its own and every running request in turn,
    after vLLM's scheduler. Sets first tokens and preemptions, returns ends."""
    coming = sorted(jobs, key=lambda job: job.arrival_s)
    waiting: list[Job] = []
    running: list[Job] = []
    computed = dict.fromkeys(jobs, 0)
    given = dict.fromkeys(jobs, 0)
    held = dict.fromkeys(jobs, 0)  # blocks
    cached = dict.fromkeys(jobs, 0)  # tokens computed when it was preempted
    answering: set[Job] = set()  # all their tokens are computed but the newest
    # Free blocks, oldest first: (owner, number of its block) or None if never used.
    free: deque[tuple[Job, int] | None] = deque(
        [None] * (kv_tokens // limits.block_tokens)
    )
    ends: dict[int, float] = {}
    now_s = 0.0

    def allocate(job: Job, tokens: int, found: int = 0) -> bool:
        need = -(-(computed[job] + tokens) // limits.block_tokens) - held[job]
        if need > len(free):
            return False
        for number in range(found):
            free.remove((job, number))
        for _ in range(need - found):
            free.popleft()
        held[job] += need
        return True

    def release(job: Job) -> None:
        free.extend((job, number) for number in reversed(range(held[job])))
        held[job] = 0

    def still_there(job: Job) -> int:
        """Full blocks from its first on that nobody has taken."""
        number = 0
        while number < cached[job] // limits.block_tokens and (job, number) in free:
            number += 1
        return number if limits.caches_prefixes else 0

    while coming or waiting or running:
        if not waiting and not running:
            now_s = max(now_s, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now_s:
            waiting.append(coming.pop(0))
        budget = limits.max_num_batched_tokens
        scheduled: dict[Job, int] = {}
        preempted = False

        def run(index: int, scheduled: dict[Job, int]) -> None:
            """Running requests in turn, from the one at ``index`` on."""
            nonlocal budget, preempted
            while index < len(running) and budget > 0:
                job = running[index]
                tokens = min(job.input_tokens + given[job] - computed[job], budget)
                while not allocate(job, tokens):
                    preempted = True
                    victim = running.pop()
                    release(victim)
                    cached[victim], computed[victim] = computed[victim], 0
                    answering.discard(victim)
                    victim.preemptions += 1
                    waiting.insert(0, victim)
                    if victim is job:
                        return
                scheduled[job] = tokens
                budget -= tokens
                index += 1

        # Where prompts have iterations of their own, those under way are the last to join.
        prompts_from = sum(job in answering for job in running)
        run(0 if limits.mixes else prompts_from, scheduled)
        while (
            waiting
            and budget > 0
            and not preempted
            and len(running) < limits.max_num_seqs
        ):
            job = waiting[0]
            found = still_there(job)
            computed[job] = found * limits.block_tokens
            tokens = min(job.input_tokens + given[job] - computed[job], budget)
            known = -(-(job.input_tokens + given[job]) // limits.block_tokens)
            too_large = limits.whole_prompts and known > len(free)
            if too_large or not allocate(job, tokens, found):
                computed[job] = 0
                break
            running.append(waiting.pop(0))
            scheduled[job] = tokens
            budget -= tokens
        if not scheduled:
            run(0, scheduled)
        decoding = [job for job in scheduled if job in answering]
        prompts = [job for job in scheduled if job not in decoding]
        if prompts:
            tokens = sum(scheduled[job] for job in prompts)
            tokens2 = sum(
                (computed[job] + scheduled[job]) ** 2 - computed[job] ** 2
                for job in prompts
            )
            cost_s = time.chunk_s if decoding else time.prefill_s
            now_s += cost_s(tokens, tokens2)
        if decoding:
            context = sum(computed[job] + 1 for job in decoding)
            now_s += time.decode_s(len(decoding), context)
        for job, tokens in scheduled.items():
            computed[job] += tokens
            if computed[job] < job.input_tokens + given[job]:
                continue
            given[job] += 1
            answering.add(job)
            if job.first_token_s is None:
                job.first_token_s = now_s
            if given[job] == job.output_tokens:
                ends[job.request] = now_s
                running.remove(job)
                release(job)
    assert len(free) == kv_tokens // limits.block_tokens
    return ends
