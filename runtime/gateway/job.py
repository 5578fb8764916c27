"""One request on its way: what it asked for, what has become of it, how it is booked."""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreserve.runtime.gateway import errors
from foreserve.runtime.gateway.body import Call
from foreserve.runtime.gateway.errors import ApiError
from foreserve.runtime.gateway.metrics import LlmMetrics
from foreserve.runtime.gateway.table import RequestRecord, Seat

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
RawHeaders = Sequence[tuple[bytes, bytes]]

CLIENT_LEFT = 499
"""The code under which those are counted who did not wait for the answer."""

_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}\Z", re.ASCII)
_WAIT = re.compile(rb"(?:^|[,;\s])wait=(\d{1,6})\b")
_NUMBER = re.compile(rb"\d{1,9}(\.\d{1,9})?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLlm:
    """What the gateway says of one LLM, and promises for it."""

    max_model_len: int | None = None
    created_s: int = 0
    """Unix time."""
    hold_s: float | None = None
    """For how long its requests are held; None: `Settings.hold_s`."""
    slo_ttft_s: float = math.inf
    slo_tpot_s: float = math.inf


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One request on its way. Mutable."""

    call: Call
    metrics: LlmMetrics
    send: Send
    headers: RawHeaders
    request_id: str
    arrival_s: float
    hold_s: float
    deadline_s: float
    slo_ttft_s: float
    slo_tpot_s: float
    number: int = 0
    waited_s: float = 0.0
    seat: Seat | None = None
    """Where it is or was worked on last."""
    scope: asyncio.Timeout | None = None
    """Of the attempt that is under way: ends it when the replica is lost."""
    started: bool = False
    """The status line has been sent."""
    complete: bool = False
    """The client has got its last byte."""
    whole: bool = False
    """And all of the answer with it."""
    left: bool = False
    """The client has."""
    first_s: float | None = None
    last_s: float = 0.0
    usage: Mapping[str, Any] | None = None
    chunks: int = 0
    finish_reason: str = "stop"


def settle(job: Job, error: ApiError | None, end_s: float) -> RequestRecord:
    """Count a request that has ended, with ``error`` if it failed; its record."""
    metrics, usage = job.metrics, job.usage or {}
    asked, given = usage.get("prompt_tokens"), usage.get("completion_tokens")
    # What the engine did not say is an estimate, and not counted as tokens.
    prompt = asked if type(asked) is int else max(1, job.call.likely_tokens)
    generated = given if type(given) is int else job.chunks
    finished = error is None and not job.left
    code, reason = 200, None
    if job.left:
        code, reason = CLIENT_LEFT, "client_left"
    elif error is not None:
        code, reason = error.status, error.code
    metrics.answered(code)
    metrics.wait.observe(job.waited_s)
    metrics.queued.observe(job.waited_s)
    metrics.tokens(prompt if type(asked) is int else 0, generated)
    if finished and job.first_s is not None:
        _time(job, job.first_s, generated, end_s)
    return RequestRecord(
        arrival_s=job.arrival_s,
        llm=job.call.llm,
        replica=job.seat.replica.id if job.seat else None,
        input_tokens=prompt,
        output_tokens=generated,
        first_token_s=job.first_s,
        end_s=end_s,
        result="finished" if finished else "failed",
        reason=reason,
        number=job.number,
    )


def _time(job: Job, first_s: float, generated: int, end_s: float) -> None:
    metrics = job.metrics
    ttft_s = first_s - job.arrival_s
    metrics.success(job.finish_reason)
    metrics.ttft.observe(ttft_s)
    metrics.our_ttft.observe(ttft_s)
    metrics.e2e.observe(end_s - job.arrival_s)
    tpot_s = 0.0
    if job.call.stream and generated > 1:
        tpot_s = (job.last_s - first_s) / (generated - 1)
        metrics.tpot.observe(tpot_s)
        metrics.our_tpot.observe(tpot_s)
    if ttft_s <= job.slo_ttft_s and tpot_s <= job.slo_tpot_s:
        metrics.attained.inc()


def request_id(headers: RawHeaders) -> str:
    """The client's own, if it is a plain one; else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return value.decode()
    return secrets.token_hex(16)


def hold_s(headers: RawHeaders, default_s: float) -> float:
    """For how long the client lets its request be held."""
    for name, value in headers:
        if name == b"prefer" and (wait := _WAIT.search(value)):
            default_s = float(wait[1])
    return number(headers, b"x-foreserve-max-wait", default_s)


def number(headers: RawHeaders, wanted: bytes, default: float) -> float:
    """The number in a header, ``default`` without it; 400 if it is none."""
    for name, value in headers:
        if name == wanted:
            if _NUMBER.match(value):
                return float(value)
            what = wanted.decode()
            raise errors.invalid(None, f"{what} must be a number, as in 2.5.", what)
    return default
