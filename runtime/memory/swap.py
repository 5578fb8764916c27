"""KV pages of requests that had to leave, in host memory until they come back.

Whether one is swapped or computed again is `turns.swaps`' to say; how fast pages move is
learnt here, from each of them that moves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from foreserve.runtime.memory.books import Pages
from foreserve.runtime.memory.pool import Copying, PagePool
from foreserve.runtime.memory.posix import PosixMemory

PACE_SHARE = 0.1
"""Weight of the last pages in what is known of their pace."""


class Swap:
    """Pages of the host for what is in a GPU's pool. For one thread."""

    def __init__(
        self, pool: PagePool, num_bytes: int, now_s: Callable[[], float]
    ) -> None:
        """``num_bytes`` of host memory at most, at least a page; on the host they are
        given when they are first used. Copies a page to learn how long that takes."""
        self._pool, self._now_s = pool, now_s
        self.host = PagePool(PosixMemory(pool.page_bytes, num_bytes // pool.page_bytes))
        pool.memory.pin(self.host.window(), self.host.capacity * pool.page_bytes)
        self._s_per_page: float | None = None
        self.try_out(0)
        self._s_per_page = None  # Memory that was never touched is slower.
        self.try_out(0)

    @property
    def bytes_per_s(self) -> float:
        """One way."""
        assert self._s_per_page is not None
        return self._pool.page_bytes / max(self._s_per_page, 1e-9)

    def try_out(self, number: int) -> None:
        """Copy that page for nothing but to learn how long it takes now."""
        there = self.out([number])
        if there is not None:
            there.release()

    def out(self, numbers: Sequence[int]) -> Pages | None:
        """Copy what is in these pages of the pool to the host: its pages, or None and
        nothing done if it has too few."""
        there = self.host.books.take(len(numbers))
        if there is not None:
            self._move(self._pool.memory.fetch, there.numbers, numbers)
        return there

    def back(self, there: Pages, numbers: Sequence[int]) -> None:
        """Copy what `out` returned into these pages of the pool, as many, and free it."""

        def copy(host: int, own: int, num_bytes: int) -> Copying:
            return self._pool.memory.copy(own, host, num_bytes)

        self._move(copy, there.numbers, numbers)
        there.release()

    def close(self) -> None:
        """What is there is lost."""
        self._pool.memory.unpin(self.host.window())
        self.host.close()

    def _move(
        self,
        begin: Callable[[int, int, int], Copying],
        there: Sequence[int],
        numbers: Sequence[int],
    ) -> None:
        """``begin`` a copy of each page by the addresses of both, and wait for all."""
        size = self._pool.page_bytes
        base, host = self._pool.window(), self.host.window()
        self._pool.memory.settle()
        began_s = self._now_s()
        copies = [
            begin(host + to * size, base + number * size, size)
            for to, number in zip(there, numbers, strict=True)
        ]
        for copy in copies:
            copy.wait()
        if numbers:
            took_s = (self._now_s() - began_s) / len(numbers)
            known_s = took_s if self._s_per_page is None else self._s_per_page
            self._s_per_page = known_s + PACE_SHARE * (took_s - known_s)
