"""The operator's port: what is planned and true, and the few things to change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from foreserve.models.errors import ForeserveError
from foreserve.runtime.gateway.app import as_json, no_such_route
from foreserve.runtime.gateway.body import parse
from foreserve.runtime.gateway.errors import ApiError, invalid, too_large
from foreserve.runtime.gateway.keys import bearer, matches

Mode = Literal["observe", "recommend", "automatic"]

LARGEST_BODY = 1 << 16
REMEMBERED = 256
"""Answers kept for callers that send a change again with the same Idempotency-Key."""


class NotThere(ForeserveError):
    """There is no plan, LLM or node of this name."""


class Stale(ForeserveError):
    """The caller looked at an older generation than the current one."""


class Operator(Protocol):
    """What stands behind the admin port. Called in threads, several at a time; answers
    are plain data for JSON."""

    def status(self) -> Mapping[str, Any]:
        """Observed and wanted state, generation, mode, last errors."""
        ...

    def plans(self) -> Mapping[str, Any]:
        """``current`` and ``proposed`` plans, each null if there is none."""
        ...

    def approve(self, plan_id: str, generation: int | None) -> Mapping[str, Any]:
        """Let a proposed plan become the current one: the receipt, with ``action``.
        `NotThere` for an unknown plan, `Stale` if ``generation`` is not the current."""
        ...

    def mode(self) -> Mode: ...

    def set_mode(self, mode: Mode) -> None: ...

    def engines(self) -> Sequence[Mapping[str, Any]]: ...

    def ledger(self) -> Sequence[Mapping[str, Any]]:
        """One row for each node, device and kind of bytes."""
        ...

    def tick(self) -> Mapping[str, Any]:
        """Have the controller take one turn now: the receipt."""
        ...


def admin_app(
    operator: Operator, token_sha256: str, reader_sha256: str | None = None
) -> Starlette:
    """The admin port's ASGI application; the reader's token changes nothing."""
    answered: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def check(request: Request) -> None:
        token = bearer(request.scope["headers"])
        if matches(token, token_sha256):
            return
        if not matches(token, reader_sha256):
            raise ApiError(
                401,
                "invalid_request_error",
                "invalid_token",
                "No valid token; send it as 'Authorization: Bearer <token>'.",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        if request.method not in ("GET", "HEAD"):
            raise ApiError(
                403, "permission_error", "not_allowed", "This token may only read."
            )

    def shown(read: Callable[[], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def show(request: Request) -> Response:
            check(request)
            return JSONResponse(await run_in_threadpool(read))

        return show

    async def change(
        request: Request, act: Callable[[], Any], status: int = 202
    ) -> Response:
        """Do it once for each Idempotency-Key."""
        once = request.headers.get("idempotency-key")
        place = (request.url.path, once or "")
        if once is None or place not in answered:
            done = await run_in_threadpool(act)
            if once is None:
                return JSONResponse(done, status)
            answered[place] = done
            if len(answered) > REMEMBERED:
                answered.popitem(last=False)
        return JSONResponse(answered[place], status)

    async def approve(request: Request) -> Response:
        check(request)
        plan_id, generation = request.path_params["plan_id"], _generation(request)
        return await change(request, lambda: operator.approve(plan_id, generation))

    async def tick(request: Request) -> Response:
        check(request)
        return await change(request, operator.tick)

    async def put_mode(request: Request) -> Response:
        check(request)
        asked = parse(await _body(request)).get("mode")
        mode: Mode | None = next((m for m in get_args(Mode) if m == asked), None)
        if mode is None:
            wanted = ", ".join(get_args(Mode))
            raise invalid(None, f"'mode' must be one of {wanted}.", "mode")
        await run_in_threadpool(operator.set_mode, mode)
        return JSONResponse({"mode": mode})

    def mode() -> Mapping[str, Any]:
        return {"mode": operator.mode()}

    app = Starlette(
        routes=[
            Route("/admin/v1/status", shown(operator.status)),
            Route("/admin/v1/plans", shown(operator.plans)),
            Route("/admin/v1/plans/{plan_id}/approve", approve, methods=["POST"]),
            Route("/admin/v1/mode", shown(mode), methods=["GET"]),
            Route("/admin/v1/mode", put_mode, methods=["PUT"]),
            Route("/admin/v1/engines", shown(operator.engines)),
            Route("/admin/v1/ledger", shown(operator.ledger)),
            Route("/admin/v1/tick", tick, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: no_such_route,
            ApiError: as_json,
            NotThere: _not_there,
            Stale: _stale,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise too_large(LARGEST_BODY)
    return body


def _generation(request: Request) -> int | None:
    text = request.headers.get("if-match")
    if text is None:
        return None
    digits = text.strip('"')
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise invalid(None, "If-Match must be a generation, a number.", "if-match")
    return int(digits)


async def _not_there(request: Request, fault: Exception) -> Response:
    error = ApiError(404, "invalid_request_error", "not_found", str(fault))
    return await as_json(request, error)


async def _stale(request: Request, fault: Exception) -> Response:
    error = ApiError(409, "invalid_request_error", "stale_generation", str(fault))
    return await as_json(request, error)
