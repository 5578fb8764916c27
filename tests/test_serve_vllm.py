"""`plan serve` on vLLM: three tiny LLMs, of which two fit at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event
from time import monotonic

import pytest

from foreserve.runtime.engines import tiny

PYTHON = os.environ.get("FORESERVE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON, reason="FORESERVE_VLLM_PYTHON names no interpreter with vLLM"
    ),
]
FAMILIES = {"first": "llama", "second": "qwen", "third": "mistral"}
SCENARIO = """
cluster:
  nodes: [{name: n, gpu: core, gpus: 2, host_ram: 4GiB}]
  gpu_types:
    - name: core
      memory_bytes: 1200000000
      hbm_bytes_per_s: 8.0e+9
      bf16_flop_per_s: 5.0e+10
      gpu_link_bytes_per_s: 1.0e+9
      host_link_bytes_per_s: 1.0e+9
      price_usd_per_h: 0.05
models:
  - {name: first, llm: first, tp: [1], input_tokens: 50, output_tokens: 20}
  - {name: second, llm: second, tp: [1], input_tokens: 50, output_tokens: 20}
  - {name: third, llm: third, tp: [1], input_tokens: 50, output_tokens: 20}
epoch: 10m
slo: {ttft: 10s, tpot: 500ms}
forecast: {method: last}
solver: {name: highs, time_limit: 2s}
runtime: {max_num_seqs: 8, residue: 0.7GiB, keep_alive: 5s}
"""


def test_the_third_llm_is_answered_after_a_real_switch(tmp_path, capsys):
    """The official client lists all three and streams a chat from each; for the third one
    of the others has to go. A second round of what is there is answered at once."""
    openai = pytest.importorskip("openai")
    # A socket's name must be short.
    folder = Path(os.path.relpath(tmp_path))
    text = SCENARIO
    for seed, (name, family) in enumerate(FAMILIES.items()):
        made = tiny.make(tmp_path / name, family, seed=seed)
        text = text.replace(f"llm: {name},", f"llm: {made.resolve()},")
    (tmp_path / "s.yaml").write_text(text)
    words = f"serve --scenario s.yaml --engine vllm --python {PYTHON} --port 0"
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "foreserve", *words.split(), "--state", "st"],
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    told = []
    try:
        about = tmp_path / "st/admin.json"
        while not about.exists():
            assert process.poll() is None, (tmp_path / "serve.log").read_text()
            Event().wait(0.1)
        port = json.loads(about.read_text())["port"]
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="-",
            max_retries=0,
            timeout=300.0,
            default_headers={"X-Foreserve-Max-Wait": "240"},
        )
        assert {llm.id for llm in client.models.list()} == set(FAMILIES)
        answers = {}
        for name in (*FAMILIES, "third"):
            began_s, first_s, answer = monotonic(), None, ""
            for chunk in client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": "kalo mira"}],
                max_tokens=12,
                temperature=0,
                stream=True,
            ):
                if chunk.choices and chunk.choices[0].delta.content:
                    first_s = first_s or monotonic() - began_s
                    answer += chunk.choices[0].delta.content
            assert first_s is not None
            assert answers.setdefault(name, answer) == answer
            told.append(f"{name}: first token after {first_s:.2f} s")
        assert len(set(answers.values())) == 3
        client.close()
        lines = map(
            json.loads, (tmp_path / "st/journal.jsonl").read_text().splitlines()
        )
        gone = [
            line["llm"]
            for line in lines
            if line["event"] == "phase" and line["phase"] is None
        ]
        assert len(gone) == 1
        assert gone[0] in ("first", "second")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90.0)
        with capsys.disabled():
            sys.stdout.write("\n" + "\n".join(told) + "\n")
    assert process.returncode == 0
