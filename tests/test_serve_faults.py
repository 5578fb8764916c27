"""A small fault run: everything that can be killed is killed while clients ask."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from time import monotonic

import pytest

pytest.importorskip("uvicorn")

from foreserve.runtime.live.check import check
from tests.fault_run import LOST_S, Clients, Supervised, inflict

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


async def run(folder: Path) -> tuple[Clients, dict[str, float]]:
    """The faults one after the other under load; when each was over."""
    (folder / "s.yaml").write_text(SCENARIO)
    served = Supervised(folder, ["--scenario", "s.yaml", "--engine", "simulated"])
    took_s: dict[str, float] = {}
    async with Clients(served.port, deadline_s=20.0) as clients:
        await served.up()
        ended = asyncio.Event()
        load = asyncio.create_task(ask_on(clients, ended))
        try:
            await asyncio.gather(*(clients.outage(m, monotonic()) for m in LLMS))
            for kind in KINDS:
                await served.whole()
                llm, node = await served.single(LLMS)
                scene, outages = await inflict(served, clients, kind, node, llm)
                took_s[kind] = max(outages.values())
                for task in scene.later:
                    task.cancel()
        finally:
            ended.set()
            await load
            served.stop()
    return clients, took_s


async def ask_on(clients: Clients, ended: asyncio.Event) -> None:
    """A request for each LLM every 0.3 s; returns when all that were sent have ended."""
    async with asyncio.TaskGroup() as group:
        while not ended.is_set():
            for llm in LLMS:
                group.create_task(clients.ask(llm, 200, 20))
            await asyncio.sleep(0.3)


def test_faults_one_after_the_other(tmp_path):
    """Three LLMs on two nodes. An agent is killed; an engine dies and its next load fails;
    `plan serve` is killed and started again; an engine hangs; a node is stopped, and its
    agent with it, which is then replaced. Each LLM that was hit answers in time again
    within 10 s. Every client hears how its request ended, and breaks in a connection come
    from the killed gateway alone. In the logs no GPU was over-committed at any line, each
    accepted request has one end, and there are as many as clients saw."""
    folder = Path(os.path.relpath(tmp_path))  # a socket's name must be short
    folder = folder if len(str(folder)) < len(str(tmp_path)) else tmp_path
    clients, took_s = asyncio.run(run(folder))
    assert list(took_s) == list(KINDS)
    assert max(took_s.values()) < WITHIN_S < LOST_S, took_s
    assert not [sent for sent in clients.sent if sent.silent]
    found = check(folder / "st")
    assert found.faults == []
    assert found.unfinished == 0
    assert max(found.peak.values()) <= 1.0
    ok = sum(sent.outcome == "ok" for sent in clients.sent)
    gone = sum(sent.outcome in ("broken", "refused") for sent in clients.sent)
    told = len(clients.sent) - ok - gone
    assert ok > 0.6 * len(clients.sent)
    assert ok <= found.ends["finished"] <= ok + gone
    assert ok + told <= found.requests <= len(clients.sent)
    assert found.ends["gateway_lost"] <= gone
