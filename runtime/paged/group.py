"""The LLMs of one GPU group in turns: each iteration runs a batch of one of them.

What runs, who joins and who gives up his pages is `turns.next_turn`'s choice, as in the
simulator; pages are `memory.kv.KvSpace`'s. Long prompts are computed in chunks, one per
iteration; who is preempted has his pages copied to the host and back, or computes his
tokens again, the answer so far among them, whichever takes less (`turns.swaps`).
Nobody is preempted, joins or leaves but between two iterations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from foreserve.models.cost import IterationTime
from foreserve.runtime.memory.kv import KvNeeds, KvSpace, KvTable
from foreserve.runtime.memory.pacing import Pacer
from foreserve.runtime.memory.rules import pages_of
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.paged.attention import Scored, Work, cache_view
from foreserve.runtime.paged.away import Away
from foreserve.runtime.paged.decoder import Decoder, Weights
from foreserve.runtime.paged.jobs import Job, Reason, TooLong, Totals, next_tokens
from foreserve.runtime.paged.leading import OWN, Leading
from foreserve.runtime.paged.mirror import Leader, Mirror, Team
from foreserve.runtime.scheduler import Policy, Profile, Progress, finished
from foreserve.runtime.turns import Rules, Turn, next_turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """One LLM of the group, its weights in place."""

    llm: str
    decoder: Decoder
    weights: Weights
    dtype: str
    time: IterationTime
    """As planned; what iterations here take instead is learnt."""
    needs: KvNeeds
    reference_s: float
    """e_s: a mean request alone."""
    team: Team | None = None
    """Those that follow, where it has several GPUs and this is the first."""
    leader: Leader | None = None
    """Where this is not."""


class Group:
    """For one thread, but for what says otherwise."""

    def __init__(
        self,
        space: KvSpace,
        pages: torch.Tensor,
        policy: Policy,
        now_s: Callable[[], float],
        rules: Rules | None = None,
        swap: Swap | None = None,
        want_free: Callable[[int], None] = lambda _: None,
        name: str = "",
    ) -> None:
        """``pages``: the pool's window, uint8 ``[pages, bytes]``; ``space``: over that one
        pool. ``swap``: where pages go that must leave; else all is computed again.
        ``want_free``: told how many pages should be free soon, when fewer are and some
        are on loan (`kv.Keeper.want`). ``name``: no other leader has it."""
        self.space, self.policy, self.rules = space, policy, rules or Rules()
        self._want_free = want_free
        self._away = Away(space, swap, self.rules.max_prompt_tokens)
        self._pages, self._now_s = pages, now_s
        self._hosted: dict[int, Hosted] = {}
        self._caches: dict[int, torch.Tensor] = {}
        self._profiles: list[Profile] = []
        """By number, of those that have left, too."""
        self.totals: dict[int, Totals] = {}
        self.mirrors: dict[int, Mirror] = {}
        """LLMs that are computed here when another process says so."""
        self.pacer: Pacer | None = None
        """Told of iterations, for the loads beside them."""
        self._jobs: dict[Job, None] = {}
        self.leading = Leading(
            space, name, self._jobs, self.mirrors, self.grow, self._evict
        )
        self._running: frozenset[int] = frozenset()
        self._made = 0
        self._quotas_next_s = 0.0
        self.iterations = self.preemptions = self.swaps = 0
        """``swaps``: preemptions that nothing is computed again for."""
        self.switches = 0
        """Changes from one LLM to another."""
        self._last: int | None = None

    @property
    def busy(self) -> bool:
        """Somebody may run."""
        return bool(self.leading.able())

    def counts(self, service: int) -> tuple[int, int]:
        """Requests of that LLM that have pages, and that wait for some. Any thread."""
        mine = [job for job in tuple(self._jobs) if job.service == service]
        running = sum(job.resident for job in mine)
        return running, len(mine) - running

    # --- LLMs ----------------------------------------------------------------------

    def add(self, hosted: Hosted) -> int:
        """It may be asked from now on; its number."""
        service = self.space.add(hosted.needs)
        config = hosted.decoder.config
        self._caches[service] = cache_view(
            self._pages,
            layers=config.layers,
            kv_heads=hosted.decoder.kv_heads,
            head_dim=config.head_dim,
            dtype=hosted.dtype,
        )
        self._hosted[service] = hosted
        if hosted.leader is not None:
            self.mirrors[service] = Mirror(self, service, hosted.leader)
        self.leading.add(service, hosted.team)
        profile = Profile(
            reference_s=hosted.reference_s,
            decode_s=hosted.time.decode_s(1, hosted.needs.input_tokens)
            * max(1.0, hosted.needs.output_tokens),
            rate_rps=hosted.needs.rate_rps,
        )
        assert service == len(self._profiles)
        self._profiles.append(profile)
        self._away.add(service, hosted.time)
        self.totals[service] = Totals()
        return service

    def remove(self, service: int) -> None:
        """It may not be asked any more, and what it was asked is aborted. Nothing here
        refers to its weights then."""
        for job in [job for job in self._jobs if job.service == service]:
            self.cancel(job)
        if service in self.mirrors:
            self.mirrors.pop(service).close()
        self.leading.remove(service)
        self._away.remove(service)
        self.space.remove(service)
        for known in (self._hosted, self._caches, self.totals):
            known.pop(service)

    # --- requests ------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """It has come; ``job.prompt`` is not empty. Raises `TooLong` if prompt and answer
        would not fit into one of its GPUs, were it the only one."""
        prompt = len(job.prompt)
        per_page, room = self.space.per_page(job.service), self.space.pages()
        pages = pages_of(prompt + job.most_tokens - 1, per_page)
        if pages <= room:
            room = self.leading.reserve(job.service, pages)
        if pages > room:
            raise TooLong(
                f"{prompt} prompt tokens and {job.most_tokens} more do not fit into "
                f"{room * per_page}"
            )
        job.known = list(job.prompt)
        prefill_s = self._away.prefill_s(job.service, prompt, prompt**2)
        self._made += 1
        job.progress = self.policy.arrive(
            Progress(
                request=self._made,
                service=job.service,
                arrival_s=job.arrival_s,
                prefill_s=prefill_s,
            ),
            self._profiles,
        )
        job.table = self.space.open(job.service)
        self._jobs[job] = None
        self._refresh(job)

    def cancel(self, job: Job, reason: Reason = "abort") -> None:
        """Nobody wants its answer any more; any number of calls."""
        if job.over:
            return
        job.over = True
        self._jobs.pop(job, None)
        self._release(job)
        job.listener.end(reason)

    def make_room(self, pages: int) -> bool:
        """Have so many pages free: the last to have come give theirs up, and compute
        again. False, and nothing done, if those in flight could not end then."""
        if self.space.pages() - pages < self.largest:
            return False
        for job in reversed(tuple(self._jobs)):
            if self.space.pools[0].free >= pages:
                break
            if job.resident:
                self._evict(job)
        return self.space.pools[0].free >= pages

    def lendable(self) -> int:
        """Pages that weights may take now, to stay, without anybody being evicted for
        them: `KvSpace.lendable`, as long as the largest request in flight can end."""
        return max(0, min(self.space.lendable(), self.space.pages() - self.largest))

    def look_ahead(self) -> None:
        """Have what is lent taken back, while an iteration goes on, for those after it."""
        books = self.space.pools[0]
        if self.space.borrower.revocable(books):
            soon = self.space.soon()
            if soon > books.free:
                self._want_free(soon)

    @property
    def largest(self) -> int:
        """Pages that the largest request in flight may come to need: with fewer it would
        never end."""
        own = max((job.most_pages for job in self._jobs), default=0)
        return max((own, *(mirror.largest for mirror in self.mirrors.values())))

    def held(self, service: int) -> int:
        """Pages that its requests have. Any thread."""
        if service in self.mirrors:
            return self.mirrors[service].held
        return sum(job.pages for job in tuple(self._jobs) if job.service == service)

    def needs(self, service: int) -> int:
        """Pages that its requests have, or may come to need. Any thread."""
        mine = [job for job in tuple(self._jobs) if job.service == service]
        return sum(job.most_pages for job in mine)

    def step(self) -> bool:
        """Run an iteration, or find out who cannot; False if nobody may run."""
        self.leading.line.serve()
        able = self.leading.able()
        if not able:
            return False
        begin_s = self._now_s()
        self._rebalance(begin_s)
        turn = next_turn(
            able,
            policy=self.policy,
            rules=self.rules,
            now_s=begin_s,
            profiles=self._profiles,
            pages=self.leading.room(able),
            quotas=self.space.quotas,
            running=self._running,
            bounds=self.leading.bounds(able),
        )
        for job in turn.evicted:
            self._evict(job)
        full = self.leading.park(turn.service, turn.batch)
        for i, job in enumerate(turn.batch):
            if i not in full and not self._ready(job, begin_s, waits=not i):
                full[i] = OWN
        batch = [i for i in range(len(turn.batch)) if i not in full]
        self.leading.go(turn.service, batch)
        for i, place in full.items():
            self.leading.refused(turn.batch[i], place, waits=not i)
        self.look_ahead()
        if batch:
            self._iterate(turn, [turn.batch[i] for i in batch], begin_s)
        return True

    def _ready(self, job: Job, now_s: float, *, waits: bool) -> bool:
        """Have pages for what it computes next."""
        tokens = job.computed + (job.prompt_tokens or 1)
        if not self.leading.has(job, tokens, waits=waits):
            return False
        if not self._away.back(job):
            return False
        if not self.grow(job.table, tokens):
            return False  # Lent meanwhile; the next turn knows of it.
        if job.joined_s is None:
            job.joined_s = now_s
            self.totals[job.service].prompt_tokens += len(job.prompt)
        return True

    def grow(self, table: KvTable, tokens: int) -> bool:
        """`KvTable.grow`, with nothing in what is new."""
        held = table.pages
        if not table.grow(tokens):
            return False
        fresh = list(table.numbers()[held:])
        if fresh and self._hosted[table.service].decoder.kernels is None:
            # What another LLM left there need not even be numbers.
            self._pages[fresh] = 0
        return True

    def compute(
        self,
        service: int,
        work: Sequence[Work],
        hear: Callable[[Scored, torch.Tensor], None] = lambda *_: None,
    ) -> torch.Tensor:
        """The logits of each one's next token; ``hear`` is told what else is wanted."""
        hosted, cache = self._hosted[service], self._caches[service]
        step = hosted.decoder.plan(work, cache)
        logits = hosted.decoder(hosted.weights, cache, step, hear)
        if logits.is_cuda:
            # Pages may be another's now, and copies into them wait for no kernel.
            torch.cuda.current_stream().synchronize()
        return logits

    def follow(self, service: int, work: Sequence[Work]) -> None:
        """Compute what a leader has said."""
        self.look_ahead()
        begin_s = self._now_s()
        self.compute(service, work)
        self.pace(service, work, self._now_s() - begin_s)

    def _iterate(self, turn: Turn[Job], batch: list[Job], begin_s: float) -> None:
        ready_s = self._now_s()
        work = [
            Work(
                tokens=job.chunk,
                begin=job.computed,
                table=job.table.numbers(),
                scored=job.scored(job.prompt_tokens),
            )
            for job in batch
        ]
        logits = self.compute(
            turn.service,
            work,
            lambda some, told: batch[some.sequence].hear(
                work[some.sequence].begin + some.first, told
            ),
        )
        for job, done in zip(batch, work, strict=True):
            job.computed += len(done.tokens)
        ready = [i for i, job in enumerate(batch) if job.computed == len(job.known)]
        tokens: dict[Job, int] = {}
        if ready:
            telling = [batch[i] for i in ready]
            rows = logits if len(ready) == len(batch) else logits[ready]
            tokens = dict(zip(telling, next_tokens(rows, telling), strict=True))
        now_s = self._now_s()
        if turn.prompts:
            self._away.learn(turn.service, work, now_s - ready_s)
        self.pace(turn.service, work, now_s - begin_s)
        self.iterations += 1
        self.switches += self._last not in (None, turn.service)
        self._last = turn.service
        for job in batch:
            self._after(job, tokens.get(job), turn.prompts, now_s - begin_s, now_s)
        self._running = frozenset(job.progress.request for job in batch if not job.over)

    def pace(self, service: int, work: Sequence[Work], took_s: float) -> None:
        """An iteration ended: what it lost says how fast loads may be beside it. Decodes
        are compared; it is their pace that is to be kept."""
        if self.pacer is None:
            return
        planned_s = 0.0
        told = self.pacer.paces or self.pacer.link.busy
        if told and all(len(one.tokens) == 1 for one in work):
            time = self._hosted[service].time
            planned_s = time.decode_s(len(work), sum(one.begin + 1 for one in work))
        self.pacer.ran(took_s, self._now_s(), service, planned_s)

    def _after(
        self, job: Job, token: int | None, prompts: bool, took_s: float, now_s: float
    ) -> None:
        if not prompts:
            job.decode_s += took_s
        if token is not None:
            reason = self._tell(job, token, now_s)
            if reason is not None:
                profile = self._profiles[job.service]
                self._profiles[job.service] = finished(profile, job.decode_s)
                self.cancel(job, reason)
                return
        job.progress = self.policy.ran(job.progress, took_s, now_s)
        self._refresh(job)

    def _tell(self, job: Job, token: int, now_s: float) -> Reason | None:
        """Why the answer ends with this token, if it does."""
        if job.first_s is None:
            job.first_s = now_s
        job.last_s = now_s
        if token in job.ends:
            return "stop"
        job.take(token)
        self.totals[job.service].given_tokens += 1
        if job.listener.token(token):
            return "stop"
        return "length" if job.given >= job.most_tokens else None

    def _release(self, job: Job) -> None:
        self.leading.release(job)
        job.table.release()
        if job.away is not None:
            job.away.release()

    def _evict(self, job: Job) -> None:
        # Those that follow would have to swap theirs, too.
        alone = self._hosted[job.service].team is None
        away = self._away.out(job) if alone else None
        self._release(job)
        job.table, job.away = self.space.open(job.service), away
        if away is None:
            job.computed = 0
        else:
            self.swaps += 1
        job.preemptions += 1
        self.preemptions += 1
        self.totals[job.service].preemptions += 1
        self._refresh(job)

    def _refresh(self, job: Job) -> None:
        """Bring what the choice sees up to date; a promise is renewed on joining."""
        per_page = self.space.per_page(job.service)
        left = len(job.known) - job.computed
        decodes = job.computed > 0 and left == 1
        job.prompt_tokens = 0 if decodes else min(left, self.rules.max_prompt_tokens)
        job.next_pages = pages_of(job.computed + (job.prompt_tokens or 1), per_page)
        if not job.resident:
            job.table.promise = self.space.promise(
                job.service, len(job.prompt), pages_of(len(job.known), per_page)
            )

    def _rebalance(self, now_s: float) -> None:
        if now_s < self._quotas_next_s:
            return
        waiting: Counter[int] = Counter(
            job.service for job in self._jobs if not job.resident
        )
        self.space.rebalance(waiting)
        self._quotas_next_s = now_s + self.rules.quota_every_s
