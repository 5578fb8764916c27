"""Requests to engines, and what their answers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from foreserve.runtime.gateway.connection import (
    Connection,
    Connections,
    EngineLost,
    place_of,
)
from foreserve.runtime.gateway.errors import ApiError, engine_lost
from foreserve.runtime.gateway.table import Routable

END_S = 1.0
"""For an answer to end behind its last event."""

FORWARDED = frozenset(
    {b"traceparent", b"tracestate", b"x-slo-ttft-ms", b"x-slo-tpot-ms"}
)


def forwarded(headers: Sequence[tuple[bytes, bytes]], request_id: str) -> bytes:
    """The headers that an engine gets of the client's, as lines."""
    lines = [
        b"%s: %s\r\n" % (name, value)
        for name, value in headers
        if name in FORWARDED and value.isascii() and value.decode().isprintable()
    ]
    return b"%sx-request-id: %s\r\n" % (b"".join(lines), request_id.encode())


class Engines:
    """Asks engines, over one pool of connections. For one event loop."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._connections = Connections()

    def close(self) -> None:
        self._connections.close()

    @asynccontextmanager
    async def ask(
        self,
        replica: Routable,
        path: str,
        payload: bytes,
        headers: bytes,
        stream: bool,
    ) -> AsyncIterator[Connection]:
        """An answer with status 200. Leaving early closes the connection, which cancels
        the request at the engine."""
        host, port, netloc, prefix = place_of(replica.url)
        if replica.key:
            headers = b"authorization: Bearer %s\r\n%s" % (
                replica.key.encode(),
                headers,
            )
        request = (
            b"POST %s%s HTTP/1.1\r\nhost: %s\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n%s\r\n%s"
        ) % (
            prefix,
            path.encode(),
            netloc,
            len(payload),
            headers,
            payload,
        )
        answer = await self._connections.open(host, port)
        try:
            answer.begin(request, self._silence_s if stream else None)
            await answer.head()
            if answer.status != 200:
                raise _meaning(answer.status, await answer.read())
            yield answer
        finally:
            answer.end()


async def finish(answer: Connection) -> None:
    """Read to the end behind the last event, so that the connection can be used again."""
    if not answer.whole:
        with suppress(EngineLost, TimeoutError):
            async with asyncio.timeout(END_S):
                await answer.read()


def _meaning(status: int, body: bytes) -> Exception:
    """What an answer other than 200 is to the client. A request that the engine found
    wrong is wrong; anything else is the engine's fault, and so to be tried elsewhere where
    it did not begin."""
    if status in (400, 413, 422):
        error = _error_of(body)
        message = error.get("message")
        code, param = error.get("code"), error.get("param")
        return ApiError(
            status if status != 422 else 400,
            "invalid_request_error",
            code if isinstance(code, str) else None,
            message if isinstance(message, str) else "The engine refused the request.",
            param=param if isinstance(param, str) else None,
        )
    if status in (429, 502, 503, 504):
        return EngineLost(f"status {status}")
    return engine_lost(f"status {status}")


def _error_of(body: bytes) -> Mapping[str, Any]:
    try:
        plain = json.loads(body)
    except ValueError:
        return {}
    if not isinstance(plain, dict):
        return {}
    error = plain.get("error", plain)
    return error if isinstance(error, dict) else {}
