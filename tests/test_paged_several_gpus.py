"""The `paged` engine on several GPUs: LLMs of one and of two share their pages."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

from foreserve.models.specs import GpuId
from foreserve.runtime.engines.base import EngineFailed

pytestmark = pytest.mark.torch
pytest.importorskip("httptools", reason="engine servers need the extra 'serve'")
openai = pytest.importorskip("openai")
torch = pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.engines.paged import (  # noqa: E402
    PagedSettings,
    close_servers,
    server_of,
)
from foreserve.runtime.paged.text import Words  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402
from tests.test_engines_paged import make as one  # noqa: E402

PAGE = 65536
GPUS = tuple(GpuId(node="n0", index=i) for i in range(2))
FAMILIES = ("llama", "qwen", "gemma2", "qwen3")


@pytest.fixture(scope="module")
def llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llms")
    return {family: Llm(folder / family, family) for family in FAMILIES}


@pytest.fixture
def settings(tmp_path, llms):
    """Two GPUs of 8 MiB; a whole LLM takes about 2."""
    yield PagedSettings(
        folder=tmp_path,
        pool_bytes=8 * 2**20,
        page_bytes=PAGE,
        checkpoints={name: str(llm.folder) for name, llm in llms.items()},
        stop_grace_s=1.0,
        answers_within_s=20.0,
    )
    close_servers(tmp_path)


def make(llm, settings, *gpus):
    return one(llm, settings, tuple(GPUS[i] for i in gpus), output_tokens=1.0)


def awake(*args):
    engine = make(*args)
    engine.start()
    engine.activate()
    return engine


def used(settings):
    """Pages that anybody has, by GPU."""
    return [server_of(settings, gpu).call("GET", "/pool")["used"] for gpu in GPUS]


def complete(engine, prompt, tokens, **more):
    api = openai.OpenAI(base_url=engine.url + "/v1", api_key="-", max_retries=0)
    return api.completions.create(
        model=engine.served_name,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
        **more,
    )


def until(what):
    pause = threading.Event()
    while not what():
        pause.wait(0.01)


def test_llms_of_one_and_two_gpus_take_turns(settings, llms):
    """Two LLMs over both GPUs (one of which was given them in the other order) and one on
    each, all ACTIVE, from the same pages, with more tokens asked for than those hold at a
    time: all answers are transformers'. A shard has half the pages. Asleep, dropped: each
    GPU's books say so."""
    settings = replace(settings, pool_bytes=6 * 2**20)
    engines = {
        "qwen": awake("qwen", settings, 0, 1),
        "llama": awake("llama", settings, 0),
        "gemma2": awake("gemma2", settings, 1, 0),
        "qwen3": awake("qwen3", settings, 1),
    }
    weights = used(settings)
    assert engines["qwen"].memory_bytes() < 0.6 * engines["qwen3"].memory_bytes()

    def ask(i):
        family = FAMILIES[i % 4]
        prompt = [(7 * i + n) % 500 for n in range(5 + 24 * i)]
        return family, prompt, complete(engines[family], prompt, 24).choices[0].text

    with ThreadPoolExecutor(24) as pool:
        for family, prompt, text in pool.map(ask, range(24)):
            llm = llms[family]
            assert text == Words(llm.folder).text(llm.told(prompt, 24))
    until(lambda: used(settings) == weights)
    for engine in engines.values():
        engine.quiesce()
    engines["qwen"].activate()
    until(lambda: used(settings) == weights)
    # Log probabilities of a prompt take sums of their own, by all ranks.
    prompt = [(5 * n) % 500 for n in range(150)]
    told = complete(engines["qwen"], prompt, 1, logprobs=0, echo=True).choices[0]
    with torch.inference_mode():
        rows = llms["qwen"].reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
    wanted = rows[torch.arange(149), torch.tensor(prompt[1:])].tolist()
    assert told.logprobs.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-3)
    # A stream that is left gives its pages back on both.
    stream = complete(engines["qwen"], [3] * 200, 800, stream=True)
    next(iter(stream))
    assert all(
        now > before for now, before in zip(used(settings), weights, strict=True)
    )
    stream.close()
    until(lambda: used(settings) == weights)
    for engine in engines.values():
        engine.stop()
    until(lambda: used(settings) == [0, 0])


