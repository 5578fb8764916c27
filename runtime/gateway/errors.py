"""Errors as OpenAI's clients know them: what went wrong, and what to do next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Headers = list[tuple[bytes, bytes]]

RETRIED_WITHIN_S = 60.0
"""Common clients obey no longer Retry-After, and come back too early instead."""


class ApiError(Exception):
    """An answer that is an error. All four keys of the body are always there."""

    def __init__(
        self,
        status: int,
        type_: str,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers: Headers = list(headers)
        self.error: dict[str, Any] = {
            "message": message,
            "type": type_,
            "param": param,
            "code": code,
        }
        if facts:
            self.error["foreserve"] = dict(facts)

    def body(self) -> bytes:
        # Escaped: lone surrogates out of a request are not UTF-8.
        return json.dumps({"error": self.error}).encode()

    def event(self) -> bytes:
        """As the last event of a stream that cannot go on."""
        return b"data: " + self.body() + b"\n\n"


def invalid(code: str | None, message: str, param: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, "invalid_request_error", code, message, param=param)


def too_large(limit_bytes: int) -> ApiError:
    return ApiError(
        413,
        "invalid_request_error",
        "body_too_large",
        f"The body is larger than {limit_bytes} bytes; send less.",
    )


def too_slow(limit_s: float) -> ApiError:
    return ApiError(
        408,
        "invalid_request_error",
        "body_too_slow",
        f"The body did not arrive within {limit_s:g} s; send it faster.",
    )


def unknown_llm(llm: str, close: Sequence[str]) -> ApiError:
    hint = f" Did you mean {', '.join(close)}?" if close else " See GET /v1/models."
    return ApiError(
        404,
        "invalid_request_error",
        "model_not_found",
        f"There is no model {llm[:100]!r}.{hint}",
        param="model",
    )


def too_long(tokens: int, room_tokens: int) -> ApiError:
    return invalid(
        "context_length_exceeded",
        f"The request needs at least {tokens} tokens; {room_tokens} fit. "
        "Shorten the prompt or lower max_tokens.",
    )


def deadline(limit_s: float) -> ApiError:
    return ApiError(
        504,
        "timeout_error",
        "deadline_exceeded",
        f"Not to be done within {limit_s:g} s; allow more time or try later.",
    )


def engine_lost(why: str) -> ApiError:
    return ApiError(
        502,
        "engine_error",
        "engine_lost",
        f"The engine failed ({why}); send the request again.",
    )


def llm_failed(llm: str) -> ApiError:
    return ApiError(
        503,
        "service_unavailable",
        "model_failed",
        f"{llm} cannot be started; tell the operator.",
        headers=[(b"x-should-retry", b"false")],
    )


def llm_held(llm: str) -> ApiError:
    return ApiError(
        503,
        "service_unavailable",
        "no_capacity",
        f"{llm} was stopped by the operator; it serves again once it is resumed.",
        headers=[(b"x-should-retry", b"false")],
    )


def closing() -> ApiError:
    return ApiError(
        503,
        "service_unavailable",
        "no_capacity",
        "The server is shutting down; send the request again.",
        headers=[*retry_after(1.0, 0.0), (b"connection", b"close")],
    )


def retry_after(wait_s: float, spread: float) -> Headers:
    """Headers for a predicted wait, later by the fraction ``spread``; none of a wait that
    cannot be foreseen."""
    if not math.isfinite(wait_s):
        return [(b"x-should-retry", b"false")]
    wait_ms = math.ceil(1000 * max(1.0, wait_s) * (1 + spread))
    headers = [
        (b"retry-after", b"%d" % math.ceil(wait_ms / 1000)),
        (b"retry-after-ms", b"%d" % wait_ms),
    ]
    if wait_ms > 1000 * RETRIED_WITHIN_S:
        headers.append((b"x-should-retry", b"false"))
    return headers
