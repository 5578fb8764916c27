"""What a request to the paged engine asks for: OpenAI's fields, and some of vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.runtime.engines.bodies import Refused
from foreserve.runtime.paged.fields import flag, number, whole
from foreserve.runtime.paged.prompts import chat_of, prompts_of, texts_of, tools_of
from foreserve.runtime.paged.sampling import MOST_LOGPROBS, Sampling
from foreserve.runtime.paged.text import Words
from foreserve.runtime.paged.tools import BEGIN

COMPLETION_TOKENS = 16
"""Of a text completion that does not say; OpenAI's default."""
MOST_CHOICES = 128
"""Of one request, all its prompts together."""
MOST_STOPS = 64
UNKNOWN: Mapping[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "bad_words": (None, []),
    "allowed_token_ids": (None,),
    "prompt_embeds": (None,),
    "use_beam_search": (None, False),
    "truncate_prompt_tokens": (None,),
    "skip_special_tokens": (None, True),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
}
"""What this engine does not do, and the values that do not ask for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    prompts: Sequence[Sequence[int]]
    """Tokens of each."""
    texts: Sequence[str]
    """What each of them says, where it is to be said again (``echo``)."""
    choices: int
    """Answers to each prompt."""
    most_tokens: int | None
    """Of an answer; None: as many as there is room for."""
    sampling: Sampling
    stops: tuple[str, ...]
    keep_stop: bool
    stop_tokens: tuple[int, ...]
    ignore_end: bool
    """The LLM's own end does not end the answer."""
    calls: bool
    """The answer may call tools."""
    most_calls: int | None

    @property
    def echoes(self) -> bool:
        return bool(self.texts)


def understand(
    body: Mapping[str, Any], words: Words, vocabulary: int, *, chat: bool
) -> Asked:
    """``vocabulary``: tokens that the LLM knows. Raises `Refused` with what is wrong, or
    not done here."""
    for name, plain in UNKNOWN.items():
        if body.get(name) not in plain:
            raise Refused(400, f"{name}: this engine does not do that")
    for name in ("stream", "parallel_tool_calls"):
        flag(body, name)
    if not isinstance(body.get("stream_options") or {}, dict):
        raise Refused(400, "stream_options: expected an object")
    tools = tools_of(body, words) if chat else None
    try:
        prompts = [chat_of(body, words, tools)] if chat else prompts_of(body, words)
        sampling = _sampling(body, vocabulary, chat=chat)
    except InvalidInput as error:
        raise Refused(400, str(error)) from error
    for prompt in prompts:
        if not prompt:
            raise Refused(400, "the prompt has no tokens")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise Refused(400, "prompt: a token that the LLM does not have")
    choices = whole(body, "n", 1, 1, MOST_CHOICES)
    if whole(body, "best_of", choices, 1, MOST_CHOICES) != choices:
        raise Refused(400, "best_of: this engine does not do that; ask for n")
    if choices * len(prompts) > MOST_CHOICES:
        raise Refused(400, f"n: at most {MOST_CHOICES} choices, all prompts together")
    echo = not chat and flag(body, "echo")
    most = _most_tokens(body, chat=chat, least=0 if echo else 1)
    if most is not None and sampling.min_tokens > most:
        raise Refused(400, "min_tokens: expected at most max_tokens")
    return Asked(
        prompts=prompts,
        texts=texts_of(body, prompts, words) if echo else (),
        choices=choices,
        most_tokens=most,
        sampling=sampling,
        stops=_stops(body),
        keep_stop=flag(body, "include_stop_str_in_output"),
        stop_tokens=_stop_tokens(body),
        ignore_end=flag(body, "ignore_eos"),
        calls=bool(tools) and BEGIN in words.template_text,
        most_calls=1 if body.get("parallel_tool_calls") is False else None,
    )


def _sampling(body: Mapping[str, Any], vocabulary: int, *, chat: bool) -> Sampling:
    seed = body.get("seed")
    return Sampling(
        temperature=number(body, "temperature", 1.0),
        top_p=number(body, "top_p", 1.0),
        # vLLM's way of saying all.
        top_k=max(0, whole(body, "top_k", 0, -1)),
        min_p=number(body, "min_p", 0.0),
        seed=None if seed is None else whole(body, "seed", 0, -(2**63), 2**64),
        presence_penalty=number(body, "presence_penalty", 0.0),
        frequency_penalty=number(body, "frequency_penalty", 0.0),
        repetition_penalty=number(body, "repetition_penalty", 1.0),
        bias=_bias(body, vocabulary),
        min_tokens=whole(body, "min_tokens", 0, 0),
        logprobs=_logprobs(body, chat=chat),
    )


def _bias(body: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    stated = body.get("logit_bias")
    if stated is None:
        return {}
    if not isinstance(stated, dict):
        raise Refused(400, "logit_bias: expected an object, token: number")
    bias = {}
    for name in stated:
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise Refused(400, f"logit_bias: {name[:40]!r} is no token's number")
        if int(name) >= vocabulary:
            raise Refused(400, "logit_bias: a token that the LLM does not have")
        bias[int(name)] = number(stated, name, 0.0, "logit_bias")
    return bias


def _logprobs(body: Mapping[str, Any], *, chat: bool) -> int | None:
    asked = body.get("logprobs")
    if chat:
        top = whole(body, "top_logprobs", 0, 0, MOST_LOGPROBS)
        if flag(body, "logprobs"):
            return top
        if top:
            raise Refused(400, "top_logprobs: expected logprobs to be true")
        return None
    if asked is None or asked is False:
        return None
    return 1 if asked is True else whole(body, "logprobs", 0, 0, MOST_LOGPROBS)


def _most_tokens(body: Mapping[str, Any], *, chat: bool, least: int) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return whole(body, name, 0, least)
    return None if chat else COMPLETION_TOKENS


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or not all(
        isinstance(stop, str) and stop for stop in stops
    ):
        raise Refused(400, "stop: expected a text, or a list of them")
    if len(stops) > MOST_STOPS:
        raise Refused(400, f"stop: at most {MOST_STOPS}")
    return tuple(stops)


def _stop_tokens(body: Mapping[str, Any]) -> tuple[int, ...]:
    tokens = body.get("stop_token_ids") or []
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise Refused(400, "stop_token_ids: expected a list of token ids")
    return tuple(tokens)
