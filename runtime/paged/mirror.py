"""What ranks of one LLM tell each other of an iteration, and what a follower keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from foreserve.runtime.paged.attention import Work
from foreserve.runtime.paged.line import Claim

if TYPE_CHECKING:
    from foreserve.runtime.paged.group import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one request computes in an iteration, for those that follow."""

    request: int
    """The leader's number of it."""
    arrival_s: float
    """By a clock that all share."""
    tokens: Sequence[int]
    begin: int
    """Position of the first."""
    promise: int
    """Pages set aside for it."""
    waits: bool
    """For pages, if there are none; else it comes again by itself."""
    scored: int = 0
    """See `Work`."""


class Team(Protocol):
    """The ranks that follow; see `following.Followers`."""

    @property
    def places(self) -> Sequence[int]:
        """Where they are: a number for each of their GPUs."""
        ...

    def park(
        self, shares: Sequence[Share], largest: int
    ) -> tuple[list[int | None], Mapping[int, int]]: ...

    def go(self, chosen: Sequence[int]) -> None: ...

    def reserve(self, pages: int) -> int: ...

    def release(
        self, request: int, but: int | None = None, *, last: bool = False
    ) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """Whose requests are followed. ``come`` and ``give_way`` tell him of one."""

    name: str
    come: Callable[[int], None]
    give_way: Callable[[int], None]


class Mirror:
    """The requests of one LLM that this process follows. For the loop's thread."""

    def __init__(self, group: Group, service: int, leader: Leader) -> None:
        self._group, self._service, self.leader = group, service, leader
        self._requests: dict[int, Claim] = {}
        self.largest = 0
        """Pages that the largest request may come to need, of those too that were never
        computed: as the leader has told."""

    @property
    def held(self) -> int:
        return sum(one.table.pages for one in tuple(self._requests.values()))

    @property
    def booked(self) -> int:
        return sum(claim.booked for claim in self.holders())

    def holders(self) -> Iterable[Claim]:
        """Those that have pages."""
        return (claim for claim in self._requests.values() if claim.table.pages)

    def reserve(self, pages: int) -> int:
        """The leader's largest request may need so many from now on, if there could be
        that many: how many there could be."""
        room = self._group.space.pages()
        if pages <= max(room, self.largest):
            self.largest = pages
        return room

    def ready(self, share: Share) -> bool:
        """Have pages for it, or have it wait for them."""
        claim = self._requests.get(share.request)
        if claim is None:
            claim = self._requests[share.request] = self._new(share)
        claim.table.promise = share.promise
        tokens = share.begin + len(share.tokens)
        return self._group.leading.line.ask(claim, tokens, waits=share.waits)

    def _new(self, share: Share) -> Claim:
        space, request = self._group.space, share.request

        def give_way() -> bool:
            self.leader.give_way(request)
            return False

        return Claim(
            age=(share.arrival_s, self.leader.name, request),
            table=space.open(self._service),
            met=partial(self.leader.come, request),
            give_way=give_way,
        )

    def compute(self, shares: Sequence[Share]) -> None:
        work = [
            Work(
                tokens=share.tokens,
                begin=share.begin,
                table=self._requests[share.request].table.numbers(),
                scored=share.scored,
            )
            for share in shares
        ]
        self._group.follow(self._service, work)

    def release(self, request: int, *, last: bool = False) -> None:
        if last:
            self.largest = 0
        gone = self._requests.pop(request, None)
        if gone is not None:
            self._group.leading.line.leave(gone)
            gone.table.release()

    def close(self) -> None:
        """Its LLM leaves."""
        for request in tuple(self._requests):
            self.release(request)
