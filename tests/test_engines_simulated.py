"""Simulated engines: real processes, real HTTP, times of the cost model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from foreserve.models.cost import IterationTime
from foreserve.models.placement import replica_id
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.engines import process
from foreserve.runtime.engines.base import EngineFailed, maker

pytest.importorskip("httptools", reason="simulated engines need the extra 'serve'")
openai = pytest.importorskip("openai")

from foreserve.runtime.engines.simulated import (  # noqa: E402
    SimulatedSettings,
    close_node,
    node_of,
    prepare,
)

TIME = IterationTime(
    prefill_base_s=0.2,
    prefill_s_per_token=0.001,
    prefill_s_per_token2=0.0,
    decode_base_s=0.1,
    decode_s_per_seq=0.01,
    decode_s_per_context_token=0.001,
    relative_error=0.0,
    source="test",
)


def option(llm: str, **changed) -> ReplicaOption:
    """Weights of 1000 bytes and room for 1600 tokens at 2 bytes; answers of 5 tokens."""
    known = dict(
        llm=llm,
        gpu_type="g",
        tp=1,
        resident_bytes=1000,
        kv_bytes=3200,
        kv_token_bytes=2,
        concurrency=8,
        rate_rps=1.0,
        exec_s=1.0,
        load_s=2.0,
        activate_s=0.5,
        ttft_s=0.1,
        tpot_s=0.1,
        time=TIME,
        output_tokens=5.0,
    )
    return ReplicaOption(**(known | changed))


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """One server for all tests here; forty seconds of the cost model pass in one."""
    folder = tmp_path_factory.mktemp("node")
    known = SimulatedSettings(
        folder=folder, time_scale=40.0, stop_grace_s=1.0, answers_within_s=1.0
    )
    prepare(known)
    yield known
    close_node(folder)


@pytest.fixture
def engine(settings, request):
    """An ACTIVE engine, its LLM named after the test."""
    name = request.node.name
    made = make(name, settings)
    made.start()
    made.activate()
    yield made
    made.stop()


def make(name, settings, **changed):
    replica = replica_id(name, (GpuId(node="n0", index=0),))
    return maker("simulated")(option(name, **changed), replica, settings)


def client(engine):
    return openai.OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=0)


def test_life(settings):
    """LOADING holds nothing yet, WARM the weights, ACTIVE weights and KV; asleep it answers
    no request; once stopped it is not alive, and stopping again changes nothing."""
    made = make("life", settings)
    with pytest.raises(EngineFailed, match="not started"):
        _ = made.url
    made.start()
    assert made.alive()
    assert made.memory_bytes() == 1000
    with pytest.raises(openai.APIStatusError, match="sleeps"):
        client(made).completions.create(model="life", prompt="hi")
    made.activate()
    assert made.memory_bytes() == 4200
    assert (made.max_num_seqs, made.room_tokens) == (8, 1600)
    made.quiesce()
    assert made.memory_bytes() == 1000
    made.stop()
    made.stop()
    assert not made.alive()
    assert made.memory_bytes() is None


def test_answers_when_the_cost_model_says(engine):
    """10 words in, 3 tokens out, alone: 0.21 s prefill, then decode steps with 11 and 12
    tokens of context; streamed text and whole text are the same."""
    asked = {"model": engine.served_name, "prompt": "a b c d e f g h i j"}
    whole = client(engine).completions.create(**asked, max_tokens=3)
    times = whole.simulated
    assert times["first_token_s"] - times["arrival_s"] == pytest.approx(0.21)
    steps_s = (0.11 + 0.011) + (0.11 + 0.012)
    assert times["end_s"] - times["first_token_s"] == pytest.approx(steps_s)
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, 3)
    assert whole.choices[0].finish_reason == "length"
    chunks = client(engine).completions.create(**asked, max_tokens=3, stream=True)
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text


def test_chat_streams_as_openai_does(engine):
    """One id for the whole stream, the role first, a reason at the end, usage last. A text
    in parts counts as well."""
    chunks = list(
        client(engine).chat.completions.create(
            model=engine.served_name,
            messages=[
                {"role": "user", "content": [{"type": "text", "text": "one two"}]}
            ],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content for c in chunks if c.choices)
    assert len(text.split()) == 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 7)


def test_prompts_as_token_ids_and_what_is_refused(engine):
    """As many tokens as ids; what does not fit, is no JSON, or names another LLM, is
    refused as OpenAI does."""
    ask = client(engine).completions.create
    name = engine.served_name
    told = ask(model=name, prompt=[7] * 1000, max_tokens=1)
    assert told.usage.prompt_tokens == 1000
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model=name, prompt=[7] * 1600, max_tokens=2)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        ask(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        client(engine).post("/completions", cast_to=object, content=b"{")
    with pytest.raises(openai.BadRequestError):
        ask(model=name, prompt="x", max_tokens="many")


def test_requests_share_iterations(engine):
    """Two requests of 400 tokens in and 30 out at once: each takes longer than alone, since
    their decode steps are the same ones."""
    asked = {"model": engine.served_name, "prompt": [1] * 400, "max_tokens": 30}
    alone = client(engine).completions.create(**asked).simulated
    both: list[dict] = []

    def ask():
        both.append(client(engine).completions.create(**asked).simulated)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone_s = alone["end_s"] - alone["first_token_s"]
    for times in both:
        together_s = times["end_s"] - times["first_token_s"]
        assert 1.3 * alone_s < together_s


def test_metrics_have_vllms_names(engine):
    """Counted: the token of the canary and these 4; one request running none waiting."""
    client(engine).completions.create(
        model=engine.served_name, prompt="x", max_tokens=4
    )
    text = (
        client(engine)
        .with_options(base_url=engine.url)
        .get("/metrics", cast_to=str, options={"headers": {"accept": "text/plain"}})
    )
    label = f'{{engine="0",model_name="{engine.served_name}"}}'
    assert f"vllm:generation_tokens_total{label} 5" in text
    assert f"vllm:num_requests_running{label} 0" in text
    assert f"vllm:time_to_first_token_seconds_count{label} 2" in text
    assert f"vllm:inter_token_latency_seconds_count{label} 3" in text
    assert 'sleep_state="awake"} 1.0' in text


def test_a_client_that_leaves_is_cancelled(engine):
    """Its stream is closed after the first chunk: nothing runs or waits any more."""
    stream = client(engine).completions.create(
        model=engine.served_name, prompt="x", max_tokens=1500, stream=True
    )
    next(iter(stream))
    stream.close()
    api = client(engine).with_options(base_url=engine.url)
    running = "vllm:num_requests_running"
    pause = threading.Event()
    for _ in range(100):
        text = api.get("/metrics", cast_to=str)
        (line,) = (row for row in text.splitlines() if row.startswith(f"{running}{{"))
        if line.endswith(" 0"):
            break
        pause.wait(0.02)
    assert line.endswith(" 0")
    assert 'finished_reason="abort"} 1' in text


def test_loads_that_fail(settings):
    """The next load of that LLM fails, the one after does not; others never."""
    node_of(settings).fail_loads("unlucky")
    unlucky, lucky = make("unlucky", settings), make("lucky", settings)
    with pytest.raises(EngineFailed, match="load failed"):
        unlucky.start()
    assert not unlucky.alive()
    unlucky.stop()
    lucky.start()
    again = make("unlucky", settings)
    again.start()
    assert lucky.alive()
    assert again.alive()
    lucky.stop()
    again.stop()


def test_stop_cuts_a_load_short(settings):
    """A load of a million seconds ends with an error as soon as the engine is stopped."""
    slow = make("endless", settings, load_s=1e6)
    failed = threading.Event()

    def start():
        with suppress(EngineFailed):
            slow.start()
            return
        failed.set()

    thread = threading.Thread(target=start)
    thread.start()
    while slow._number is None:
        thread.join(0.01)
    slow.stop()
    assert failed.wait(5)
    thread.join()


def test_one_that_dies_cuts_its_streams_and_no_others(engine, settings):
    """The stream breaks off without an end; the engine beside it goes on."""
    other = make("other", settings)
    other.start()
    stream = client(engine).completions.create(
        model=engine.served_name, prompt="x", max_tokens=1500, stream=True
    )
    chunks = iter(stream)
    next(chunks)
    engine.fail("die")
    with pytest.raises(openai.APIConnectionError):
        list(chunks)
    assert not engine.alive()
    assert other.alive()
    other.stop()


def test_one_that_lies_fails_its_canary(engine):
    """It says it is awake and answers, but not what it should."""
    engine.quiesce()
    engine.fail("gibberish")
    with pytest.raises(EngineFailed, match="canary"):
        engine.activate()


def test_one_that_hangs_is_not_alive(engine):
    """Its port still takes connections; nothing ever comes."""
    assert engine.alive()
    engine.fail("hang")
    assert not engine.alive()


def test_the_server_is_killed(tmp_path):
    """All its engines are dead at once; the next start makes a new server, and an engine
    of the old one stays dead."""
    settings = SimulatedSettings(folder=tmp_path, time_scale=1e3, stop_grace_s=1.0)
    first = make("a", settings)
    first.start()
    child = node_of(settings).child
    (server,) = (pid for pid in child.pids() if pid != child.session)
    os.kill(server, signal.SIGKILL)
    while child.running():
        pass
    assert not first.alive()
    second = make("a", settings)
    second.start()
    assert second.alive()
    assert not first.alive()
    first.stop()
    second.stop()
    close_node(tmp_path)
    assert list(tmp_path.glob("*.json")) == []


OWNER = """
import sys, threading
from pathlib import Path
from foreserve.runtime.engines.process import Child
script = "import subprocess, sys, time; subprocess.Popen(['sleep', '600']); time.sleep(600)"
child = Child([sys.executable, "-c", script], Path(sys.argv[1]), "x", grace_s=0.5)
while len(child.pids()) < 3: pass
print(child.session, flush=True)
threading.Event().wait()
"""


def owner(folder):
    """A process that owns a child with a child of its own; it, and the session's number."""
    started = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None
    session = int(started.stdout.readline())
    started.stdout.close()
    return started, session


