"""Weights on their way from host memory into a slot: in chunks that can be stopped.

A `Link` is what leads to one GPU. It takes one load at a time, urgent ones first, then in
the order in which they were asked for (the simulator's rule in `links`); another one's turn
begins at the next chunk. Pages are mapped by a thread of its own, ahead of the copies.
Those that nobody waits for can be held (`pacing.Pacer`).

What has arrived is always a prefix: a load that was cancelled goes on where it ended.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from foreserve.runtime.clock import Clock
from foreserve.runtime.memory.books import Pages
from foreserve.runtime.memory.pool import Copying, Slot

End = Literal["done", "cancelled", "failed"]


class Source(Protocol):
    """A shard's bytes in host memory, all or those that come next. Calls are quick."""

    def at(self, offset_bytes: int) -> tuple[int, int]:
        """The address of that byte, and how many are ready from there on: 0 if they are
        still on their way (`Link.look` when they have come). What this raises makes the
        load fail."""
        ...

    def copied(self, num_bytes: int) -> None:
        """So many from the begin are there, and not needed here any more."""
        ...


class Whole(NamedTuple):
    """A `Source` that has everything."""

    address: int
    num_bytes: int

    def at(self, offset_bytes: int) -> tuple[int, int]:
        return self.address + offset_bytes, self.num_bytes - offset_bytes

    def copied(self, num_bytes: int) -> None:
        pass


@dataclass(eq=False)
class Load:
    """One shard on its way. Any thread may look, cancel and wait."""

    slot: Slot
    source: Source
    num_bytes: int
    pages: Pages
    """Not mapped yet."""
    urgent: bool
    order: int
    held_pages: int
    """Of the slot and its own, while it is under way."""
    copied_bytes: int
    """Arrived: a prefix of the shard."""
    end: End | None = None
    """How it ended; None while it is under way."""
    error: str = ""
    ended: threading.Event = field(default_factory=threading.Event)
    _begun_bytes: int = 0
    _cancelled: bool = False
    _mapping: bool = False

    @property
    def mapped(self) -> bool:
        return not self.pages and not self._mapping


