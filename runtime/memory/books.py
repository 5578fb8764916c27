"""Whose a physical page is: free, or in exactly one `Pages`, which moves but never copies.

There is no way to say "page 7": pages come from `Books.take` and go where their `Pages`
goes. So no page has two owners, none is lost (what nobody refers to is free again), and
who has passed his pages on has none left to use. No memory is touched here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

import numpy as np

from foreserve.models.errors import InvalidInput


class Books:
    """The pages 0 .. ``capacity`` - 1 of one pool. Any thread may call anything."""

    def __init__(self, capacity: int, order: int = 0) -> None:
        """``order``: of this pool among those of a node, for `take_all`."""
        if capacity < 1:
            raise InvalidInput(f"a pool of {capacity} pages: expected at least 1")
        self.capacity = capacity
        self.order = order
        self._lock = threading.RLock()
        self._is_free = np.ones(capacity, np.bool_)
        self._free = capacity
        # What the collector found comes back from wherever it ran, so without the lock.
        self._found: deque[list[int]] = deque()

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        with self._lock:
            self._settle()
            return self._free

    @property
    def held(self) -> int:
        """Pages in some `Pages`: ``free`` + ``held`` = ``capacity`` at all times."""
        return self.capacity - self.free

    def take(self, count: int, *, top: bool = False) -> Pages | None:
        """``count`` pages, those of the lowest numbers; None if fewer are free.
        ``top``: the highest numbers. Weights come from there, and KV from below, so that
        both lie in long runs."""
        with self._lock:
            self._settle()
            if count > self._free:
                return None
            found = self._first(count, top)
            self._is_free[found] = False
            self._free -= count
            return Pages(self, found)

    def _first(self, count: int, top: bool) -> list[int]:
        """The free pages nearest to one end, ascending."""
        if count <= 0:
            return []
        side = self._is_free[::-1] if top else self._is_free
        start = int(side.argmax())
        size = 2 * count
        while True:
            found = np.flatnonzero(side[start : start + size])[:count] + start
            if len(found) == count:
                break
            size *= 4
        ascending = self.capacity - 1 - found[::-1] if top else found
        numbers: list[int] = ascending.tolist()
        return numbers

    def _give_back(self, numbers: list[int]) -> None:
        with self._lock:
            self._is_free[numbers] = True
            self._free += len(numbers)

    def _settle(self) -> None:
        while self._found:
            self._give_back(self._found.popleft())


class Pages:
    """Pages that somebody holds, in an order of his own; one thread's at a time."""

    __slots__ = ("_books", "_numbers")

    def __init__(self, books: Books, numbers: list[int]) -> None:
        """Only `Books.take`, `split` and `head` make them."""
        self._books, self._numbers = books, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def books(self) -> Books:
        return self._books

    @property
    def numbers(self) -> Sequence[int]:
        """The pages' numbers now; do not keep it, and do not write to it."""
        return self._numbers

    def split(self, count: int) -> Pages:
        """Its last ``count`` pages, which it has no longer."""
        if not 0 <= count <= len(self._numbers):
            raise ValueError(f"{count} of {len(self._numbers)} pages")
        cut = len(self._numbers) - count
        away = self._numbers[cut:]
        del self._numbers[cut:]
        return Pages(self._books, away)

    def head(self, count: int) -> Pages:
        """Its first ``count`` pages, or all if it has fewer, which it has no longer."""
        away = self._numbers[:count]
        del self._numbers[:count]
        return Pages(self._books, away)

    def absorb(self, other: Pages) -> None:
        """Take over what ``other`` has, behind its own; ``other`` is empty then."""
        if other is self or other._books is not self._books:
            raise ValueError("pages of another pool, or the same ones")
        moved, other._numbers = other._numbers, []
        self._numbers += moved

    def release(self) -> None:
        """Give all of them back; any number of calls."""
        gone, self._numbers = self._numbers, []
        self._books._give_back(gone)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of pages that lie beside each other in its order too."""
        return runs(self._numbers)

    def __del__(self) -> None:
        if self._numbers:
            self._books._found.append(self._numbers)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of ascending neighbours in ``numbers``."""
    if len(numbers) == 1:
        yield numbers[0], 1
        return
    listed = np.asarray(numbers, np.int64)
    cuts = np.flatnonzero(np.diff(listed) != 1) + 1
    bounds = [0, *cuts.tolist(), len(numbers)]
    for first, last in pairwise(bounds):
        if last > first:
            yield numbers[first], last - first


def take_all(books: Sequence[Books], count: int) -> tuple[Pages, ...] | None:
    """``count`` pages of each (all different), or None and nothing taken. Pools are locked
    in their ``order``, so two that ask for the same ones never wait for each other."""
    with ExitStack() as locked:
        for own in sorted(books, key=lambda b: (b.order, id(b))):
            locked.enter_context(own._lock)
        if any(own.free < count for own in books):
            return None
        taken = (own.take(count) for own in books)
        return tuple(pages for pages in taken if pages is not None)
