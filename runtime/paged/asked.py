"""What a request to the paged engine asks for, from OpenAI's bodies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.runtime.engines.bodies import Refused
from foreserve.runtime.paged.sampling import Sampling
from foreserve.runtime.paged.text import Words

COMPLETION_TOKENS = 16
"""Of a text completion that does not say; OpenAI's default."""
UNKNOWN: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None,),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "tools": (None, []),
    "response_format": (None, {"type": "text"}),
}
"""What this engine does not do, and the values that do not ask for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    tokens: list[int]
    """Of the prompt."""
    most_tokens: int | None
    """Of the answer; None: as many as there is room for."""
    sampling: Sampling
    stops: tuple[str, ...]
    keep_stop: bool
    stop_tokens: tuple[int, ...]
    ignore_end: bool
    """The LLM's own end does not end the answer."""


def understand(
    body: Mapping[str, Any], words: Words, vocabulary: int, *, chat: bool
) -> Asked:
    """``vocabulary``: tokens that the LLM knows. Raises `Refused` with what is wrong, or
    not done here."""
    for name, plain in UNKNOWN.items():
        if body.get(name) not in plain:
            raise Refused(400, f"{name}: this engine does not do that")
    try:
        tokens = _chat(body, words) if chat else _prompt(body, words)
        sampling = Sampling(
            temperature=float(_given(body, "temperature", 1.0)),
            top_p=float(_given(body, "top_p", 1.0)),
            top_k=max(0, int(_given(body, "top_k", 0))),
            seed=body.get("seed"),
        )
    except InvalidInput as error:
        raise Refused(400, str(error)) from error
    if not tokens:
        raise Refused(400, "the prompt has no tokens")
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise Refused(400, "prompt: a token that the LLM does not have")
    most = body.get("max_completion_tokens") or body.get("max_tokens")
    if most is None and not chat:
        most = COMPLETION_TOKENS
    if most is not None and int(most) < 1:
        raise Refused(400, "max_tokens: expected at least 1")
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop: expected a text, or a list of them")
    return Asked(
        tokens=tokens,
        most_tokens=None if most is None else int(most),
        sampling=sampling,
        stops=tuple(stops),
        keep_stop=bool(body.get("include_stop_str_in_output")),
        stop_tokens=tuple(int(token) for token in body.get("stop_token_ids") or ()),
        ignore_end=bool(body.get("ignore_eos")),
    )


def _given(body: Mapping[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    return default if value is None else value


def _prompt(body: Mapping[str, Any], words: Words) -> list[int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return words.tokens(prompt)
    if isinstance(prompt, list) and prompt and all(type(x) is int for x in prompt):
        return prompt
    raise Refused(400, "prompt: expected a text, or a list of token ids")


def _chat(body: Mapping[str, Any], words: Words) -> list[int]:
    messages = body.get("messages")
    if not (isinstance(messages, list) and messages):
        raise Refused(400, "messages: expected a list")
    said = [{**message, "content": _content(message)} for message in messages]
    return words.chat(said, body.get("chat_template_kwargs") or {})


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, or of its parts."""
    content = message.get("content")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise Refused(400, "messages: only texts are understood")
        return "\n".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise Refused(400, "messages: each needs a text as content")
    return content
