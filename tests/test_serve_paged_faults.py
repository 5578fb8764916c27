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
from foreserve.runtime.live.check import check  # noqa: E402
from tests.fault_run import Clients, Supervised, inflict  # noqa: E402

LLMS = {"a": "llama", "b": "qwen"}
SCENARIO = """
cluster:
  nodes: [{name: n, count: 2, gpu: core, gpus: 1, host_ram: 1GiB}]
  gpu_types:
    - name: core
      memory_bytes: 300000000
      hbm_bytes_per_s: 8.0e+9
      bf16_flop_per_s: 5.0e+10
      gpu_link_bytes_per_s: 1.0e+9
      host_link_bytes_per_s: 1.0e+9
      price_usd_per_h: 0.05
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
)
WITHIN_S = 30.0
"""A server of ours takes some seconds to start, and more on a busy machine."""


async def run(folder: Path) -> tuple[Clients, dict[str, float]]:
    """The faults one after the other under load; when each was over."""
    served = Supervised(folder, ["--scenario", "s.yaml", "--engine", "paged"])
    took_s: dict[str, float] = {}
    async with Clients(served.port, deadline_s=40.0) as clients:
        await served.up()
        ended = asyncio.Event()
        load = asyncio.create_task(ask_on(clients, ended))
        try:
            await asyncio.gather(*(clients.outage(llm, 0.0) for llm in LLMS))
            for kind in KINDS:
                await served.whole()
                llm, node = await served.single(list(LLMS))
                scene, outages = await inflict(served, clients, kind, node, llm)
                took_s[kind] = max(outages.values(), default=0.0)
                for task in scene.later:
                    task.cancel()
        finally:
            ended.set()
            await load
            served.stop()
    return clients, took_s


async def ask_on(clients: Clients, ended: asyncio.Event) -> None:
    """A request for each LLM every 0.5 s; returns when all that were sent have ended."""
    async with asyncio.TaskGroup() as group:
        while not ended.is_set():
            for llm in LLMS:
                group.create_task(clients.ask(llm, 50, 10))
            await asyncio.sleep(0.5)


def test_faults_one_after_the_other(tmp_path):
    """Two LLMs on two nodes. The process that has the LLMs is killed, then its guard, then
    an agent, then `plan serve`: each LLM that was hit answers again. Of requests with 40 s
    to wait that the gateway did not take with it, four of five are answered at least. Every
    client hears how its request ended; by the logs no GPU was over-committed, and each
    accepted request has one end."""
    folder = Path(os.path.relpath(tmp_path))  # a socket's name must be short
    folder = folder if len(str(folder)) < len(str(tmp_path)) else tmp_path
    models = ", ".join(
        f"{{name: {name}, llm: {tiny.make(tmp_path / family, family).resolve()}, "
        "tp: [1], input_tokens: 50, output_tokens: 10}"
        for name, family in LLMS.items()
    )
    (folder / "s.yaml").write_text(SCENARIO.replace("MODELS", models))
    clients, took_s = asyncio.run(run(folder))
    assert list(took_s) == list(KINDS)
    assert max(took_s.values()) < WITHIN_S, took_s
    assert not [sent for sent in clients.sent if sent.silent]
    found = check(folder / "st")
    assert found.faults == []
    assert found.unfinished == 0
    assert max(found.peak.values()) <= 1.0
    ok = sum(sent.outcome == "ok" for sent in clients.sent)
    gone = sum(sent.outcome in ("broken", "refused") for sent in clients.sent)
    patient = clients.outcomes()
    lost = patient.get("broken", 0) + patient.get(
        "refused", 0
    )  # by the gateway's death
    assert patient["ok"] > 0.8 * (sum(patient.values()) - lost), patient
    assert ok <= found.ends["finished"] <= ok + gone
