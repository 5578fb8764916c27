"""One request after the other: whom it may be, who takes it, and how it ends."""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from numpy.random import Generator

from foreserve.runtime.gateway import errors
from foreserve.runtime.gateway.body import read_call
from foreserve.runtime.gateway.connection import EngineLost
from foreserve.runtime.gateway.engines import Engines, finish, forwarded
from foreserve.runtime.gateway.errors import ApiError, Headers
from foreserve.runtime.gateway.job import (
    Job,
    RawHeaders,
    Receive,
    Scope,
    Send,
    ServedLlm,
    hold_s,
    number,
    request_id,
    settle,
)
from foreserve.runtime.gateway.keys import ApiKey, Keys
from foreserve.runtime.gateway.metrics import Metrics
from foreserve.runtime.gateway.sse import Answer, BrokenStream, Cutter
from foreserve.runtime.gateway.table import SHUN_S, Prediction, RoutingTable, Waiter

ATTEMPTS = 3
"""Replicas that are asked, one after the other, while nothing has been answered."""

MOST_SPREAD = 0.1
"""Waits are told up to so much longer, by chance, so that not all come back at once."""

LOST_SILENCE_S = 2.0
"""A stream of a replica that was lost has failed when it says nothing for so long."""

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits of the public port. Waits and deadlines are in seconds of the table's clock,
    as are the headers that set them; bodies and silence in real ones."""

    time_scale: float = 1.0
    """Seconds of the table's clock in a real one."""

    hold_s: float = 30.0
    """A request that no replica can take is held if it is predicted (90th percentile) to
    wait no longer than this; a client may ask for another limit."""
    longest_hold_s: float = 600.0
    queue: int = 1024
    """Requests that may wait for one LLM."""
    deadline_s: float = 900.0
    """From the whole request to the end of its answer; a client may ask for less."""
    silence_s: float = 120.0
    """A stream that is silent for so long has failed."""
    body_bytes: int = 8 << 20
    body_s: float = 20.0
    """For a body to arrive."""


class ClientLeft(Exception):
    """There is nobody to answer."""