class Link:
    """Copies onto one GPU, by two threads of its own. Any thread may call."""

    def __init__(
        self,
        clock: Clock,
        *,
        chunk_bytes: int = 8 * 1024**2,
        map_bytes: int = 64 * 1024**2,
    ) -> None:
        """``chunk_bytes``: what a cancelled load still copies, at most twice that.
        ``map_bytes``: mapped in one go."""
        self._clock = clock
        self._chunk_bytes, self._map_bytes = chunk_bytes, map_bytes
        self._held_until_s = -math.inf
        self.begun = self.ended = 0
        """Pieces of work, of mapping or copying."""
        self._loads: dict[Load, None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._asked = 0
        self._threads = [
            threading.Thread(target=work, daemon=True)
            for work in (self._map_all, self._copy_all)
        ]
        for thread in self._threads:
            thread.start()

    def begin(
        self,
        slot: Slot,
        source: Source | int,
        num_bytes: int,
        *,
        resident_bytes: int = 0,
        pages: Pages,
        urgent: bool = False,
    ) -> Load:
        """Copy the shard from ``source`` (an address: all of it is there) into ``slot``, of
        which ``resident_bytes`` are there; ``pages`` are what the slot lacks, and are the
        load's from now on. It fails at once if they are too few (somebody took some of the
        slot's meanwhile), or the link is closed; what is too much is free."""
        page_bytes = slot.pool.page_bytes
        wanted = -(-num_bytes // page_bytes) - slot.mapped
        pages.split(max(0, len(pages) - max(0, wanted))).release()
        with self._changed:
            self._asked += 1
            load = Load(
                slot=slot,
                source=Whole(source, num_bytes) if isinstance(source, int) else source,
                num_bytes=num_bytes,
                held_pages=slot.mapped + len(pages),
                pages=pages.split(len(pages)),
                urgent=urgent,
                order=self._asked,
                copied_bytes=resident_bytes,
                _begun_bytes=resident_bytes,
            )
            if len(load.pages) < wanted:
                load.error = f"{len(load.pages)} pages where {wanted} are missing"
            elif self._closed:
                load.error = "the link is closed"
            if load.error:
                load.pages.release()
                load.end = "failed"
                load.ended.set()
            else:
                self._loads[load] = None
                self._changed.notify_all()
            return load

    def hurry(self, load: Load) -> None:
        """Requests wait for it now."""
        with self._changed:
            load.urgent = True
            self._changed.notify_all()

    def look(self) -> None:
        """Some source has more, or has failed."""
        with self._changed:
            self._changed.notify_all()

    def cancel(self, load: Load) -> None:
        """It ends after the chunks under way, `Load.ended`; what has arrived stays. After
        `Load.ended` nothing is copied into its slot any more."""
        with self._changed:
            load._cancelled = True
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a load is under way that nobody waits for."""
        return any(not load.urgent for load in tuple(self._loads))

    def hold(self, until_s: float) -> None:
        """Of loads that nobody waits for, nothing is mapped or copied any more until then,
        or `resume`, but for what is under way."""
        self._held_until_s = until_s

    def resume(self) -> None:
        with self._changed:
            self._held_until_s = -math.inf
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel everything and end the threads."""
        with self._changed:
            self._closed = True
            for load in self._loads:
                load._cancelled = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _ranked(self) -> list[Load]:
        """Those that may go on now, the first one first."""
        if self._held_s() <= 0:
            self._held_until_s = -math.inf
        held = self._held_until_s > -math.inf
        return sorted(
            (load for load in self._loads if load.urgent or not held),
            key=lambda load: (not load.urgent, load.order),
        )

    def _held_s(self) -> float:
        """For how long loads that nobody waits for stand still."""
        return self._held_until_s - self._clock.now_s()

    def _wait(self) -> None:
        """Until something has changed, or a hold is over; with the lock."""
        held = self._loads and self._held_until_s > -math.inf
        self._changed.wait(max(0.0, self._held_s()) if held else None)

    # --- mapping -------------------------------------------------------------------

    def _map_all(self) -> None:
        while True:
            with self._changed:
                load = self._to_map()
                while load is None:
                    if self._closed and not self._loads:
                        return
                    self._wait()
                    load = self._to_map()
                count = max(1, self._map_bytes // load.slot.pool.page_bytes)
                batch = load.pages.head(count)
                load._mapping = True
                self.begun += 1
            error = ""
            try:
                load.slot.map(batch)
            except OSError as failure:
                error = str(failure)
                batch.release()
            with self._changed:
                load._mapping = False
                self.ended += 1
                if error:
                    load.error, load._cancelled = error, True
                self._changed.notify_all()

    def _to_map(self) -> Load | None:
        waiting = (x for x in self._ranked() if x.pages and not x._cancelled)
        return next(waiting, None)

    # --- copying -------------------------------------------------------------------

    def _copy_all(self) -> None:
        # Two chunks are under way, so that the link is never idle in between.
        flying: deque[tuple[Load, int, Copying, ExitStack]] = deque()
        while True:
            chunk = self._next_chunk(wait=not flying)
            if chunk is not None:
                load, at, source, size = chunk
                uses = ExitStack()
                try:
                    address = uses.enter_context(load.slot.using(at, size))
                    copy = load.slot.pool.memory.copy(address, source, size)
                except Exception as failure:
                    uses.close()
                    self._fail(load, failure)
                    self._count_ended()
                else:
                    flying.append((load, size, copy, uses))
            elif not flying:
                return
            if flying and (chunk is None or len(flying) > 1):
                load, size, copy, uses = flying.popleft()
                try:
                    copy.wait()
                except Exception as failure:
                    self._fail(load, failure)
                else:
                    with self._changed:
                        # Behind a chunk that failed there is no prefix to add to.
                        load.copied_bytes += 0 if load.error else size
                    load.source.copied(load.copied_bytes)
                uses.close()
                self._count_ended()
            self._settle({load for load, *_ in flying})

    def _next_chunk(self, *, wait: bool) -> tuple[Load, int, int, int] | None:
        """What to copy next: offset, address, bytes; None if there is nothing (with
        ``wait``: ever again)."""
        with self._changed:
            while True:
                chunk = self._to_copy()
                if wait:
                    self._settle(set())
                if chunk is not None:
                    load, _, _, size = chunk
                    load._begun_bytes += size
                    self.begun += 1
                    return chunk
                if not wait or (self._closed and not self._loads):
                    return None
                self._wait()

    def _to_copy(self) -> tuple[Load, int, int, int] | None:
        """Of the first in order, even if its pages are still being mapped: nobody overtakes
        it for that, but where its source is not ready."""
        for load in self._ranked():
            at = load._begun_bytes
            if load._cancelled or at >= load.num_bytes:
                continue
            try:
                source, ready = load.source.at(at)
            except Exception as failure:
                self._fail(load, failure)
                continue
            mapped = min(load.slot.mapped_bytes, load.num_bytes) - at
            size = min(self._chunk_bytes, mapped, ready)
            if size > 0:
                return load, at, source, size
            if ready > 0:
                return None
        return None

    def _count_ended(self) -> None:
        with self._changed:
            self.ended += 1

    def _fail(self, load: Load, failure: Exception) -> None:
        with self._changed:
            load.error, load._cancelled = str(failure), True

    def _settle(self, flying: set[Load]) -> None:
        """End loads that are through, or cancelled with nothing under way any more."""
        with self._changed:
            for load in tuple(self._loads):
                if load._mapping or load in flying:
                    continue
                through = load.copied_bytes >= load.num_bytes
                if not (through or load._cancelled):
                    continue
                load.pages.release()
                load.end = (
                    "done" if through else "failed" if load.error else "cancelled"
                )
                del self._loads[load]
                load.ended.set()
                self._changed.notify_all()
