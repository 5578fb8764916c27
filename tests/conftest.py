"""Fixtures of more than one module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, settings

from foreserve import cli

# How fast a machine is proves nothing.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

Ran = tuple[int, str, str]

ONE_BY_ONE = tuple(
    f"tests/test_{name}"
    for name in (
        "browser", "drift_live", "engines_", "gateway", "live_", "memory_",
        "paged_decoder_ranks", "paged_loads", "paged_pressure", "paged_server",
        "paged_several_gpus", "ray_", "serve", "status_page",
    )
)  # fmt: skip
"""Files whose tests start processes and servers, and wait for them."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests at once run in two processes, where pytest-xdist is there."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    alone = config.option.usepdb or hasattr(config, "workerinput")
    if everything and not alone and getattr(config.option, "numprocesses", 1) is None:
        config.option.numprocesses = 2


def pytest_terminal_summary(terminalreporter):
    """What tests measured: the ``measured`` of their `record_property`."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "measured":
                    terminalreporter.write_line(f"{report.nodeid}:\n{value}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests share fixtures and stay in one process; so do all those that wait
    for processes of their own, which would else wait for each other."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "" if nodeid.startswith(ONE_BY_ONE) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # as they are put below
    return Files(config, log)


def pytest_collection_modifyitems(items):
    """What has to go one by one begins at once: it takes as long as all the rest."""
    items.sort(key=lambda item: not item.nodeid.startswith(ONE_BY_ONE))


@pytest.fixture
def run_plan(monkeypatch, capsys) -> Callable[[Sequence[str]], Ran]:
    """Run `plan ARGS` in this process; returns (exit code, stdout, stderr)."""

    def run(args: Sequence[str]) -> Ran:
        monkeypatch.setattr(sys, "argv", ["plan", *args])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        out, err = capsys.readouterr()
        return int(exited.value.code or 0), out, err

    return run


@pytest.fixture
def plan(run_plan) -> Callable[..., Ran]:
    """The same for arguments without spaces, several in one text."""
    return lambda *args: run_plan(" ".join(map(str, args)).split())
