"""Simulations with many seeds on a Ray cluster, in programs of their own: Ray changes the
process that it is in."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.build import ten_minutes

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"
)
TASKS = """
import ray
from foreserve.runtime.ray.studies import in_cluster

def work(common, task):
    if task == 2:
        raise RuntimeError("ValueError: two")
    return common * task

try:
    found = []
    for result in in_cluster(work, 10, [0, 1, 2, 3], "local"):
        found.append(result)
except RuntimeError as error:
    print(found, type(error).__name__, error, ray.is_initialized())
"""


@pytest.fixture
def day(tmp_path) -> list[str]:
    """Ten minutes of two LLMs on two GPUs; the program to simulate them."""
    ten_minutes(tmp_path)
    words = f"-m foreserve simulate {tmp_path}/p.json --trace {tmp_path}/t.csv"
    return [sys.executable, *words.split()]


def ran(command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *more], capture_output=True, text=True, timeout=120, check=False
    )


@needs_ray
def test_seeds_do_not_depend_on_ray(day, tmp_path):
    """Processes and a local Ray: the same bytes on stdout and in the series, which are of
    the run that comes back in full; nothing on stderr."""
    series = tmp_path / "s.csv"
    flags = "--policy planned --policy reactive --seed 3 --seeds 2 --json --series"
    texts = []
    for where in ("", "--ray local"):
        done = ran(day, *flags.split(), str(series), *where.split())
        assert (done.returncode, done.stderr) == (0, "")
        texts.append((done.stdout, series.read_bytes()))
        series.unlink()
    assert texts[0] == texts[1]


@needs_ray
def test_what_a_task_raises_is_raised_here():
    """In order: 0 and 10, then the error of the third as it is, and Ray has ended."""
    done = ran([sys.executable, "-c", TASKS])
    assert done.stderr == ""
    assert done.stdout == "[0, 10] RuntimeError ValueError: two False\n"


@needs_ray
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
def test_an_interrupt_leaves_nothing_behind(day):
    """Ctrl-C, to the whole group as a terminal sends it: exit code 130, one line, and soon
    no process that has our mark in its environment."""
    mark = f"FORESERVE_TEST={os.getpid()}-{time.monotonic_ns()}"
    program = subprocess.Popen(
        [*day, "--seeds", "2000", "--ray", "local", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **dict([mark.split("=")])},
        # Whoever runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while not marked(mark, "ray::_work") and time.monotonic() < deadline:
        waited()
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err.strip()) == (130, "", "error: interrupted")
    while marked(mark) and time.monotonic() < deadline:
        waited()
    assert marked(mark) == []


def waited() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(["sleep", "5"], timeout=0.2, check=False)


def marked(mark: str, title: str = "") -> list[str]:
    """Processes with ``mark`` in their environment, of those that are called so."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            there = mark.encode() in (folder / "environ").read_bytes().split(b"\0")
            if there and title.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ("--seeds 2 --ray local", 2, "pip install 'foreserve[ray]'"),
        ("--seeds 2 --ray", 2, "pip install 'foreserve[ray]'"),
        ("--seeds 2 --ray nowhere", 2, "no address of a Ray cluster"),
        ("--seeds 2 --ray ray://host:1", 2, "no address of a Ray cluster"),
        ("--seeds 2 --ray 127.0.0.1:{port}", 1, "no Ray at '127.0.0.1:{port}'"),
        ("--ray local", 2, "--ray needs --seeds"),
        ("--seeds 2 --workers 1 --ray local", 2, "not for --ray"),
    ],
)
def test_without_ray(run_plan, day, monkeypatch, flags, code, message):
    """Not installed, no address, nobody there, wrong use: one line that says so."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    found, out, err = run_plan([*day[3:], *flags.format(port=port).split()])
    assert (found, out) == (code, "")
    assert message.format(port=port) in err
    assert err.count("\n") == 1
