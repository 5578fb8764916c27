"""Server-sent events: cut at blank lines, whatever the pieces they arrive in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BLANK = re.compile(rb"\r?\n\r?\n")
_REASON = re.compile(rb'"finish_reason":\s*"(\w+)"')
_NULL_USAGE = re.compile(rb'"usage":\s*null')

LARGEST_EVENT = 8 << 20
"""Bytes; a longer event is no answer of an engine."""


class BrokenStream(Exception):
    """The engine's stream is not one."""


class Cutter:
    """Bytes in, whole events out. Mutable."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, new: bytes) -> list[bytes]:
        """The events that ``new`` completes, without their blank lines."""
        data = self._rest + new if self._rest else new
        if data.endswith(b"\n\n") and b"\r" not in data:
            self._rest = b""
            return data[:-2].split(b"\n\n")
        # Looking for a blank line again and again in what grows would be quadratic.
        *events, self._rest = _BLANK.split(data) if b"\n" in new else (data,)
        if len(self._rest) > LARGEST_EVENT:
            raise BrokenStream("an event without end")
        return events


class Answer:
    """Follows one streamed answer: what to pass on, what it used, whether it is whole.
    Mutable."""

    def __init__(self, *, wants_usage: bool, served_name: str, llm: str) -> None:
        self._wants_usage = wants_usage
        self._names = None
        if served_name != llm:
            # Quotes inside of JSON text are escaped: this can only be a key.
            old, new = json.dumps(served_name).encode(), json.dumps(llm).encode()
            self._names = (
                re.compile(rb'"model":\s*' + re.escape(old)),
                b'"model":' + new,
            )
        self.usage: Mapping[str, Any] | None = None
        self.finish_reason = "stop"
        self.chunks = 0
        """Events that carried output."""
        self.done = False
        self.failed = False
        """The engine said so itself."""

    def take(self, event: bytes) -> bytes | None:
        """The event as the client gets it; None: not for the client."""
        if not event.startswith(b"data:"):
            return event + b"\n\n"
        data = event[5:].lstrip()
        if data == b"[DONE]":
            self.done = True
            return None if self.failed else b"data: [DONE]\n\n"
        if data.startswith(b'{"error"'):
            self.failed = True
            return event + b"\n\n"
        if b'"usage"' in data and not _NULL_USAGE.search(data):
            usage, alone = _usage(data)
            if usage is not None:
                self.usage = usage
            if alone:
                return self._named(event) if self._wants_usage else None
        self.chunks += 1
        if b'"finish_reason"' in data:
            reason = _REASON.search(data)
            if reason:
                self.finish_reason = reason[1].decode()
        return self._named(event)

    def _named(self, event: bytes) -> bytes:
        if self._names:
            event = self._names[0].sub(lambda _: self._names[1], event)  # type: ignore[index]
        return event + b"\n\n"


def _usage(data: bytes) -> tuple[Mapping[str, Any] | None, bool]:
    """The usage in a chunk, and whether that is all there is in it."""
    try:
        chunk = json.loads(data)
    except ValueError:
        raise BrokenStream("an event that is not JSON") from None
    if not isinstance(chunk, dict):
        raise BrokenStream("an event that is no object")
    usage = chunk.get("usage")
    if not isinstance(usage, dict):
        return None, False
    return usage, not chunk.get("choices")
