"""The public port over real HTTP, before a real engine server that misbehaves on demand."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from foreserve.models.errors import InvalidInput
from foreserve.runtime.gateway import server
from foreserve.runtime.gateway.gateway import Settings
from foreserve.runtime.gateway.job import ServedLlm
from foreserve.runtime.gateway.keys import ApiKey, hashed
from tests.gateway_stand import CHAT, post_bytes, replica, stand, wait_for

USER = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def shared():
    with stand(1) as made:
        yield made


@pytest.fixture
def one(shared):
    """A gateway with one engine that serves ``a``; nothing is left of the test before."""
    shared.publish_all()
    wait_for(lambda: not any(shared.table.in_flight().values()))
    engine = shared.engines[0]
    engine.asked.clear()
    engine.headers.clear()
    shared.records.clear()
    shared.eta = (1.0, 2.0)
    return shared


def events(text: str) -> list[str]:
    return [part.removeprefix("data: ") for part in text.split("\n\n") if part]


def error_of(answer) -> dict:
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    return error


# What the official client sees.


def official(made, **options) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{made.url}/v1", api_key="k", **options)


def test_client_lists_chats_and_streams(one):
    """The official client lists both LLMs, asleep or not, chats, streams, completes, and
    meets our names, not the engine's."""
    with official(one) as client:
        assert [llm.id for llm in client.models.list()] == ["a", "b"]
        assert client.models.retrieve("a").id == "a"
        chat = client.chat.completions.create(model="a", messages=USER)
        assert chat.choices[0].message.content == "t0 t1 t2 "
        assert (chat.model, chat.usage.completion_tokens) == ("a", 3)
        with client.chat.completions.create(
            model="a",
            messages=USER,
            stream=True,
            stream_options={"include_usage": True},
        ) as stream:
            chunks = list(stream)
        assert "".join(c.choices[0].delta.content for c in chunks[:-1]) == "t0 t1 t2 "
        assert chunks[-1].choices == []
        assert chunks[-1].usage.prompt_tokens == 7
        assert {chunk.model for chunk in chunks} == {"a"}
        text = client.completions.create(model="a", prompt="x").choices[0].text
        assert text == "t0 t1 t2 "


def test_client_gets_errors_as_its_exceptions(one):
    """Unknown LLM, wrong type, engine's refusal: the exceptions the client has for them."""
    with official(one, max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="aa", messages=USER)
        assert unknown.value.code == "model_not_found"
        assert "a?" in unknown.value.message
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="a", messages=[])
        echo = {"echo": {"status": 400}}
        with pytest.raises(openai.BadRequestError, match="as asked"):
            client.chat.completions.create(model="a", messages=USER, extra_body=echo)


def test_client_retries_after_503(one):
    """A client that is sent away while the LLM is woken comes back by itself, no earlier
    than it was told, and is answered."""
    one.table.publish([])
    header = {"X-Foreserve-Max-Wait": "0"}
    one.eta = (0.3, 0.5)
    waking = threading.Timer(0.5, one.publish_all)
    waking.start()
    with official(one, default_headers=header) as client:
        began_s = time.monotonic()
        client.chat.completions.create(model="a", messages=USER)
    assert time.monotonic() - began_s >= 1.0
    waking.join()
    wait_for(lambda: len(one.records) == 2)
    assert [r.reason for r in one.records] == ["model_waking", None]


# Streams.


def test_usage_is_asked_for_and_taken_out(one):
    """Without having asked, a client sees no usage; the gateway has counted from it."""
    answer = one.chat(stream=True)
    assert "usage" not in answer.text
    assert events(answer.text)[-1] == "[DONE]"
    assert one.engines[0].asked[0]["stream_options"] == {"include_usage": True}
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    record = one.last()
    assert (record.input_tokens, record.output_tokens) == (7, 3)
    assert record.result == "finished"
    assert record.reason is None
    assert record.arrival_s <= record.first_token_s <= record.end_s


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_events_cut_anywhere(one, pieces):
    """However the engine's bytes are split, the same whole events come out."""
    answer = one.chat(stream=True, echo={"tokens": 4, "pieces": pieces})
    *chunks, end = events(answer.text)
    texts = [json.loads(c)["choices"][0]["delta"]["content"] for c in chunks]
    assert (texts, end) == (["t0 ", "t1 ", "t2 ", "t3 "], "[DONE]")


