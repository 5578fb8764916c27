"""The live backend over simulated engines: agents and engines are processes, requests are
HTTP. Loads of 0.1 s, tokens every 10 ms."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines.process import _processes as processes
from foreserve.runtime.engines.simulated import SimulatedSettings
from foreserve.runtime.live.check import check
from foreserve.runtime.live.host import Hosted, setups
from foreserve.runtime.live.patience import Patience
from tests.build import cluster, fleet, option
from tests.live_setup import Live, live, on

QUICK = Patience(watch_s=0.05, hang_s=1.0, first_retry_s=0.1)


@pytest.fixture
def run(tmp_path) -> Iterator[Live]:
    """Three LLMs on two GPUs that hold two each, beside each other one that serves."""
    options = (
        option(llm, load_s=0.1, resident_bytes=3000, kv_bytes=2000) for llm in "abc"
    )
    f = fleet(*options, on=cluster(memory_bytes=10_000))
    settings = SimulatedSettings(
        folder=tmp_path, answers_within_s=0.6, stop_grace_s=0.2
    )
    make = "foreserve.runtime.engines.simulated:make"
    made = setups(f, tmp_path, make, settings, QUICK)
    with live(tmp_path, f, {node: Hosted(made[node]) for node in made}) as found:
        yield found
    found.backend.close(stop_engines=True)
    checked = check(tmp_path)
    assert checked.faults == []
    assert 0.5 <= max(checked.peak.values()) <= 1.0


def url(run: Live, llm: str) -> str:
    return next(r.url for r in run.backend.published if r.id.llm == llm)


def post(address: str, body: dict[str, Any]) -> Any:
    head = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=5.0) as answer:
        return json.loads(answer.read())


def ask(address: str, llm: str, tokens: int = 5) -> int:
    """Tokens that an engine gives for an answer."""
    body = {"model": llm, "prompt": "hello", "max_tokens": tokens}
    given: int = post(f"{address}/v1/completions", body)["usage"]["completion_tokens"]
    return given


def test_a_switch_lets_an_answer_end(run):
    """a answers 60 tokens (0.6 s) when c is wanted in its place: it is drained, the answer
    is whole, and c answers after that."""
    run.reach(on("a", 0), on("b", 1))
    assert ask(url(run, "a"), "a") == ask(url(run, "b"), "b") == 5
    request, given = run.request("a"), []
    address = url(run, "a")

    def stream() -> None:
        given.append(ask(address, "a", 60))
        run.table.release(request)

    thread = threading.Thread(target=stream)
    thread.start()
    run.reach(on("c", 0), on("b", 1))
    assert given == [60]
    thread.join()
    assert ask(url(run, "c"), "c") == 5


def test_a_load_begins_in_what_a_drain_gives_up(run):
    """As before, but a has 3 s to go: the 2000 bytes that are free are too few for c's
    weights, yet they are there before a has ended, in KV memory that a's last request
    cannot need; and the answer is whole."""
    run.reach(on("a", 0), on("b", 0, "WARM"))
    request, given = run.request("a"), []
    address = url(run, "a")

    def stream() -> None:
        given.append(ask(address, "a", 300))
        run.table.release(request)

    thread = threading.Thread(target=stream)
    thread.start()
    run.want(on("c", 0), on("b", 0, "WARM"))

    def phases() -> dict[str, str]:
        return {r.llm: r.phase for r in run.backend.observe().replicas}

    run.until(lambda: phases().get("c") == "WARM")
    assert phases()["a"] == "DRAINING"
    run.until(lambda: phases().get("c") == "ACTIVE")
    thread.join()
    assert given == [300]


@pytest.mark.parametrize("kind", ["die", "hang"])
def test_an_engine_that_fails_is_replaced(run, kind):
    """It dies, or says nothing any more: another one answers within 5 s; b's does not
    change."""
    run.reach(on("a", 0), on("b", 1))
    before, other = url(run, "a"), url(run, "b")
    post(f"{before}/fail", {"kind": kind})
    run.until(lambda: run.table.routable("a") == 0)
    took_s = run.until(lambda: run.table.routable("a") == 1)
    assert took_s < 5.0
    assert url(run, "a") != before
    assert url(run, "b") == other
    assert ask(url(run, "a"), "a") == 5


def test_nobody_is_routed_to_gibberish(run):
    """A replica that is WARM has forgotten its answer: activated, it is never published
    but ended and loaded anew, which then answers."""
    run.reach(on("a", 0), on("b", 1, "WARM"))
    run.reach(on("a", 0), on("b", 1))
    post(f"{url(run, 'b')}/fail", {"kind": "gibberish"})
    bad = url(run, "b")
    run.reach(on("a", 0), on("b", 1, "WARM"))
    run.want(on("a", 0), on("b", 1))
    run.until(lambda: run.table.routable("b") == 1)
    assert url(run, "b") != bad
    assert [t.reason.partition(":")[0] for t in run.backend.troubles()] == ["canary"]


def test_kill_9_of_all_engines(run, tmp_path):
    """The process that all engines of the node live in: both LLMs are served again
    within 10 s, and the agent is the same."""
    run.reach(on("a", 0), on("b", 1))
    (record,) = (tmp_path / "n0").glob("*.process.json")
    os.killpg(json.loads(record.read_text())["session"], signal.SIGKILL)
    clock = SystemClock()
    run.until(lambda: run.table.routable() == 0)
    run.until(lambda: run.table.routable() == 2)
    assert clock.now_s() < 10.0
    assert ask(url(run, "a"), "a") == ask(url(run, "b"), "b") == 5
    assert starts(tmp_path) == 1


def test_kill_9_of_the_guard(run, tmp_path):
    """The process that would end the engines if their agent died: a server that nobody
    guards is replaced, and is gone."""
    run.reach(on("a", 0), on("b", 1))
    (record,) = (tmp_path / "n0").glob("*.process.json")
    session = json.loads(record.read_text())["session"]
    os.kill(session, signal.SIGKILL)
    run.until(lambda: run.table.routable() == 0)
    run.until(lambda: run.table.routable() == 2)
    assert all(process.session != session for process in processes())
    assert ask(url(run, "a"), "a") == ask(url(run, "b"), "b") == 5
    assert starts(tmp_path) == 1


def starts(folder: Path) -> int:
    """How many lives the agent has had."""
    return (folder / "n0.log").read_text().count('"event": "start"')
