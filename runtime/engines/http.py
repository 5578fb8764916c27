"""HTTP/1.1 of engine servers: what every connection does, whatever it answers."""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

import httptools

from foreserve.runtime.engines.bodies import Refused

MOST_BODY_BYTES = 64 * 1024**2
BROKEN_BODY: tuple[type[Exception], ...] = (ArithmeticError, AttributeError)
BROKEN_BODY += (LookupError, RecursionError, TypeError, ValueError)
"""What reading one may raise that is not as it should be."""
REASONS = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
}
REASONS |= {413: b"Content Too Large", 500: b"Internal Server Error"}
REASONS |= {503: b"Service Unavailable", 507: b"Insufficient Storage"}


class HttpConnection(asyncio.Protocol):
    """One client connection; one request at a time. Whoever inherits has `handle`, which
    answers now (`json`, `send`, by raising `Refused`) or later (`occupied` until then)."""

    def __init__(self, key: bytes = b"") -> None:
        """``key``: what requests have to show; empty: nothing."""
        self.transport: asyncio.Transport
        self._expected, self._shown = b"Bearer " + key, b""
        if key:
            self.on_header = self._see_header  # The parser calls what there is.
        self._keyed = bool(key)
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._size = b"", 0
        self._body: list[bytes] = []
        self._keep_alive = True

    # --- for whoever inherits ------------------------------------------------------------

    @property
    def occupied(self) -> bool:
        """A request is being answered."""
        raise NotImplementedError

    def handle(self, method: str, path: str, body: bytes) -> None:
        raise NotImplementedError

    def left(self) -> None:
        """The client has gone."""
        raise NotImplementedError

    # --- asyncio and httptools -----------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.left()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # Our own fault: asyncio says so, and closes the connection.
        except httptools.HttpParserError:
            self.abort()

    def on_message_begin(self) -> None:
        self._url, self._body, self._size = b"", [], 0
        self._shown = b""

    def _see_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"authorization":
            self._shown = value

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > MOST_BODY_BYTES:
            self.abort()
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self.occupied:
            self.abort()  # Nobody we know sends the next request before the answer.
            return
        self._keep_alive = self._parser.should_keep_alive()
        try:
            if self._keyed and not hmac.compare_digest(self._shown, self._expected):
                raise Refused(401, "Unauthorized")
            self.handle(
                self._parser.get_method().decode(),
                self._url.split(b"?")[0].decode("latin-1"),
                b"".join(self._body),
            )
        except Refused as refused:
            self.refuse(refused)
        except BROKEN_BODY as error:
            self.refuse(Refused(400, f"{type(error).__name__}: {error}"))

    # --- answers -------------------------------------------------------------------------

    def json(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode())

    def refuse(self, refused: Refused) -> None:
        kind = "invalid_request_error" if refused.status < 500 else "engine_error"
        error = {
            "message": str(refused),
            "type": kind,
            "param": None,
            "code": refused.code,
        }
        self.send(refused.status, json.dumps({"error": error}).encode())

    def send(self, status: int, body: bytes, kind: bytes = b"application/json") -> None:
        self.transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s"
            % (status, REASONS[status], kind, len(body), body)
        )
        self.rest()

    def rest(self) -> None:
        """The request is answered."""
        if not self._keep_alive:
            self.transport.close()

    def abort(self) -> None:
        self.transport.abort()