def test_a_follower_is_killed(settings):
    """The engine is dead, also while nobody asks it; its leader ends with the next
    iteration, or gives up what it had when the engine is stopped. A new engine finds a new
    follower and says what the old one said."""
    first = awake("qwen", settings, 0, 1)
    child = server_of(settings, GPUS[1]).child
    (pid,) = (pid for pid in child.pids() if pid != child.session)
    assert first.alive()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not child.running())
    assert not first.alive()
    with pytest.raises(openai.OpenAIError):
        complete(first, "x", 3)
    leader = server_of(settings, GPUS[0])
    until(lambda: not leader.child.running())
    first.stop()
    second = awake("qwen", settings, 0, 1)
    assert second._answer == first._answer
    assert second.alive()
    assert not first.alive()
    second.stop()
    until(lambda: used(settings) == [0, 0])


def test_a_follower_hangs(settings):
    """While its leader waits for it: the engine is dead, and stopping it ends both; a new
    one answers."""
    settings = replace(settings, answers_within_s=1.5)
    first = awake("qwen", settings, 0, 1)
    servers = [server_of(settings, gpu) for gpu in GPUS]
    stream = complete(first, [3] * 20, 900, stream=True)
    next(iter(stream))
    (pid,) = (p for p in servers[1].child.pids() if p != servers[1].child.session)
    os.kill(pid, signal.SIGSTOP)
    assert not first.alive()
    first.stop()
    until(lambda: not any(server.child.running() for server in servers))
    second = awake("qwen", settings, 0, 1)
    assert second.alive()
    second.stop()
    until(lambda: used(settings) == [0, 0])


def test_a_leader_is_killed(settings, llms):
    """While it answers: the follower gives up its shard and pages, and the other LLM there
    goes on."""
    other = awake("llama", settings, 1)
    alone = used(settings)[1]
    engine = awake("qwen", settings, 0, 1)
    next(iter(complete(engine, [3] * 20, 900, stream=True)))
    child = server_of(settings, GPUS[0]).child
    (pid,) = (pid for pid in child.pids() if pid != child.session)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not engine.alive())
    follower = server_of(settings, GPUS[1])
    until(lambda: follower.call("GET", "/pool")["used"] == alone)
    llm = llms["llama"]
    text = complete(other, [5, 6, 7], 8).choices[0].text
    assert text == Words(llm.folder).text(llm.told([5, 6, 7], 8))


def test_loads_that_fail(settings):
    """No checkpoint, or no room on the second GPU alone: one line says so, and nothing is
    left on either GPU; with room there, the next load is as ever."""
    full = [awake("llama", settings, 1) for _ in range(3)]
    full.append(awake("gemma2", settings, 0, 1))
    full[-1].quiesce()
    before = used(settings)
    with pytest.raises(EngineFailed, match="pages are missing"):
        make("qwen", settings, 0, 1).start()
    lost = replace(settings, checkpoints={"qwen": "/none"})
    with pytest.raises(EngineFailed, match=r"config\.json"):
        make("qwen", lost, 0, 1).start()
    until(lambda: used(settings) == before)
    for engine in full:
        engine.stop()
    awake("qwen", settings, 0, 1).stop()
    until(lambda: used(settings) == [0, 0])


def test_a_load_waits_for_room_on_each_gpu(settings):
    """Requests have the second GPU: an LLM of both, whose shard fits on the first, waits
    there; when requests wait for it the follower is told, and takes what it needs."""
    other = awake("llama", settings, 1)
    stops = threading.Event()

    def ask(i):
        while not stops.is_set():
            complete(other, [3 + i] * 600, 100 + 25 * i)

    engine = make("qwen", settings, 0, 1)
    with ThreadPoolExecutor(13) as pool, ExitStack() as end:
        end.callback(stops.set)
        asking = [pool.submit(ask, i) for i in range(12)]
        until(lambda: used(settings)[1] > 33 + 8 * 10)
        starting = pool.submit(engine.start)
        until(lambda: used(settings)[0] >= 17)
        with pytest.raises(TimeoutError):
            starting.result(1.0)
        engine.hurry()
        starting.result(20.0)
        stops.set()
        for one in asking:
            one.result(30.0)
    engine.activate()
    assert complete(engine, "x", 3).choices[0].text
    engine.stop()
    other.stop()
    until(lambda: used(settings) == [0, 0])
