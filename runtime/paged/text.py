"""Text to tokens and back: tokenizer, chat template, and answers that stream.

What streams is whole characters (a token may end inside one), and nothing that could still
turn out to be the beginning of a stop string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from foreserve.models.errors import InvalidInput
from foreserve.runtime.engines.tiny import byte_letters

_BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}
CONTEXT = 8
"""Tokens of what comes before an answer that its first ones may be said by."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class Words:
    """A checkpoint's tokenizer and chat template. Any thread may use it."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise InvalidInput("no tokenizer.json", file=str(folder))
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._folder = folder
        stated = folder / "tokenizer_config.json"
        self._config: dict[str, Any] = (
            json.loads(stated.read_text()) if stated.exists() else {}
        )
        self._decoder = bytes(self.tokenizer.decoder.__getstate__() or b"")
        self._added: dict[int, bytes] = {
            token: added.content.encode()
            for token, added in self.tokenizer.get_added_tokens_decoder().items()
        }
        self._raw: dict[int, bytes] = {}

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """``special``: with what the tokenizer puts around every text. Raises
        `InvalidInput` if there is half a character in it."""
        try:
            found: list[int] = self.tokenizer.encode(
                text, add_special_tokens=special
            ).ids
        except TypeError as error:
            raise InvalidInput("a text that is no Unicode", field="prompt") from error
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """Without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def raw(self, token: int) -> bytes:
        """What it stands for, be it part of a character; special ones by their names."""
        found = self._raw.get(token)
        if found is None:
            found = self._raw[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        added = self._added.get(token)
        if added is not None:
            return added
        text = self.tokenizer.id_to_token(token)
        if text is None:  # The LLM has more than its tokenizer.
            return b""
        if b'"ByteLevel"' in self._decoder and all(letter in _BYTES for letter in text):
            return bytes(_BYTES[letter] for letter in text)
        if b'"ByteFallback"' in self._decoder and (found := _BYTE.fullmatch(text)):
            return bytes([int(found[1], 16)])
        return str(text).replace("\u2581", " ").encode()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        more: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Tokens of a conversation up to where the answer begins; ``more`` is what else
        the template may use. Raises `InvalidInput` if it does not take the messages."""
        names = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in self._config.items()
            if key.endswith("_token") and value is not None
        }
        try:
            text = self._template.render(
                {
                    **names,
                    **more,
                    "messages": messages,
                    "tools": tools,
                    "documents": None,
                    "add_generation_prompt": True,
                }
            )
        except Exception as error:  # Of programs in files, which may do anything.
            raise InvalidInput(f"chat template: {error}", field="messages") from error
        return self.tokens(text, special=False)

    @cached_property
    def template_text(self) -> str:
        """Of the chat template; raises `InvalidInput` if there is none."""
        path = self._folder / "chat_template.jinja"
        text = path.read_text() if path.exists() else self._config.get("chat_template")
        if isinstance(text, list):
            text = next((t["template"] for t in text if t["name"] == "default"), None)
        if text is None:
            raise InvalidInput(
                "this LLM has no chat template", hint="ask /v1/completions"
            )
        return str(text)

    @cached_property
    def _template(self) -> Template:
        def refuse(message: str) -> None:
            raise TemplateError(message)

        env = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        env.globals["raise_exception"] = refuse
        # Templates write JSON as it is, not for web pages.
        env.filters["tojson"] = lambda value, indent=None, **_: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        try:
            return env.from_string(self.template_text)
        except TemplateError as error:
            raise InvalidInput(
                f"chat template: {error}", file=str(self._folder)
            ) from error


class Speech:
    """The text of one answer, piece by piece."""

    def __init__(
        self,
        words: Words,
        stops: Sequence[str] = (),
        *,
        keep_stop: bool = False,
        deaf: int = 0,
        after: Sequence[int] = (),
    ) -> None:
        """``stops``: strings that end it, but none that is over after ``deaf`` tokens;
        they are not said unless ``keep_stop``. ``after``: tokens of a text that it goes
        on with; some tokenizers say a first word without its space."""
        self._deaf = deaf
        before = words.text(after[-CONTEXT:])
        self._before = "" if before.endswith("\ufffd") else before
        self._after = list(after[-CONTEXT:]) if self._before else []
        self._words, self._stops, self._keep_stop = words, tuple(stops), keep_stop
        self._stream: DecodeStream | None = DecodeStream(skip_special_tokens=True)
        self._tokens: list[int] = []
        self._text = ""
        for token in self._after:
            self._next(token)
        self._said = 0
        self.stopped = False
        """A stop string came."""

    @property
    def size(self) -> int:
        """Letters known so far: where the next token begins."""
        return len(self._text)

    def add(self, token: int) -> str:
        """What may be said now that ``token`` has come."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        if more := self._next(token):
            self._grow(more)
        return self._say(self._safe())

    def _next(self, token: int) -> str | None:
        """What ``token`` adds, if it ends a character."""
        if self._stream is not None:
            try:
                more: str | None = self._stream.step(self._words.tokenizer, token)
                return more
            except Exception:  # Some tokenizers take back what they have said.
                self._stream = None
        whole = self._whole()
        if whole.endswith("\ufffd") or not whole.startswith(self._text):
            return None
        return whole[len(self._text) :]

    def _whole(self) -> str:
        return self._words.text(self._after + self._tokens)[len(self._before) :]

    def end(self) -> str:
        """What is still to be said when no further token comes."""
        if not self.stopped:
            # What ends inside a character is said as it is.
            whole = self._whole()
            if whole.startswith(self._text):
                self._grow(whole[len(self._text) :])
        return self._say(len(self._text))

    def _grow(self, more: str) -> None:
        known = len(self._text)
        self._text += more
        if len(self._tokens) <= self._deaf:
            return
        found: list[tuple[int, int]] = []
        for stop in self._stops:
            # It may have begun in what is there already.
            at = self._text.find(stop, max(0, known - len(stop) + 1))
            if at >= 0:
                found.append((at, len(stop)))
        if found:
            at, length = min(found)
            self._text = self._text[: at + length if self._keep_stop else at]
            self.stopped = True

    def _safe(self) -> int:
        """Up to where it is certain."""
        if self.stopped:
            return len(self._text)
        held = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._text)), held, -1):
                if self._text.endswith(stop[:size]):
                    held = size
                    break
        return len(self._text) - held

    def _say(self, end: int) -> str:
        more = self._text[self._said : end]
        self._said = max(self._said, end)
        return more
