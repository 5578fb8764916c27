"""The report in a real browser: it renders, fetches nothing, and breaks no policy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import matplotlib.image
import pytest

from foreserve.planner.report import write_report
from tests.browser import CHROMIUM, QUIET
from tests.made_up import made_up_plan, made_up_run


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_report_renders_in_chromium(tmp_path: Path) -> None:
    """The residency map and the curves are in the page and painted; the console names no
    refused resource."""
    plan, solves = made_up_plan()
    report, shot = tmp_path / "report.html", tmp_path / "shot.png"
    runs = (made_up_run(plan, "planned"), made_up_run(plan, "reactive", slow=3.0))
    write_report(
        report, plan=plan, solves=solves, runs=runs, title="A day", command=None
    )
    flags = [*QUIET, "--window-size=1400,2600", "--enable-logging=stderr"]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", report.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    pixels = matplotlib.image.imread(shot)
    assert pixels.shape[:2] == (2600, 1400)
    # Colour of the replicas' boxes: a page of text alone is grey.
    colourful = (pixels[..., :3].max(axis=2) - pixels[..., :3].min(axis=2)) > 0.3
    assert colourful.mean() > 0.02
    dom = subprocess.run(
        [*command, "--dump-dom", report.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert dom.count("<svg") >= 8
    for llm in plan.fleet.llms:
        assert llm.name in dom
