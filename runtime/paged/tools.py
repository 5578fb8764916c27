"""Calls of tools in an answer's text, as the LLMs of Hermes and Qwen write them.

``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them, after what
else there is to say. What is not written like this stays text.
"""

from __future__ import annotations

import json

BEGIN, END = "<tool_call>", "</tool_call>"


class Calls:
    """Cuts calls out of a text that comes in pieces. Mutable."""

    def __init__(self, number: str, *, most: int | None = None) -> None:
        """``number``: of the answer, for the calls' ids; ``most``: further calls are
        dropped."""
        self._number, self._most = number, most
        self._rest = ""
        """Not said yet: white space, or what may become a call."""
        self.made = 0

    def add(self, text: str) -> tuple[str, list[dict[str, object]]]:
        """What may be said now that ``text`` has come, and calls that are complete; as
        OpenAI's streams have them."""
        self._rest += text
        said, calls = "", []
        while (begin := self._rest.find(BEGIN)) >= 0:
            end = self._rest.find(END, begin)
            if end < 0:
                break
            call = self._read(self._rest[begin + len(BEGIN) : end])
            # White space before a call, and between two, is not meant to be said.
            said += (
                self._rest[: end + len(END)]
                if call is None
                else self._rest[:begin].rstrip()
            )
            if call is not None and self._kept:
                calls.append(call)
            self._rest = self._rest[end + len(END) :]
        ready = _before(self._rest, BEGIN) if begin < 0 else self._rest[:begin]
        ready = ready.rstrip()
        self._rest = self._rest[len(ready) :]
        return said + ready, calls

    def end(self) -> tuple[str, list[dict[str, object]]]:
        """The same, when no more comes: a call may lack its end."""
        rest, self._rest = self._rest, ""
        said, begun, inner = rest.partition(BEGIN)
        call = self._read(inner) if begun else None
        if call is not None:
            return said.rstrip(), [call] if self._kept else []
        return rest.rstrip() if self.made else rest, []

    @property
    def _kept(self) -> bool:
        """The call that was made last is one of those that are wanted."""
        return self._most is None or self.made <= self._most

    def _read(self, inner: str) -> dict[str, object] | None:
        try:
            call = json.loads(inner)
            name, arguments = call["name"], call.get("arguments", {})
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return None
        if not isinstance(name, str):
            return None
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        self.made += 1
        return {
            "index": self.made - 1,
            "id": f"call-{self._number}-{self.made - 1}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def _before(text: str, mark: str) -> str:
    """``text`` without what may turn out to begin ``mark``."""
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return text[:-size]
    return text
