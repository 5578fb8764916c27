"""The public port: what of OpenAI's API there is, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from foreserve.runtime.gateway.errors import ApiError
from foreserve.runtime.gateway.gateway import Gateway
from foreserve.runtime.gateway.job import Receive, Scope, Send

App = Callable[[Scope, Receive, Send], Awaitable[None]]


POSTS = ("/v1/chat/completions", "/v1/completions")


def public_app(gateway: Gateway) -> App:
    """The public port's ASGI application."""
    rest = _rest(gateway)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        # Requests for tokens go past Starlette: they are many, and wait for every step.
        if scope["path"] in POSTS and scope["method"] == "POST":
            await gateway.post(scope["path"], scope, receive, send)
        else:
            await rest(scope, receive, send)

    return app


def _rest(gateway: Gateway) -> Starlette:
    async def elsewhere(_: Request) -> Response:
        raise HTTPException(405, headers={"allow": "POST"})

    async def models(request: Request) -> Response:
        key = gateway.keys.check(request.scope["headers"])
        data = [_describe(gateway, name) for name in gateway.allowed(key)]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        key = gateway.keys.check(request.scope["headers"])
        name = request.path_params["name"]
        gateway.find(name, key)
        return JSONResponse(_describe(gateway, name))

    async def health(_: Request) -> Response:
        return Response()

    async def ready(_: Request) -> Response:
        reason = None
        if gateway.closing:
            reason = "shutting down"
        elif gateway.plan_id() is None:
            reason = "no plan is loaded"
        elif not gateway.table.routable():
            reason = "no replica is routable"
        if reason is None:
            return JSONResponse({"ready": True})
        return JSONResponse({"ready": False, "reason": reason}, 503)

    async def about(_: Request) -> Response:
        return JSONResponse(
            {"version": version("foreserve"), "plan_id": gateway.plan_id()}
        )

    async def metrics(_: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(gateway.metrics.text(), headers={"content-type": kind})

    app = Starlette(
        routes=[
            *(Route(path, elsewhere) for path in POSTS),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/ready", ready),
            Route("/version", about),
            Route("/metrics", metrics),
        ],
        exception_handlers={HTTPException: no_such_route, ApiError: as_json},
    )
    # A redirect would be made of the client's own Host header.
    app.router.redirect_slashes = False
    return app


def _describe(gateway: Gateway, name: str) -> dict[str, Any]:
    llm, state = gateway.llms[name], gateway.state(name)
    eta_s = 0.0 if state == "active" else gateway.table.eta(name)[1]
    return {
        "id": name,
        "object": "model",
        "created": llm.created_s,
        "owned_by": "foreserve",
        "max_model_len": llm.max_model_len,
        "foreserve": {
            "state": state,
            "eta_s": round(eta_s, 3) if math.isfinite(eta_s) else None,
        },
    }


async def no_such_route(request: Request, fault: Exception) -> Response:
    """404 and 405, as JSON like every other error."""
    status = fault.status_code if isinstance(fault, HTTPException) else 404
    what = "no such route" if status == 404 else "not with this method"
    error = ApiError(
        status,
        "invalid_request_error",
        "not_found" if status == 404 else "method_not_allowed",
        f"There is {what} here; see GET /v1/models.",
    )
    headers = getattr(fault, "headers", None) or {}
    error.headers = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
    return await as_json(request, error)


async def as_json(_: Request, error: Exception) -> Response:
    """An `ApiError` as its answer."""
    assert isinstance(error, ApiError)
    headers = {name.decode(): value.decode() for name, value in error.headers}
    return Response(error.body(), error.status, headers, "application/json")
