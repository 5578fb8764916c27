"""`plan serve` on our own engine: tiny LLMs of different families that take turns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow]
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
pytest.importorskip("torch", reason="the paged engine needs torch")
pytest.importorskip("transformers", reason="compared with transformers")

from foreserve.runtime.paged.text import Words  # noqa: E402
from tests.paged_llms import Llm  # noqa: E402

FAMILIES = ("llama", "qwen", "mistral", "qwen3")
SCENARIO = """
cluster:
  nodes: [{name: n, gpu: core, gpus: 2, host_ram: 1GiB}]
  gpu_types:
    - name: core
      memory_bytes: 100000000
      hbm_bytes_per_s: 8.0e+9
      bf16_flop_per_s: 5.0e+10
      gpu_link_bytes_per_s: 1.0e+9
      host_link_bytes_per_s: 1.0e+9
      price_usd_per_h: 0.05
models: [MODELS]
epoch: 10m
slo: {ttft: 10s, tpot: 500ms}
forecast: {method: last}
solver: {name: highs, time_limit: 2s}
runtime: {max_num_seqs: 8, residue: 0GiB, keep_alive: 500ms}
"""


def test_real_llms_are_switched(tmp_path, capsys):
    """Four LLMs on two GPUs with room for one ACTIVE each: twelve chats, up to eight at
    once, are answered with transformers' greedy tokens. Nothing is left behind."""
    # A socket's name must be short.
    folder = Path(os.path.relpath(tmp_path))
    llms = {family: Llm(tmp_path / family, family) for family in FAMILIES}
    models = ", ".join(
        f"{{name: {name}, llm: {llm.folder.resolve()}, tp: [1], input_tokens: 50, "
        "output_tokens: 20}"
        for name, llm in llms.items()
    )
    (tmp_path / "s.yaml").write_text(SCENARIO.replace("MODELS", models))
    words = "serve --scenario s.yaml --engine paged --port 0 --state st"
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "foreserve", *words.split()],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    told = []
    try:
        about = tmp_path / "st/admin.json"
        while not about.exists():
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            threading.Event().wait(0.1)
        port = json.loads(about.read_text())["port"]
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="-",
            max_retries=0,
            timeout=120.0,
        )

        def ask(i: int) -> tuple[str, str, float]:
            name = FAMILIES[i % 4]
            began_s = monotonic()
            chunks = client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": f"kalo {'mira ' * i}"}],
                temperature=0,
                max_tokens=16,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            text = ""
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
            return name, text, monotonic() - began_s

        for names in (range(4), range(8)):
            with ThreadPoolExecutor(12) as pool:
                for i, (name, text, took_s) in zip(
                    names, pool.map(ask, names), strict=True
                ):
                    words = Words(llms[name].folder)
                    prompt = words.chat(
                        [{"role": "user", "content": f"kalo {'mira ' * i}"}], {}
                    )
                    assert text == words.text(llms[name].told(prompt, 16))
                    told.append(f"{name}: {took_s:.2f} s")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        with capsys.disabled():
            print("\n" + ", ".join(told))  # noqa: T201
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert not left.stdout.split()
    assert process.returncode == 0, (tmp_path / "serve.log").read_text()
