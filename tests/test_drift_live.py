"""Plan against actual where a cluster serves: reports, metrics, restarts."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from foreserve.cli.books import Books
from foreserve.models.drift import EpochDrift
from foreserve.runtime.gateway.metrics import DriftMetrics, Metrics
from foreserve.runtime.journal import Event, RequestEnd, RequestEnds
from tests.build import fleet, gpu, option
from tests.test_drift import ACTIVE, made, phase
from tests.test_serve import Served, plan

FLEET = fleet(option("a"), option("b"))
RATE = 1000.0
"""Of the cluster's clock, so that an epoch of 100 s takes a tenth of one."""


class Lines:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.epochs: list[EpochDrift] = []
        self.told = threading.Event()

    def record(self, event: Event | RequestEnds) -> None:
        if isinstance(event, EpochDrift):
            self.epochs.append(event)
            self.told.set()


def asked(books: Books, wait_s: float) -> RequestEnd:
    """A request that came now and gets its first token after ``wait_s``."""
    now_s = books.clock.now_s()
    return RequestEnd(
        at_s=now_s + wait_s + 0.1,
        request=0,
        llm="a",
        arrival_s=now_s,
        input_tokens=10,
        output_tokens=5,
        result="finished",
        first_token_s=now_s + wait_s,
        gpus=(gpu(0),),
    )


def test_an_epoch_is_reported_once_its_requests_have_ended(tmp_path: Path) -> None:
    """Told to the journal, to the metrics and to the admin port: one request kept, one
    missed; nothing of it before its time."""
    books, lines, metrics = (
        Books(tmp_path, FLEET, epoch_s=100.0, rate=RATE),
        Lines(),
        Metrics(),
    )
    books.adopt(made(ACTIVE))
    books.record(phase(books.clock.now_s(), "a", "ACTIVE"))
    books.record(asked(books, 0.5))
    books.record(asked(books, 9.0))
    books.tick()
    assert books.drift()["epochs"] == []
    books.start(lines, DriftMetrics(metrics.registry))
    assert lines.told.wait(20.0)
    books.close()
    first = lines.epochs[0]
    assert (first.epoch, first.missed) == (0, 1)
    assert first.llms[0].requests == 2
    assert first.llms[0].forecast is not None
    told = books.drift()
    assert told["epochs"][0]["missed"] == 1
    assert told["by_llm"]["a"]["blame"]["queue"] == 1
    text = metrics.text().decode()
    assert 'foreserve_slo_missed_total{blame="queue",model_name="a"} 1.0' in text
    assert 'foreserve_demand_forecast_rps{model_name="a",quantile="mean"} 1.0' in text
    assert 'foreserve_prewarm_total{model_name="b",result="unused"} 0.0' in text


def test_a_fault_of_the_books_does_not_end_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An event that cannot be (an LLM that is not served here) is logged; the next epoch is
    reported all the same."""
    books, lines = Books(tmp_path, FLEET, epoch_s=100.0, rate=RATE), Lines()
    books.record(phase(0.0, "nobody", "ACTIVE"))
    books.start(lines)
    assert lines.told.wait(20.0)
    books.close()
    assert "KeyError" in caplog.text


SCENARIO = """
cluster: {nodes: [{name: n, gpu: h100, gpus: 2, host_ram: 1TiB}]}
models:
  - {name: small, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}
  - {name: other, llm: qwen2.5-7b, input_tokens: 500, output_tokens: 100}
epoch: 20s
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
"""


class Fast(Served):
    """A cluster whose clock runs ten times as fast: an epoch takes two seconds."""

    scenario = SCENARIO
    options = "--time-scale 10"

    def journal(self) -> list[dict[str, Any]]:
        text = (self.folder / "st/journal.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def reports(self, count: int) -> list[dict[str, Any]]:
        """The first ``count`` reports with a request in them."""
        until = time.monotonic() + 40.0
        while time.monotonic() < until:
            found = [e for e in self.journal() if e["event"] == "drift"]
            some = [e for e in found if any(x["requests"] for x in e["llms"])]
            if len(some) >= count:
                return some
            threading.Event().wait(0.2)
        raise AssertionError((self.folder / "serve.log").read_text())


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Fast]:
    folder = Path(os.path.relpath(tmp_path))
    cluster = Fast(folder if len(str(folder)) < len(str(tmp_path)) else tmp_path)
    yield cluster
    if cluster.process.poll() is None:
        cluster.end()


def test_drift_of_a_cluster_that_serves(served: Fast) -> None:
    """The first request has to wait for a load, which nobody had forecast or planned: its
    miss is booked, with one blame. The report is in the journal, at the admin port, in the
    metrics, and in what `plan drift` prints; after SIGKILL the clock goes on, and so do
    the forecasts."""
    assert served.ask("small")[0] == 200
    for _ in range(5):
        assert served.ask("small")[0] == 200
    first = served.reports(1)[0]
    row = next(x for x in first["llms"] if x["llm"] == "small")
    assert sum(row["blame"].values()) == row["missed"]
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/metrics") as answer:
        text = answer.read().decode()
    assert 'foreserve_switch_seconds_count{kind="load",model_name="small"' in text
    done = plan("drift", "st", "--json", cwd=served.folder)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["by_llm"]["small"]["misses"] == 1
    assert told["total"]["load"]["count"] >= 1
    before_s = served.journal()[-1]["at_s"]
    served.process.kill()
    served.process.wait(10.0)
    served.start()
    assert served.ask("small")[0] == 200
    after = [e["at_s"] for e in served.journal() if e["event"] == "started"]
    assert len(after) == 2
    assert after[1] >= before_s
    table = plan("drift", "st", cwd=served.folder)
    assert "small" in table.stdout


def test_drift_needs_the_plan_of_a_simulation(tmp_path: Path) -> None:
    """One line says what to do; a missing file is named."""
    (tmp_path / "j.jsonl").write_text('{"event":"ended","at_s":1.0}\n')
    done = plan("drift", "j.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert "--plan plan.json" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = plan("drift", "nothing.jsonl", cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
