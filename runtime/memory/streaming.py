"""Where loads come from: the node's store, or the checkpoint itself where that has no room.

What the store is still reading is copied as it comes. A `Stream` reads a shard while it is
copied, too, but through a small ring of buffers: nothing is kept.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import numpy as np

from foreserve.models.errors import ForeserveError
from foreserve.runtime.memory.filling import Fill, Stop
from foreserve.runtime.memory.loading import Source, Whole
from foreserve.runtime.memory.node_store import StoreGone
from foreserve.runtime.memory.pool import Memory
from foreserve.runtime.memory.store import Opened, Shards, Store

WINDOW_BYTES = 8 * 1024**2
WINDOWS = 4


class StreamFailed(ForeserveError):
    """The checkpoint could not be read; one line says why."""


class Stream:
    """A `loading.Source` that reads ahead of one load, by a thread of its own."""

    def __init__(
        self,
        fill: Fill,
        num_bytes: int,
        look: Callable[[], None],
        *,
        window_bytes: int = WINDOW_BYTES,
        windows: int = WINDOWS,
    ) -> None:
        """``look``: `Link.look`. Nothing is read before the link asks for it."""
        self._fill, self._shard_bytes, self._look = fill, num_bytes, look
        self._window_bytes, self._windows = window_bytes, windows
        self.num_bytes = window_bytes * windows
        """Of its buffers."""
        ring = np.frombuffer(mmap.mmap(-1, self.num_bytes), np.uint8)
        self._ring = ring.reshape(windows, window_bytes)
        self.address = int(ring.ctypes.data)
        self._begin = self._ready = self._copied = 0
        """In the shard: of the first window, of what was read, of what was copied."""
        self._error = ""
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def at(self, offset_bytes: int) -> tuple[int, int]:
        """As `Source.at`; the first call says where to begin."""
        with self._changed:
            if self._thread is None:
                self._begin = self._ready = self._copied = offset_bytes
                self._thread = threading.Thread(target=self._read, daemon=True)
                self._thread.start()
            window, inside = divmod(offset_bytes - self._begin, self._window_bytes)
            place = (window % self._windows) * self._window_bytes + inside
            ready = min(self._ready - offset_bytes, self._window_bytes - inside)
            if ready <= 0 and self._error:
                raise StreamFailed(self._error)
            return self.address + place, max(0, ready)

    def copied(self, num_bytes: int) -> None:
        with self._changed:
            self._copied = num_bytes
            self._changed.notify_all()

    def _read(self) -> None:
        try:
            for number, at in enumerate(
                range(self._begin, self._shard_bytes, self._window_bytes)
            ):
                last = at - (self._windows - 1) * self._window_bytes
                with self._changed:
                    # What is in the buffer now has to be copied first.
                    while self._copied < last and not self._closed:
                        self._changed.wait()
                    if self._closed:
                        return
                window = self._ring[number % self._windows]
                self._fill(window, at, lambda: self._closed)
                with self._changed:
                    self._ready = min(at + self._window_bytes, self._shard_bytes)
                self._look()
        except Exception as error:
            with self._changed:
                self._error = str(error) or type(error).__name__
            self._look()

    def close(self) -> None:
        """Nobody copies from it any more: returns when it reads nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()


class Coming:
    """A `loading.Source`: a shard that the store is still reading. Should the store be gone
    before its end, the rest is streamed."""

    def __init__(self, shared: Opened, stream: Callable[[], Stream]) -> None:
        self._address, self._filling = shared.address, shared.filling
        self._stream = stream
        self._rest: Stream | None = None

    def at(self, offset_bytes: int) -> tuple[int, int]:
        if self._rest is None:
            try:
                ready = self._filling.ahead(offset_bytes)
            except StoreGone:
                self._rest = self._stream()
            else:
                return self._address + offset_bytes, ready
        return self._rest.at(offset_bytes)

    def copied(self, num_bytes: int) -> None:
        if self._rest is not None:
            self._rest.copied(num_bytes)

    def close(self) -> None:
        if self._rest is not None:
            self._rest.close()


class Sources:
    """Of all loads of one process."""

    def __init__(self, store: Store, shards: Shards, memory: Memory) -> None:
        """``shards``: what the store would read, read here where it cannot. ``memory``:
        what copies from what is opened here."""
        self._store, self._shards, self._memory = store, shards, memory

    @contextmanager
    def open(self, key: str, look: Callable[[], None], stop: Stop) -> Iterator[Source]:
        """The shard of that key, for one load of a link with that `Link.look`, which has
        ended when the context does. Raises what reading it raises, and `Stopped`."""
        shared = None
        with suppress(StoreGone):
            shared = self._store.open(key, stop)
        if shared is None:
            stream = self._stream(key, look)
            with self._pinned(stream.address, stream.num_bytes), closing(stream):
                yield stream
            return
        with closing(shared):
            if shared.filling.whole:
                self._pin(shared)
                yield Whole(shared.address, shared.num_bytes)
                return
            # To pin it now would take as long as to read it.
            shared.filling.watch(look)
            coming = Coming(shared, lambda: self._stream(key, look))
            try:
                with closing(coming):
                    yield coming
            finally:
                shared.filling.unwatch(look)

    def _stream(self, key: str, look: Callable[[], None]) -> Stream:
        num_bytes, fill = self._shards(key)
        return Stream(fill, num_bytes, look)

    def _pin(self, shared: Opened) -> None:
        address, num_bytes = shared.address, shared.num_bytes
        # Where the machine does not let us, copies are slower.
        with suppress(ForeserveError):
            shared.once(
                lambda: self._memory.pin(address, num_bytes),
                lambda: self._unpin(address),
            )

    @contextmanager
    def _pinned(self, address: int, num_bytes: int) -> Iterator[None]:
        try:
            self._memory.pin(address, num_bytes)
        except ForeserveError:
            yield
            return
        try:
            yield
        finally:
            self._unpin(address)

    def _unpin(self, address: int) -> None:
        with suppress(ForeserveError):  # There is nothing else to be done about it.
            self._memory.unpin(address)

    def close(self) -> None:
        self._store.close()
