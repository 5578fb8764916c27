"""What clients ask of the paged engine, by HTTP: choices, log probabilities, echoes, wishes
for the next token, tools; and what is refused."""

from __future__ import annotations

import copy
import json
import threading

import numpy as np
import pytest

pytestmark = pytest.mark.torch
pytest.importorskip("httptools", reason="engine servers need the extra 'serve'")
openai = pytest.importorskip("openai")
torch = pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.engines import tiny  # noqa: E402
from foreserve.runtime.paged.sampling import Sampling  # noqa: E402
from foreserve.runtime.paged.text import Words  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402
from tests.paged_stand import UNIX_S, Stand  # noqa: E402
from tests.test_paged_group import Stand as GroupStand  # noqa: E402
from tests.test_paged_group import prompts  # noqa: E402

BEGUN, ENDED = '<tool_call>{"name":"look",', '"arguments":{"at":"x"}}</tool_call>'
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{% for m in messages %}"
    "<|user|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.arguments.at }}{% endfor %}{% endfor %}<|assistant|>"
)
LOOK = {"type": "function", "function": {"name": "look", "parameters": {}}}
SAID = [{"role": "user", "content": "kalo mira"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return Llm(tmp_path_factory.mktemp("llms") / "plain", "llama")


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    """An LLM two of whose tokens are the halves of a call, if it is made to say them."""
    folder = tiny.make(tmp_path_factory.mktemp("llms") / "caller", "llama")
    path = folder / "tokenizer.json"
    stated = json.loads(path.read_text())
    vocabulary = stated["model"]["vocab"]
    for old, new in (("\u0120kaka", BEGUN), ("\u0120kalo", ENDED)):
        vocabulary[new] = vocabulary.pop(old)
    path.write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def stand(llm, caller):
    stand = Stand([llm.folder, caller])
    yield stand
    stand.close()


@pytest.fixture(scope="module")
def words(llm):
    return Words(llm.folder)


@pytest.fixture
def texts(stand):
    return stand.client().completions


@pytest.fixture
def chats(stand):
    return stand.client().chat.completions


def logs_of(llm, tokens):
    """Transformers' log probabilities after each token, ``[tokens, vocabulary]``."""
    with torch.inference_mode():
        return llm.reference(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_log_probabilities_of_a_chat(chats, llm, words):
    """Of ten drawn tokens, as transformers has them at temperature 1 whatever was asked;
    with the three likeliest. Streamed: the same, each with the text it belongs to."""
    asked = {"model": "plain", "messages": SAID, "max_tokens": 10, "seed": 3}
    asked |= {"logprobs": True, "top_logprobs": 3, "temperature": 2.0}
    choice = chats.create(**asked).choices[0]
    told = choice.logprobs.content
    assert "".join(one.token for one in told) == choice.message.content
    prompt = words.chat(SAID, {})
    answer = words.tokens(choice.message.content)
    logs = logs_of(llm, prompt + answer)[len(prompt) - 1 :]
    for row, token, one in zip(logs, answer, told, strict=False):
        best = row.topk(3)
        assert one.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert bytes(one.bytes).decode() == one.token
        found = [top.logprob for top in one.top_logprobs]
        assert found == pytest.approx(best.values.tolist(), abs=1e-3)
        assert [top.token for top in one.top_logprobs] == [
            words.text([token]) for token in best.indices.tolist()
        ]
    streamed = []
    for piece in chats.create(**asked, stream=True):
        (choice,) = piece.choices
        if choice.logprobs is not None:
            assert choice.delta.content == "".join(
                one.token for one in choice.logprobs.content
            )
            streamed += choice.logprobs.content
    assert streamed == told


@pytest.mark.parametrize("most", [0, 1])
def test_what_harnesses_ask(texts, llm, words, most):
    """A prompt of 150 tokens (three chunks) said again with log probabilities, as lm-eval
    asks for it, two prompts at once: each token's own and the likeliest one are those of
    transformers, the first has none, and tokens begin in the text where is said."""
    rng = np.random.default_rng(2)
    asked = [rng.integers(256, 540, size).tolist() for size in (150, 3)]
    told = texts.create(
        model="plain",
        prompt=asked,
        max_tokens=most,
        temperature=0,
        echo=True,
        logprobs=1,
    )
    assert told.usage.prompt_tokens == 153
    assert told.usage.completion_tokens == 2 * most
    for prompt, choice in zip(asked, told.choices, strict=True):
        assert choice.text.startswith(words.text(prompt))
        found = choice.logprobs
        assert len(found.tokens) == len(prompt) + most
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        answer = words.tokens(choice.text)[len(prompt) :]
        assert len(answer) == most
        logs = logs_of(llm, prompt + answer)
        for row, token, own, top in zip(
            logs,
            (prompt + answer)[1:],
            found.token_logprobs[1:],
            found.top_logprobs[1:],
            strict=False,
        ):
            assert own == pytest.approx(float(row[token]), abs=1e-3)
            best = words.text([int(row.argmax())])
            assert top[best] == max(top.values())
            assert top[words.text([token])] == own
        for at, token in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[at : at + len(token)] == token


def test_echoes_of_those_who_are_preempted(llm):
    """Fourteen prompts in chunks of 16, with pages for a few of them, so that some are
    computed twice in part: each token of each is scored once, as by transformers."""
    group = GroupStand([llm], 24, "round-robin", max_num_seqs=8, max_prompt_tokens=16)
    how = {"sampling": Sampling(temperature=0, logprobs=1), "echoes": True}
    asked = [group.ask(llm, prompt, **how) for prompt in prompts(14)]
    group.run()
    assert group.group.preemptions > 0
    for heard in asked:
        prompt, told = heard.job.prompt, heard.job.prompt_scores
        assert [one.token for one in told] == prompt[1:]
        rows = logs_of(llm, prompt)
        scored = zip(rows, prompt[1:], strict=False)
        wanted = [float(row[token]) for row, token in scored]
        assert [one.own for one in told] == pytest.approx(wanted, abs=1e-3)


def test_parts_of_characters(texts, words):
    """An emoji is four tokens of a byte each: they have their bytes for names, and begin
    where it does; a special token has its name, and no text."""
    tokens = [*words.tokens("k😀"), words.tokenizer.token_to_id("<|user|>"), 300]
    found = texts.create(
        model="plain", prompt=tokens, max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    names = ["k", "\\xf0", "\\x9f", "\\x98", "\\x80", "<|user|>", words.text([300])]
    assert found.logprobs.tokens == names
    assert found.logprobs.text_offset == [0, 1, 1, 1, 1, 2, 2]
    assert found.text == "k😀" + words.text([300])


def test_echoes_stream(texts, words):
    """The prompt first, then the answer, with all log probabilities in their order."""
    asked = {"model": "plain", "prompt": "kalo mira", "max_tokens": 5, "logprobs": 2}
    asked |= {"echo": True, "temperature": 0}
    whole = texts.create(**asked).choices[0]
    pieces = [piece.choices[0] for piece in texts.create(**asked, stream=True)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[0].text.startswith("kalo mira")
    for name in ("tokens", "token_logprobs", "text_offset"):
        told = [one for piece in pieces for one in getattr(piece.logprobs, name)]
        assert told == getattr(whole.logprobs, name)
    del asked["logprobs"]
    assert texts.create(**asked).choices[0].text == whole.text


def test_choices(texts, chats):
    """Three of each of two prompts, drawn with a seed: the first of each is what is said
    to that prompt alone, all differ, indices count through; streamed, the same; prompts
    are counted once."""
    asked = {"model": "plain", "seed": 7, "temperature": 1.5, "max_tokens": 6}
    both = ["kalo", "mira sute"]
    told = texts.create(**asked, prompt=both, n=3)
    said = [choice.text for choice in told.choices]
    assert [choice.index for choice in told.choices] == list(range(6))
    assert len(set(said)) == 6
    for i, prompt in enumerate(both):
        alone = texts.create(**asked, prompt=prompt)
        assert alone.choices[0].text == said[3 * i]
    streamed = [""] * 6
    more = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = texts.create(**asked, prompt=both, n=3, **more)
    reasons = []
    for piece in pieces:
        (choice,) = piece.choices
        streamed[choice.index] += choice.text
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert streamed == said
    assert reasons == ["length"] * 6
    assert last.usage == told.usage
    single = texts.create(**asked, prompt=both).usage
    assert told.usage.prompt_tokens == single.prompt_tokens
    assert told.usage.completion_tokens == 36
    asked["max_tokens"] = 2
    stream = chats.create(**asked, messages=SAID, n=2, stream=True)
    roles = [piece.choices[0] for piece in stream if piece.choices[0].delta.role]
    assert [choice.index for choice in roles] == [0, 1]


def test_answers_say_when_they_were_made(stand, chats, texts):
    """In whole seconds of the wall's clock: answers, each piece of a stream, LLMs."""
    told = texts.create(model="plain", prompt=[5, 6, 7], max_tokens=2)
    stream = list(
        chats.create(
            model="plain",
            messages=[{"role": "user", "content": "kalo"}],
            max_tokens=2,
            stream=True,
        )
    )
    made = [told.created, *(part.created for part in stream)]
    made += [one.created for one in stand.client().models.list()]
    assert set(made) == {int(UNIX_S)}


def test_wishes_for_the_next_token(texts, llm, words):
    """A bias makes it say one word alone, a frequency penalty another word before long, a
    strong repetition penalty no word twice; the likeliest alone are left by top-k 1 and by
    min-p 1; an end comes late enough."""

    def say(**how):
        extra = {"ignore_eos": True} | how.pop("extra", {})
        told = texts.create(
            model="plain",
            prompt="kalo mira",
            **({"max_tokens": 12, "temperature": 0} | how),
            extra_body=extra,
        )
        return told.choices[0].text.split(), told.choices[0].finish_reason

    plain, _ = say()
    (word,) = words.tokens(" sute")
    assert say(logit_bias={word: 100})[0] == ["sute"] * 12
    some, _ = say(logit_bias={word: 20}, frequency_penalty=2.0)
    assert some[:2] == ["sute"] * 2
    assert set(some) > {"sute"}
    assert len(set(say(extra={"repetition_penalty": 100.0})[0])) == 12
    assert len(set(say(logit_bias={word: 100}, presence_penalty=2.0)[0])) == 1
    for how in ({"top_k": 1}, {"min_p": 1.0}):
        assert say(temperature=3.0, extra=how)[0] == plain
    ends = {"stop_token_ids": [words.tokens(f" {plain[3]}")[0]]}
    early, reason = say(extra=ends)
    assert (early, reason) == (plain[: plain.index(plain[3])], "stop")
    late, _ = say(extra=ends | {"min_tokens": 6})
    assert len(late) >= 6
    assert late[:3] == plain[:3]


def test_stop_strings(texts):
    """Not said, or said where that is wanted; not heard in the first tokens."""

    def say(**extra):
        told = texts.create(
            model="plain",
            prompt="kalo mira",
            max_tokens=8,
            temperature=0,
            stop=stop,
            extra_body={"ignore_eos": True} | extra,
        )
        return told.choices[0].text, told.choices[0].finish_reason

    stop = None
    plain, _ = say()
    stop = plain.split()[2]
    before, _, _ = plain.partition(stop)
    assert say() == (before, "stop")
    assert say(include_stop_str_in_output=True) == (before + stop, "stop")
    assert say(min_tokens=8) == (plain, "length")


def test_a_client_of_many_choices_leaves(stand, texts):
    """All of them end, and their pages are free."""
    stream = texts.create(
        model="plain",
        prompt="kalo",
        n=5,
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    held = stand.http.get("/pool").json()["used"]
    stream.close()
    pause = threading.Event()
    while stand.node.worker.group.busy:
        pause.wait(0.01)
    assert stand.http.get("/pool").json()["used"] <= held - 5


def test_tools(stand, caller):
    """Made to say a word, both halves of a call, and its end: the word is the content, the
    call a call; streamed, too. Without tools the same is text. What was called, and what
    came of it, is told to the template with arguments as objects."""
    words = Words(caller)
    order = [words.tokens(" sute")[0]]
    order += [words.tokenizer.token_to_id(half) for half in (BEGUN, ENDED)]
    order.append(words.tokenizer.token_to_id("<|end|>"))
    api = stand.client(1).chat.completions
    asked = {
        "model": "caller",
        "messages": SAID,
        "temperature": 0,
        "max_tokens": 9,
        "logit_bias": dict(zip(order, (100, 80, 60, 40), strict=True)),
        "extra_body": {"repetition_penalty": 100},
    }
    plain = api.create(**asked).choices[0]
    assert plain.message.content == f" sute{BEGUN}{ENDED}"
    assert plain.finish_reason == "stop"
    told = api.create(**asked, tools=[LOOK]).choices[0]
    (call,) = told.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("look", '{"at": "x"}')
    assert told.message.content == " sute"
    assert told.finish_reason == "tool_calls"
    pieces = list(api.create(**asked, tools=[LOOK], tool_choice="auto", stream=True))
    deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(delta.content or "" for delta in deltas) == " sute"
    ((streamed,),) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert streamed.function.model_dump() == call.function.model_dump()
    assert streamed.index == 0
    assert pieces[-1].choices[0].finish_reason == "tool_calls"
    assert api.create(**asked, tools=[LOOK], tool_choice="none").choices[0] == plain
    back = [
        *SAID,
        told.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "raka"},
    ]
    asked["messages"] = back
    count = len(
        words.tokens("<|user|>kalo mira<|user|> sutex<|user|>raka<|assistant|>")
    )
    assert api.create(**asked).usage.prompt_tokens == count


REFUSED = {
    "n": [0, 1.5, 129, True, "2"],
    "best_of": [2],
    "logit_bias": [{"600": 1}, {"x": 1}, {"5": 101}, {"5": "1"}, [5]],
    "presence_penalty": [3, "1"],
    "frequency_penalty": [-2.1],
    "repetition_penalty": [0, -1],
    "min_p": [1.1],
    "min_tokens": [17, -1],
    "temperature": [-1, 10**400, True],
    "top_p": [0],
    "top_k": [-2, 1e300],
    "logprobs": [21, -1, 1.5],
    "suffix": ["x"],
    "max_tokens": [0, -1, 1e9, "3"],
    "seed": ["a", 0.5],
    "stop": [5, [""], ["a"] * 65, {"a": 1}],
    "stop_token_ids": [["1"], 4],
    "stream": ["yes"],
    "stream_options": [[1]],
    "response_format": [{"type": "json_object"}],
    "prompt": [None, "", [], [[]], [1, "a"], [True], [-1], "\ud800", ["x"] * 129],
}
CHAT_REFUSED = {
    "logprobs": [5],
    "top_logprobs": [3],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[LOOK], [{}], "f"],
    "functions": [[{"name": "f"}]],
    "response_format": [{"type": "json_schema", "json_schema": {}}],
    "messages": [
        None,
        [],
        ["x"],
        [{"role": "user"}],
        [{"content": [{"type": "image"}]}],
    ],
    "chat_template_kwargs": [[1]],
}


def bodies():
    """A good body of each kind."""
    text = {"model": "plain", "prompt": "kalo", "max_tokens": 2}
    return {
        "completions": text,
        "chat/completions": {"model": "plain", "messages": SAID, "max_tokens": 2},
    }


def test_what_is_refused(stand):
    """Each with 400 and a line that names the field; the good bodies are answered."""
    for path, cases in zip(bodies(), (REFUSED, CHAT_REFUSED), strict=True):
        good = bodies()[path]
        assert stand.http.post(f"/r/0/v1/{path}", json=good).status_code == 200
        for name, values in cases.items():
            for value in values:
                body = json.dumps(good | {name: value})
                told = stand.http.post(f"/r/0/v1/{path}", content=body)
                assert told.status_code == 400, (name, value, told.text)
                message = told.json()["error"]["message"]
                assert name in message or name in ("prompt", "max_tokens"), message


def test_hostile_bodies(stand):
    """600 bodies with fields of any kind, cut or nested deeply: answered, or refused with
    400 or 404, never 5xx; no iteration failed, and a good one is answered at the end."""
    rng = np.random.default_rng(11)
    odd = [None, True, 0, -1, 3, 2**70, 0.5, 1e308, float("nan"), float("inf"), "", "x"]
    odd += ["\ud800", [], [None], [[1]], {}, {"a": {}}, {"5": 1}, [LOOK], ["x", [3]]]
    odd += [{"include_usage": 1}, [{"role": 1, "content": {}}], {"type": "text"}]
    odd += [[{"role": "user", "content": "a", "tool_calls": [{"function": 3}]}]]
    names = sorted({*REFUSED, *CHAT_REFUSED, "echo", "ignore_eos", "user", "model"})
    names += ["include_stop_str_in_output", "parallel_tool_calls", "guided_json"]
    counts = {}
    for i in range(600):
        path = list(bodies())[i % 2]
        body = copy.deepcopy(bodies()[path])
        for _ in range(int(rng.integers(1, 4))):
            name = names[rng.integers(len(names))]
            body[name] = odd[rng.integers(len(odd))]
        content = json.dumps(body).encode()
        if rng.random() < 0.1:
            content = content[: rng.integers(len(content))]
        told = stand.http.post(f"/r/{i % 4 // 2}/v1/{path}", content=content)
        counts[told.status_code] = counts.get(told.status_code, 0) + 1
    nested = b"[" * 100_000
    assert stand.http.post("/r/0/v1/completions", content=nested).status_code == 400
    assert set(counts) == {200, 400, 404}
    assert counts[200] > 20
    assert stand.deaths == []
    good = stand.http.post("/r/0/v1/completions", json=bodies()["completions"])
    assert good.status_code == 200
