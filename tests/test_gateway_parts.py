"""Bodies, events, keys and waits, each for itself."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreserve.models.errors import InvalidInput
from foreserve.runtime.gateway.body import parse, read_call
from foreserve.runtime.gateway.errors import ApiError, retry_after
from foreserve.runtime.gateway.keys import hashed, read_keys, read_token
from foreserve.runtime.gateway.sse import LARGEST_EVENT, Answer, BrokenStream, Cutter

CHAT = "/v1/chat/completions"


def attempt(read, *given):
    """What it returns, or the error that becomes an answer."""
    try:
        return read(*given)
    except ApiError as error:
        return error


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_an_object(body):
    """Never another exception than the one that becomes a 400."""
    found = attempt(parse, body)
    assert isinstance(found, dict) or found.status == 400


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda part: (
        st.lists(part, max_size=3)
        | st.dictionaries(st.text(max_size=5), part, max_size=3)
    ),
    max_leaves=8,
)
KNOWN = ["model", "stream", "stream_options", "messages", "prompt", "n", "max_tokens"]


@given(
    st.dictionaries(st.sampled_from(KNOWN), JSONS),
    st.sampled_from([CHAT, "/v1/completions"]),
)
def test_wrong_types_are_refused_or_forwarded(fields, path):
    """Of any JSON: a 400, or a call whose payload is JSON with the same fields."""
    call = attempt(read_call, path, json.dumps(fields).encode())
    if isinstance(call, ApiError):
        assert call.status == 400
        return
    sent = json.loads(call.payload("served"))
    assert sent.pop("model") == "served"
    assert set(sent) >= set(fields) - {"model"}
    if call.stream:
        assert sent["stream_options"]["include_usage"] is True


@pytest.mark.parametrize(
    ("fields", "exact", "likely"),
    [
        ({"prompt": "abcd" * 100}, 1, 100),
        ({"prompt": [5, 6, 7], "max_tokens": 10}, 13, 13),
        ({"prompt": [[5, 6], [7]], "max_tokens": 10}, 12, 12),
        ({"prompt": ["x"], "max_tokens": 10, "n": 3}, 11, 31),
        ({"prompt": [5, 6, 7], "max_tokens": 0, "echo": True}, 3, 3),
    ],
)
def test_tokens(fields, exact, likely):
    """What is needed for certain, and probably: four bytes of the body a token, and as
    many outputs as are asked for."""
    call = read_call("/v1/completions", json.dumps({"model": "a", **fields}).encode())
    assert call.exact_tokens == exact
    assert likely <= call.likely_tokens <= likely + 20


@given(st.data())
def test_cutter(data):
    """However a stream is cut into pieces, and with either line end, the events are the
    same."""
    events = [b"data: {}", b": note", b"event: x\ndata: 1", b"data: [DONE]"]
    end = data.draw(st.sampled_from([b"\n\n", b"\r\n\r\n"]))
    if end == b"\r\n\r\n":
        events = [event.replace(b"\n", b"\r\n") for event in events]
    stream = b"".join(event + end for event in events)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    cutter = Cutter()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += cutter.feed(stream[start:stop])
    assert found == events


def test_an_event_without_end():
    """Is refused before it fills the memory."""
    cutter = Cutter()
    cutter.feed(b"x" * LARGEST_EVENT)
    with pytest.raises(BrokenStream):
        cutter.feed(b"x")


def chunk(**fields) -> bytes:
    return b"data: " + json.dumps({"model": "e", **fields}).encode()


def test_answer_takes_out_what_was_not_asked_for():
    """The usage chunk goes, null usage and a text that speaks of usage stay; the name of
    the engine's LLM becomes ours where it is a key, not in a text."""
    answer = Answer(wants_usage=False, served_name="e", llm="ours")
    text = 'say "usage": 3, "model": "e"'
    kept = answer.take(chunk(choices=[{"text": text}], usage=None))
    assert kept is not None
    plain = json.loads(kept[6:])
    assert plain["model"] == "ours"
    assert plain["choices"][0]["text"] == text
    assert answer.take(chunk(choices=[], usage={"prompt_tokens": 1})) is None
    assert answer.usage == {"prompt_tokens": 1}
    assert answer.take(b"data: [DONE]") == b"data: [DONE]\n\n"
    assert (answer.done, answer.chunks) == (True, 1)


def test_answer_keeps_usage_that_comes_with_tokens():
    """Engines that count along: the chunk is passed on, the last count holds."""
    answer = Answer(wants_usage=False, served_name="a", llm="a")
    for count in (1, 2):
        usage = {"completion_tokens": count}
        assert answer.take(chunk(choices=[{"text": "x"}], usage=usage))
    assert answer.usage == {"completion_tokens": 2}
    with pytest.raises(BrokenStream):
        answer.take(b'data: {"usage": {')


@pytest.mark.parametrize(
    ("wait_s", "spread", "seconds", "ms"),
    [
        (0.2, 0.0, b"1", b"1000"),
        (4.0, 0.125, b"5", b"4500"),
        (60.5, 0.0, b"61", b"60500"),
    ],
)
def test_retry_after(wait_s, spread, seconds, ms):
    """Whole seconds, at least one; above 60 s the client is told not to retry itself."""
    headers = dict(retry_after(wait_s, spread))
    assert (headers[b"retry-after"], headers[b"retry-after-ms"]) == (seconds, ms)
    assert (b"x-should-retry" in headers) == (wait_s > 60)


def test_key_file(tmp_path):
    """Hashes only; a wrong one is named with its place."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"sha256": hashed("k"), "llms": ["a"]}]}))
    (key,) = read_keys(path)
    assert (key.llms, key.tenant) == (("a",), "default")
    path.write_text('{"keys": [{"sha256": "k"}]}')
    with pytest.raises(InvalidInput, match="64 lower-case"):
        read_keys(path)


def test_token_file(tmp_path):
    """Only the owner may read it."""
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o644)
    with pytest.raises(InvalidInput, match="others may read"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == hashed("0123456789abcdef")
    path.write_text("short")
    with pytest.raises(InvalidInput, match="16 characters"):
        read_token(path)
