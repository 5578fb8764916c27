"""One pool of physical pages, mapped into ranges of addresses that never change.

A `Slot` is such a range. Its pages are mapped from its begin on without holes: `Slot.map`
adds behind the last one, `Slot.unmap` takes the last ones off. With `books.Pages` as the
only currency a page cannot be mapped twice. Whoever uses memory of a slot holds a `Span`
(tensors made of it keep it alive), and while one lives `unmap` beneath it is refused: so
there is no use after unmapping, and no page under a copy is anybody else's.

The whole pool is mapped once more in its `window`, at addresses that follow from the
pages' numbers: KV caches live there and need no mapping at all.

This is the same for host memory and GPUs; `Memory` is what differs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.runtime.memory.books import Books, Pages

Run = tuple[int, int]
"""(first, count) of pages with consecutive numbers."""

Span = Any
"""Bytes at a fixed address, and what tensors are made of without a copy: a ctypes array
(the buffer protocol), or for GPUs an object with ``__cuda_array_interface__``."""


class InUse(ForeserveError):
    """Memory was to be unmapped that somebody still uses: a fault in our own code."""


class Copying(Protocol):
    """A copy that was begun."""

    def wait(self) -> None:
        """Return when it has ended."""
        ...


class Memory(Protocol):
    """Physical pages and addresses of one device; knows nothing of who may use them."""

    @property
    def page_bytes(self) -> int: ...

    @property
    def num_pages(self) -> int: ...

    def reserve(self, num_bytes: int) -> int:
        """The address of a range of whole pages, nothing mapped; nobody else gets it."""
        ...

    def free(self, address: int, num_bytes: int) -> None:
        """Give up a range, of which nothing is mapped."""
        ...

    def map(self, address: int, pages: Iterable[Run], *, filled: bool = False) -> None:
        """Have the pages at ``address``, one behind the other, to be read and written.
        ``filled``: all of them will be, and soon. When it fails (`OSError`) nothing of it
        is mapped."""
        ...

    def unmap(self, address: int, num_bytes: int) -> None:
        """Have nothing at that address; touching it is an error of the machine."""
        ...

    def span(self, address: int, num_bytes: int) -> Span: ...

    def copy(self, address: int, source: int, num_bytes: int) -> Copying:
        """Begin to copy from host memory at ``source``; without the interpreter's lock."""
        ...

    def fetch(self, destination: int, address: int, num_bytes: int) -> Copying:
        """Begin to copy to host memory at ``destination``."""
        ...

    def settle(self) -> None:
        """Return when what was begun on the device has ended: its kernels, which copies
        do not wait for."""
        ...

    def pin(self, source: int, num_bytes: int) -> None:
        """Have that host memory ready to be copied from at full speed."""
        ...

    def unpin(self, source: int) -> None: ...

    def discard(self, pages: Iterable[Run]) -> None:
        """What is in these pages is not needed; where possible the machine gets their
        memory until they are written again."""
        ...

    def close(self) -> None:
        """Give everything back to the machine; nothing is used any more."""
        ...


