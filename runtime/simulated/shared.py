"""One group of GPUs that serves several LLMs in virtual time: an iteration runs one of
them, and all keep their KV cache in one pool.

A page has a fixed number of bytes and holds as many whole tokens of whichever LLM as fit.
What runs is `turns.next_turn`'s choice; an iteration computes prompts or decodes, not
both. A request that must leave its pages goes to host memory and comes back, where that
takes less than computing its tokens again; either way waits for the transfer. A request
that comes during an iteration is considered at its end.

A batch that decodes and would be chosen again and again is taken to the end of its turn
in closed form: to the first end, budget used up, request waiting for too long, or page
that is not there.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from foreserve.models.cost import IterationTime
from foreserve.runtime.memory.rules import (
    first_quotas,
    pages_of,
    promised_pages,
    tokens_per_page,
    usual_pages,
)
from foreserve.runtime.scheduler import Policy, Profile, Progress, finished
from foreserve.runtime.turns import Rules, Turn, next_turn, rebalance, swaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """One LLM of the group."""

    time: IterationTime
    kv_bytes_per_token: int
    """On each GPU."""
    profile: Profile
    input_tokens: float
    output_tokens: float
    """Means; they and the profile's rate divide the pool at first."""
    usual_output_tokens: int
    """Output for which a request is promised pages when it joins: the median."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """KV memory of the group, on each of its GPUs."""

    num_bytes: int
    page_bytes: int = 2 << 20
    link_bytes_per_s: float = 0.0
    """To host memory, of each GPU; 0: nothing is swapped."""

    @property
    def pages(self) -> int:
        return self.num_bytes // self.page_bytes

    def room_tokens(self, kv_bytes_per_token: int) -> int:
        """Most tokens of one request that the pool holds."""
        return self.pages * tokens_per_page(self.page_bytes, kv_bytes_per_token)


@dataclass(slots=True, eq=False, kw_only=True)
class SharedJob:
    """One request on its way: a `turns.Standing`. Mutable; its engine fills in the rest."""

    request: int
    service: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    given: int = 0
    """Output tokens so far."""
    computed: int = 0
    """Tokens in the KV cache, or swapped out of it."""
    first_token_s: float | None = None
    preemptions: int = 0
    last_token_s: float = 0.0
    decode_s: float = 0.0
    """Of the iterations in which it decoded."""
    progress: Progress = field(init=False)
    prompt_tokens: int = 0
    next_pages: int = 0
    promise: int = 0
    pages: int = 0
    resident: bool = False

    @property
    def known_tokens(self) -> int:
        return self.input_tokens + self.given

    def forget(self) -> None:
        """Its KV is gone; what it has answered stays."""
        self.computed, self.pages, self.resident = 0, 0, False


class SharedEngine:
    """Works on jobs. Its owner calls `advance` at `next_s`, and again as that changes."""

    def __init__(
        self,
        services: Iterable[Hosted],
        pool: Pool,
        policy: Policy,
        rules: Rules | None = None,
        switch_s: float = 0.0,
    ) -> None:
        """``switch_s`` passes whenever another LLM's turn begins."""
        self.policy = policy
        self.rules = rules or Rules()
        self.switch_s = switch_s
        self.gaps: Callable[[int, float, int], None] | None = None
        """Told of gaps between tokens: service, seconds, how many."""
        self.pool = pool
        self.next_s = math.inf
        """When something happens next: the end of an iteration or of several alike."""
        self.used = 0
        """Pages held, at the begin of the iterations under way."""
        self.preemptions = self.swaps = self.turns = 0
        """Requests that left their pages, those of them that were swapped, and changes
        from one LLM to another."""
        self._hosted: list[Hosted | None] = list(services)
        self._profiles: list[Profile] = [h.profile for h in self._hosted if h]
        self._quotas = self._first_quotas()
        self._quotas_next_s = 0.0
        self._jobs: dict[SharedJob, None] = {}
        self._running: frozenset[int] = frozenset()
        """Of the last iteration."""
        self._last: int | None = None
        self._speed = self._next_speed = 1.0
        # Under way since `_start_s`: `_count` iterations of one turn, and what else it
        # takes before the first (swaps, a switch).
        self._turn: Turn[SharedJob] | None = None
        self._start_s = 0.0
        self._extra_s = 0.0
        self._count = 0

    @property
    def running(self) -> int:
        """Requests whose KV is on the GPUs."""
        return sum(job.resident for job in self._jobs)

    @property
    def waiting(self) -> int:
        return len(self._jobs) - self.running

    def jobs(self) -> Iterable[SharedJob]:
        """All jobs it has, in order of submission."""
        return tuple(self._jobs)

    def profile(self, service: int) -> Profile:
        """What is known of the requests of ``service`` by now."""
        return self._profiles[service]

    def can_hold(self, job: SharedJob) -> bool:
        """Whether ``job`` fits the pool at all; its last token never gets there."""
        tokens = job.input_tokens + job.output_tokens - 1
        kv_bytes = self._service(job.service).kv_bytes_per_token
        return tokens <= self.pool.room_tokens(kv_bytes)

    def set_speed(self, factor: float, now_s: float) -> None:
        """Iterations take ``factor`` times their time, from the next one on."""
        self._next_speed = factor
        self._changed(now_s)

    def submit(self, job: SharedJob, now_s: float) -> None:
        """Take ``job``, which `can_hold`. ``now_s`` is not after `next_s`."""
        self._enter(job)
        self._changed(now_s)

    def adopt(self, job: SharedJob, now_s: float) -> None:
        """Take ``job`` and what it has computed elsewhere: its KV is in the pool."""
        self._enter(job)
        if job.computed:
            job.pages, job.resident = self._pages(job.service, job.computed), True
            self.used += job.pages
        self._changed(now_s)

    def _enter(self, job: SharedJob) -> None:
        if not self.can_hold(job):
            raise ValueError(f"request {job.request}: more tokens than the pool has")
        time = self._service(job.service).time
        prompt = job.input_tokens
        job.progress = self.policy.arrive(
            Progress(
                request=job.request,
                service=job.service,
                arrival_s=job.arrival_s,
                prefill_s=time.prefill_s(prompt, prompt**2),
                size_s=time.isolated_s(prompt, job.output_tokens),
            ),
            self._profiles,
        )
        self._jobs[job] = None
        self._refresh(job)

    def advance(self) -> tuple[SharedJob, ...]:
        """Go to `next_s`; return the jobs that end there, in order of rank."""
        turn, now_s, count = self._turn, self.next_s, self._count
        if turn is None:
            raise ValueError("nothing is under way")
        seconds = self._turn_s(count)
        for job in turn.evicted:
            if job in self._jobs:
                self._evict(job)
        ended = []
        first_s = self._start_s + self._turn_s(1)
        for job in turn.batch:
            self._note_gaps(job, first_s, now_s, count)
            job.computed = job.known_tokens if turn.prompts else job.computed + count
            job.given += count
            job.resident = True
            if job.first_token_s is None:
                job.first_token_s = now_s
            if not turn.prompts:
                job.decode_s += seconds
            if job.given == job.output_tokens:
                del self._jobs[job]
                self.used -= job.pages
                profile = self._profiles[job.service]
                self._profiles[job.service] = finished(profile, job.decode_s)
                job.pages, job.resident = 0, False
                ended.append(job)
            else:
                job.progress = self.policy.ran(job.progress, seconds, now_s)
                if self.policy.foresees:
                    self._foresee(job)
                pages = self._pages(job.service, job.computed)
                self.used += pages - job.pages
                job.pages = pages
                self._refresh(job)
        self.turns += self._last != turn.service
        self._last = turn.service
        self._running = frozenset(job.request for job in turn.batch)
        if now_s >= self._quotas_next_s:
            self._rebalance()
            every_s = self.rules.quota_every_s
            self._quotas_next_s = (now_s // every_s + 1) * every_s
        self._begin(now_s)
        return tuple(ended)

    def _note_gaps(
        self, job: SharedJob, first_s: float, now_s: float, count: int
    ) -> None:
        """Tell of the job's gaps in ``count`` iterations, the first of which ends at
        ``first_s``; those after it count as equal."""
        if self.gaps is not None and job.first_token_s is not None:
            self.gaps(job.service, first_s - job.last_token_s, 1)
            if count > 1:
                self.gaps(job.service, (now_s - first_s) / (count - 1), count - 1)
        job.last_token_s = now_s

    # --- members come and go -------------------------------------------------------

    def add(self, service: Hosted, pool: Pool, now_s: float) -> int:
        """``service`` joins; the group then has ``pool``. Returns its index."""
        self._hosted.append(service)
        self._profiles.append(service.profile)
        self._resize(pool, now_s)
        return len(self._hosted) - 1

    def remove(self, service: int, pool: Pool, now_s: float) -> tuple[SharedJob, ...]:
        """``service`` leaves, the group then has ``pool``; returns the jobs that it had,
        without their KV. Its index is not used again. An iteration of it that is under way
        is lost."""
        self._service(service)
        gone = tuple(job for job in self._jobs if job.service == service)
        for job in gone:
            del self._jobs[job]
            self.used -= job.pages
            job.forget()
        self._hosted[service] = None
        if self._turn and self._turn.service == service:
            self._turn = None
        self._resize(pool, now_s)
        return gone

    def _resize(self, pool: Pool, now_s: float) -> None:
        """Who no longer has pages leaves them at the end of the iteration under way."""
        if pool.page_bytes != self.pool.page_bytes:
            raise ValueError("pages cannot change their size")
        self.pool = pool
        if not all(self.can_hold(job) for job in self._jobs):
            raise ValueError("the pool no longer holds each of its requests")
        self._quotas = self._first_quotas()
        self._changed(now_s)

    def _first_quotas(self) -> dict[int, float]:
        """A request each, and the rest in proportion to the KV that comes in."""
        inflow = {
            s: self._profiles[s].rate_rps
            * h.kv_bytes_per_token
            * (h.input_tokens + h.output_tokens)
            for s, h in enumerate(self._hosted)
            if h
        }
        return first_quotas(self.pool.pages, self._least(), inflow)

    def _least(self) -> dict[int, int]:
        """Pages of one usual request of each LLM."""
        return {
            s: usual_pages(h.input_tokens, h.usual_output_tokens, self._per_page(s))
            for s, h in enumerate(self._hosted)
            if h
        }

    def _rebalance(self) -> None:
        used = dict.fromkeys(self._quotas, 0)
        waiting = set()
        for job in self._jobs:
            if job.resident:
                used[job.service] += job.promise
            else:
                waiting.add(job.service)
        self._quotas = rebalance(self._quotas, used, waiting, least=self._least())

    # --- jobs ----------------------------------------------------------------------

    def _service(self, service: int) -> Hosted:
        hosted = self._hosted[service]
        if hosted is None:
            raise ValueError(f"service {service} has left")
        return hosted

    def _per_page(self, service: int) -> int:
        token_bytes = self._service(service).kv_bytes_per_token
        return tokens_per_page(self.pool.page_bytes, token_bytes)

    def _pages(self, service: int, tokens: int) -> int:
        return pages_of(tokens, self._per_page(service))

    def _refresh(self, job: SharedJob) -> None:
        """Bring what the choice sees up to date; a promise is renewed on joining."""
        job.prompt_tokens = 0 if job.computed else job.known_tokens
        job.next_pages = self._pages(job.service, job.prompt_tokens or job.computed + 1)
        if not job.resident:
            job.promise = promised_pages(
                job.input_tokens,
                self._service(job.service).usual_output_tokens,
                job.next_pages,
                self._per_page(job.service),
            )

    def _foresee(self, job: SharedJob) -> None:
        """Its true size, as far as it is still to come."""
        left = job.output_tokens - job.given
        context = job.known_tokens + left / 2
        left_s = left * self._service(job.service).time.decode_s(1, context)
        size_s = job.progress.attained_s + left_s
        job.progress = replace(job.progress, size_s=size_s)

    def _swaps(self, job: SharedJob) -> bool:
        time, tokens = self._service(job.service).time, job.computed
        return swaps(
            self._kv_bytes(job),
            self.pool.link_bytes_per_s,
            time.prefill_s(tokens, tokens**2),
        )

    def _kv_bytes(self, job: SharedJob) -> int:
        return job.computed * self._service(job.service).kv_bytes_per_token

    def _evict(self, job: SharedJob) -> None:
        self.used -= job.pages
        self.preemptions += 1
        job.preemptions += 1
        if self._swaps(job):
            self.swaps += 1
            job.pages, job.resident = 0, False
        else:
            job.forget()
        self._refresh(job)

    # --- turns ---------------------------------------------------------------------

    def _changed(self, now_s: float) -> None:
        """Something is new: iterations that have not begun are chosen again."""
        if self._turn is None or now_s == self._start_s:
            self._begin(now_s)
        elif self._count > 1:
            self._count = self._until(now_s, self._count)
            self.next_s = self._start_s + self._turn_s(self._count)

    def _begin(self, now_s: float) -> None:
        """Choose what runs from ``now_s`` on. Changes nothing but the plan."""
        self._start_s, self._speed = now_s, self._next_speed
        if not self._jobs:
            self._turn, self.next_s = None, math.inf
            return
        turn = next_turn(
            self._jobs,
            policy=self.policy,
            rules=self.rules,
            now_s=now_s,
            profiles=self._profiles,
            pages=self.pool.pages,
            quotas=self._quotas,
            running=self._running,
        )
        self._turn = turn
        moved = [job for job in turn.evicted if self._swaps(job)]
        moved += [job for job in turn.batch if job.computed and not job.resident]
        self._extra_s = 0.0
        if moved:
            moved_bytes = sum(self._kv_bytes(job) for job in moved)
            self._extra_s = moved_bytes / self.pool.link_bytes_per_s
        if self._last not in (None, turn.service):
            self._extra_s += self.switch_s
        self._count = 1 if turn.prompts else self._alike(turn)
        self.next_s = now_s + self._turn_s(self._count)

    def _alike(self, turn: Turn[SharedJob]) -> int:
        """Decode iterations until the choice may be another one."""
        batch, others = turn.batch, set(self._jobs).difference(turn.batch)
        stays = self.policy.keeps or not others
        settled = not turn.evicted and all(job.resident for job in batch)
        if turn.overdue or not (stays and settled):
            return 1
        count = min(job.output_tokens - job.given for job in batch)
        if turn.others_fit:
            # Until what is promised to the batch grows.
            count = min(count, *(self._promised(job) for job in batch))
        count = self._with_pages(batch, max(count, 1))
        left_s = min(job.progress.budget_s - job.progress.attained_s for job in batch)
        ends_s = [self._start_s + left_s]
        for job in others:
            patience_s = self.rules.patience * self._profiles[job.service].reference_s
            due_s = job.progress.unserved_since_s + patience_s
            if due_s >= self._start_s:
                ends_s.append(due_s)
            if not job.resident:
                ends_s.append(self._quotas_next_s)
        return self._until(min(ends_s), count)

    def _promised(self, job: SharedJob) -> int:
        """Tokens until it takes a page that was not promised to it."""
        held = max(job.promise, job.pages)
        return held * self._per_page(job.service) - job.computed

    def _with_pages(self, batch: Sequence[SharedJob], count: int) -> int:
        """Up to ``count`` iterations for which there are pages; at least one."""
        free = self.pool.pages - self.used

        def taken(steps: int) -> int:
            return sum(
                self._pages(job.service, job.computed + steps) - job.pages
                for job in batch
            )

        if taken(count) <= free:
            return count
        return max(1, bisect_left(range(1, count + 1), free + 1, key=taken))

    def _until(self, at_s: float, count: int) -> int:
        """Iterations until the first end at or after ``at_s``, at most ``count``."""
        if self._start_s + self._turn_s(count) < at_s:
            return count
        steps = range(1, count + 1)
        return 1 + bisect_left(
            steps, at_s, key=lambda n: self._start_s + self._turn_s(n)
        )

    def _turn_s(self, count: int) -> float:
        """Seconds of the first ``count`` iterations of the turn.

        Decoding ``b`` sequences adds ``b`` tokens of context per step, so ``count`` steps
        from ``c`` tokens see ``count * c + b * count * (count - 1) / 2`` in all.
        """
        turn = self._turn
        if turn is None:
            return math.inf
        time, batch = self._service(turn.service).time, len(turn.batch)
        if turn.prompts:
            tokens = sum(job.prompt_tokens for job in turn.batch)
            tokens2 = sum(job.prompt_tokens**2 for job in turn.batch)
            return self._extra_s + time.prefill_s(tokens, tokens2) * self._speed
        context = count * sum(job.computed + 1 for job in turn.batch)
        context += batch * (count * (count - 1) // 2)
        seconds = count * time.decode_s(batch, 0.0)
        seconds += time.decode_s_per_context_token * context
        return self._extra_s + seconds * self._speed
