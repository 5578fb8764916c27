"""Ends the processes of agents that are no more, and no others."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from foreserve.runtime.clock import SystemClock

MARK = "FORESERVE_AGENT"
"""In the environment of everything that an agent starts: a number that nobody can guess,
which the agent's log has."""


@cache
def mark_process() -> str:
    """Have all that this process starts from now on carry its number; returns that."""
    os.environ[MARK] = secrets.token_hex(16)
    return os.environ[MARK]


def end_leftovers(nonces: Iterable[str], grace_s: float = 5.0) -> int:
    """Kill every process that carries one of ``nonces``, and wait until they are gone, or
    for ``grace_s``. How many there were; 0 where there is no /proc."""
    marks = {f"{MARK}={nonce}".encode() for nonce in nonces}
    found = list(_marked(marks))
    for pid in found:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    clock = SystemClock()
    while clock.now_s() < grace_s and any(True for _ in _marked(marks)):
        clock.wait(clock.now_s() + 0.05)
    return len(found)


def _marked(marks: set[bytes]) -> Iterator[int]:
    if not marks:
        return
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(folder.name) != os.getpid() and not marks.isdisjoint(environment):
            yield int(folder.name)