class PagePool:
    """The pages of one `Memory`, their books, and the slots they are mapped into.

    Any thread may call anything. Calls of one slot wait for each other; nobody waits for
    another slot's mapping, and taking pages waits for no mapping at all. A page is free
    only after it has been unmapped, so no mapping overtakes an unmapping.
    """

    def __init__(self, memory: Memory, order: int = 0) -> None:
        """``order``: of this pool among the node's, for grants on several at once."""
        self.memory = memory
        self.books = Books(memory.num_pages, order)
        self._slots: set[Slot] = set()
        self._window: int | None = None
        self._lock = threading.Lock()

    @property
    def page_bytes(self) -> int:
        return self.memory.page_bytes

    @property
    def capacity(self) -> int:
        return self.books.capacity

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return self.books.free

    @property
    def mapped(self) -> int:
        """Pages in slots."""
        with self._lock:
            return sum(slot.mapped for slot in self._slots)

    def pages_for(self, num_bytes: int) -> int:
        return -(-num_bytes // self.page_bytes)

    def reserve(self, num_bytes: int) -> Slot:
        """A slot with room for ``num_bytes``, in whole pages; nothing is mapped."""
        if num_bytes < 1:
            raise InvalidInput(f"a slot of {num_bytes} bytes: expected at least 1")
        slot = Slot(self, self.pages_for(num_bytes))
        with self._lock:
            self._slots.add(slot)
        return slot

    def map(self, slot: Slot, count: int) -> bool:
        """Take ``count`` free pages and map them behind what ``slot`` has; False, and
        nothing done, if fewer are free."""
        pages = self.books.take(count, top=True)
        if pages is None:
            return False
        slot.map(pages)
        return True

    def unmap(self, slot: Slot, count: int) -> None:
        """Take the last ``count`` pages off ``slot``; they are free then."""
        slot.unmap(count).release()

    def window(self) -> int:
        """The address of page 0 in a mapping of the whole pool, made once: page ``n`` is
        ``n * page_bytes`` behind it, whoever has it."""
        with self._lock:
            if self._window is None:
                num_bytes = self.capacity * self.page_bytes
                address = self.memory.reserve(num_bytes)
                try:
                    self.memory.map(address, [(0, self.capacity)])
                except OSError:
                    self.memory.free(address, num_bytes)
                    raise
                self._window = address
            return self._window

    def window_span(self) -> Span:
        """All of it: what tensors over KV pages are made of."""
        return self.memory.span(self.window(), self.capacity * self.page_bytes)

    def trim(self) -> int:
        """Return the memory of free pages to the machine until they are used again, where
        it can be; how many pages."""
        pages = self.books.take(self.books.free)
        if pages is None:
            return 0
        count = len(pages)
        self.memory.discard(pages.runs())
        pages.release()
        return count

    def close(self) -> None:
        """Release all slots and the memory. Raises `InUse` while a span is alive."""
        with self._lock:
            slots = tuple(self._slots)
        for slot in slots:
            slot.release()
        with self._lock:
            if self._window is not None:
                num_bytes = self.capacity * self.page_bytes
                self.memory.unmap(self._window, num_bytes)
                self.memory.free(self._window, num_bytes)
                self._window = None
        self.memory.close()


class Slot:
    """A range of addresses whose pages are mapped from its begin on."""

    def __init__(self, pool: PagePool, num_pages: int) -> None:
        """Only `PagePool.reserve` makes them."""
        self.pool = pool
        self.num_pages = num_pages
        self.num_bytes = num_pages * pool.page_bytes
        self.address = pool.memory.reserve(self.num_bytes)
        """Of its first byte, for as long as it lives."""
        none = pool.books.take(0)
        assert none is not None
        self._pages = none
        self._uses: dict[int, int] = {}
        """End of each use under way, by a number of its own."""
        self._used = 0
        self._released = False
        self._lock = threading.Lock()
        """Of what is said of it; nobody has it while the machine works."""
        self._mapping = threading.RLock()
        """Of mapping and unmapping, which wait for each other."""

    @property
    def mapped(self) -> int:
        """How many pages, all at its begin."""
        return len(self._pages)

    @property
    def mapped_bytes(self) -> int:
        return len(self._pages) * self.pool.page_bytes

    @property
    def numbers(self) -> tuple[int, ...]:
        """Its pages, in order."""
        return tuple(self._pages.numbers)

    def map(self, pages: Pages) -> None:
        """Map ``pages`` behind its own; they are the slot's then, and ``pages`` is empty.
        If that fails (`OSError`) all is as before."""
        with self._mapping:
            if self._released or self.mapped + len(pages) > self.num_pages:
                raise ValueError(
                    f"{len(pages)} pages behind {self.mapped} of {self.num_pages}"
                )
            if pages.books is not self.pool.books:
                raise ValueError("pages of another pool")
            mine = pages.split(len(pages))
            at = self.address + self.mapped_bytes
            try:
                self.pool.memory.map(at, mine.runs(), filled=True)
            except OSError:
                pages.absorb(mine)
                raise
            with self._lock:
                self._pages.absorb(mine)

    def unmap(self, count: int) -> Pages:
        """Take its last ``count`` pages off; they are the caller's. Raises `InUse` if
        anybody uses one of them."""
        with self._mapping:
            with self._lock:
                left = (self.mapped - count) * self.pool.page_bytes
                if count < 0 or left < 0:
                    raise ValueError(f"{count} of {self.mapped} pages")
                if self.used_bytes > left:
                    raise InUse(
                        f"bytes up to {self.used_bytes} are used, {left} would stay"
                    )
                # From here on nobody can begin to use them.
                gone = self._pages.split(count)
            try:
                size = count * self.pool.page_bytes
                self.pool.memory.unmap(self.address + left, size)
            except OSError:
                with self._lock:
                    self._pages.absorb(gone)
                raise
            return gone

    @property
    def used_bytes(self) -> int:
        """Up to where somebody uses it now."""
        # A copy, since uses may end at any moment, wherever the collector runs.
        return max(self._uses.copy().values(), default=0)

    def view(self, offset_bytes: int, num_bytes: int) -> Span:
        """That part of it, without a copy; all of it must be mapped, and stays mapped as
        long as the span, or anything made of it, lives."""
        use = self._use(offset_bytes, num_bytes)
        span = self.pool.memory.span(self.address + offset_bytes, num_bytes)
        weakref.finalize(span, self._uses.pop, use, None).atexit = False
        return span

    @contextmanager
    def using(self, offset_bytes: int, num_bytes: int) -> Iterator[int]:
        """The address of that part of it, for as long as the context lasts."""
        use = self._use(offset_bytes, num_bytes)
        try:
            yield self.address + offset_bytes
        finally:
            del self._uses[use]

    def _use(self, offset_bytes: int, num_bytes: int) -> int:
        with self._lock:
            end = offset_bytes + num_bytes
            if offset_bytes < 0 or num_bytes < 0 or end > self.mapped_bytes:
                raise ValueError(
                    f"bytes {offset_bytes} to {end}: {self.mapped_bytes} are mapped"
                )
            self._used += 1
            self._uses[self._used] = end
            return self._used

    def release(self) -> None:
        """Unmap everything and give the range up; any number of calls. Raises `InUse`."""
        with self._mapping:
            if self._released:
                return
            self.unmap(self.mapped).release()
            self._released = True
            self.pool.memory.free(self.address, self.num_bytes)
        with self.pool._lock:
            self.pool._slots.discard(self)