def test_streams_are_not_buffered(one):
    """The first token arrives while the engine still waits with the others."""
    body = {"model": "a", "messages": USER, "stream": True, "echo": {"gap_s": 0.3}}
    began_s = time.monotonic()
    with one.client.stream("POST", CHAT, json=body) as answer:
        first = next(answer.iter_raw())
        assert b"t0 " in first
        assert b"t1 " not in first
        assert time.monotonic() - began_s < 0.3


def test_a_cut_stream_does_not_look_whole(one):
    """An engine that dies after two tokens: an error event ends the stream, without
    finish_reason and [DONE], and it counts as failed."""
    answer = one.chat(stream=True, echo={"tokens": 5, "die_after": 2})
    *chunks, last = events(answer.text)
    assert len(chunks) == 2
    assert json.loads(last)["error"]["code"] == "engine_lost"
    assert "[DONE]" not in answer.text
    assert '"length"' not in answer.text
    record = one.last()
    assert (record.result, record.reason) == ("failed", "engine_lost")
    assert record.output_tokens == 2
    assert one.failed


def test_an_error_inside_a_stream_ends_it(one):
    """An engine that says so in the stream: its error is passed on, its [DONE] is not."""
    answer = one.chat(stream=True, echo={"gap_s": 0.05, "error_after": 1})
    assert "out of memory" in answer.text
    assert "[DONE]" not in answer.text
    assert one.last().result == "failed"


