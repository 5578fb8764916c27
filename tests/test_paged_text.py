"""Calls of tools in texts that come in pieces; what tokens stand for; late stop strings."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytestmark = pytest.mark.torch
tokenizers = pytest.importorskip("tokenizers", reason="the paged engine needs it")

from foreserve.runtime.engines import tiny  # noqa: E402
from foreserve.runtime.paged.text import Speech, Words  # noqa: E402
from foreserve.runtime.paged.tools import Calls  # noqa: E402

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>'
WHOLE = {"index": 0, "id": "call-7-0", "type": "function"}
WHOLE["function"] = {"name": "look", "arguments": '{"at": "é"}'}
CASES = {
    "plain  text \n": ("plain  text \n", 0),
    CALL: ("", 1),
    f"I look. \n\n{CALL}\n{CALL}\n": ("I look.", 2),
    f"a{CALL} b": ("a b", 1),
    CALL.removesuffix("</tool_call>"): ("", 1),
    "<tool_call>{no}</tool_call> x": ("<tool_call>{no}</tool_call> x", 0),
    f"<tool_call>[]</tool_call>{CALL}": ("<tool_call>[]</tool_call>", 1),
    '<tool_call>{"name": 5}</tool_call>': ('<tool_call>{"name": 5}</tool_call>', 0),
    "a <tool_call": ("a <tool_call", 0),
    "a <tool_call>{": ("a <tool_call>{", 0),
    "a < b <too\n<tool": ("a < b <too\n<tool", 0),
}


@pytest.mark.parametrize("text", CASES)
def test_calls_however_they_are_cut(text):
    """In one piece, letter by letter, and cut anywhere: what is said is as the table has
    it, and so are the calls; without most of them the text stays the same."""
    wanted, count = CASES[text]
    rng = np.random.default_rng(1)
    cuts = [[len(text)], list(range(1, len(text) + 1))]
    cuts += [sorted({*rng.integers(1, len(text) + 1, 4), len(text)}) for _ in range(9)]
    for ends in cuts:
        for most in (None, 1):
            calls, said, made = Calls("7", most=most), "", []
            pieces = [
                calls.add(text[begin:end])
                for begin, end in zip([0, *ends], ends, strict=False)
            ]
            for more, found in (*pieces, calls.end()):
                said += more
                made += found
            assert said == wanted
            assert len(made) == (count if most is None else min(1, count))
            if made:
                assert made[0] == WHOLE
            assert [call["index"] for call in made] == list(range(len(made)))


def test_arguments_in_a_text():
    """Arguments that are a text are passed on; none are an empty object."""
    calls = Calls("1")
    for inner, wanted in (
        ('{"name":"f","arguments":"{}"}', "{}"),
        ('{"name":"f"}', "{}"),
    ):
        _, (call,) = calls.add(f"<tool_call>{inner}</tool_call>")
        assert call["function"]["arguments"] == wanted


def test_what_tokens_stand_for(tmp_path):
    """Tokenizers of bytes as letters, and those with a mark for spaces and names for bytes:
    each token's bytes; a special token's name; nothing of a token that there is not."""
    words = Words(tiny.make(tmp_path / "a"))
    for text in ("kalo mira é😀\n", "<|user|>"):
        tokens = words.tokens(text)
        assert b"".join(words.raw(token) for token in tokens).decode() == text
    assert words.raw(10_000) == b""

    folder = tmp_path / "b"
    folder.mkdir()
    known = {"\u2581so": 0, "<0xC3>": 1, "<0xA9>": 2, "it": 3, "<s>": 4, "\u0120": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(known, []))
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence(
        [parts.Replace("\u2581", " "), parts.ByteFallback(), parts.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    words = Words(folder)
    told = [words.raw(token) for token in range(6)]
    assert told == [b" so", b"\xc3", b"\xa9", b"it", b"<s>", "\u0120".encode()]


def test_deaf_at_first(tmp_path):
    """A stop string that is over within the first four tokens is said; the next one of
    it, and one that ends with the fifth token, are heard."""
    words = Words(tiny.make(tmp_path))

    def said(text, stop):
        speech = Speech(words, [stop], deaf=4)
        text = "".join([*map(speech.add, words.tokens(text)), speech.end()])
        return text, speech.stopped

    assert said(" kalo mira sute lora", "mira") == (" kalo mira sute lora", False)
    twice = " kalo mira sute lora mira"
    assert len(words.tokens(twice)) == 5
    assert said(twice, "mira") == (" kalo mira sute lora ", True)
    # It began before.
    assert said(twice, "ra mir") == (" kalo mira sute lo", True)


def test_a_text_goes_on(tmp_path):
    """With a tokenizer whose decoder drops the first space, an answer that goes on with a
    text keeps it, streamed or at once; one that stands alone does not."""
    known = {"\u2581so": 0, "\u2581it": 1, "<0xC3>": 2, "<0xA9>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(known, []))
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence(
        [
            parts.Replace("\u2581", " "),
            parts.ByteFallback(),
            parts.Fuse(),
            parts.Strip(" ", 1, 0),
        ]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = Words(tmp_path)

    def said(tokens, after):
        speech = Speech(words, after=after)
        return "".join([*map(speech.add, tokens), speech.end()])

    assert said([1, 2, 3, 0], [0, 1] * 9) == " ité so"
    assert said([1, 0], []) == "it so"
    assert said([1, 2], [0]) == " it\ufffd"
    assert (
        said([3, 1], [0, 2]) == "\ufffd it"
    )  # Half of a character is not gone back to.


def test_templates_that_fail(tmp_path):
    """Whatever a template does wrong, the client hears of it in one line."""
    from foreserve.models.errors import InvalidInput

    folder = tiny.make(tmp_path)
    for template in (
        "{{ 1 / 0 }}",
        "{{ messages[5].x }}",
        "{{ raise_exception('no') }}",
    ):
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        stated["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        with pytest.raises(InvalidInput, match="chat template"):
            Words(folder).chat([{"role": "user", "content": "x"}], {})
