"""Who waits for pages of a GPU that requests of several leaders share.

Leaders decide alone which of their requests run (`turns.next_turn`), and learn only on
asking what others have taken meanwhile. Whoever finds no pages then waits here, and nobody
behind him gets any before. Those who have pages come before those who have none yet, and
the older before the younger. The first of those who have some makes younger ones give up
theirs, the youngest first, whoever leads them; older ones he waits for. Nobody makes others
give way before he has pages, and he has none while he waits for the first.

So there is no circle of those who wait: each waits for older ones, or has nothing that
others could wait for. The age of a request stays when it has to compute again, so the
oldest is never made to by another leader, and two leaders do not do it to each other for
ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from foreserve.runtime.memory.kv import KvSpace, KvTable
from foreserve.runtime.memory.rules import pages_of

Age = tuple[float, str, int]
"""When a request came, who leads it, its number there: smaller is older. The same on all
GPUs."""


@dataclass(slots=True, eq=False, kw_only=True)
class Claim:
    """One request's pages on this GPU."""

    age: Age
    table: KvTable
    met: Callable[[], None]
    """It has waited long enough: what it waited for is its own now or, if it had nothing,
    can be had."""
    give_way: Callable[[], bool]
    """Have it give up its pages; whether it has done so already."""
    tokens: int = 0
    """Wanted, in all."""
    place: Age | None = None
    """In line, where it is not its own age."""
    called: bool = False
    """It was told that it may come; its place is kept meanwhile."""
    leaves: bool = False
    """It was told to give way."""

    @property
    def turn(self) -> tuple[bool, Age]:
        """Smaller comes first."""
        return self.joins, self.place or self.age

    @property
    def joins(self) -> bool:
        return not self.table.pages

    @property
    def missing(self) -> int:
        return pages_of(self.tokens, self.table.per_page) - self.table.pages

    @property
    def booked(self) -> int:
        return max(self.table.pages, self.table.promise)


class Line:
    """For the loop's thread, between two iterations."""

    def __init__(
        self,
        space: KvSpace,
        grow: Callable[[KvTable, int], bool],
        holders: Callable[[], Iterable[Claim]],
    ) -> None:
        """``space``: over one pool. ``grow``: `KvTable.grow`; ``holders``: all that have
        pages."""
        self._space, self._grow, self._holders = space, grow, holders
        self.waiting: dict[Claim, None] = {}

    def ask(self, claim: Claim, tokens: int, *, waits: bool) -> bool:
        """Have pages for ``tokens`` in all; if there are none it ``waits``, or not."""
        claim.tokens, claim.called = tokens, False
        if claim.missing <= 0:
            return True
        if claim not in self.waiting:
            self._take_place(claim)
        first = self._first() is claim
        has = first and self._fits(claim) and self._grow(claim.table, tokens)
        if has or not waits:
            del self.waiting[claim]
        return has

    def leave(self, claim: Claim) -> None:
        """It wants nothing any more; any number of calls."""
        self.waiting.pop(claim, None)

    def serve(self) -> None:
        """Give to those who wait, as far as there is something."""
        while self.waiting:
            first = self._first()
            if first.joins:
                if not first.called and self._fits(first):
                    first.called = True
                    first.met()
                return
            if self._grow(first.table, first.tokens):
                del self.waiting[first]
                first.met()
            elif not self._displace(first):
                return

    def _take_place(self, claim: Claim) -> None:
        """A leader has one place for all that join, the oldest's: which of them comes is
        for him to say."""
        claim.place = None
        if claim.joins:
            for other in tuple(self.waiting):
                if other.joins and other.age[1] == claim.age[1]:
                    del self.waiting[other]
                    claim.place = min(claim.age, other.place or other.age)
        self.waiting[claim] = None

    def _first(self) -> Claim:
        return min(self.waiting, key=lambda claim: claim.turn)

    def _fits(self, claim: Claim) -> bool:
        """Whether it may have its pages if they are there: who joins, only if there is
        room for what is promised to him and to all that have some."""
        if not claim.joins:
            return True
        space = self._space
        booked = sum(other.booked for other in self._holders())
        if booked and booked + max(claim.missing, claim.table.promise) > space.pages():
            return False
        return claim.missing <= space.pages() - space.used()

    def _displace(self, claim: Claim) -> bool:
        """Have younger ones give way for what is missing; whether some has become free."""
        space, freed = self._space, False
        lacking = claim.missing - (space.pages() - space.used())
        younger = [other for other in self._holders() if other.age > claim.age]
        for other in sorted(younger, key=lambda other: other.age, reverse=True):
            if lacking <= 0:
                break
            lacking -= other.table.pages
            if not other.leaves:
                other.leaves = True
                freed |= other.give_way()
        return freed
