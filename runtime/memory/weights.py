"""Weights that are resident: loaded, kept in part, in use, and given up for KV.

What is resident of a shard is a prefix, since it is copied from its begin and dropped from
its end; a load goes on behind it. While an LLM is ACTIVE its weights are pinned; those of
WARM ones are on loan from the KV cache unless they are kept, and `Shelf` takes them back:
the least valuable first, from the end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foreserve.models.errors import ForeserveError
from foreserve.runtime.memory.books import Books, Pages
from foreserve.runtime.memory.loading import Link, Load, Source
from foreserve.runtime.memory.pool import PagePool, Span


class NotResident(ForeserveError):
    """Weights were to be used that are not all there: a fault in our own code."""


class Weights:
    """One shard in a slot of its own. Any thread."""

    def __init__(self, pool: PagePool, num_bytes: int) -> None:
        """Reserves addresses, and no memory."""
        self.pool, self.num_bytes = pool, num_bytes
        self.slot = pool.reserve(num_bytes)
        self._resident_bytes = 0
        self._load: tuple[Link, Load] | None = None
        self._pins = 0
        self._leaving: int | None = None
        self._lock = threading.RLock()

    @property
    def resident_bytes(self) -> int:
        """How much of the shard is there, from its begin."""
        with self._lock:
            if self._load is not None:
                return self._load[1].copied_bytes
            return self._resident_bytes

    @property
    def complete(self) -> bool:
        return self.resident_bytes == self.num_bytes

    @property
    def pinned(self) -> bool:
        return self._pins > 0

    @property
    def missing_pages(self) -> int:
        """To be taken for a load."""
        return self.pool.pages_for(self.num_bytes) - self.slot.mapped

    @property
    def held_pages(self) -> int:
        """Mapped, and set aside for the load under way; what is being dropped counts
        until it is free. Waits for nobody."""
        leaving, loading = self._leaving, self._load
        if leaving is not None:
            return leaving
        if loading is not None and not loading[1].ended.is_set():
            return loading[1].held_pages
        return self.slot.mapped

    def load(
        self, link: Link, source: Source | int, pages: Pages, *, urgent: bool = False
    ) -> Load:
        """Bring what is missing of the shard from ``source`` (or that address), into
        ``pages`` (`missing_pages` of them), which are the load's from now on. One at a
        time."""
        with self._lock:
            if self._load is not None:
                if not self._load[1].ended.is_set():
                    raise ValueError("a load is under way")
                self._end()
            load = link.begin(
                self.slot,
                source,
                self.num_bytes,
                resident_bytes=self._resident_bytes,
                pages=pages,
                urgent=urgent,
            )
            self._load = link, load
            return load

    def settle(self) -> None:
        """Wait for the load under way, and book what has arrived; pages that were mapped
        and got nothing are free."""
        with self._lock:
            if self._load is not None:
                self._load[1].ended.wait()
                self._end()

    def stop(self) -> None:
        """Cancel the load under way and `settle`: takes as long as the chunks that are
        being copied."""
        with self._lock:
            if self._load is not None:
                link, load = self._load
                link.cancel(load)
                self.settle()

    def _end(self) -> None:
        assert self._load is not None
        self._resident_bytes = self._load[1].copied_bytes
        self._load = None
        used = self.pool.pages_for(self._resident_bytes)
        self.slot.unmap(self.slot.mapped - used).release()

    def drop(self, count: int) -> int:
        """Free at least ``count`` pages from the end, or all it has; how many. A load is
        stopped first; nothing happens to pinned weights."""
        with self._lock:
            if self.pinned:
                return 0
            before = self._leaving = self.held_pages
            try:
                self.stop()
                freed = before - self.slot.mapped
                more = min(max(0, count - freed), self.slot.mapped)
                self.slot.unmap(more).release()
            finally:
                self._leaving = None
            mapped_bytes = self.slot.mapped_bytes
            self._resident_bytes = min(self._resident_bytes, mapped_bytes)
            return freed + more

    def pin(self) -> None:
        """They are used from now on, and cannot be dropped. All must be there."""
        with self._lock:
            if self._load is not None and self._load[1].ended.is_set():
                self._end()
            if not self.complete:
                raise NotResident(
                    f"{self.resident_bytes} of {self.num_bytes} bytes are there"
                )
            self._pins += 1

    def unpin(self) -> None:
        """Undo one `pin`; nothing made of `view` may be left, or `drop` will fail."""
        with self._lock:
            if not self._pins:
                raise ValueError("not pinned")
            self._pins -= 1

    def view(self) -> Span:
        """All of it, without a copy; while pinned."""
        with self._lock:
            if not self.pinned:
                raise NotResident("weights that are not pinned may be dropped")
            return self.slot.view(0, self.num_bytes)

    def close(self) -> None:
        """Give up memory and addresses. Raises `pool.InUse` while a view is alive."""
        with self._lock:
            self.stop()
            self._pins = 0
            self.slot.release()
            self._resident_bytes = 0


@dataclass(eq=False)
class _Placed:
    shards: tuple[Weights, ...]
    score: float
    kept: int = 0


class Shelf:
    """The weights of all LLMs on a node's pools, a `kv.Borrower`. Any thread."""

    def __init__(self) -> None:
        self._placed: dict[str, _Placed] = {}
        self._lock = threading.RLock()
        self._revoking = threading.Lock()
        """Who asks what there is need not wait for who takes it."""
        self.revoked_pages = 0
        """So far, on all GPUs."""

    def put(self, llm: str, shards: Iterable[Weights], score: float = 0.0) -> None:
        """Weights of an LLM, one shard on each of its GPUs; ``score``: what they are
        worth (the plan's value), the lowest go first."""
        with self._lock:
            if llm in self._placed:
                raise ValueError(f"{llm} is here")
            self._placed[llm] = _Placed(tuple(shards), score)

    def shards(self, llm: str) -> Sequence[Weights]:
        with self._lock:
            return self._placed[llm].shards

    def __contains__(self, llm: str) -> bool:
        with self._lock:
            return llm in self._placed

    def take(self, llm: str) -> None:
        """Close its shards: all its pages and addresses are free, on every GPU."""
        with self._lock:
            for own in self._placed[llm].shards:
                own.close()
            del self._placed[llm]

    def pin(self, llm: str) -> None:
        """It is ACTIVE: all its shards or none, `NotResident` if one is not whole."""
        with self._lock:
            pinned: list[Weights] = []
            try:
                for own in self._placed[llm].shards:
                    own.pin()
                    pinned.append(own)
            except NotResident:
                for own in pinned:
                    own.unpin()
                raise

    def unpin(self, llm: str) -> None:
        """It is WARM again."""
        with self._lock:
            for own in self._placed[llm].shards:
                own.unpin()

    def keep(self, llm: str) -> None:
        """It is not on loan from now on, whole or not: what it has, and what comes, stays
        until `lend` is called as often. For weights that a plan has given their memory, or
        that requests wait for."""
        with self._revoking, self._lock:
            self._placed[llm].kept += 1

    def lend(self, llm: str) -> None:
        """Undo one `keep`."""
        with self._lock:
            if not self._placed[llm].kept:
                raise ValueError(f"{llm} is on loan")
            self._placed[llm].kept -= 1

    def _victims(self, pool: Books) -> list[tuple[_Placed, int]]:
        """Who is on loan with pages of ``pool``, and how many; who goes first is first."""
        found = []
        for placed in sorted(self._placed.values(), key=lambda p: p.score):
            if placed.kept or any(own.pinned for own in placed.shards):
                continue
            pages = sum(x.held_pages for x in placed.shards if x.pool.books is pool)
            if pages:
                found.append((placed, pages))
        return found

    def revocable(self, pool: Books) -> int:
        """Pages of ``pool`` that WARM LLMs have on loan."""
        with self._lock:
            return sum(pages for _, pages in self._victims(pool))

    def revoke(self, pool: Books, count: int) -> int:
        """Drop weights on loan from their ends until ``count`` pages of ``pool`` are
        free, or there are no more. Of an LLM with several shards each loses as much, as
        none is of use without the others."""
        freed = 0
        with self._revoking:
            with self._lock:
                victims = self._victims(pool)
            for placed, pages in victims:
                if freed >= count:
                    break
                want = min(count - freed, pages)
                for own in placed.shards:
                    dropped = own.drop(want)
                    self.revoked_pages += dropped
                    freed += dropped if own.pool.books is pool else 0
        return freed
