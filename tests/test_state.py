"""Each part of what a cluster keeps, or is watched by, is taken away in turn: it serves on,
and carries out no plan by itself until somebody says so."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from foreserve.cli.serve import make
from foreserve.cli.serving import Serving
from foreserve.cli.state import State, Steady
from foreserve.models.errors import InvalidInput
from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.models.plan import Plan
from foreserve.planner.policies import get_policy
from foreserve.runtime.gateway.admin import Change, Refused
from foreserve.runtime.journal import Faulted
from tests.build import small_plan

SCENARIO = """
cluster: {nodes: [{name: n, gpu: h100, gpus: 1, host_ram: 1TiB}]}
models: [{name: small, llm: llama-3.1-8b, input_tokens: 500, output_tokens: 100}]
forecast: {method: last}
solver: {name: greedy, time_limit: 2s}
"""
FAULT = Faulted(at_s=1.0, kind="replica-crash", target="x", replicas=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "s.yaml").write_text(SCENARIO)
    return tmp_path


class Parts:
    """A cluster that serves, of which nothing has been started."""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "s.yaml")
        self.folder = folder / "st"
        self.serving: Serving = make(
            path, None, "simulated", None, self.folder, mode="automatic", port=0
        )

    def close(self) -> None:
        """Once."""
        if self.serving._lock_file._file < 0:
            return
        self.serving.policy.close()
        self.serving.journal.close()
        self.serving._lock_file.close()
        for sock in self.serving.server._sockets:
            sock.close()

    def amiss(self) -> list[str]:
        """What the admin port, the metrics and `plan status` tell of, which agree."""
        told = self.serving.operator.status()
        text = self.serving.gateway.metrics.text().decode()
        whats = [line.partition(":")[0] for line in told["amiss"]]
        for what in whats:
            assert f'foreserve_state_amiss{{what="{what}"}} 1.0' in text
        assert f'foreserve_mode{{mode="{told["mode"]}"}} 1.0' in text
        assert (told["mode"] == "recommend") == bool(whats)
        return whats


@pytest.fixture
def parts(folder: Path) -> Iterator[Parts]:
    found = Parts(folder)
    yield found
    found.close()


BROKEN = {
    "journal.jsonl": b'{"event":"started","at_s":0.0}\n\x00\x00not json\n',
    "arrivals.npz": b"PK\x03\x04 no such file",
    "clock.json": b'{"wall_s": 1}',
    "plan.json": b'{"fleet":',
    "wishes.json": b'{"drained": 3}',
    "controller.log": b'{"event": "generation", "generation": 7}\n\xff\xfe garbage\n',
    "receipts.json": b"[{]",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_set_aside(folder, name, caplog):
    """Each file in turn: the start goes on without it, in mode ``recommend``, with one line
    of warning; its bytes are kept. Orders of the next generation are newer than all that
    the lost part of the log can have told of."""
    (folder / "st").mkdir()
    (folder / "st" / name).write_bytes(BROKEN[name])
    with caplog.at_level(logging.WARNING, logger="foreserve.cli.state"):
        parts = Parts(folder)
    try:
        assert parts.amiss() == [name]
        assert len(caplog.records) == 1
        assert len(caplog.records[0].getMessage().splitlines()) == 1
        kept = parts.folder / f"{name}.broken"
        assert kept.read_bytes() == BROKEN[name]
        if name == "controller.log":
            assert parts.serving.backend.generation > 7 + 1
        parts.serving.operator.set_mode("automatic")
        assert parts.amiss() == []
    finally:
        parts.close()
    again = Parts(folder)
    assert again.amiss() == []
    again.close()


def test_no_state_no_automatic_mode(folder, parts, monkeypatch):
    """A disk that takes nothing: no start, in one line; and no return to ``automatic``."""
    parts.serving.policy.set_mode("recommend")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInput, match="nothing can be kept there") as refused:
        State(folder / "other")
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(Refused, match="No space left"):
        parts.serving.operator.set_mode("automatic")
    assert parts.serving.policy.mode == "recommend"
    monkeypatch.undo()
    parts.serving.operator.set_mode("automatic")
    assert parts.serving.policy.mode == "automatic"


def test_a_full_disk_ends_nothing(parts, monkeypatch):
    """While it serves, the journal and the plan cannot be written any more: requests are
    accepted, plans kept in memory, who listens is told, and the mode has fallen."""
    journal, room = parts.serving.journal, 30

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Disk:
        """Takes the first bytes of a line, and no more."""

        held = b""

        def write(self, line: bytes) -> int:
            self.held += line[:room]
            return len(line[:room])

        def tell(self) -> int:
            return len(self.held)

        def truncate(self, size: int) -> None:
            self.held = self.held[:size]

    with monkeypatch.context() as patch:
        patch.setattr(journal, "_log", Disk())
        assert journal.accepted("small", 1.0, 5) == 0
        assert journal._log.held == b""
    assert parts.amiss() == ["journal"]
    assert len(parts.serving.feed.since(0, requests=True)) == 1
    monkeypatch.setattr("foreserve.cli.serving.write_text", full)
    parts.serving._keep(replace(small_plan(), fleet=parts.serving.fleet))
    assert parts.amiss() == ["journal", "plan.json"]


def test_who_watches_may_fail(parts, monkeypatch):
    """The page's timeline, receipts, and the books of what came, each broken: events reach
    the others, and decisions are made."""

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    serving = parts.serving
    for owner, name in (
        (serving.timeline, "record"),
        (serving.timeline, "saw"),
        (serving.receipts, "saw"),
    ):
        monkeypatch.setattr(owner, name, broken)
    serving.journal.record(FAULT)
    assert [event for _, event in serving.feed.since(0)] == [FAULT]
    serving.controller.step()
    assert serving.controller.desired is not None
    assert sorted(parts.amiss()) == ["journal", "receipts", "timeline"]


def test_a_decision_that_fails_changes_nothing(parts, monkeypatch):
    """The policy raises: what was wanted before stays wanted."""
    serving = parts.serving
    wanted = small_plan().epochs[0].placement
    steady = Steady(serving.policy, serving.state)
    answers: list[Placement | Exception] = [wanted, RuntimeError("broken"), wanted]

    def decide(now_s: float, observed: Observed) -> Placement:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(serving.policy, "decide", decide)
    assert [steady.decide(0.0, Observed(now_s=0.0)) for _ in range(3)] == [wanted] * 3
    assert parts.amiss() == ["decision"]


def test_receipts_are_known_after_a_restart(folder, parts):
    """Of two changes the one that was done says so to the next process, the other one that
    nobody saw its end; both name the plan's generation they were asked for under."""
    operator = parts.serving.operator
    done = operator.set_mode("observe")["action"]
    parts.serving.receipts.saw(Observed(now_s=1e9))
    drained = Change(verb="drain", subject="n")
    running = operator.change(drained, dry_run=False)["action"]
    parts.serving.receipts.saw(Observed(now_s=0.0))
    parts.close()
    again = Parts(folder)
    try:
        operator = again.serving.operator
        assert [operator.action(a)["state"] for a in (done, running)] == [
            "done",
            "unknown",
        ]
        assert operator.action(done)["generation"] == 0
        assert operator.action(running)["took_s"] is None
        assert again.serving.policy.wishes.drained == ("n",)
    finally:
        again.close()


def test_a_plan_that_has_expired_is_followed():
    """Long after its last epoch, its last placement is wanted."""
    plan: Plan = small_plan()
    policy = get_policy("planned", plan, 30.0)
    late_s = plan.end_s + 1e6
    wanted = policy.decide(late_s, Observed(now_s=late_s))
    assert wanted == plan.epochs[-1].placement
    assert policy.next_review_s(late_s) > late_s


def test_a_line_that_was_cut_off_is_no_corruption(folder):
    """A kill in the midst of a write: nothing is set aside, the mode stays."""
    (folder / "st").mkdir()
    about = {"event": "generation", "generation": 3}
    for name, line in (
        ("controller.log", json.dumps(about)),
        ("journal.jsonl", '{"event":"started","at_s":0.0}'),
    ):
        (folder / "st" / name).write_text(f"{line}\n{line[:15]}")
    parts = Parts(folder)
    assert parts.amiss() == []
    assert parts.serving.policy.mode == "automatic"
    assert parts.serving.backend.generation == 4
    parts.close()
