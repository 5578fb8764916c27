"""The `paged` engine: a real process, real HTTP, real (tiny) LLMs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from foreserve.cli.engines import engine_settings
from foreserve.models.placement import replica_id
from foreserve.models.specs import GpuId
from foreserve.planner.arrivals import trace_of
from foreserve.planner.fleet import build_fleet, request_lengths
from foreserve.planner.scenario import load_scenario
from foreserve.runtime.engines.base import EngineFailed, keep, maker

pytestmark = pytest.mark.torch
pytest.importorskip("httptools", reason="engine servers need the extra 'serve'")
openai = pytest.importorskip("openai")
pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.engines import paged  # noqa: E402
from foreserve.runtime.engines.paged import (  # noqa: E402
    PagedSettings,
    close_servers,
    server_of,
    store_of,
)
from tests.paged_llms import Llm  # noqa: E402
from tests.test_engines_simulated import option  # noqa: E402
from tests.tiny_cluster import scenario  # noqa: E402

FAMILIES = ("llama", "qwen3", "gemma2")
GPU = GpuId(node="n0", index=0)
PAGE = 65536


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return {family: Llm(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, llms):
    """One server for all tests here: 12 MiB, of which three LLMs take 6."""
    folder = tmp_path_factory.mktemp("node")
    known = PagedSettings(
        folder=folder,
        pool_bytes=12 * 2**20,
        page_bytes=PAGE,
        checkpoints={name: str(llm.folder) for name, llm in llms.items()},
        stop_grace_s=1.0,
        answers_within_s=10.0,
    )
    server_of(known, GPU).call("GET", "/health", wait_s=60.0)
    yield known
    close_servers(folder)


def make(llm, settings, gpus=(GPU,), **changed):
    known = {"kv_bytes": 2**20, "kv_token_bytes": 1024, "resident_bytes": 2 * 2**20}
    known |= {"input_tokens": 30.0, "output_tokens": 10.0}
    return maker("paged")(
        option(llm, **(known | changed)), replica_id(llm, gpus), settings
    )


@pytest.fixture
def engines(settings):
    """All three, ACTIVE."""
    made = {family: make(family, settings) for family in FAMILIES}
    for engine in made.values():
        engine.start()
        engine.activate()
    yield made
    for engine in made.values():
        engine.stop()
    assert used(settings) == 0


def used(settings) -> int:
    """Pages of the pool that anybody has."""
    return server_of(settings, GPU).call("GET", "/pool")["used"]


def client(engine):
    return openai.OpenAI(base_url=engine.url + "/v1", api_key="none", max_retries=0)


def words_of(llm, tokens) -> str:
    from foreserve.runtime.paged.text import Words

    return Words(llm.folder).text(tokens)


def test_answers_are_those_of_transformers(engines, llms):
    """Twelve requests to three LLMs at once, streamed and whole, prompts as token ids: the
    text is that of transformers' greedy tokens; usage counts them."""

    def ask(i):
        family = FAMILIES[i % 3]
        prompt = [(7 * i + n) % 500 for n in range(5 + 11 * i)]
        asked = {
            "model": family,
            "prompt": prompt,
            "max_tokens": 9,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        api = client(engines[family]).completions
        if i % 2:
            told = api.create(**asked)
            assert told.usage.completion_tokens == 9
            assert told.usage.prompt_tokens == len(prompt)
            assert told.choices[0].finish_reason == "length"
            return family, prompt, told.choices[0].text
        chunks = list(api.create(**asked, stream=True))
        return family, prompt, "".join(c.choices[0].text for c in chunks)

    with ThreadPoolExecutor(6) as pool:
        for family, prompt, text in pool.map(ask, range(12)):
            wanted = llms[family].told(prompt, 9)
            assert text == words_of(llms[family], wanted)


def test_chat_streams_as_openai_does(engines):
    """The role first, words with their spaces, a stop string that is not said, usage last;
    the same seed says the same."""

    def ask(seed):
        return list(
            client(engines["llama"]).chat.completions.create(
                model="llama",
                messages=[{"role": "user", "content": "kalo, mira?"}],
                temperature=1.3,
                seed=seed,
                max_completion_tokens=12,
                stream=True,
                stream_options={"include_usage": True},
            )
        )

    def text(chunks):
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)

    chunks = ask(5)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 12
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len(text(chunks).split()) > 6
    assert text(ask(5)) == text(chunks) != text(ask(6))
    third = text(chunks).split()[2]
    told = client(engines["llama"]).chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "kalo, mira?"}],
        temperature=1.3,
        seed=5,
        stop=[third],
    )
    assert told.choices[0].message.content == text(chunks).split(third)[0]
    assert told.choices[0].finish_reason == "stop"


