"""Where the tokens of requests go that must leave: their pages are copied to the host and
back, or the tokens are computed again, whichever takes less here (`turns.swaps`)."""

from __future__ import annotations

from collections.abc import Sequence

from foreserve.models.cost import IterationTime
from foreserve.runtime.memory.books import Pages
from foreserve.runtime.memory.kv import KvSpace
from foreserve.runtime.memory.rules import pages_of
from foreserve.runtime.memory.swap import Swap
from foreserve.runtime.paged.attention import Work
from foreserve.runtime.paged.jobs import Job
from foreserve.runtime.turns import swaps

PACE_SHARE = 0.1
"""Weight of the last iteration in what is known of this machine's pace."""


class Away:
    """For the loop's thread."""

    def __init__(self, space: KvSpace, swap: Swap | None, chunk_tokens: int) -> None:
        """``swap``: where pages go; else all is computed again, in chunks."""
        self._space, self._swap, self._chunk_tokens = space, swap, chunk_tokens
        self._times: dict[int, IterationTime] = {}
        self._pace: dict[int, float] = {}
        """What prompts take here, as a multiple of what was planned. By LLM."""

    def add(self, service: int, time: IterationTime) -> None:
        self._times[service], self._pace[service] = time, 1.0

    def remove(self, service: int) -> None:
        del self._times[service], self._pace[service]

    def prefill_s(self, service: int, tokens: int, squares: int) -> float:
        """What a prompt takes here."""
        return self._times[service].prefill_s(tokens, squares) * self._pace[service]

    def learn(self, service: int, work: Sequence[Work], took_s: float) -> None:
        """How long prompts take on this machine, compared with what was planned."""
        squares = sum((w.begin + len(w.tokens)) ** 2 - w.begin**2 for w in work)
        tokens = sum(len(w.tokens) for w in work)
        planned_s = self._times[service].prefill_s(tokens, squares)
        if planned_s > 0:
            pace = self._pace[service]
            self._pace[service] = pace + PACE_SHARE * (took_s / planned_s - pace)

    def out(self, job: Job) -> Pages | None:
        """Where its tokens are now if they were swapped."""
        count = pages_of(job.computed, self._space.per_page(job.service))
        if self._swap is None or not count:
            return None
        numbers = job.table.numbers()[:count]
        num_bytes = count * self._space.page_bytes
        if swaps(num_bytes, self._swap.bytes_per_s, self._again_s(job)):
            return self._swap.out(numbers)
        self._swap.try_out(numbers[0])  # It may have become faster.
        return None

    def back(self, job: Job) -> bool:
        """Have in pages again what was swapped, if there are any for it."""
        if job.away is None:
            return True
        if not job.table.grow(job.computed):
            return False
        assert self._swap is not None
        # It may have pages for what comes next already.
        self._swap.back(job.away, job.table.numbers()[: len(job.away)])
        job.away = None
        return True

    def _again_s(self, job: Job) -> float:
        """What it would take to compute its tokens again, chunk by chunk."""
        most = self._chunk_tokens
        ends = [*range(most, job.computed, most), job.computed]
        return sum(
            self.prefill_s(job.service, end - begin, end**2 - begin**2)
            for begin, end in zip([0, *ends], ends, strict=False)
        )
