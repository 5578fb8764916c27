"""The operator's port: what is planned and true, and what may be changed by hand."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.runtime.gateway.app import as_json, no_such_route
from foreserve.runtime.gateway.body import parse
from foreserve.runtime.gateway.errors import ApiError, invalid, too_large
from foreserve.runtime.gateway.feed import Feed
from foreserve.runtime.gateway.keys import bearer, matches
from foreserve.runtime.gateway.page import page

Mode = Literal["observe", "recommend", "automatic"]
Verb = Literal["wake", "sleep", "unload", "pin", "unpin", "drain", "resume"]
OF_LLM: tuple[Verb, ...] = ("wake", "sleep", "unload", "pin", "unpin")
OF_NODE: tuple[Verb, ...] = ("drain", "resume")

LARGEST_BODY = 1 << 16
LARGEST_PLAN = 1 << 26
REMEMBERED = 256
"""Answers kept for callers that send a change again with the same Idempotency-Key."""


class NotThere(ForeserveError):
    """There is no plan, LLM, node or action of this name."""


class Stale(ForeserveError):
    """The caller looked at an older generation than the current one."""


class Refused(ForeserveError):
    """It would go against a rule; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something to do with an LLM or a node."""

    verb: Verb
    subject: str | None
    """LLM or node; None: all LLMs."""
    until_need: bool = False
    """Of sleep and unload: only until a request asks for the LLM."""


class Operator(Protocol):
    """What stands behind the admin port. Called in threads, several at a time; answers
    are plain data for JSON. Unknown names raise `NotThere`."""

    def generation(self) -> int:
        """Of the plan that is carried out."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Observed and wanted state, generation, mode, last errors."""
        ...

    def view(self, stays: int, after_s: float) -> Mapping[str, Any]:
        """All that the status page shows; residency only if its version is not ``stays``,
        samples of load only if they are later than ``after_s``."""
        ...

    def llms(self) -> Sequence[Mapping[str, Any]]: ...

    def nodes(self) -> Sequence[Mapping[str, Any]]: ...

    def engines(self) -> Sequence[Mapping[str, Any]]: ...

    def ledger(self) -> Sequence[Mapping[str, Any]]:
        """One row for each node, device and kind of bytes."""
        ...

    def drift(self) -> Mapping[str, Any]:
        """Forecast against actual, and whose fault missed requests were."""
        ...

    def running(self) -> Sequence[Mapping[str, Any]]:
        """LLMs that are resident, as llama-swap tells of them."""
        ...

    def plans(self) -> Mapping[str, Any]:
        """``current`` and ``proposed`` plans, each null if there is none, and the
        ``history``."""
        ...

    def plan(self, plan_id: str) -> Mapping[str, Any]: ...

    def diff(self, plan_id: str) -> Mapping[str, Any]:
        """What the plan would change in the current one."""
        ...

    def hand_in(self, text: str, *, dry_run: bool) -> Mapping[str, Any]:
        """A plan file's text becomes a proposal: the receipt. `InvalidInput` where it is no
        plan, or one that the fleet cannot hold."""
        ...

    def approve(self, plan_id: str, *, dry_run: bool) -> Mapping[str, Any]:
        """Let a proposed plan become the current one: the receipt, with ``action``."""
        ...

    def reject(self, plan_id: str) -> Mapping[str, Any]: ...

    def change(self, change: Change, *, dry_run: bool) -> Mapping[str, Any]:
        """Do it: the receipt, with ``action``. `Refused` if a rule is against it. With
        ``dry_run`` nothing is done: the steps, and the ledger after them."""
        ...

    def action(self, action_id: str) -> Mapping[str, Any]:
        """What has become of a change."""
        ...

    def mode(self) -> Mode: ...

    def set_mode(self, mode: Mode) -> Mapping[str, Any]: ...

    def tick(self) -> Mapping[str, Any]:
        """Have the controller take one turn now: the receipt."""
        ...


