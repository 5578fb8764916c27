"""KV pages of requests that had to leave, in host memory until they come back.

Whether one is swapped or computed again is `turns.swaps`' to say.
"""

from __future__ import annotations

from collections.abc import Iterator

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
        copies = [
            self._pool.memory.fetch(host, own, self._pool.page_bytes)
            for own, host in self._addresses(pages, there)
        ]
        for copy in copies:
            copy.wait()
        pages.release()
        return there

    def back(self, there: Pages, pages: Pages) -> None:
        """Copy what `out` returned into ``pages``, as many of them, and free it."""
        copies = [
            self._pool.memory.copy(own, host, self._pool.page_bytes)
            for own, host in self._addresses(pages, there)
        ]
        for copy in copies:
            copy.wait()
        there.release()

    def _addresses(self, pages: Pages, there: Pages) -> Iterator[tuple[int, int]]:
        """Of each page in the pool, and of its place in the host's."""
        base, host = self._pool.window(), self._host.window()
        size = self._pool.page_bytes
        for number, to in zip(pages.numbers, there.numbers, strict=True):
            yield base + number * size, host + to * size
