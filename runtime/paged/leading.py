"""Requests of one process beside those that others lead, on its GPU and on those of others.

Requests that wait for pages of some GPU (`line`) do not run until they are told to come;
whoever has none there meanwhile does not join either, for he would wait behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from foreserve.runtime.memory.kv import KvSpace, KvTable
from foreserve.runtime.paged.jobs import Job
from foreserve.runtime.paged.line import Claim, Line
from foreserve.runtime.paged.mirror import Mirror, Share, Team
from foreserve.runtime.turns import Bound

OWN = 0
"""The GPU of this process; those of followers have their own numbers."""


class Leading:
    """For the loop's thread."""

    def __init__(
        self,
        space: KvSpace,
        name: str,
        jobs: Mapping[Job, None],
        mirrors: Mapping[int, Mirror],
        grow: Callable[[KvTable, int], bool],
        evict: Callable[[Job], None],
    ) -> None:
        """``jobs`` are led here, by ``name``, which no other leader has; ``mirrors``, by
        LLM, follow others. ``grow``: `KvTable.grow`."""
        self._space, self._name, self._evict = space, name, evict
        self._jobs, self._mirrors = jobs, mirrors
        self.line = Line(space, grow, self._holders)
        """On this GPU."""
        self._claims: dict[Job, Claim] = {}
        """Of jobs that wait in it."""
        self._teams: dict[int, Team | None] = {}
        self._places: dict[int, frozenset[int]] = {}
        """By LLM."""
        self._rooms: dict[int, int] = {}
        """Pages that its requests have or could have on each of the others, as last
        told."""
        self._largest: dict[int, int] = {}
        """Pages that a request may come to need, as the others were told, by LLM."""
        self._waiting: dict[Job, int] = {}
        """And for which GPU."""
        self.waits = 0
        """How often somebody did."""

    def add(self, service: int, team: Team | None) -> None:
        self._teams[service] = team
        self._places[service] = frozenset((OWN, *(team.places if team else ())))
        self._largest[service] = 0

    def remove(self, service: int) -> None:
        del self._teams[service], self._places[service], self._largest[service]
        there = frozenset[int]().union(*self._places.values())
        for place in self._rooms.keys() - there:
            del self._rooms[place]

    # --- who waits -----------------------------------------------------------------

    @property
    def stuck(self) -> bool:
        """Somebody waits."""
        return bool(self._waiting)

    def retry(self) -> None:
        """All may try again."""
        self._waiting.clear()

    def able(self) -> Collection[Job]:
        """Those that may run or join."""
        if not self._waiting:
            return self._jobs
        full = {at for job, at in self._waiting.items() if not job.resident}
        return [
            job
            for job in self._jobs
            if job not in self._waiting
            and (job.resident or full.isdisjoint(self._places[job.service]))
        ]

    def hear(self, what: str, request: int) -> None:
        """What a follower says of one: it may come, or has to give way to an older one."""
        for job in self._jobs:
            if job.progress.request == request:
                if what == "come":
                    self._waiting.pop(job, None)
                elif job.resident:
                    self._evict(job)
                return

    def refused(self, job: Job, place: int, *, waits: bool) -> None:
        """There are no pages for it. Nobody who joins has any while he waits."""
        team = self._teams[job.service]
        if team is not None and not job.resident:
            team.release(job.progress.request, but=place if waits else None)
        if waits and (place != OWN or job in self._claims):
            self._waiting[job] = place
            self.waits += 1

    def release(self, job: Job) -> None:
        """It has no pages any more, and waits for none; any number of calls."""
        self._waiting.pop(job, None)
        claim = self._claims.pop(job, None)
        if claim is not None:
            self.line.leave(claim)
        team = self._teams[job.service]
        if team is not None:
            last = all(other.service != job.service for other in self._jobs)
            team.release(job.progress.request, last=last)
            if last:
                self._largest[job.service] = 0

    # --- pages ---------------------------------------------------------------------

    def reserve(self, service: int, pages: int) -> int:
        """Pages that a request of that LLM could have on each of the others. If it may
        need ``pages`` and there are so many, they are not given to weights any more."""
        team, known = self._teams[service], self._largest[service]
        if team is None or pages <= known:
            return pages
        room = team.reserve(pages)
        if room < pages:
            team.reserve(known)
        else:
            self._largest[service] = pages
        return room

    def park(self, service: int, batch: Sequence[Job]) -> dict[int, int]:
        """Those that follow stand still and have pages; which of the batch cannot go on,
        and where there are none. The first one waits for them."""
        team = self._teams[service]
        if team is None:
            return {}
        mine = (job for job in self._jobs if job.service == service)
        largest = self._largest[service] = max(job.most_pages for job in mine)
        refused, rooms = team.park(
            [
                Share(
                    request=job.progress.request,
                    arrival_s=job.arrival_s,
                    tokens=job.chunk,
                    begin=job.computed,
                    promise=job.promise,
                    waits=not i,
                    scored=job.scored(job.prompt_tokens),
                )
                for i, job in enumerate(batch)
            ],
            largest,
        )
        self._rooms |= rooms
        return {i: place for i, place in enumerate(refused) if place is not None}

    def go(self, service: int, chosen: Sequence[int]) -> None:
        team = self._teams[service]
        if team is not None:
            team.go(chosen)

    def has(self, job: Job, tokens: int, *, waits: bool) -> bool:
        """Have pages on this GPU, where others have some, too. False: it may wait."""
        if not self._mirrors:
            return True
        claim = self._claim(job)
        has = self.line.ask(claim, tokens, waits=waits)
        if has or not waits:
            self._claims.pop(job, None)
        else:
            self._claims[job] = claim
        return has

    def _holders(self) -> Iterator[Claim]:
        for mirror in self._mirrors.values():
            yield from mirror.holders()
        for job in tuple(self._jobs):
            if job.resident:
                yield self._claim(job)

    def _claim(self, job: Job) -> Claim:
        def met() -> None:
            self._waiting.pop(job, None)

        def give_way() -> bool:
            self._evict(job)
            return True

        return self._claims.get(job) or Claim(
            age=(job.arrival_s, self._name, job.progress.request),
            table=job.table,
            met=met,
            give_way=give_way,
        )

    # --- room ----------------------------------------------------------------------

    def room_for(self, leader: str) -> int:
        """Pages that its requests have here, or could have: others keep what they have,
        and what they are promised."""
        mirrors = self._mirrors.values()
        mine = sum(m.held for m in mirrors if m.leader.name == leader)
        own = sum(max(job.pages, job.promise) for job in self._jobs if job.resident)
        return max(mine, self._space.pages() - own - self._followed(leader))

    def _followed(self, leader: str = "") -> int:
        """Pages here of those whom others but that one lead."""
        mirrors = self._mirrors.values()
        return sum(m.booked for m in mirrors if m.leader.name != leader)

    def room(self, able: Iterable[Job]) -> int:
        """`turns.next_turn`'s ``pages`` for the ``able`` ones."""
        return self._left(OWN, able, self._space.pages() - self._followed())

    def bounds(self, able: Collection[Job]) -> Sequence[Bound]:
        return [
            Bound(
                services=frozenset(s for s, at in self._places.items() if place in at),
                pages=self._left(place, able, pages),
            )
            for place, pages in self._rooms.items()
        ]

    def _left(self, place: int, able: Iterable[Job], pages: int) -> int:
        """Of ``pages`` there for all; what they hold they may keep."""
        kept = sum(
            max(job.pages, job.next_pages)
            for job in self._waiting
            if job.resident and place in self._places[job.service]
        )
        held = sum(job.pages for job in able if place in self._places[job.service])
        return max(held, pages - kept)
