"""Prompts of a body: texts, tokens, or messages with the tools that they may call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.runtime.engines.bodies import Refused
from foreserve.runtime.paged.text import Words


def prompts_of(body: Mapping[str, Any], words: Words) -> list[list[int]]:
    return [
        words.tokens(prompt) if isinstance(prompt, str) else prompt
        for prompt in _stated(body)
    ]


def _stated(body: Mapping[str, Any]) -> list[str | list[int]]:
    """Each prompt as it was given: a text, or tokens."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or _are_tokens(prompt):
        return [prompt]  # type: ignore[list-item]
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(one, str) or _are_tokens(one) for one in prompt)
    ):
        return prompt
    raise Refused(
        400, "prompt: expected a text, a list of token ids, or a list of such"
    )


def _are_tokens(prompt: object) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(type(x) is int for x in prompt)
    )


def texts_of(
    body: Mapping[str, Any], prompts: Sequence[Sequence[int]], words: Words
) -> tuple[str, ...]:
    stated = zip(_stated(body), prompts, strict=True)
    return tuple(
        said if isinstance(said, str) else words.text(tokens) for said, tokens in stated
    )


def chat_of(
    body: Mapping[str, Any], words: Words, tools: list[dict[str, Any]] | None
) -> list[int]:
    messages = body.get("messages")
    if not (isinstance(messages, list) and messages):
        raise Refused(400, "messages: expected a list")
    more = body.get("chat_template_kwargs") or {}
    if not isinstance(more, dict):
        raise Refused(400, "chat_template_kwargs: expected an object")
    return words.chat([_message(message) for message in messages], more, tools)


def _message(message: object) -> dict[str, Any]:
    """As templates expect it: its content is a text, arguments of calls are objects."""
    if not isinstance(message, dict):
        raise Refused(400, "messages: expected objects")
    calls = message.get("tool_calls")
    told = {**message, "content": _content(message, bool(calls))}
    if not calls:
        told.pop("tool_calls", None)
        return told
    try:
        told["tool_calls"] = [
            {**call, "function": _with_arguments(call["function"])} for call in calls
        ]
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise Refused(
            400, "messages: tool_calls: expected functions with JSON as arguments"
        ) from error
    return told


def _with_arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return {**function, "arguments": arguments}


def _content(message: Mapping[str, Any], calls: bool) -> str:
    """The text of a message, or of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) for part in content):
            raise Refused(400, "messages: parts of a content have to be objects")
        if any(part.get("type") != "text" for part in content):
            raise Refused(400, "messages: only texts are understood")
        return "\n".join(str(part.get("text", "")) for part in content)
    if content is None and calls:
        return ""
    if not isinstance(content, str):
        raise Refused(400, "messages: each needs a text as content")
    return content


def tools_of(body: Mapping[str, Any], words: Words) -> list[dict[str, Any]] | None:
    """What the template is told of."""
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise Refused(400, "tool_choice: no calls can be forced; expected none or auto")
    tools = body.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict)
        and tool.get("type") == "function"
        and isinstance(tool.get("function"), dict)
        and isinstance(tool["function"].get("name"), str)
        for tool in tools
    ):
        raise Refused(400, "tools: expected functions with names")
    if choice == "none":
        return None
    try:
        if "tools" not in words.template_text:
            raise Refused(400, "tools: this LLM's chat template knows of none")
    except InvalidInput as error:
        raise Refused(400, str(error)) from error
    return tools
