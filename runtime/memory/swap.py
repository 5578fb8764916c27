"""KV pages of requests that had to leave, in host memory until they come back.

Whether one is swapped or computed again is `turns.swaps`' to say.
"""

from __future__ import annotations

from foreserve.runtime.memory.books import Pages
from foreserve.runtime.memory.pool import PagePool


class Swap:
    """Moves pages between a GPU's pool and one of the host with pages of the same size.
    Any thread, but one `Pages` at a time."""

    def __init__(self, pool: PagePool, host: PagePool) -> None:
        if pool.page_bytes != host.page_bytes:
            raise ValueError(f"pages of {pool.page_bytes} and {host.page_bytes} bytes")
        self._pool, self._host = pool, host

    def out(self, pages: Pages) -> Pages | None:
        """Copy what is in ``pages`` to the host and free them; the host's pages, or None
        and nothing done if it has too few."""
        there = self._host.books.take(len(pages))
        if there is None:
            return None
        base, host = self._pool.window(), self._host.window()
        size = self._pool.page_bytes
        copies = [
            self._pool.memory.fetch(host + to * size, base + number * size, size)
            for number, to in zip(pages.numbers, there.numbers, strict=True)
        ]
        for copy in copies:
            copy.wait()
        pages.release()
        return there

    def back(self, there: Pages, pages: Pages) -> None:
        """Copy what `out` returned into ``pages``, as many of them, and free it."""
        base, host = self._pool.window(), self._host.window()
        size = self._pool.page_bytes
        copies = [
            self._pool.memory.copy(base + number * size, host + to * size, size)
            for number, to in zip(pages.numbers, there.numbers, strict=True)
        ]
        for copy in copies:
            copy.wait()
        there.release()
