"""The journal as it grows, for whoever listens on the admin port (server-sent events)."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from foreserve.runtime.journal import (
    Accepted,
    Event,
    RequestEnd,
    RequestEnds,
    line_of,
    name_of,
)

KEPT = 2000
"""Events that a listener who lost the connection can still have."""
SILENCE_S = 15.0
"""After so long without an event a comment is sent, so that nobody takes it for dead."""


class Feed:
    """A `Recorder` that passes events on. Written by any thread, read in an event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: deque[tuple[int, Event]] = deque(maxlen=KEPT)
        self._requests: deque[tuple[int, Event]] = deque(maxlen=KEPT)
        self._number = 0
        self._listeners: dict[Callable[[], object], bool] = {}
        """What tells each, and whether it wants to hear of requests."""
        self._closed = False

    def record(self, event: Event | RequestEnds) -> None:
        if isinstance(event, RequestEnds):
            return
        with self._lock:
            self._number += 1
            small = isinstance(event, Accepted | RequestEnd)
            (self._requests if small else self._events).append((self._number, event))
            told = [t for t, all_ in self._listeners.items() if all_ or not small]
        for tell in told:
            tell()

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            self._closed = True
            told = list(self._listeners)
        for tell in told:
            tell()

    @property
    def number(self) -> int:
        """Of the latest event."""
        with self._lock:
            return self._number

    def since(
        self, number: int, *, requests: bool = False
    ) -> Sequence[tuple[int, Event]]:
        """Events after ``number`` that are still there; requests, of which there are
        many, only where asked for."""
        with self._lock:
            found = [pair for pair in self._events if pair[0] > number]
            if requests:
                found += [pair for pair in self._requests if pair[0] > number]
        return sorted(found, key=lambda pair: pair[0])

    async def stream(
        self, number: int, *, requests: bool = False
    ) -> AsyncIterator[bytes]:
        """Server-sent events after ``number``, until the feed is closed."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        with self._lock:
            self._listeners[tell] = requests
        try:
            yield b": events of the cluster's journal\n\n"
            while not self._closed:
                news.clear()
                for at, event in self.since(number, requests=requests):
                    number = at
                    yield (
                        f"id: {at}\nevent: {name_of(event)}\ndata: {line_of(event)}\n\n"
                    ).encode()
                try:
                    async with asyncio.timeout(SILENCE_S):
                        await news.wait()
                except TimeoutError:
                    yield b": nothing new\n\n"
        finally:
            with self._lock:
                del self._listeners[tell]
