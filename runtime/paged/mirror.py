"""What ranks of one LLM tell each other of an iteration, and what a follower keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from foreserve.runtime.memory.kv import KvTable
from foreserve.runtime.memory.rules import pages_of
from foreserve.runtime.paged.attention import Work

if TYPE_CHECKING:
    from foreserve.runtime.paged.group import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one request computes in an iteration, for those that follow."""

    request: int
    """The leader's number of it."""
    tokens: Sequence[int]
    begin: int
    """Position of the first."""
    most_tokens: int
    """That it may come to have, all in all."""
    scored: int = 0
    """See `Work`."""


class Team(Protocol):
    """The ranks that follow; see `following.Followers`."""

    def park(self, shares: Sequence[Share]) -> tuple[list[bool], int]: ...

    def go(self, chosen: Sequence[int]) -> None: ...

    def release(self, request: int) -> None: ...


@dataclass(slots=True)
class _Mirrored:
    table: KvTable
    most_pages: int


class Mirror:
    """The requests of one LLM that this process follows. For the loop's thread."""

    def __init__(self, group: Group, service: int) -> None:
        self._group, self._service = group, service
        self._requests: dict[int, _Mirrored] = {}

    @property
    def held(self) -> int:
        return sum(one.table.pages for one in tuple(self._requests.values()))

    @property
    def largest(self) -> int:
        return max((one.most_pages for one in self._requests.values()), default=0)

    def ready(self, share: Share) -> bool:
        """Have pages for it."""
        space = self._group.space
        known = self._requests.get(share.request)
        if known is None:
            most = pages_of(share.most_tokens, space.per_page(self._service))
            known = _Mirrored(space.open(self._service), most)
            self._requests[share.request] = known
        return self._group.grow(known.table, share.begin + len(share.tokens))

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

    def release(self, request: int) -> None:
        gone = self._requests.pop(request, None)
        if gone is not None:
            gone.table.release()
