"""A shard on its way from storage into shared memory: a prefix of it can be copied from."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import ForeserveError

Stop = Callable[[], bool]
"""Whether nobody waits any more; quick."""

Fill = Callable[[NDArray[np.uint8], int, Stop], None]
"""Writes a shard's bytes from that offset on, as many as the memory has; `Stopped` soon
after nobody waits."""

WINDOW_BYTES = 4 * 1024**2
"""Read, then written to shared memory: few enough to stay in a cache in between."""


class Filling:
    """How far a shard is. Any thread."""

    def __init__(self, num_bytes: int, ready_bytes: int = 0) -> None:
        self.num_bytes, self._ready_bytes = num_bytes, ready_bytes
        self._error: ForeserveError | None = None
        self._looks: list[Callable[[], None]] = []
        self._changed = threading.Condition()

    @property
    def ready_bytes(self) -> int:
        """From the begin."""
        return self._ready_bytes

    @property
    def whole(self) -> bool:
        return self._ready_bytes >= self.num_bytes

    @property
    def failed(self) -> bool:
        return self._error is not None

    def ahead(self, offset_bytes: int) -> int:
        """How many bytes are ready from there on; 0: none yet. Raises why there will be
        none."""
        # In this order: what was ready before the failure is ready.
        error, ready = self._error, self._ready_bytes - offset_bytes
        if ready <= 0 and error is not None:
            raise error
        return max(0, ready)

    def reach(self, ready_bytes: int) -> None:
        with self._changed:
            self._ready_bytes = ready_bytes
            self._changed.notify_all()
        self._look()

    def fail(self, error: ForeserveError) -> None:
        """There will be no more."""
        with self._changed:
            self._error = error
            self._changed.notify_all()
        self._look()

    def watch(self, look: Callable[[], None]) -> None:
        """Have it called whenever there is more, or will be no more; quick. It may be
        called once more after `unwatch`."""
        with self._changed:
            self._looks.append(look)

    def unwatch(self, look: Callable[[], None]) -> None:
        with self._changed:
            self._looks.remove(look)

    def _look(self) -> None:
        # Without the lock: who looks may wait for who asks.
        for look in tuple(self._looks):
            look()

    def wait(self, beyond_bytes: int, within_s: float | None = None) -> int:
        """`ready_bytes`, when that is more, or the time is over. Raises as `ahead`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ready_bytes > beyond_bytes or self._error, within_s
            )
            self.ahead(beyond_bytes)
            return self._ready_bytes


def windows(fd: int, filling: Filling, fill: Fill, stop: Stop) -> int:
    """Read what is missing into the file, telling how far it is but for the last bytes,
    which the caller tells of; returns how many there are then. Raises what reading raises,
    `OSError` where the machine has no memory."""
    # Into fresh pages of a mapping it takes twice as long: each is zeroed, and faulted in.
    buffer = np.frombuffer(mmap.mmap(-1, WINDOW_BYTES), np.uint8)
    while True:
        at = filling.ready_bytes
        window = buffer[: filling.num_bytes - at]
        fill(window, at, stop)
        left = window.data
        while left:
            count = os.pwrite(fd, left, at)
            left, at = left[count:], at + count
        if at >= filling.num_bytes:
            return at
        filling.reach(at)
