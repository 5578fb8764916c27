"""Lets nobody in who does not show the engine's key: ASGI, run inside vLLM's server.

With the standard library alone; `vllm` copies it to where that interpreter finds it.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SHUT = b'{"error": {"message": "Unauthorized", "code": 401}}'


class Door:
    """Around ``app``: every path, health and sleep among them."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._expected = b"Bearer " + os.environ["FORESERVE_ENGINE_KEY"].encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        shown = dict(scope["headers"]).get(b"authorization", b"")
        if hmac.compare_digest(shown, self._expected):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            kind = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": kind})
            await send({"type": "http.response.body", "body": SHUT})
        else:
            await send({"type": "websocket.close", "code": 1008})
