"""HTTP/1.1 to engines, as little of it as they need.

A request goes out in one write; of the answer there are the status, the kind and the body's
pieces as they come. Connections are kept for the next request. (A general client took most
of what the gateway adds to a first token.)
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 2.0
"""Engines are near; one that does not accept within this is gone."""

KEPT_S = 3.0
"""Idle connections are dropped before the engine does it (5 s for vLLM), so that no
request meets one that is just being closed."""

MOST_UNREAD = 1 << 20
"""Bytes of an answer that nobody has taken; beyond that its engine has to wait."""


class EngineLost(Exception):
    """No answer, or one that broke off. Another replica may do better."""


class Connection(asyncio.Protocol):
    """To one engine, for one answer after the other. For one event loop."""

    status = 0
    """Of the answer; 0 until its head is there."""
    kind = b""
    """Its content-type."""
    whole = False
    """All of it is there."""

    def __init__(self, kept: list[Connection]) -> None:
        self._kept = kept
        """Where it goes between two answers."""
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._lost = ""
        self._asked = self._paused = False

    def begin(self, request: bytes, silence_s: float | None) -> None:
        """Send ``request``. An answer that is silent for ``silence_s`` is lost."""
        self._parser = httptools.HttpResponseParser(self)
        self.status, self.kind, self.whole = 0, b"", False
        self._parts: list[bytes] = []
        self._unread = 0
        self._framed = self._stays = False
        self._asked = True
        self._stop_timer()
        if silence_s is not None:
            self._heard_s = self._loop.time()
            self._timer = self._loop.call_later(silence_s, self._listen, silence_s)
        self._transport.write(request)

    async def head(self) -> None:
        """Wait for status and kind; `EngineLost` if they do not come."""
        while not self.status:
            await self._news()

    async def more(self) -> bytes:
        """What has come of the body since the last time, as soon as there is something;
        empty at its end. `EngineLost` if it breaks off."""
        while not self._parts:
            if self.whole:
                return b""
            await self._news()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._unread = 0
        if self._paused:
            self._paused, self._heard_s = False, self._loop.time()
            self._transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """All that is left of the body."""
        parts = []
        while data := await self.more():
            parts.append(data)
        return b"".join(parts)

    def end(self) -> None:
        """The answer is done with. One that was read to its end leaves the connection to
        the next; else it is closed, which cancels the request at the engine."""
        self._asked = False
        self._stop_timer()
        if self._lost or self._paused or not (self.whole and self._stays):
            self.drop("left")
            return
        self._kept.append(self)
        self._timer = self._loop.call_later(KEPT_S, self.drop, "kept for too long")

    def drop(self, reason: str) -> None:
        """Close it at once."""
        self._lost = self._lost or reason
        self._stop_timer()
        if self in self._kept:
            self._kept.remove(self)
        self._transport.abort()
        self._tell()

    async def _news(self) -> None:
        if self._lost:
            raise EngineLost(self._lost)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _tell(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _listen(self, silence_s: float) -> None:
        left_s = self._heard_s + silence_s - self._loop.time()
        if self._paused:  # It may not speak.
            left_s = silence_s
        if left_s <= 0:
            self.drop("silent")
        else:
            self._timer = self._loop.call_later(left_s, self._listen, silence_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- asyncio and httptools -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if not self._asked:
            self.drop("it spoke unasked")
            return
        self._heard_s = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.drop("no HTTP")
        if self._unread > MOST_UNREAD and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        self._tell()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._asked and self.status and not self._framed and not self._lost:
            self.whole = True  # The end of the connection is the answer's.
        self.drop("broke off" if self.status else "no answer")

    def eof_received(self) -> None:
        if not self._asked:
            self.drop("closed")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.kind = value
        elif name in (b"content-length", b"transfer-encoding"):
            self._framed = True

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:  # Others only announce one.
            self.status = status

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        if self.status:
            self.whole, self._stays = True, self._parser.should_keep_alive()


class Connections:
    """Connections to all engines, by where they go. For one event loop."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], list[Connection]] = {}

    async def open(self, host: str, port: int) -> Connection:
        """One that nobody uses; `EngineLost` if there is none to be had."""
        kept = self._kept.setdefault((host, port), [])
        if kept:
            return kept.pop()
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, made = await loop.create_connection(
                    lambda: Connection(kept), host, port
                )
        except (OSError, TimeoutError) as error:
            raise EngineLost(f"no connection: {type(error).__name__}") from error
        return made

    def close(self) -> None:
        """End those that are kept."""
        for kept in self._kept.values():
            for connection in list(kept):
                connection.drop("closing")


@lru_cache(maxsize=4096)
def place_of(url: str) -> tuple[str, int, bytes, bytes]:
    """(host, port, the header ``host``, path) of an address."""
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// address")
    return parts.hostname, parts.port or 80, parts.netloc.encode(), parts.path.encode()
