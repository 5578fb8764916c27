"""Fixtures of more than one module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import pytest

from foreserve import cli

Ran = tuple[int, str, str]


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
