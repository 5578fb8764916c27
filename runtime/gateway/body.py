"""What a client asks for: read strictly before any engine is touched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from foreserve.runtime.gateway.errors import invalid

BYTES_PER_TOKEN = 4
"""For estimates of a text's tokens: about that of English."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request for tokens."""

    path: str
    llm: str
    fields: Mapping[str, Any]
    """The whole body; what we do not know is passed on."""
    stream: bool
    wants_usage: bool
    """The client asked for the usage of its stream."""
    exact_tokens: int
    """KV memory that it needs at least."""
    likely_tokens: int

    def payload(self, served_name: str) -> bytes:
        """The body for the engine."""
        fields = {**self.fields, "model": served_name}
        if self.stream:
            options = fields.get("stream_options") or {}
            fields["stream_options"] = {**options, "include_usage": True}
        return json.dumps(fields).encode()


def read_call(path: str, body: bytes) -> Call:
    """Parse the body of a POST to ``path``; `ApiError` (400) says what is wrong."""
    fields = parse(body)
    llm = fields.get("model")
    if not isinstance(llm, str) or not llm:
        raise invalid("missing_model", "'model' must name an LLM.", "model")
    stream = _optional(fields, "stream", bool) or False
    options = _optional(fields, "stream_options", dict) or {}
    wants_usage = _optional(options, "include_usage", bool) or False
    choices = _count(fields, "n") or 1
    # Who asks what the LLM thinks of a prompt may want no answer.
    least = 0 if fields.get("echo") is True else 1
    limits = (
        _count(fields, "max_tokens", least),
        _count(fields, "max_completion_tokens", least),
    )
    output_tokens = max((limit for limit in limits if limit), default=0)
    if path.endswith("/chat/completions"):
        messages = fields.get("messages")
        if (
            not isinstance(messages, list)
            or not messages
            or not all(isinstance(message, dict) for message in messages)
        ):
            raise invalid(
                None, "'messages' must be a list of at least one object.", "messages"
            )
        exact = 1
    else:
        exact = _prompt_tokens(fields.get("prompt"))
    likely = max(exact, len(body) // BYTES_PER_TOKEN)
    return Call(
        path=path,
        llm=llm,
        fields=fields,
        stream=stream,
        wants_usage=wants_usage,
        exact_tokens=exact + output_tokens,
        likely_tokens=likely + choices * output_tokens,
    )


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``: UTF-8, each key once, finite numbers only."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise invalid(
            "invalid_json", f"The body is not UTF-8 (byte {error.start})."
        ) from None
    try:
        plain = json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except json.JSONDecodeError as error:
        raise invalid(
            "invalid_json",
            f"The body is not JSON: {error.msg} (line {error.lineno}, "
            f"column {error.colno}).",
        ) from None
    except RecursionError:
        raise invalid("invalid_json", "The body is nested too deeply.") from None
    except ValueError as error:
        # Ours, or an integer of thousands of digits.
        what = str(error) if type(error) is _Refused else "a number is too long"
        raise invalid("invalid_json", f"The body is not good JSON: {what}.") from None
    if not isinstance(plain, dict):
        raise invalid("invalid_json", "The body must be a JSON object.")
    return plain


class _Refused(ValueError):
    """JSON that Python would take and we do not."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        raise _Refused("a key occurs twice in one object")
    return plain


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _Refused("a number is too large")
    return number


def _optional(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    """The field, None if it is absent or null; 400 if it is of another type."""
    value = fields.get(name)
    if value is not None and not isinstance(value, kind):
        what = {bool: "true or false", dict: "an object"}[kind]
        raise invalid(None, f"{name!r} must be {what}.", name)
    return value


def _count(fields: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not least <= value < 2**31:
        raise invalid(None, f"{name!r} must be a positive integer.", name)
    return value


def _prompt_tokens(prompt: object) -> int:
    """Tokens of the longest prompt, 1 of a text; 400 if it is neither text nor tokens."""
    if isinstance(prompt, str):
        return 1
    if isinstance(prompt, list) and prompt:
        kinds = {type(part) for part in prompt}
        if kinds == {int}:
            return len(prompt)
        if kinds == {str}:
            return 1
        if kinds == {list} and all(
            part and all(type(token) is int for token in part) for part in prompt
        ):
            return max(len(part) for part in prompt)
    raise invalid(
        None, "'prompt' must be text, a list of texts, or tokens (not empty).", "prompt"
    )
