"""Blocking calls of an engine's server, with the standard library alone."""

from __future__ import annotations

import http.client
import json
from typing import Any

ANSWER_TOKENS = 8


def known_question(served_name: str) -> dict[str, Any]:
    """A completion that an LLM answers the same each time, with so many tokens: whether
    it still does after a wake is how one sees that its weights are in place."""
    return {
        "model": served_name,
        "prompt": "Count from one to ten:",
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


class NoAnswer(Exception):
    """The server did not answer in time, broke off, or answered an error."""

    status = 0
    """Of the error that it answered."""


class NotInTime(NoAnswer):
    """It may yet answer, or hang."""


def call(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    *,
    within_s: float,
    host: str = "127.0.0.1",
    key: str = "",
) -> bytes:
    """The body of the answer; ``body`` goes as JSON. ``within_s`` holds for each wait."""
    connection = http.client.HTTPConnection(host, port, timeout=within_s)
    try:
        text = None if body is None else json.dumps(body)
        headers = {} if body is None else {"content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        told = answer.read()
    except TimeoutError as error:
        raise NotInTime(f"{method} {path}: nothing within {within_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise NoAnswer(f"{method} {path}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        refused = NoAnswer(f"{method} {path}: {answer.status}: {_message(told)}")
        refused.status = answer.status
        raise refused
    return told


def _message(told: bytes) -> str:
    """Of an error as OpenAI writes them, or the beginning of whatever it is."""
    try:
        return str(json.loads(told)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return told[:200].decode(errors="replace")
