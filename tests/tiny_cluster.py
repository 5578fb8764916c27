"""`plan serve` as a process of its own, over real tiny LLMs and cores that are called
GPUs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import openai

CORE = """\
  gpu_types:
    - name: core
      memory_bytes: {memory_bytes}
      hbm_bytes_per_s: 8.0e+9
      bf16_flop_per_s: 5.0e+10
      gpu_link_bytes_per_s: 1.0e+9
      host_link_bytes_per_s: 1.0e+9
      price_usd_per_h: 0.05"""
"""A core that is called a GPU, as a scenario's cluster knows it."""
SCENARIO = """
cluster:
  nodes: [{{name: n, gpu: core, gpus: 2, host_ram: 4GiB}}]
{core}
models: [{models}]
epoch: 10m
slo: {{ttft: 10s, tpot: 500ms}}
forecast: {{method: last}}
solver: {{name: highs, time_limit: 2s}}
runtime: {{max_num_seqs: 8, residue: {residue}, keep_alive: {keep_alive}}}
"""
LLM = "{{name: {name}, llm: {folder}, tp: [1], input_tokens: 50, output_tokens: 20}}"


def scenario(
    llms: Mapping[str, Path], *, memory_bytes: int, residue: str, keep_alive: str
) -> str:
    """One node of two GPUs, and the LLMs of these folders."""
    rows = (LLM.format(name=name, folder=llms[name].resolve()) for name in llms)
    return SCENARIO.format(
        core=CORE.format(memory_bytes=memory_bytes),
        models=", ".join(rows),
        residue=residue,
        keep_alive=keep_alive,
    )


@contextmanager
def serving(folder: Path, words: str) -> Iterator[openai.OpenAI]:
    """`plan serve` over ``s.yaml`` of ``folder``, with its state in ``st``: a client that
    is ready to wait. Ended in the end, with exit code 0."""
    # A socket's name must be short.
    words = f"serve --scenario s.yaml --port 0 --state st {words}"
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "foreserve", *words.split()],
            cwd=os.path.relpath(folder),
            stdout=log,
            stderr=log,
        )
    try:
        about = folder / "st/admin.json"
        while not about.exists():
            assert process.poll() is None, (folder / "serve.log").read_text()
            Event().wait(0.1)
        port = json.loads(about.read_text())["port"]
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key="-",
            max_retries=0,
            timeout=300.0,
            default_headers={"X-Foreserve-Max-Wait": "240"},
        ) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90.0)
    assert process.returncode == 0, (folder / "serve.log").read_text()
