"""What engine servers read and write: OpenAI's bodies, and HTTP's chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def chunk(data: bytes) -> bytes:
    """A piece of a body of unknown length."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def object_of(body: bytes) -> dict[str, Any]:
    """A body that has to be a JSON object."""
    try:
        value = json.loads(body)
    except (RecursionError, ValueError) as error:
        raise Refused(400, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(400, "expected a JSON object")
    return value


def prompt_of(asked: dict[str, Any], chat: bool) -> tuple[int, str]:
    """How many tokens it has, and what it says."""
    if not chat:
        prompt = asked.get("prompt")
        if isinstance(prompt, str) and prompt:
            return prompt.count(" ") + 1, prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return len(prompt), str(prompt[:16])
        raise Refused(400, "prompt: expected a text, or a list of token ids")
    messages = asked.get("messages")
    if not (isinstance(messages, list) and messages):
        raise Refused(400, "messages: expected a list")
    text = "\n".join(_content(message) for message in messages)
    return len(text.split()), text


def _content(message: Any) -> str:
    """The text of a message, or of its parts."""
    content = message["content"]
    if isinstance(content, list):
        return "\n".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise Refused(400, "messages: each needs a text as content")
    return content


NULL = b"null"


@dataclass(slots=True, kw_only=True)
class Telling:
    """How an answer is written, streamed or whole. Texts are as they stand in JSON."""

    opening: bytes
    """Of every chunk, or of the whole answer, up to its choices."""
    chat: bool
    stream: bool
    usage: bool
    """The stream ends with what was used."""
    choices: int = 1
    begun: bool = False

    def say(self, choice: bytes) -> bytes:
        """A piece of a stream: of a `choice`, whose last piece has a ``reason``."""
        return self._begin() + self._event(choice)

    def choice(
        self,
        text: bytes,
        *,
        index: int = 0,
        reason: str | None = None,
        logprobs: bytes = NULL,
        calls: bytes = b"",
    ) -> bytes:
        """One choice, or a piece of it; ``calls`` of tools, as JSON with commas."""
        said = b'"text":"%b"' % text
        if self.chat:
            parts = [] if self.stream else [b'"role":"assistant"']
            if text or not calls:
                parts.append(b'"content":"%b"' % text)
            elif not self.stream:
                parts.append(b'"content":null')
            if calls:
                parts.append(b'"tool_calls":[%b]' % calls)
            where = b"delta" if self.stream else b"message"
            said = b'"%b":{%b}' % (where, b",".join(parts))
        ended = NULL if reason is None else b'"%b"' % reason.encode()
        return b'{"index":%d,%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            said,
            logprobs,
            ended,
        )

    def whole(self, choices: Sequence[bytes], more: Mapping[str, Any]) -> bytes:
        """The body of an answer; ``more`` stands beside its choices (``usage`` and what
        else there is to tell)."""
        extra = json.dumps(more).encode()
        return b"%b%b],%b" % (self.opening, b",".join(choices), extra[1:])

    def close(self, more: Mapping[str, Any]) -> bytes:
        """The end of a stream whose choices have ended."""
        parts = [self._begin()]
        if self.usage:
            parts.append(chunk(b"data: %b\n\n" % self.whole([], more)))
        parts.append(chunk(b"data: [DONE]\n\n"))
        parts.append(b"0\r\n\r\n")
        return b"".join(parts)

    def end(self, text: bytes, reason: str, more: Mapping[str, Any]) -> bytes:
        """The rest of an answer of one choice, streamed or whole."""
        choice = self.choice(text, reason=reason)
        if self.stream:
            return self.say(choice) + self.close(more)
        return self.whole([choice], more)

    def _event(self, choice: bytes) -> bytes:
        return chunk(b"data: %b%b]}\n\n" % (self.opening, choice))

    def _begin(self) -> bytes:
        if self.begun:
            return b""
        self.begun = True
        head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        if not self.chat:
            return head
        role = (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}'
        )
        return head + b"".join(self._event(role % i) for i in range(self.choices))


def telling(
    served_name: str,
    number: str,
    chat: bool,
    asked: Mapping[str, Any],
    choices: int = 1,
    *,
    created_s: float,
) -> Telling:
    """What goes with the request ``asked``, which came at that Unix time."""
    stream = bool(asked.get("stream"))
    options = asked.get("stream_options") or {}
    ident = f"{'chatcmpl' if chat else 'cmpl'}-{number}"
    kind = "chat.completion" if chat else "text_completion"
    if stream and chat:
        kind += ".chunk"
    opening = (
        f'{{"id":"{ident}","object":"{kind}","created":{int(created_s)},'
        f'"model":{json.dumps(served_name)},"choices":['
    )
    return Telling(
        opening=opening.encode(),
        chat=chat,
        stream=stream,
        usage=bool(options.get("include_usage")),
        choices=choices,
    )
