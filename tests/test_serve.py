"""`plan serve` as a user has it: a process, HTTP, and commands beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

SCENARIO = """
cluster: {nodes: [{name: n, gpu: h100, gpus: 2, host_ram: 1TiB}]}
models:
  - {name: small, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}
  - {name: other, llm: qwen2.5-7b, input_tokens: 500, output_tokens: 100}
  - {name: large, llm: llama-3.1-70b, input_tokens: 500, output_tokens: 100}
epoch: 600s
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
"""


def plan(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "foreserve", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Served:
    """A cluster that serves from ``folder``."""

    scenario = SCENARIO
    options = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "s.yaml").write_text(self.scenario)
        self.start()

    def start(self) -> None:
        words = "serve --scenario s.yaml --engine simulated --port 0 --state st "
        words += self.options
        with (self.folder / "serve.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "foreserve", *words.split()],
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        path = self.folder / "st/admin.json"
        until = time.monotonic() + 40.0
        while time.monotonic() < until:
            if path.exists():
                about = json.loads(path.read_text())
                if about["pid"] == self.process.pid:
                    self.port: int = about["port"]
                    return
            if self.process.poll() is not None:
                break
            threading.Event().wait(0.05)
        self.process.kill()
        self.process.wait()
        raise AssertionError((self.folder / "serve.log").read_text())

    def ask(self, llm: str, tokens: int = 5) -> tuple[int, dict[str, Any]]:
        body = {"model": llm, "prompt": "one two three", "max_tokens": tokens}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60.0) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def status(self) -> dict[str, Any]:
        done = plan("status", "--state", "st", "--json", cwd=self.folder)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60.0)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    # A socket's name must be short.
    folder = Path(os.path.relpath(tmp_path))
    cluster = Served(folder if len(str(folder)) < len(str(tmp_path)) else tmp_path)
    yield cluster
    if cluster.process.poll() is None:
        cluster.end()


def test_every_llm_is_answered_on_two_gpus_that_cannot_hold_all(served: Served) -> None:
    """The small ones, then the 70B that needs both GPUs, then a small one again: each
    answer is its own LLM's, after real loads and drops; nothing is lost."""
    told = {}
    for llm in ("small", "other", "large", "small"):
        code, answer = served.ask(llm)
        assert code == 200, answer
        assert answer["model"] == llm
        assert answer["usage"]["completion_tokens"] == 5
        text = answer["choices"][0]["text"]
        assert told.setdefault(llm, text) == text
    assert len(set(told.values())) == 3
    seen = served.status()
    assert seen["failed"] is None
    assert seen["troubles"] == []
    assert {row["llm"] for row in seen["observed"]} >= {"small"}
    code, answer = served.ask("smal")
    assert code == 404
    assert "small" in answer["error"]["message"]


def test_it_stops_when_told_and_leaves_nothing_behind(served: Served) -> None:
    """`plan stop`: no process, no socket, no way to reach the admin port; the journal
    has every request."""
    assert served.ask("small")[0] == 200
    done = plan("stop", "--state", "st", cwd=served.folder)
    assert done.returncode == 0
    assert served.process.wait(60.0) == 0
    assert not (served.folder / "st/admin.json").exists()
    assert not list((served.folder / "st").rglob("*.sock"))
    lines = (served.folder / "st/journal.jsonl").read_text().splitlines()
    ends = [json.loads(line) for line in lines if '"event":"request"' in line]
    assert [end["result"] for end in ends] == ["finished"]
    after = plan("status", "--state", "st", cwd=served.folder)
    assert after.returncode == 2
    assert len(after.stderr.splitlines()) == 1


def test_after_a_kill_the_next_start_finds_the_engines(served: Served) -> None:
    """SIGKILL to the whole front, which leaves its plan in pieces: agents and engines live
    on, the next start sets the file aside and serves the LLM without loading it again, in
    mode ``recommend``, which it says why. No epoch ends meanwhile, which might want it
    elsewhere."""
    assert served.ask("small")[0] == 200
    served.process.kill()
    served.process.wait(10.0)
    (served.folder / "st/plan.json").write_text('{"fleet":')
    served.start()
    assert served.ask("small")[0] == 200
    lines = (served.folder / "st/journal.jsonl").read_text().splitlines()
    loads = [line for line in lines if '"LOADING"' in line and '"small"' in line]
    assert len(loads) == 1
    assert (served.folder / "st/plan.json.broken").exists()
    seen = served.status()
    assert seen["mode"] == "recommend"
    assert [line.partition(":")[0] for line in seen["amiss"]] == ["plan.json"]


def test_epochs_that_do_not_fit_the_history_end_the_start(tmp_path) -> None:
    """The shipped fleet's history has rows of 300 s, which cannot tell of 30 s: said at
    once, in one line, and nothing is started or left behind."""
    words = "serve --scenario sample:fleet-day --engine simulated --replan 30s"
    done = plan(*words.split(), "--state", "st", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "multiple of 300s" in done.stderr
    assert not (tmp_path / "st").exists()
