"""What simulated engines read and write: OpenAI's bodies, and HTTP's chunks."""

from __future__ import annotations

import json
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