class Gateway:
    """Takes requests for tokens to replicas. For one event loop."""

    def __init__(
        self,
        *,
        table: RoutingTable,
        llms: Mapping[str, ServedLlm],
        rng: Generator,
        settings: Settings | None = None,
        keys: Sequence[ApiKey] | None = None,
        metrics: Metrics | None = None,
        plan_id: Callable[[], str | None] = lambda: None,
        state: Callable[[str], str] = lambda llm: "absent",
    ) -> None:
        self.table, self.llms = table, llms
        self.settings = settings or Settings()
        self.keys = Keys(keys)
        self.metrics = metrics or Metrics()
        self.plan_id = plan_id
        self._state = state
        self._rng = rng
        self._engines = Engines(self.settings.silence_s)
        self._held: dict[Waiter, asyncio.Event] = {}
        self.closing = False
        table.predicted = self._predicted
        self.metrics.watch(self._running, table.held)

    def shut(self) -> None:
        """Take nothing new, and let those go who wait; what runs, runs on."""
        self.closing = True
        for event in self._held.values():
            event.set()

    def close(self) -> None:
        self._engines.close()

    def state(self, llm: str) -> str:
        """``active``, or what the owner of the replicas says, such as ``failed``, or
        ``held`` by the operator."""
        return "active" if self.table.routable(llm) else self._state(llm)

    def allowed(self, key: ApiKey) -> list[str]:
        """The LLMs that ``key`` may use."""
        return [name for name in self.llms if key.llms is None or name in key.llms]

    # One request.

    async def post(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: answer a POST to ``path``."""
        headers: RawHeaders = scope["headers"]
        own_id = request_id(headers)
        slo_class = "default"
        try:
            key = self.keys.check(headers)
            slo_class = key.slo_class
            call = read_call(path, await self._body(headers, receive))
            llm = self.find(call.llm, key)
            limits, now_s = self.settings, self.table.now_s()
            job = Job(
                call=call,
                metrics=self.metrics.of(call.llm, slo_class),
                send=send,
                headers=headers,
                request_id=own_id,
                arrival_s=now_s,
                hold_s=min(
                    hold_s(
                        headers, limits.hold_s if llm.hold_s is None else llm.hold_s
                    ),
                    limits.longest_hold_s,
                ),
                deadline_s=min(
                    number(headers, b"x-foreserve-deadline", math.inf),
                    limits.deadline_s,
                ),
                slo_ttft_s=number(headers, b"x-slo-ttft-ms", 1000 * llm.slo_ttft_s)
                / 1000,
                slo_tpot_s=number(headers, b"x-slo-tpot-ms", 1000 * llm.slo_tpot_s)
                / 1000,
            )
            self.keys.spend(key, now_s)
            job.number = self.table.began(call.llm, now_s, call.likely_tokens)
        except ClientLeft:
            return
        except ApiError as error:
            self.metrics.refused(slo_class, error.status)
            await _send_error(send, error, own_id)
            return
        await self._run(job, receive)

    async def _run(self, job: Job, receive: Receive) -> None:
        task = asyncio.current_task()
        assert task is not None

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not job.complete:
                job.left = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        error: ApiError | None = None
        try:
            async with asyncio.timeout(job.deadline_s / self.settings.time_scale):
                await self._answer(job)
        except ApiError as refused:
            error = refused
        except TimeoutError:
            error = errors.deadline(job.deadline_s)
        except asyncio.CancelledError:
            if job.left:
                task.uncancel()
            else:
                error = errors.closing()
        except Exception:
            log.exception("request %s", job.request_id)
            error = ApiError(500, "server_error", "internal", "This is our fault.")
        finally:
            watcher.cancel()
        if job.whole:
            error = None
        record = settle(job, error, self.table.now_s())
        if error is not None and not (job.left or job.complete):
            if job.started:
                # Without a finish_reason and without [DONE]: it must not look whole.
                await job.send({"type": "http.response.body", "body": error.event()})
            else:
                await _send_error(job.send, error, job.request_id, self._told(job))
        self.table.ended(record)

    async def _answer(self, job: Job) -> None:
        loop = asyncio.get_running_loop()
        llm = job.call.llm
        lost = ""
        for _ in range(ATTEMPTS):
            waiter = await self._seated(job)
            try:
                async with asyncio.timeout(None) as job.scope:
                    if waiter.seat is None or waiter.seat.lost:
                        raise EngineLost("it was lost meanwhile")
                    if job.call.stream:
                        await self._relay(job, waiter)
                    else:
                        await self._pass_on(job, waiter)
                return
            except (EngineLost, BrokenStream, TimeoutError) as error:
                lost = str(error) or "it was lost"
                self.table.shun(waiter, lost)
                shunned_s = SHUN_S / self.settings.time_scale
                loop.call_later(shunned_s + 0.01, self.table.serve, llm)
                if job.started:
                    break
            finally:
                job.scope = None
                self.table.release(waiter)
        raise errors.engine_lost(lost)

    def _abandon(self, job: Job, waiter: Waiter, chunks: int = -1) -> None:
        """The replica of a request was lost, or its node does not answer: without a token
        yet the request is tried elsewhere; a stream goes on for as long as it does."""
        scope, loop = job.scope, asyncio.get_running_loop()
        if waiter.seat is None or scope is None:
            return
        if not job.started or job.chunks == chunks:
            scope.reschedule(loop.time())
        else:
            loop.call_later(LOST_SILENCE_S, self._abandon, job, waiter, job.chunks)

    async def _seated(self, job: Job) -> Waiter:
        """Wait for a replica; the waiter that was given one, to be released."""
        table, call = self.table, job.call
        event = asyncio.Event()
        loop = asyncio.get_running_loop()
        waiter = Waiter(
            call.llm,
            call.exact_tokens,
            call.likely_tokens,
            lambda: loop.call_soon_threadsafe(event.set),
            lambda: loop.call_soon_threadsafe(self._abandon, job, waiter),
        )
        if self.closing:
            raise errors.closing()
        if not table.take(waiter):
            await self._hold(job, waiter, event)
        if waiter.never:
            room = table.room_tokens(call.llm)
            raise errors.too_long(call.exact_tokens, room)
        job.seat = waiter.seat
        return waiter

    async def _hold(self, job: Job, waiter: Waiter, event: asyncio.Event) -> None:
        """Wait until ``waiter`` has its answer, or refuse."""
        table, llm = self.table, job.call.llm
        began_s = table.now_s()
        state = self.state(llm)
        if state == "failed":
            raise errors.llm_failed(llm)
        if state == "held":
            raise errors.llm_held(llm)
        said = table.predict(llm)
        if said.position > self.settings.queue:
            raise self._refusal(llm, said, state, full=True)
        if math.isfinite(said.p50_s) and (
            began_s + said.p50_s > job.arrival_s + job.deadline_s
        ):
            raise errors.deadline(job.deadline_s)
        limit_s = max(0.0, job.hold_s - job.waited_s)
        if said.p90_s > limit_s:
            table.refuse(llm, said.p90_s)
            raise self._refusal(llm, said, state)
        self._held[waiter] = event
        try:
            table.join(waiter)
            async with asyncio.timeout(limit_s / self.settings.time_scale):
                await event.wait()
        except TimeoutError:
            if waiter.seat is None and not waiter.never:
                said = table.predict(llm)
                table.leave(waiter)
                table.refuse(llm, said.p90_s)
                raise self._refusal(llm, said, self.state(llm)) from None
        except BaseException:
            table.leave(waiter)
            raise
        finally:
            del self._held[waiter]
            job.waited_s += table.now_s() - began_s
        if waiter.seat is None and not waiter.never:
            table.leave(waiter)
            raise errors.closing()
        self._predicted(llm, said.p90_s, table.now_s() - began_s)

    async def _relay(self, job: Job, waiter: Waiter) -> None:
        """Pass a stream on, event by event, unbuffered."""
        assert waiter.seat is not None
        replica = waiter.seat.replica
        call, now_s = job.call, self.table.now_s
        cutter = Cutter()
        answer = Answer(
            wants_usage=call.wants_usage,
            served_name=replica.served_name,
            llm=call.llm,
        )
        headers = forwarded(job.headers, job.request_id)
        payload = call.payload(replica.served_name)
        gaps = job.metrics.itl
        async with self._engines.ask(
            replica, call.path, payload, headers, True
        ) as response:
            if not response.kind.lower().startswith(b"text/event-stream"):
                raise EngineLost("no stream")
            while data := await response.more():
                events = [answer.take(event) for event in cutter.feed(data)]
                out = b"".join([event for event in events if event is not None])
                if not out:
                    continue
                if answer.failed and not job.started:
                    raise errors.engine_lost("an error in place of an answer")
                if not job.started:
                    await self._start(job, 200, _STREAM)
                if answer.chunks > job.chunks:
                    at_s = now_s()
                    if job.first_s is None:
                        job.first_s = at_s
                    else:
                        gaps.observe(at_s - job.last_s)
                    job.last_s, job.chunks = at_s, answer.chunks
                job.usage, job.finish_reason = answer.usage, answer.finish_reason
                over = answer.done or answer.failed
                job.complete, job.whole = over, answer.done and not answer.failed
                await job.send(
                    {"type": "http.response.body", "body": out, "more_body": not over}
                )
                if over:
                    break
            if answer.failed:
                raise errors.engine_lost("an error within the stream")
            if not answer.done:
                raise EngineLost("the stream broke off")
            await finish(response)

    async def _pass_on(self, job: Job, waiter: Waiter) -> None:
        """Pass on an answer in one piece."""
        assert waiter.seat is not None
        replica, call = waiter.seat.replica, job.call
        headers = forwarded(job.headers, job.request_id)
        payload = call.payload(replica.served_name)
        async with self._engines.ask(
            replica, call.path, payload, headers, False
        ) as response:
            body = await response.read()
        try:
            plain = json.loads(body)
        except ValueError:
            raise EngineLost("an answer that is not JSON") from None
        if not isinstance(plain, dict):
            raise EngineLost("an answer that is no object")
        usage, choices = plain.get("usage"), plain.get("choices")
        job.usage = usage if isinstance(usage, dict) else None
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            job.finish_reason = str(choices[0].get("finish_reason"))
        if replica.served_name != call.llm:
            body = json.dumps({**plain, "model": call.llm}).encode()
        job.first_s = job.last_s = self.table.now_s()
        await self._start(job, 200, [JSON, (b"content-length", b"%d" % len(body))])
        job.complete = job.whole = True
        await job.send({"type": "http.response.body", "body": body})

    # What it says.

    async def _start(self, job: Job, status: int, headers: Headers) -> None:
        job.started = True
        await job.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    *headers,
                    (b"x-request-id", job.request_id.encode()),
                    *self._told(job),
                ],
            }
        )

    def _told(self, job: Job) -> Headers:
        return [
            (b"x-foreserve-model-state", self.state(job.call.llm).encode()),
            (b"x-foreserve-wait-ms", b"%d" % round(1000 * job.waited_s)),
        ]

    def _refusal(
        self, llm: str, said: Prediction, state: str, *, full: bool = False
    ) -> ApiError:
        spread = float(self._rng.uniform(0, MOST_SPREAD))
        if math.isfinite(said.p90_s):
            self.metrics.retry_after.labels(llm).observe(max(1.0, said.p90_s))
        facts = {
            "state": state,
            "eta_s": _finite(said.p90_s),
            "eta_p50_s": _finite(said.p50_s),
            "position": said.position,
            "plan_id": self.plan_id(),
        }
        when = f"in about {said.p90_s:.1f} s" if math.isfinite(said.p90_s) else "later"
        if full:
            status, type_, code = 429, "rate_limit_error", "queue_full"
            message = f"Too many requests wait for {llm}; try again {when}."
        else:
            status, type_ = 503, "service_unavailable"
            waking = state != "active" and math.isfinite(said.p90_s)
            code = "model_waking" if waking else "no_capacity"
            what = "is being started" if waking else "has no free capacity"
            message = (
                f"{llm} {what}; try again {when}, or send X-Foreserve-Max-Wait "
                "to be held."
            )
        return ApiError(
            status,
            type_,
            code,
            message,
            headers=errors.retry_after(said.p90_s / self.settings.time_scale, spread),
            facts=facts,
        )

    def _predicted(self, llm: str, said_s: float, was_s: float) -> None:
        if math.isfinite(said_s):
            self.metrics.retry_error.labels(llm).observe(abs(was_s - said_s))

    def _running(self) -> Mapping[str, int]:
        counts = dict.fromkeys(self.llms, 0)
        for replica, count in self.table.in_flight().items():
            counts[replica.llm] = counts.get(replica.llm, 0) + count
        return counts

    # What it may.

    def find(self, name: str, key: ApiKey) -> ServedLlm:
        llm = self.llms.get(name)
        if llm is None or (key.llms is not None and name not in key.llms):
            close = difflib.get_close_matches(name[:200], self.allowed(key), n=3)
            raise errors.unknown_llm(name, close)
        return llm

    async def _body(self, headers: RawHeaders, receive: Receive) -> bytes:
        limit = self.settings.body_bytes
        for name, value in headers:
            if name == b"content-length" and int(value) > limit:
                raise errors.too_large(limit)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise errors.too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise errors.too_slow(self.settings.body_s) from None


_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def _send_error(
    send: Send, error: ApiError, request_id: str, told: Headers | None = None
) -> None:
    body = error.body()
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [
                JSON,
                (b"content-length", b"%d" % len(body)),
                (b"x-request-id", request_id.encode()),
                *error.headers,
                *(told or []),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None