def members(session):
    return [p.pid for p in process._processes() if p.session == session]


def test_nothing_outlives_its_owner(tmp_path):
    """The owner is killed: its child and its child's child end too."""
    started, session = owner(tmp_path)
    assert len(members(session)) == 3
    started.kill()
    started.wait()
    pause = threading.Event()
    for _ in range(200):
        if not members(session):
            break
        pause.wait(0.02)
    assert members(session) == []


def test_what_outlives_owner_and_guard_is_found_again(tmp_path):
    """Owner and guard are killed together. The child is killed with its guard; its own
    child is ended by the next owner, and only that: a record of another process is no
    reason to kill it."""
    started, session = owner(tmp_path)
    os.kill(session, signal.SIGKILL)
    started.kill()
    started.wait()
    pause = threading.Event()
    while len(members(session)) > 1:
        pause.wait(0.02)
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (path,) = tmp_path.glob("*.process.json")
    record = json.loads(path.read_text())
    other = tmp_path / "other.process.json"
    other.write_text(json.dumps({**record, "session": bystander.pid}))
    (tmp_path / "torn.process.json").write_text('{"session": 1')
    assert process.reap(tmp_path) == [session]
    assert members(session) == []
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    assert [p.name for p in tmp_path.glob("*.process.*")] == ["torn.process.broken"]
