"""A small fault run: everything that can be killed is killed while clients ask."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from tests.fault_run import (
    LOST_S,
    Clients,
    Supervised,
    conserved,
    one_after_the_other,
)

SCENARIO = """
cluster: {nodes: [{name: n, count: 2, gpu: h100, gpus: 4, host_ram: 1TiB}]}
models:
  - {name: a, llm: llama-3.1-8b, input_tokens: 200, output_tokens: 20}
  - {name: b, llm: qwen2.5-7b, input_tokens: 200, output_tokens: 20}
  - {name: c, llm: qwen3-8b, input_tokens: 200, output_tokens: 20}
epoch: 10s
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
"""
LLMS = ("a", "b", "c")
KINDS = (
    "agent killed",
    "engine dies, its load fails",
    "plan serve killed",
    "node stopped for 20 s",
)
WITHIN_S = 10.0


async def run(
    folder: Path,
) -> tuple[Clients, tuple[dict[str, float], dict[str, float]]]:
    served = Supervised(folder, ["--scenario", "s.yaml", "--engine", "simulated"])
    async with Clients(served.port, deadline_s=20.0) as clients:
        return clients, await one_after_the_other(
            served, clients, KINDS, LLMS, lambda llm: clients.ask(llm, 200, 20), 0.3
        )


def test_faults_one_after_the_other(tmp_path):
    """Three LLMs on two nodes. An agent is killed; an engine dies and its next load fails;
    `plan serve` is killed and started again; a node is stopped, and its agent with it,
    which is ended and replaced. Each LLM that was hit answers in time again within 10 s.
    The logs are as `conserved` says."""
    folder = Path(os.path.relpath(tmp_path))  # a socket's name must be short
    folder = folder if len(str(folder)) < len(str(tmp_path)) else tmp_path
    (folder / "s.yaml").write_text(SCENARIO)
    clients, (took_s, ended_s) = asyncio.run(run(folder))
    assert list(took_s) == list(KINDS)
    assert max(took_s.values()) < WITHIN_S, took_s
    assert max(ended_s.values()) < LOST_S, ended_s
    conserved(clients, folder / "st")
    ok = sum(sent.outcome == "ok" for sent in clients.sent)
    assert ok > 0.6 * len(clients.sent)
