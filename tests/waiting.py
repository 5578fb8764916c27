"""Waiting for what other threads do."""

from __future__ import annotations

import threading
from collections.abc import Callable

SOON_S = 20.0
"""No test waits so long unless it fails."""


def until(happened: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(SOON_S / 0.001)):
        if happened():
            return
        pause.wait(0.001)
    raise AssertionError("it never happened")
