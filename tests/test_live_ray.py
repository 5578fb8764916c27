"""The same backend over agents that are Ray actors: a local Ray, two logical nodes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from foreserve.runtime.live.check import check

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs the extra `ray`"
)


@needs_ray
def test_on_ray(tmp_path):
    """Three LLMs on two nodes, a switch; then the process of one agent is killed: its
    node is lost within 5 s, the other one goes on serving, and all of it comes back. A
    second controller finds everything as the first one left it. The logs have no fault.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.live_ray", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["routable_then"] == ["n1"]
    assert seen["lost_s"] < 5.0
    assert (seen["generation"], seen["same"]) == (2, True)
    found = check(tmp_path)
    assert found.faults == []
    assert found.orders >= 12
    assert max(found.peak.values()) <= 1.0
    text = (tmp_path / "n0.log").read_text()
    assert text.count('"event": "start"') == 2  # two lives of the agent
