"""Weights on their way into the pool, and whose memory they may take for it.

A load that nobody waits for uses spare memory only: pages that are free and that requests
are not likely to need. It waits for them, and while it is under way what it has is on loan,
so KV takes it back before any request would go without. A load that requests wait for
takes what others have on loan first, and then has requests preempted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, TypeVar

from foreserve.models.errors import ForeserveError
from foreserve.runtime.memory.books import Pages
from foreserve.runtime.memory.kv import KvSpace
from foreserve.runtime.memory.loading import Link, Load
from foreserve.runtime.memory.streaming import Sources
from foreserve.runtime.memory.weights import Shelf, Weights

if TYPE_CHECKING:
    from foreserve.runtime.paged.group import Group
    from foreserve.runtime.paged.worker import Resident

T = TypeVar("T")
LOOK_S = 0.01
"""Between looks at whether a load was cancelled, or requests wait for it now."""


class LoadFailed(ForeserveError):
    """Weights did not arrive; one line says why."""


class NoRoom(LoadFailed):
    """The pool has no room for them now. Nothing is wrong with them."""


class Loop(Protocol):
    """Where the iterations run: the worker."""

    def now_s(self) -> float: ...

    def ask(self, action: Callable[[], T]) -> Future[T]: ...


class Loads:
    """Of one worker. Any thread; calls block, each in a thread of its caller."""

    def __init__(
        self,
        loop: Loop,
        *,
        space: KvSpace,
        shelf: Shelf,
        group: Group,
        link: Link,
        sources: Sources,
        room_within_s: float,
    ) -> None:
        """``room_within_s``: a load that nobody waits for waits so long for memory."""
        self._loop, self._space, self._shelf, self._group = loop, space, shelf, group
        self._books = space.pools[0]
        self._link, self._sources = link, sources
        self._room_within_s = room_within_s
        self._seeking: set[Resident] = set()
        """Who takes memory from others now: what becomes free is for them."""

    def fetch(self, resident: Resident) -> None:
        """Bring what is missing of its weights, on all its GPUs, and have a kept one's
        stay. Raises `LoadFailed`, also when `leaving` is set meanwhile."""
        followers = resident.followers
        while not self.settle(resident):
            if followers is not None:
                followers.fetch(urgent=resident.urgent.is_set())
            self.bring(resident)
            if followers is not None:
                # Nothing is to stay before all is there.
                followers.settle(resident.leaving, resident.urgent)

    def settle(self, resident: Resident) -> bool:
        """Whether all its weights are there; those of a kept one stay then."""
        llm, followers = resident.service.llm, resident.followers
        (weights,) = self._shelf.shards(llm)
        if resident.settled or not weights.complete:
            return weights.complete
        if resident.service.kept:
            self._shelf.keep(llm)
            whole = weights.complete and (followers is None or followers.keep())
            if not whole:  # KV took some of it back in between.
                self._shelf.lend(llm)
                return False
            resident.settled = True
        return True

    def bring(self, resident: Resident) -> None:
        """Those of this GPU, and kernels for them. They are on loan when this returns,
        whoever waits for them."""
        prepared = resident.prepared = resident.prepared or self._prepare(resident)
        (weights,) = self._shelf.shards(resident.service.llm)
        until_s = self._loop.now_s() + self._room_within_s
        with ExitStack() as kept:
            hurried = tried = False
            while not weights.complete:
                if not hurried:
                    self._await_room(resident, weights, until_s, again=tried)
                if resident.urgent.is_set() and not hurried:
                    self._hurry(resident, kept)
                    hurried = True
                self._try(resident, weights)
                tried = True
            self._await_kernels(resident, prepared)

    def _prepare(self, resident: Resident) -> Future[None]:
        """Have its kernels compiled, beside all else."""
        prepared: Future[None] = Future()

        def prepare() -> None:
            try:
                resident.decoder.prepare(resident.layout, self._space.page_bytes)
            except BaseException as error:
                prepared.set_exception(error)
            else:
                prepared.set_result(None)

        threading.Thread(target=prepare, name="kernels", daemon=True).start()
        return prepared

    def _await_kernels(self, resident: Resident, prepared: Future[None]) -> None:
        llm = resident.service.llm
        while not wait([prepared], LOOK_S).done:
            if resident.leaving.is_set():
                raise LoadFailed(f"{llm}: the load was cancelled")
        error = prepared.exception()
        if error is not None:
            raise LoadFailed(f"{llm}: no kernels for it: {error}") from error

    def _await_room(
        self, resident: Resident, weights: Weights, until_s: float, *, again: bool
    ) -> None:
        """Return when there is spare memory for what is missing, or requests wait. If it
        could not be had without any requests either, that is known at once, unless it
        was there before (``again``)."""
        try:
            while not resident.urgent.is_set():
                missing, spare, most = self._loop.ask(
                    lambda: self._spare(weights)
                ).result()
                if missing <= spare:
                    return
                resident.waits_pages = missing
                never = missing > most and not again
                if never or self._loop.now_s() > until_s:
                    raise self._no_room(resident, missing)
                if resident.leaving.wait(LOOK_S):
                    raise LoadFailed(f"{resident.service.llm}: the load was cancelled")
        finally:
            resident.waits_pages = 0

    def _spare(self, weights: Weights) -> tuple[int, int, int]:
        """In the loop's thread: pages that are missing, that it may have now, and that it
        could have if there were no requests."""
        spare = 0 if self._seeking else self._group.lendable()
        # What it has is on loan, and counts as if requests could have it.
        most = self._space.pages() - weights.held_pages
        return weights.missing_pages, spare, most

    def _try(self, resident: Resident, weights: Weights) -> None:
        """One load of what is missing, from beginning to end: it may be taken back."""
        llm, leaving = resident.service.llm, resident.leaving
        with self._sources.open(
            resident.shard_key, self._link.look, leaving.is_set
        ) as source:
            pages = self._take(resident, weights)
            if pages is None:
                return
            count, urgent = len(pages), resident.urgent.is_set()
            load = weights.load(self._link, source, pages, urgent=urgent)
            self._watch(resident, load)
            weights.settle()
        if leaving.is_set():
            raise LoadFailed(f"{llm}: the load was cancelled")
        # Too few pages: some of what was there was taken back just before.
        if load.end == "failed" and weights.missing_pages <= count:
            raise LoadFailed(f"{llm}: the load failed: {load.error}")

    def _watch(self, resident: Resident, load: Load) -> None:
        """Until it has ended; it may be cancelled, or requests wait for it."""
        with ExitStack() as kept:
            while not load.ended.wait(LOOK_S):
                if resident.leaving.is_set():
                    self._link.cancel(load)
                elif resident.urgent.is_set() and not load.urgent:
                    self._hurry(resident, kept)
                    self._link.hurry(load)

    def _hurry(self, resident: Resident, kept: ExitStack) -> None:
        """Nobody takes back what it has until ``kept`` is closed."""
        llm = resident.service.llm
        self._shelf.keep(llm)
        kept.callback(self._shelf.lend, llm)
        if resident.followers is not None:
            resident.followers.hurry()

    def _take(self, resident: Resident, weights: Weights) -> Pages | None:
        """Pages for what is missing; None: not now."""
        if not resident.urgent.is_set():
            return self._loop.ask(lambda: self._take_spare(weights)).result()
        self._seeking.add(resident)
        try:
            # Loads that nobody waits for yield first, then WARM LLMs, then requests.
            self._space.keep_free(weights.missing_pages)
            pages = self._loop.ask(lambda: self._take_any(weights)).result()
        finally:
            self._seeking.discard(resident)
        if pages is None:
            raise self._no_room(resident, weights.missing_pages)
        return pages

    def _take_spare(self, weights: Weights) -> Pages | None:
        """In the loop's thread."""
        missing, spare, _ = self._spare(weights)
        return self._books.take(missing, top=True) if missing <= spare else None

    def _take_any(self, weights: Weights) -> Pages | None:
        """In the loop's thread: from requests if need be."""
        missing = weights.missing_pages
        if not self._group.make_room(missing):
            return None
        return self._books.take(missing, top=True)

    def _no_room(self, resident: Resident, missing: int) -> NoRoom:
        why = "" if resident.urgent.is_set() else ", and nobody waits for it"
        return NoRoom(
            f"{resident.service.llm}: {missing} pages are missing, "
            f"{self._books.free} of {self._books.capacity} free{why}"
        )