class _Once:
    """Changes that are done once for each Idempotency-Key, also while they are under way.
    One that was refused may be tried again."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, ...], asyncio.Task[Any]] = OrderedDict()

    async def do(self, request: Request, act: Callable[[], Any]) -> Any:
        key = request.headers.get("idempotency-key")
        if key is None:
            return await run_in_threadpool(act)
        place = (request.method, request.url.path, request.url.query, key)
        if place not in self._known:
            self._known[place] = asyncio.create_task(_run(act))
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        task = self._known[place]
        try:
            # One caller that leaves must not take the answer from the others.
            return await asyncio.shield(task)
        except Exception:
            self._known.pop(place, None)
            raise


async def _run(act: Callable[[], Any]) -> Any:
    return await run_in_threadpool(act)


def admin_app(
    operator: Operator,
    token_sha256: str,
    reader_sha256: str | None = None,
    *,
    feed: Feed | None = None,
) -> Starlette:
    """The admin port's ASGI application; the reader's token changes nothing."""
    once, events = _Once(), feed or Feed()

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

    def shown(
        path: str,
        read: Callable[[], Any] | Callable[[Request], Any],
        *,
        asked: bool = False,
    ) -> Route:
        """A GET route; ``asked``: what is read depends on the request."""

        async def show(request: Request) -> Response:
            check(request)
            args = (request,) if asked else ()
            return _fresh(JSONResponse(await run_in_threadpool(read, *args)))

        return Route(path, show, methods=["GET"])

    def done(path: str, act: Callable[[Request, bytes], Callable[[], Any]]) -> Route:
        """A POST route; ``act`` reads the request, what it returns is done once."""

        async def change(request: Request) -> Response:
            check(request)
            wanted = _generation(request)
            if wanted is not None and wanted != operator.generation():
                raise Stale(
                    f"the generation is {operator.generation()}, not {wanted}: look "
                    "at the plan again"
                )
            large = LARGEST_PLAN if path.endswith("/plans") else LARGEST_BODY
            body = await _body(request, large)
            told = await once.do(request, act(request, body))
            return _fresh(JSONResponse(told, 200 if _dry(request) else 202))

        method = "PUT" if path.endswith("/mode") else "POST"
        return Route(path, change, methods=[method])

    def of(verb: Verb, name: str) -> Callable[[Request, bytes], Callable[[], Any]]:
        def act(request: Request, body: bytes) -> Callable[[], Any]:
            change = Change(
                verb=verb,
                subject=request.path_params[name],
                until_need=_choice(request, "until", ("wake", "request")) == "request",
            )
            dry_run = _dry(request)
            return lambda: operator.change(change, dry_run=dry_run)

        return act

    def unload(request: Request, body: bytes) -> Callable[[], Any]:
        """As llama-swap has it: what is asked for again comes again."""
        change = Change(
            verb="unload", subject=request.path_params.get("name"), until_need=True
        )
        return lambda: operator.change(change, dry_run=False)

    def hand_in(request: Request, body: bytes) -> Callable[[], Any]:
        try:
            text = body.decode()
        except UnicodeDecodeError:
            raise invalid("invalid_json", "The plan is not UTF-8 text.") from None
        dry_run = _dry(request)
        return lambda: operator.hand_in(text, dry_run=dry_run)

    def put_mode(request: Request, body: bytes) -> Callable[[], Any]:
        asked = parse(body).get("mode")
        mode: Mode | None = next((m for m in get_args(Mode) if m == asked), None)
        if mode is None:
            wanted = ", ".join(get_args(Mode))
            raise invalid(None, f"'mode' must be one of {wanted}.", "mode")
        return lambda: operator.set_mode(mode)

    def plan_of(request: Request) -> str:
        plan_id: str = request.path_params["plan_id"]
        return plan_id

    def view(request: Request) -> Any:
        stays = _number(request, "stays", -1.0)
        return operator.view(int(stays), _number(request, "after_s", -1.0))

    async def stream(request: Request) -> Response:
        check(request)
        last = request.headers.get("last-event-id", "")
        number = (
            int(last) if last.isascii() and last.isdigit() and len(last) < 16 else 0
        )
        requests = _choice(request, "requests", ("false", "true")) == "true"
        return _fresh(
            StreamingResponse(
                events.stream(number, requests=requests),
                media_type="text/event-stream",
                headers={"x-accel-buffering": "no"},
            )
        )

    async def show_page(_: Request) -> Response:
        body, headers = page()
        return Response(body, headers=headers, media_type="text/html")

    v1 = "/admin/v1"
    app = Starlette(
        routes=[
            Route("/", show_page, methods=["GET"]),
            shown(f"{v1}/status", operator.status),
            shown(f"{v1}/view", view, asked=True),
            shown(f"{v1}/models", operator.llms),
            shown(f"{v1}/nodes", operator.nodes),
            shown(f"{v1}/engines", operator.engines),
            shown(f"{v1}/ledger", operator.ledger),
            shown(f"{v1}/drift", operator.drift),
            Route(f"{v1}/events", stream, methods=["GET"]),
            shown(f"{v1}/plans", operator.plans),
            done(f"{v1}/plans", hand_in),
            shown(
                f"{v1}/plans/{{plan_id}}",
                lambda r: operator.plan(plan_of(r)),
                asked=True,
            ),
            shown(
                f"{v1}/plans/{{plan_id}}/diff",
                lambda r: operator.diff(plan_of(r)),
                asked=True,
            ),
            done(
                f"{v1}/plans/{{plan_id}}/approve",
                lambda r, _: lambda: operator.approve(plan_of(r), dry_run=_dry(r)),
            ),
            done(
                f"{v1}/plans/{{plan_id}}/reject",
                lambda r, _: lambda: operator.reject(plan_of(r)),
            ),
            shown(f"{v1}/mode", lambda: {"mode": operator.mode()}),
            done(f"{v1}/mode", put_mode),
            done(f"{v1}/tick", lambda r, _: operator.tick),
            *(done(f"{v1}/models/{{name:path}}/{v}", of(v, "name")) for v in OF_LLM),
            *(done(f"{v1}/nodes/{{name}}/{v}", of(v, "name")) for v in OF_NODE),
            shown(
                f"{v1}/actions/{{action_id}}",
                lambda r: operator.action(r.path_params["action_id"]),
                asked=True,
            ),
            shown("/running", lambda: {"running": operator.running()}),
            done("/api/models/unload", unload),
            done("/api/models/unload/{name:path}", unload),
        ],
        exception_handlers={
            HTTPException: no_such_route,
            ApiError: as_json,
            NotThere: _as(404, "not_found"),
            Stale: _as(409, "stale_generation"),
            Refused: _as(409, "refused"),
            InvalidInput: _as(400, "invalid_plan"),
        },
    )
    app.router.redirect_slashes = False
    return app


async def _body(request: Request, large: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > large:
            raise too_large(large)
    return bytes(body)


def _generation(request: Request) -> int | None:
    text = request.headers.get("if-match")
    if text is None:
        return None
    digits = text.strip('"')
    if not (digits.isascii() and digits.isdigit() and len(digits) < 16):
        raise invalid(None, "If-Match must be a generation, a number.", "if-match")
    return int(digits)


def _choice(request: Request, name: str, choices: tuple[str, ...]) -> str:
    """A query parameter; the first choice where it is absent."""
    found = request.query_params.get(name, choices[0])
    if found not in choices:
        raise invalid(None, f"{name!r} must be one of {', '.join(choices)}.", name)
    return found


def _dry(request: Request) -> bool:
    return _choice(request, "dry_run", ("false", "true")) == "true"


def _number(request: Request, name: str, missing: float) -> float:
    text = request.query_params.get(name)
    try:
        number = missing if text is None else float(text)
        if not abs(number) < 1e15:
            raise ValueError
    except ValueError:
        raise invalid(None, f"{name!r} must be a number.", name) from None
    return number


def _fresh(response: Response) -> Response:
    """What is true now is not to be kept."""
    response.headers["cache-control"] = "no-store"
    return response


def _as(status: int, code: str) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def answer(request: Request, fault: Exception) -> Response:
        error = ApiError(status, "invalid_request_error", code, str(fault))
        return await as_json(request, error)

    return answer
