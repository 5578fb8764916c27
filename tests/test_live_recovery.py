"""Processes are killed: the controller, an agent, both. Real processes and sockets; the
engines only wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from foreserve.models.errors import ForeserveError
from foreserve.runtime.clock import SystemClock
from foreserve.runtime.engines.process import Child
from foreserve.runtime.journal import Faulted
from foreserve.runtime.live.check import check
from foreserve.runtime.live.host import Hosted, make_agent
from foreserve.runtime.live.messages import Link
from tests.build import gpu
from tests.live_setup import key, live, on, setup, three

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    """Of a run; whatever agents are left there in the end are ended, the logs checked."""
    yield tmp_path
    with suppress(ForeserveError):
        Hosted(setup(tmp_path, three()))().call("close", timeout_s=10.0)
    found = check(tmp_path)
    assert found.faults == []
    assert found.lines > 0
    assert max(found.peak.values(), default=0.0) <= 1.0


def pid_of_agent(folder: Path) -> int:
    """The process whose command line names the setup."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder / "n0.setup") in (entry / "cmdline").read_text():
                return int(entry.name)
    raise AssertionError("no agent")


def test_kill_9_of_the_controller_in_the_middle_of_a_load(folder):
    """Two loads of 1.5 s are under way when it dies. The next controller finds the same
    agent, both loads under way, goes on with them and serves; it loads nothing again."""
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.live_controller", str(folder), "1.5"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "loading\n"
    agent = pid_of_agent(folder)
    program.send_signal(signal.SIGKILL)
    program.wait()
    program.stdout.close()
    f = three(1.5)
    with live(folder, f, {"n0": Hosted(setup(folder, f))}) as run:
        assert run.backend.generation == 2
        assert run.phases() == {key("a", 0): "LOADING", key("a", 1): "LOADING"}
        assert run.reach(on("a", 0), on("a", 1)) < 3.0
        assert run.table.routable("a") == 2
        assert pid_of_agent(folder) == agent
    text = (folder / "n0.log").read_text()
    assert text.count('"kind": "load"') == 2


def test_kill_9_of_an_agent(folder):
    """Its GPUs are lost at once; another agent is started, all is loaded again, and
    serves again; the routing table has nobody in between."""
    f = three()
    with live(folder, f, {"n0": Hosted(setup(folder, f))}) as run:
        run.reach(on("a", 0), on("b", 1))
        agent = pid_of_agent(folder)
        os.kill(agent, signal.SIGKILL)
        run.until(lambda: run.backend.observe().lost_gpus == {gpu(0), gpu(1)})
        assert run.table.routable() == 0
        assert run.until(lambda: run.table.routable() == 2) < 8.0
        assert pid_of_agent(folder) != agent
    (fault,) = [event for event in run.events() if isinstance(event, Faulted)]
    assert (fault.kind, fault.target, fault.replicas) == ("node-loss", "n0", 2)


def test_an_agent_that_hangs_is_lost_and_comes_back(folder, monkeypatch):
    """Stopped, it does not answer for 0.5 s: its GPUs are lost, its replicas not routable.
    Once it goes on they are back as they were; nothing was loaded again."""
    monkeypatch.setattr("foreserve.runtime.live.backend.ANSWER_S", 0.5)
    monkeypatch.setattr("foreserve.runtime.live.backend.POLL_S", 0.2)
    f = three()
    with live(folder, f, {"n0": Hosted(setup(folder, f))}) as run:
        run.reach(on("a", 0), on("b", 1))
        agent = pid_of_agent(folder)
        os.kill(agent, signal.SIGSTOP)
        try:
            took_s = run.until(lambda: run.backend.observe().lost_gpus)
            assert run.table.routable() == 0
        finally:
            os.kill(agent, signal.SIGCONT)
        assert took_s < 1.5
        run.until(lambda: run.table.routable() == 2)
    assert (folder / "n0.log").read_text().count('"kind": "load"') == 2


def test_an_agent_that_hangs_for_long_is_ended(folder, monkeypatch):
    """Stopped for good: after 1 s without an answer its process is ended, another one
    started, and both LLMs are loaded again. A second controller, which has not started
    it, does the same."""
    monkeypatch.setattr("foreserve.runtime.live.backend.ANSWER_S", 0.5)
    monkeypatch.setattr("foreserve.runtime.live.backend.POLL_S", 0.2)
    monkeypatch.setattr("foreserve.runtime.live.host.HUNG_S", 1.0)
    f = three()
    for _ in range(2):
        with live(folder, f, {"n0": Hosted(setup(folder, f))}) as run:
            run.reach(on("a", 0), on("b", 1))
            agent = pid_of_agent(folder)
            os.kill(agent, signal.SIGSTOP)
            run.until(lambda: run.backend.observe().lost_gpus)
            run.until(lambda: run.table.routable() == 2)
            assert pid_of_agent(folder) != agent
    assert (folder / "n0.log").read_text().count('"event": "start"') == 3


def test_engines_of_an_agent_that_is_gone_are_ended(tmp_path):
    """A process on record in the engines' folder, of an owner that is no more, is ended
    before the next agent does anything."""
    left = Child(["sleep", "30"], tmp_path / "n0", "left", grace_s=1.0)
    agent = make_agent(setup(tmp_path, three()))
    assert not left.running()
    agent.close()
    left.stop()


def test_an_agent_that_cannot_start_says_where_to_look(tmp_path, monkeypatch):
    """Its engines' module is not there: a lost link that names the file with the error."""
    bad = setup(tmp_path, three())
    object.__setattr__(bad, "make", "tests.nowhere:make")
    with pytest.raises(ForeserveError, match=r"ended with code 1: see .*n0\.out"):
        Hosted(bad)()
    assert "tests.nowhere" in (tmp_path / "n0.out").read_text()


def test_links_only_call_what_is_meant_to_be_called(folder):
    """Another method of the agent is refused; an error comes back as it was raised."""
    link: Link = Hosted(setup(folder, three()))()
    clock = SystemClock()
    assert link.call("hello", 1, timeout_s=5.0) == 1
    with pytest.raises(ForeserveError, match="no call of an agent"):
        link.call("_stop", timeout_s=5.0)
    with pytest.raises(TypeError):
        link.call("hello", timeout_s=5.0)
    assert link.call("report", timeout_s=5.0).node == "n0"
    assert clock.now_s() < 5.0
    link.close()


def test_agents_of_an_earlier_scenario_are_replaced(folder):
    """A controller comes back with other options for the same nodes: whose books were
    other ones is ended, engines and all; the same again finds the same."""

    def pid(load_s: float) -> int:
        open_ = Hosted(setup(folder, three(load_s)))
        link = open_()
        link.call("hello", 1, timeout_s=5.0)
        found: int = link.call("report", timeout_s=5.0).place.pid
        link.close()
        return found

    first = pid(1.5)
    assert pid(1.5) == first
    assert pid(0.05) != first
