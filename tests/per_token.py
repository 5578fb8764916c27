"""A plain engine, each iteration and token on its own: what the compiled one must be."""

from __future__ import annotations

from collections import Counter, deque
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
    prefixes: tuple[int, ...] = ()
    first_token_s: float | None = None
    preemptions: int = 0
    found: int = 0
    """Prompt tokens that it found in the cache when it joined first."""


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
    # Free blocks, oldest first, with what is in them: a job's or a prefix's block of some
    # number, or None if it was never used.
    free: deque[tuple[Job | int, int] | None] = deque(
        [None] * (kv_tokens // limits.block_tokens)
    )
    unit = limits.prefix_tokens // limits.block_tokens
    users: Counter[int] = Counter()  # jobs that use a prefix's blocks
    uses: dict[Job, list[int]] = {job: [] for job in jobs}
    doubles: dict[Job, set[int]] = {job: set() for job in jobs}
    ends: dict[int, float] = {}
    now_s = 0.0

    def allocate(job: Job, tokens: int, found: int = 0) -> bool:
        need = -(-(computed[job] + tokens) // limits.block_tokens) - held[job]
        shared = 0
        if unit:
            shared = sum(users[p] > 0 for p in job.prefixes[: found // unit]) * unit
        if need - shared > len(free):
            return False
        for number in range(found):
            if not unit:
                free.remove((job, number))
            elif not users[prefix := job.prefixes[number // unit]]:
                free.remove((prefix, number % unit))
        if unit and found:
            uses[job] = list(job.prefixes[: found // unit])
            users.update(uses[job])
        for _ in range(need - found):
            free.popleft()
        held[job] += need
        return True

    def release(job: Job) -> None:
        mine = [p for i, p in enumerate(uses[job]) if i not in doubles[job]]
        begin = len(mine) * unit
        free.extend((job, number) for number in reversed(range(begin, held[job])))
        for prefix in reversed(uses[job]):
            users[prefix] -= 1
            if not users[prefix]:
                # Other copies of it are forgotten.
                for number in range(unit):
                    if (prefix, number) in free:
                        free[free.index((prefix, number))] = None
                free.extend((prefix, number) for number in reversed(range(unit)))
        held[job], uses[job], doubles[job] = 0, [], set()

    def register(job: Job) -> None:
        full = job.input_tokens // limits.prefix_tokens if unit else 0
        for number in range(len(uses[job]), min(len(job.prefixes), full)):
            prefix = job.prefixes[number]
            if users[prefix]:
                doubles[job].add(number)
            uses[job].append(prefix)
            users[prefix] += 1

    def still_there(job: Job) -> int:
        """Full blocks from its first on that nobody has taken."""
        number = 0
        if unit:
            known = job.input_tokens + given[job] - 1
            most = min(known, job.input_tokens) // limits.prefix_tokens
            for prefix in job.prefixes[:most]:
                there = all((prefix, i) in free for i in range(unit))
                if not (users[prefix] or there):
                    break
                number += unit
            return number
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
            if unit and not job.preemptions:
                job.found = found * limits.block_tokens
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
            if job not in answering:
                register(job)
            answering.add(job)
            if job.first_token_s is None:
                job.first_token_s = now_s
            if given[job] == job.output_tokens:
                ends[job.request] = now_s
                running.remove(job)
                release(job)
    assert len(free) == kv_tokens // limits.block_tokens
    return ends