def test_fields_and_headers_reach_the_engine(one):
    """What we do not know is passed on; a request id is echoed, or made."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"X-Request-Id": "r-1", "traceparent": trace, "cookie": "secret"}
    body = {"model": "a", "messages": [{"content": "é\ud800"}], "top_k": 3}
    answer = one.client.post(CHAT, content=json.dumps(body), headers=headers)
    assert answer.headers["x-request-id"] == "r-1"
    engine = one.engines[0]
    assert engine.asked[0]["top_k"] == 3
    assert engine.asked[0]["model"] == "echo"
    assert engine.asked[0]["messages"][0]["content"] == "é\ud800"
    assert engine.headers[0]["x-request-id"] == "r-1"
    assert engine.headers[0]["traceparent"] == trace
    assert "cookie" not in engine.headers[0]
    made = one.chat({"X-Request-Id": "bad id"}).headers["x-request-id"]
    assert len(made) == 32


def test_a_client_that_leaves_is_cancelled_at_the_engine(one):
    """Streamed, or waiting for an answer in one piece: the engine notices within a second
    that nobody is there, and the seat is free."""
    for stream in (True, False):
        before = one.engines[0].left
        body = {"model": "a", "messages": USER, "stream": stream}
        body["echo"] = {"tokens": 100, "gap_s": 0.1}
        sock = socket.create_connection(("127.0.0.1", one.server.port))
        sock.sendall(post_bytes(CHAT, json.dumps(body).encode()))
        wait_for(lambda: one.engines[0].working)
        sock.close()
        wait_for(lambda old=before: one.engines[0].left == old + 1, within_s=1.0)
        assert one.last().reason == "client_left"
        wait_for(lambda: not one.engines[0].working)
    assert not any(one.table.in_flight().values())


def test_two_requests_on_one_connection(one):
    """Pipelined requests are answered in their order."""
    body = json.dumps({"model": "a", "prompt": "x"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
    both = head % len(body) + body + post_bytes("/v1/completions", body)
    assert one.raw(both).count(b"HTTP/1.1 200 OK") == 2


# Engines that fail.


def test_a_request_that_has_not_streamed_is_retried_elsewhere():
    """Of two engines one is dead: every request is answered by the other, and the dead one
    is not asked again at once."""
    with stand(2) as two:
        two.engines[0].stop()
        for stream in (False, True):
            assert two.chat(stream=stream).status_code == 200
        assert len(two.failed) == 1
        two.engines[1].stop()
        answer = two.chat({"X-Foreserve-Max-Wait": "0"})
        assert answer.status_code in (502, 503)
        assert error_of(answer)["code"]


def test_an_engine_that_dies_before_the_first_token_is_retried():
    """A whole answer that breaks off, and a stream that ends before its first event."""
    with stand(2) as two:
        for kind, stream in (("whole", False), ("stream", True)):
            answer = two.chat(
                stream=stream, echo={"tokens": 3, "die_after": 0, "once": kind}
            )
            assert answer.status_code == 200
            assert "t0 " in answer.text
            assert '"length"' in answer.text
        assert [len(engine.asked) for engine in two.engines] == [2, 2]
        assert two.failed == ["no answer", "broke off"]


def test_an_engine_that_hangs():
    """Silent for longer than is allowed: before the first token another is asked, after
    it the stream ends with an error; the one that hangs is rid of both."""
    with stand(2, settings=Settings(silence_s=0.3)) as two:
        answer = two.chat(stream=True, echo={"wait_s": 9, "once": "hang"})
        assert answer.text.endswith("data: [DONE]\n\n")
        answer = two.chat(stream=True, echo={"gap_s": 9})
        assert "engine_lost" in answer.text
        assert "[DONE]" not in answer.text
        wait_for(lambda: sum(engine.left for engine in two.engines) == 2, within_s=1.0)
        assert two.failed == ["silent", "silent"]


def test_an_engine_that_answers_500_is_a_bad_gateway(one):
    """502 with `engine_error`, and no second try of what may have killed it."""
    answer = one.chat(echo={"status": 500})
    assert answer.status_code == 502
    assert error_of(answer)["type"] == "engine_error"
    assert len(one.engines[0].asked) == 1


def test_deadline(one):
    """A request not done by its deadline: 504, or an error event once it streams; and the
    engine is rid of it."""
    soon = {"X-Foreserve-Deadline": "0.2"}
    answer = one.chat(soon, echo={"wait_s": 5})
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "deadline_exceeded"
    answer = one.chat(soon, stream=True, echo={"tokens": 50, "gap_s": 0.05})
    assert "deadline_exceeded" in answer.text
    assert "[DONE]" not in answer.text
    wait_for(lambda: not one.engines[0].working, within_s=1.0)
    wrong = one.chat({"X-Foreserve-Deadline": "soon"})
    assert wrong.status_code == 400


def test_a_deadline_that_cannot_be_met_is_refused_at_once(one):
    """The LLM needs 5 s to wake, the client gives 1."""
    one.table.publish([])
    one.eta = (5.0, 6.0)
    began_s = time.monotonic()
    answer = one.chat({"X-Foreserve-Deadline": "1"})
    assert answer.status_code == 504
    assert time.monotonic() - began_s < 0.5


# Waiting.


def test_a_held_request_is_served_once_there_is_a_replica(one):
    """It needs nothing but the publication; the owner was told at once that there is a
    need, and sees it as waiting."""
    one.table.publish([])
    needs = one.needs
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(one.chat)
        wait_for(lambda: one.table.waiting().get("a") == 1)
        wait_for(lambda: one.needs == needs + 1)
        threading.Event().wait(0.02)
        one.publish_all()
        got = answer.result()
    assert got.status_code == 200
    assert int(got.headers["x-foreserve-wait-ms"]) >= 20
    assert got.headers["x-foreserve-model-state"] == "active"
    assert one.table.waiting() == {}


def test_sent_away_with_the_predicted_wait(one):
    """Eta 40 s at p90 and nothing held longer than 30 s: 503 with that, up to 10 % more,
    in both headers; above 60 s a client is told not to retry by itself."""
    one.table.publish([])
    one.eta = (30.0, 40.0)
    answer = one.chat()
    assert answer.status_code == 503
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("service_unavailable", "model_waking")
    assert error["foreserve"] == {
        "state": "absent",
        "eta_s": 40.0,
        "eta_p50_s": 30.0,
        "position": 1,
        "plan_id": "p1",
    }
    assert 40 <= int(answer.headers["retry-after"]) <= 44
    assert 40_000 <= int(answer.headers["retry-after-ms"]) <= 44_000
    assert "x-should-retry" not in answer.headers
    assert one.table.waiting()["a"] == 1
    one.eta = (70.0, 80.0)
    assert one.chat().headers["x-should-retry"] == "false"
    one.eta = (float("inf"), float("inf"))
    answer = one.chat()
    assert error_of(answer)["code"] == "no_capacity"
    assert "retry-after" not in answer.headers
    one.publish_all()
    assert one.table.waiting() == {}


@pytest.mark.parametrize("header", ["X-Foreserve-Max-Wait: 0.1", "Prefer: wait=0"])
def test_a_client_chooses_how_long_to_wait(one, header):
    """Eta 2 s: not held where the client allows less, held where it allows more."""
    one.table.publish([])
    name, value = header.split(": ")
    assert one.chat({name: value}).status_code == 503
    one.eta = (0.0, 0.05)
    began_s = time.monotonic()
    assert one.chat({"X-Foreserve-Max-Wait": "0.2"}).status_code == 503
    assert time.monotonic() - began_s >= 0.2
    assert one.chat({"X-Foreserve-Max-Wait": "nan"}).status_code == 400


def test_a_clock_that_runs_faster():
    """Twenty seconds in one: held for 4 s is held for 0.2, and a wait of 100 s is over in
    5, which is what a client is told."""
    with stand(0, settings=Settings(time_scale=20.0)) as empty:
        empty.eta = (0.0, 0.0)
        began_s = time.monotonic()
        assert empty.chat({"X-Foreserve-Max-Wait": "4"}).status_code == 503
        assert 0.2 <= time.monotonic() - began_s < 2.0
        empty.eta = (50.0, 100.0)
        assert int(empty.chat().headers["retry-after"]) in (5, 6)


def test_a_client_that_leaves_while_held_is_no_demand(one):
    """Its place in the queue is gone within a second."""
    one.table.publish([])
    body = json.dumps({"model": "a", "messages": USER}).encode()
    with socket.create_connection(("127.0.0.1", one.server.port)) as sock:
        sock.sendall(post_bytes(CHAT, body))
        wait_for(lambda: one.table.held().get("a") == 1)
    wait_for(lambda: one.table.held().get("a") == 0, within_s=1.0)
    assert one.last().reason == "client_left"


def test_queue_is_bounded():
    """Two may wait, the third is told 429 with a Retry-After; all who wait are served in
    their order when a place is free."""
    with stand(0, settings=Settings(queue=2)) as empty, ThreadPoolExecutor(2) as pool:
        held = [pool.submit(empty.chat) for _ in range(2)]
        wait_for(lambda: empty.table.held().get("a") == 2)
        answer = empty.chat()
        assert answer.status_code == 429
        assert error_of(answer)["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        with stand(1) as other:
            empty.table.publish([replica(other.engines[0].url, cap=1)])
            assert [h.result().status_code for h in held] == [200, 200]


def test_an_llm_that_failed_says_so():
    """503 without Retry-After, and no automatic retry."""
    with stand(0, state=lambda llm: "failed") as empty:
        answer = empty.chat()
    assert answer.status_code == 503
    assert error_of(answer)["code"] == "model_failed"
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers


def test_too_many_tokens_for_any_replica(one):
    """1000 tokens fit: 999 + 2 do not, for certain; a long text may, so the engine is
    asked."""
    tokens = {"model": "a", "prompt": [1] * 999, "max_tokens": 2}
    answer = one.client.post("/v1/completions", json=tokens)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"
    text = {"model": "a", "prompt": "x " * 9000, "max_tokens": 2}
    assert one.client.post("/v1/completions", json=text).status_code == 200


# What is not to be had.


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'{"model": "a"', "invalid_json"),
        (b'{"model": "\xff"}', "invalid_json"),
        (b'{"model": "a", "model": "b"}', "invalid_json"),
        (b'{"model": "a", "temperature": NaN}', "invalid_json"),
        (b'{"model": "a", "temperature": 1e999}', "invalid_json"),
        (b'{"model": "a", "seed": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"model": 1}', "missing_model"),
        (b'{"messages": []}', "missing_model"),
        (b'{"model": "a"}', None),
        (b'{"model": "a", "messages": [1]}', None),
        (b'{"model": "a", "messages": [{}], "stream": "yes"}', None),
        (b'{"model": "a", "messages": [{}], "max_tokens": true}', None),
        (b'{"model": "a", "messages": [{}], "stream_options": []}', None),
    ],
)
def test_bad_bodies(one, body, code):
    """Each is refused with 400 and the reason, before any engine is touched."""
    answer = one.client.post(CHAT, content=body)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert not one.engines[0].asked


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", CHAT, 405),
        ("POST", "/health", 405),
        ("GET", "/admin/v1/status", 404),
        ("POST", "/sleep", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/v1/../admin/v1/status", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/%00%ff%2e%2e", 404),
        ("GET", "/docs", 404),
    ],
)
def test_nothing_else_is_reachable(one, method, path, status):
    """Errors of routing are JSON as well."""
    line = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    head, _, body = one.raw(line.encode()).partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["message"]


def test_body_limits():
    """A body that says it is too large, one that turns out to be, and a slow one."""
    with stand(1, settings=Settings(body_bytes=1000, body_s=0.2)) as small:
        assert small.client.post(CHAT, content=b"x" * 1001).status_code == 413
        chunks = iter([b"x" * 600, b"x" * 600])
        answer = small.client.post(CHAT, content=chunks)
        assert error_of(answer)["code"] == "body_too_large"
        slow = post_bytes(CHAT, b"x" * 50)[:-20]
        assert b" 408 " in small.raw(slow)
        assert not small.engines[0].asked


def test_http_itself_is_guarded(one):
    """What is no HTTP, and heads that are too large, get an answer and no more."""
    assert b" 400 " in one.raw(b"nonsense\r\n\r\n")
    large = b"GET /health HTTP/1.1\r\nx: " + b"y" * 100_000
    assert b" 431 " in one.raw(large)
    two = b"POST /v1/completions HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"
    assert b" 400 " in one.raw(two)


def test_slow_heads_and_rests_end(one, monkeypatch):
    """A head that does not come, a line end and nothing more, a body nobody wants any more:
    none keeps its connection."""
    monkeypatch.setattr(server, "HEADER_S", 0.1)
    monkeypatch.setattr(server, "REST_S", 0.1)
    assert b" 408 " in one.raw(b"GET /health HT")
    assert b" 408 " in one.raw(b"\r\n")
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n"
    )
    assert b" 413 " in one.raw(head + b"x")


def test_a_head_without_a_body_is_sent(one):
    """HEAD is answered on a connection that stays open, and the next request after it."""
    first = b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    assert one.raw(first + last).count(b"HTTP/1.1 200 OK") == 2


def test_keys():
    """No key: 401. A key for ``b`` alone: ``a`` is unknown to it. More than one request a
    second: 429 with the time to wait."""
    keys = [
        ApiKey(sha256=hashed("all")),
        ApiKey(sha256=hashed("some"), llms=("b",)),
        ApiKey(sha256=hashed("slow"), rate_rps=1.0, slo_class="batch"),
    ]
    with stand(1, keys=keys) as locked:
        assert locked.chat().status_code == 401
        assert locked.client.get("/v1/models").status_code == 401
        assert locked.client.get("/health").status_code == 200

        def chat(key: str):
            return locked.chat({"Authorization": f"Bearer {key}"})

        assert chat("wrong").status_code == 401
        assert chat("all").status_code == 200
        assert error_of(chat("some"))["code"] == "model_not_found"
        some = {"Authorization": "Bearer some"}
        listed = locked.client.get("/v1/models", headers=some).json()["data"]
        assert [llm["id"] for llm in listed] == ["b"]
        assert locked.client.get("/v1/models/a", headers=some).status_code == 404
        assert chat("slow").status_code == 200
        answer = chat("slow")
        assert error_of(answer)["code"] == "tenant_limit"
        assert answer.headers["retry-after"] == "1"
        counted = locked.client.get("/metrics").text
    assert 'requests_total{code="200",model_name="a",slo_class="batch"} 1' in counted


def test_no_open_port_without_keys():
    """A wildcard address without keys is refused, unless asked for in so many words."""
    with pytest.raises(InvalidInput, match="no API keys"), stand(0, host="0.0.0.0"):
        pass


# The rest of the port.


def test_ready_depends_on_plan_and_replicas():
    """Health is about the process alone."""
    plan: list[str] = []
    with stand(1, plan_id=lambda: plan[0] if plan else None) as made:
        assert "no plan" in made.client.get("/ready").json()["reason"]
        plan.append("p7")
        assert made.client.get("/ready").status_code == 200
        assert made.client.get("/version").json()["plan_id"] == "p7"
        made.table.publish([])
        assert made.client.get("/ready").status_code == 503
        assert made.client.get("/health").status_code == 200
        data = made.client.get("/v1/models").json()["data"]
        assert data[0]["foreserve"] == {"state": "absent", "eta_s": 2.0}
        assert data[0]["max_model_len"] == 4096


def test_metrics():
    """vLLM's names and ours, for one stream of three tokens and one unknown LLM; no name
    out of a request becomes a label."""
    with stand(1, llms={"a": ServedLlm(slo_ttft_s=10.0)}) as made:
        made.chat(stream=True, echo={"gap_s": 0.01})
        made.chat(model="nobody")
        wait_for(lambda: made.records)
        text = made.client.get("/metrics").text
        made.chat({"x-slo-ttft-ms": "0"}, stream=True)
        wait_for(lambda: len(made.records) == 2)
        later = made.client.get("/metrics").text
    vllm = '{engine="gateway",model_name="a"}'
    for name, value in (
        ("num_requests_running", 0),
        ("num_requests_waiting", 0),
        ("prompt_tokens_total", 7),
        ("generation_tokens_total", 3),
        ("time_to_first_token_seconds_count", 1),
        ("inter_token_latency_seconds_count", 2),
        ("request_time_per_output_token_seconds_count", 1),
        ("e2e_request_latency_seconds_count", 1),
        ("request_queue_time_seconds_count", 1),
    ):
        assert f"vllm:{name}{vllm} {value}.0\n" in text
    for line in (
        'vllm:request_success_total{engine="gateway",finished_reason="length",'
        'model_name="a"} 1.0',
        'foreserve_requests_total{code="200",model_name="a",slo_class="default"} 1.0',
        'foreserve_requests_total{code="404",model_name="",slo_class="default"} 1.0',
        'foreserve_gateway_ttft_seconds_count{model_name="a",slo_class="default"} 1.0',
        'foreserve_wait_seconds_count{model_name="a",slo_class="default"} 1.0',
        'foreserve_slo_attained_total{model_name="a",slo_class="default"} 1.0',
        'foreserve_held_requests{model_name="a"} 0.0',
    ):
        assert line in text
    assert "nobody" not in text
    attained = 'foreserve_slo_attained_total{model_name="a",slo_class="default"} 1.0'
    assert attained in later


def test_graceful_shutdown():
    """What streams ends in peace within the grace, who waits is sent away, nobody new is
    taken; after the grace a stream is broken off with an error."""
    with stand(1) as made, ThreadPoolExecutor(3) as pool:
        stream = {"stream": True, "echo": {"tokens": 6, "gap_s": 0.1}}
        short = pool.submit(made.chat, None, **stream)
        long = pool.submit(
            made.chat, None, stream=True, echo={"tokens": 99, "gap_s": 0.1}
        )
        wait_for(lambda: made.engines[0].working == 2)
        held = pool.submit(made.chat, None, model="b")
        wait_for(lambda: made.table.held().get("b") == 1)
        made.server.stop(1.0)
        assert held.result().status_code == 503
        assert short.result().text.endswith("data: [DONE]\n\n")
        assert "shutting down" in long.result().text
        assert "[DONE]" not in long.result().text
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", made.server.port))
