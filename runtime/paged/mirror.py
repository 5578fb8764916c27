"""What ranks of one LLM tell each other of an iteration, and what a follower keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from foreserve.runtime.memory.rules import pages_of
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
    most_tokens: int
    """That it may come to have, all in all."""
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
        self, shares: Sequence[Share]
    ) -> tuple[list[int | None], Mapping[int, int]]: ...

    def go(self, chosen: Sequence[int]) -> None: ...

    def release(self, request: int, but: int | None = None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Leader:
    """Whose requests are followed. ``come`` and ``give_way`` tell him of one."""

    name: str
    come: Callable[[int], None]
    give_way: Callable[[int], None]


@dataclass(slots=True)
class _Mirrored:
    claim: Claim
    most_pages: int


class Mirror:
    """The requests of one LLM that this process follows. For the loop's thread."""

    def __init__(self, group: Group, service: int, leader: Leader) -> None:
        self._group, self._service, self.leader = group, service, leader
        self._requests: dict[int, _Mirrored] = {}

    @property
    def held(self) -> int:
        return sum(one.claim.table.pages for one in tuple(self._requests.values()))

    @property
    def booked(self) -> int:
        return sum(claim.booked for claim in self.holders())

    @property
    def largest(self) -> int:
        return max((one.most_pages for one in self._requests.values()), default=0)

    def holders(self) -> Iterable[Claim]:
        """Those that have pages."""
        claims = (one.claim for one in self._requests.values())
        return (claim for claim in claims if claim.table.pages)

    def ready(self, share: Share) -> bool:
        """Have pages for it, or have it wait for them."""
        known = self._requests.get(share.request)
        if known is None:
            known = self._requests[share.request] = self._new(share)
        known.claim.table.promise = share.promise
        tokens = share.begin + len(share.tokens)
        return self._group.leading.line.ask(known.claim, tokens, waits=share.waits)

    def _new(self, share: Share) -> _Mirrored:
        space, request = self._group.space, share.request

        def give_way() -> bool:
            self.leader.give_way(request)
            return False

        claim = Claim(
            age=(share.arrival_s, self.leader.name, request),
            table=space.open(self._service),
            met=partial(self.leader.come, request),
            give_way=give_way,
        )
        most = pages_of(share.most_tokens, space.per_page(self._service))
        return _Mirrored(claim, most)

    def compute(self, shares: Sequence[Share]) -> None:
        work = [
            Work(
                tokens=share.tokens,
                begin=share.begin,
                table=self._requests[share.request].claim.table.numbers(),
                scored=share.scored,
            )
            for share in shares
        ]
        self._group.follow(self._service, work)

    def release(self, request: int) -> None:
        gone = self._requests.pop(request, None)
        if gone is not None:
            self._group.leading.line.leave(gone.claim)
            gone.claim.table.release()

    def close(self) -> None:
        """Its LLM leaves."""
        for request in tuple(self._requests):
            self.release(request)
