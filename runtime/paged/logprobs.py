"""Log probabilities as OpenAI's bodies have them: one form for chats, one for texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from foreserve.runtime.paged.sampling import Scores
from foreserve.runtime.paged.text import Speech, Words

LEAST = -9999.0
"""JSON has no infinity; the number that vLLM writes."""
Placed = tuple[int, Scores]
"""Where its token begins in the text, and what is told of it."""


def echoed(
    prompt: Sequence[int], text: str, scores: Iterable[Scores], words: Words
) -> list[Placed]:
    """Of a prompt that is said again as ``text``; nothing is told of its first token."""
    speech, places = Speech(words), [0]
    for token in prompt:
        speech.add(token)
        places.append(min(speech.size, len(text)))
    told = (Scores(prompt[0], None, ()), *scores)
    return list(zip(places, told, strict=False))


def of_chat(placed: Sequence[Placed], words: Words) -> bytes:
    def entry(token: int, log: float | None) -> dict[str, Any]:
        raw = words.raw(token)
        return {"token": _name(raw), "logprob": _log(log), "bytes": list(raw)}

    content = [
        entry(one.token, one.own)
        | {"top_logprobs": [entry(token, log) for token, log in one.top]}
        for _, one in placed
    ]
    return json.dumps({"content": content, "refusal": None}).encode()


def of_text(placed: Sequence[Placed], words: Words) -> bytes:
    def top(one: Scores) -> dict[str, float | None] | None:
        if one.own is None:
            return None
        # The token that came is told of in any case.
        told = {**dict(one.top), one.token: one.own}
        return {_name(words.raw(token)): _log(log) for token, log in told.items()}

    told = {
        "tokens": [_name(words.raw(one.token)) for _, one in placed],
        "token_logprobs": [_log(one.own) for _, one in placed],
        "top_logprobs": [top(one) for _, one in placed],
        "text_offset": [at for at, _ in placed],
    }
    return json.dumps(told).encode()


def _name(raw: bytes) -> str:
    """A part of a character has its bytes for a name."""
    return raw.decode(errors="backslashreplace")


def _log(value: float | None) -> float | None:
    return None if value is None else max(LEAST, value)