def test_what_is_refused(engines):
    """Too long for the room that the plan gives it, another LLM's name, what is no JSON,
    what this engine does not do, a token that there is not; an engine that sleeps."""
    engine = engines["llama"]
    api = client(engine).completions
    with pytest.raises(openai.BadRequestError) as refused:
        api.create(model="llama", prompt=[1] * 1020, max_tokens=10)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        api.create(model="qwen3", prompt="x")
    with pytest.raises(openai.BadRequestError, match="not JSON"):
        client(engine).post("/completions", cast_to=object, content=b"{")
    with pytest.raises(openai.BadRequestError, match="suffix"):
        api.create(model="llama", prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError, match="does not have"):
        api.create(model="llama", prompt=[10_000])
    engine.quiesce()
    with pytest.raises(openai.InternalServerError, match="sleeps"):
        api.create(model="llama", prompt="x")
    engine.activate()
    assert api.create(model="llama", prompt="x").choices[0].text


def test_warm_llms_hold_weights_alone(engines, settings):
    """ACTIVE and idle or WARM: the same pages, those of its weights. While it answers it
    holds KV pages too, and gives up what the answer does not need."""
    engine = engines["llama"]
    weights = engine.memory_bytes()
    assert weights == -(-(2136576) // PAGE) * PAGE
    stream = client(engine).completions.create(
        model="llama",
        prompt=[3] * 200,
        max_tokens=800,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    assert engine.memory_bytes() >= weights + 4 * PAGE
    assert engine.shrink() == 2**20 - 16 * PAGE  # 999 tokens of 1024 bytes
    stream.close()
    engine.quiesce()
    assert engine.memory_bytes() == weights


def test_a_client_that_leaves_is_cancelled(engines):
    """Its stream is closed after the first chunk: nothing runs any more, and its pages are
    free."""
    engine = engines["qwen3"]
    weights = engine.memory_bytes()
    stream = client(engine).completions.create(
        model="qwen3",
        prompt="x",
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    pause = threading.Event()
    while engine.memory_bytes() != weights:
        pause.wait(0.01)
    api = client(engine).with_options(base_url=engine.url)
    text = api.get("/metrics", cast_to=str)
    label = '{engine="0",model_name="qwen3"}'
    assert f"vllm:num_requests_running{label} 0" in text
    assert 'finished_reason="abort"} 1' in text
    assert 'sleep_state="awake"} 1.0' in text


def test_loads_that_fail(settings, tmp_path):
    """A checkpoint that is not there, one that is cut off, one for which the pool has no
    room: one line says so, nothing stays in the pool, and the next load is as ever."""
    from foreserve.runtime.engines import tiny

    before = used(settings)
    folder = tiny.make(tmp_path / "cut", "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    large = tiny.make(tmp_path / "large", "llama", hidden=512, layers=3)
    other = {"a": str(tmp_path / "none"), "b": str(folder), "c": str(large)}
    for llm, says in (("a", "config.json"), ("b", "safetensors"), ("c", "pages")):
        engine = make(llm, replace(settings, checkpoints=other))
        with pytest.raises(EngineFailed, match=says):
            engine.start()
        assert not engine.alive()
        engine.stop()
    assert used(settings) == before
    engine = make("llama", settings)
    engine.start()
    engine.activate()
    engine.stop()
    assert not engine.alive()
    assert used(settings) == before


def test_the_server_is_killed(tmp_path, llms, monkeypatch):
    """Two GPUs' servers that load one LLM at once read it once; there is room in host
    memory for one, and the plan keeps it there. All engines of a server that is killed are
    dead at once; the next start makes a new server, which has the weights without reading
    them, and its answers are the same. Another LLM finds no room, and is read past the
    store: its answers are those of transformers. A store that is killed takes no server
    with it, and one that hangs is ended: the next load has a new one. Nothing is left of
    any of them."""
    settings = PagedSettings(
        folder=tmp_path / ("long" * 20),
        pool_bytes=8 * 2**20,
        page_bytes=PAGE,
        host_bytes=3 * 2**20,
        checkpoints={name: str(llm.folder) for name, llm in llms.items()},
        stop_grace_s=1.0,
        answers_within_s=10.0,
    )
    others, names = [GPU, GpuId(node="n0", index=1)], os.listdir("/dev/shm")
    keep("foreserve.runtime.engines.paged", settings, ["llama", "unknown"])
    try:
        both = [make("llama", settings, (gpu,)) for gpu in others]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda engine: engine.start(), both))
        store = store_of(settings)
        once = len(llms["llama"].memory)
        assert store.look(10.0) == {"held_bytes": once, "read_bytes": once}
        first, elsewhere = both
        child = server_of(settings, GPU).child
        os.kill(process_of(child), signal.SIGKILL)
        while child.running():
            threading.Event().wait(0.01)
        assert not first.alive()
        assert elsewhere.alive()
        with pytest.raises(EngineFailed, match="ended"):
            first.activate()
        second = make("llama", settings)
        second.start()
        second.activate()
        assert second._answer == first._answer == elsewhere._answer
        assert not first.alive()
        first.stop()
        assert second.alive()
        third = make("qwen3", settings)
        third.start()
        third.activate()
        assert store.look(10.0) == {"held_bytes": once, "read_bytes": once}
        says(third, llms["qwen3"])
        os.kill(process_of(store.child), signal.SIGKILL)
        while store.child.running():
            threading.Event().wait(0.01)
        says(second, llms["llama"])
        third.stop()
        fourth = make("gemma2", settings)
        fourth.start()
        newer = store_of(settings)
        assert newer.look(10.0)["read_bytes"] == len(llms["gemma2"].memory)
        os.kill(process_of(newer.child), signal.SIGSTOP)
        monkeypatch.setattr(paged, "START_S", 0.0)
        newest = store_of(replace(settings, answers_within_s=0.2), ask=True)
        assert newer.child.pids() == []
        fourth.activate()
        says(fourth, llms["gemma2"])
        assert newest.look(10.0) == {"held_bytes": 0, "read_bytes": 0}
        assert os.listdir("/dev/shm") == names
    finally:
        close_servers(settings.folder)
    for gone in (child, store.child, newest.child):
        assert gone.pids() == []


def process_of(child) -> int:
    (pid,) = (pid for pid in child.pids() if pid != child.session)
    return pid


def says(engine, llm):
    """What transformers says."""
    told = client(engine).completions.create(
        model=engine.served_name, prompt=[5, 6, 7], max_tokens=8, temperature=0
    )
    assert words_of(llm, llm.told([5, 6, 7], 8)).startswith(told.choices[0].text)
    assert told.choices[0].text


def test_nothing_here_needs_torch():
    """Agents make paged engines without importing torch."""
    code = "import sys, foreserve.runtime.engines.paged; print('torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("gpus", "ram", "swapping", "swap"),
    [(2, 64 * 2**20, True, 4 * 2**20), (2, 2**40, True, 2**32), (4, 2**30, False, 0)],
)
def test_swapped_pages_are_of_the_nodes_memory(
    llms, tmp_path, gpus, ram, swapping, swap
):
    """Under `plan serve` the servers' room for KV of requests that must leave and the
    store's for weights are the node's host memory together: an eighth is for the former,
    4 GiB per GPU at most, none where nothing is swapped."""
    path = tmp_path / "s.yaml"
    text = scenario(
        {"a": llms["llama"].folder}, memory_bytes=10**8, residue="0GiB", keep_alive="1s"
    )
    for stated, wanted in (
        ("gpus: 2, host_ram: 4GiB", f"gpus: {gpus}, host_ram: {ram}"),
        ("runtime: {", f"runtime: {{swapping: {str(swapping).lower()}, "),
    ):
        assert stated in text
        text = text.replace(stated, wanted)
    path.write_text(text)
    known = load_scenario(path)
    fleet = build_fleet(known, request_lengths(known, trace_of(["a"]), None))
    made = engine_settings(known, fleet, "paged", tmp_path, 1.0, None)
    assert made.swap_bytes == swap
    assert made.host_bytes + gpus * made.swap_bytes == ram
