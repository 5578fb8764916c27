"""The fault run of the other engines, on ours: what can be killed is killed while clients
ask real LLMs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.slow]
pytest.importorskip("uvicorn")
pytest.importorskip("torch", reason="the paged engine needs torch")

from foreserve.runtime.engines import tiny  # noqa: E402
from tests.fault_run import (  # noqa: E402
    LOST_S,
    Clients,
    Supervised,
    conserved,
    one_after_the_other,
)
from tests.tiny_cluster import CORE  # noqa: E402

LLMS = {"a": "llama", "b": "qwen"}
SCENARIO = """
cluster:
  nodes: [{name: n, count: 2, gpu: core, gpus: 1, host_ram: 1GiB}]
CORE
models: [MODELS]
epoch: 10s
slo: {ttft: 10s, tpot: 500ms}
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
runtime: {max_num_seqs: 8, residue: 0GiB}
"""
KINDS = (
    "engine server killed",
    "guard of engines killed",
    "agent killed",
    "plan serve killed",
    "engine server hangs",
    "node stopped for 20 s",
    "weights gone for a load",
)
WITHIN_S = 30.0
"""A server of ours takes some seconds to start, and more on a busy machine."""


async def run(
    folder: Path,
) -> tuple[Clients, tuple[dict[str, float], dict[str, float]]]:
    served = Supervised(folder, ["--scenario", "s.yaml", "--engine", "paged"])
    async with Clients(served.port, deadline_s=40.0) as clients:
        return clients, await one_after_the_other(
            served,
            clients,
            KINDS,
            list(LLMS),
            lambda llm: clients.ask(llm, 50, 10),
            0.5,
        )


def test_faults_one_after_the_other(tmp_path):
    """Two LLMs on two nodes. The process that has the LLMs is killed, then its guard, then
    an agent, then `plan serve`; that process hangs; a node is stopped; weights are gone for
    a load, which fails, until they are back. Each LLM that was hit answers again, and what
    hung or was lost is ended, not left beside those that took its place. Of requests with
    40 s to wait that the gateway did not take with it, four of five are answered at least.
    The logs are as `conserved` says."""
    folder = Path(os.path.relpath(tmp_path))  # a socket's name must be short
    folder = folder if len(str(folder)) < len(str(tmp_path)) else tmp_path
    models = ", ".join(
        f"{{name: {name}, llm: {tiny.make(tmp_path / name, family).resolve()}, "
        "tp: [1], input_tokens: 50, output_tokens: 10}"
        for name, family in LLMS.items()
    )
    core = CORE.format(memory_bytes=300_000_000)
    text = SCENARIO.replace("CORE", core).replace("MODELS", models)
    (folder / "s.yaml").write_text(text)
    clients, (took_s, ended_s) = asyncio.run(run(folder))
    assert list(took_s) == list(KINDS)
    assert max(took_s.values()) < WITHIN_S, took_s
    assert max(ended_s.values()) < LOST_S, ended_s
    conserved(clients, folder / "st")
    patient = clients.outcomes()
    lost = patient.get("broken", 0) + patient.get("refused", 0)  # with the gateway
    assert patient["ok"] > 0.8 * (sum(patient.values()) - lost), patient
