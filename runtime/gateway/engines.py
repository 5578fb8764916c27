"""Requests to engines, and what their answers mean."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from foreserve.runtime.gateway.errors import ApiError, engine_lost
from foreserve.runtime.gateway.table import Routable

CONNECT_S = 2.0
"""Engines are near; one that does not accept within this is gone."""

KEPT_S = 3.0
"""Idle connections are dropped before the engine does it (5 s for vLLM), so that no
request meets one that is just being closed."""

END_S = 1.0
"""For an answer to end behind its last event."""

FORWARDED = frozenset(
    {b"traceparent", b"tracestate", b"x-slo-ttft-ms", b"x-slo-tpot-ms"}
)


class EngineLost(Exception):
    """No answer, or one that broke off. Another replica may do better."""


def forwarded(
    headers: Sequence[tuple[bytes, bytes]], request_id: str
) -> dict[str, str]:
    """The headers that an engine gets."""
    passed = {
        name.decode(): value.decode("latin-1")
        for name, value in headers
        if name in FORWARDED and value.isascii()
    }
    return {**passed, "content-type": "application/json", "x-request-id": request_id}


class Engines:
    """One pool of connections to all engines. For one event loop."""

    def __init__(self, silence_s: float) -> None:
        self._silence_s = silence_s
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept-Encoding", "User-Agent"),
            read_bufsize=1 << 20,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @asynccontextmanager
    async def ask(
        self,
        replica: Routable,
        path: str,
        payload: bytes,
        headers: Mapping[str, str],
        stream: bool,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 200. Leaving early closes the connection, which cancels
        the request at the engine."""
        assert self._session is not None
        if replica.key:
            headers = {**headers, "authorization": f"Bearer {replica.key}"}
        silence_s = self._silence_s if stream else None
        limit = aiohttp.ClientTimeout(sock_connect=CONNECT_S, sock_read=silence_s)
        response = None
        try:
            response = await self._session.post(
                replica.url + path,
                data=payload,
                headers=headers,
                timeout=limit,
                allow_redirects=False,
            )
            if response.status != 200:
                raise _meaning(response.status, await response.read())
            yield response
        except aiohttp.ClientError as error:
            raise EngineLost(type(error).__name__) from error
        finally:
            if response is not None:
                # Of an answer that was read to its end, the connection is kept already.
                response.close()


async def finish(response: aiohttp.ClientResponse) -> None:
    """Read to the end behind the last event, so that the connection can be used again."""
    if response.content.at_eof():
        return
    with suppress(aiohttp.ClientError, TimeoutError):
        async with asyncio.timeout(END_S):
            async for _ in response.content.iter_any():
                pass


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
