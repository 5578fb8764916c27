"""What engine servers read and write: OpenAI's bodies, and HTTP's chunks."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    except ValueError as error:
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


@dataclass(slots=True, kw_only=True)
class Telling:
    """How one answer is written, streamed or whole. Texts are as they stand in JSON."""

    head: bytes
    """Of every chunk, up to the text."""
    tail: bytes
    """Of every chunk but the last one with text, from the text on."""
    chat: bool
    stream: bool
    usage: bool
    """The stream ends with what was used."""
    begun: bool = False

    def say(self, text: bytes) -> bytes:
        """A piece of a stream, of which more will come."""
        return self._begin() + chunk(self.head + text + self.tail)

    def end(self, text: bytes, reason: str, more: Mapping[str, Any]) -> bytes:
        """The last piece of a stream, or the body of a whole answer; ``more`` goes into
        the body or the last chunk (``usage`` and what else there is to tell)."""
        reason_json = b'"finish_reason":"%s"' % reason.encode()
        last = self.tail.replace(b'"finish_reason":null', reason_json)
        extra = json.dumps(more).encode()
        if not self.stream:
            return self.head + text + last + b"," + extra[1:]
        parts = [self._begin(), chunk(self.head + text + last)]
        if self.usage:
            opening = self.head[: self.head.index(b'"choices":')]
            parts.append(chunk(opening + b'"choices":[],' + extra[1:] + b"\n\n"))
        parts.append(chunk(b"data: [DONE]\n\n"))
        parts.append(b"0\r\n\r\n")
        return b"".join(parts)

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
        role = self.head.replace(b'"delta":{', b'"delta":{"role":"assistant",')
        return head + chunk(role + self.tail)


def telling(
    served_name: str, number: str, chat: bool, asked: dict[str, Any]
) -> Telling:
    """What goes with the request ``asked``."""
    stream = bool(asked.get("stream"))
    head, tail = frame(served_name, number, chat, stream)
    options = asked.get("stream_options") or {}
    return Telling(
        head=head,
        tail=tail,
        chat=chat,
        stream=stream,
        usage=bool(options.get("include_usage")),
    )


def frame(
    served_name: str, number: str, chat: bool, stream: bool
) -> tuple[bytes, bytes]:
    """What stands before and after the text in a chunk, or in the whole answer."""
    name = json.dumps(served_name)
    ident = f"{'chatcmpl' if chat else 'cmpl'}-{number}"
    kind = "chat.completion" if chat else "text_completion"
    if stream:
        kind += ".chunk" if chat else ""
    opening = (
        f'{{"id":"{ident}","object":"{kind}","created":0,"model":{name},"choices":['
    )
    if not chat:
        head, tail = '{"index":0,"text":"', '","logprobs":null,"finish_reason":null}]'
    elif stream:
        head, tail = (
            '{"index":0,"delta":{"content":"',
            '"},"logprobs":null,"finish_reason":null}]',
        )
    else:
        head = '{"index":0,"message":{"role":"assistant","content":"'
        tail = '"},"logprobs":null,"finish_reason":null}]'
    if stream:
        return f"data: {opening}{head}".encode(), f"{tail}}}\n\n".encode()
    return f"{opening}{head}".encode(), tail.encode()
