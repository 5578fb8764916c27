"""Time as an argument: a clock that jumps from event to event, and the real one."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol


def unix_s() -> float:
    """The wall's clock."""
    return datetime.now(UTC).timestamp()


class Clock(Protocol):
    """What the controller knows of time."""

    def now_s(self) -> float: ...

    def wait(self, until_s: float) -> None:
        """Return at ``until_s``, or earlier if woken (also if woken before the call)."""
        ...

    def wake(self) -> None:
        """End the current wait, or the next one."""
        ...


class Stream(Protocol):
    """Events in such numbers that they run by themselves, without the clock's heap."""

    def run(self, until_s: float) -> float:
        """Let everything up to and including ``until_s`` happen. Stops early, and returns
        when, after an event that `handle` has to deal with; returns infinity if none."""
        ...

    def handle(self) -> None:
        """Deal with it; the clock shows the time that `run` returned."""
        ...


class VirtualClock:
    """Time that passes only in `wait`, from one event to the next.

    Events of one instant run in the order in which they were scheduled, those of the
    ``stream`` first, all of them before a woken wait returns: whoever waits sees the
    instant as a whole.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self.stream: Stream | None = None
        self._now_s = start_s
        self._woken = False
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0

    def now_s(self) -> float:
        return self._now_s

    def schedule(self, at_s: float, callback: Callable[[], None]) -> None:
        """Have ``callback`` called at ``at_s``, which must not lie in the past."""
        if not at_s >= self._now_s:
            raise ValueError(f"event at {at_s} s, but it is {self._now_s} s already")
        heapq.heappush(self._events, (at_s, self._scheduled, callback))
        self._scheduled += 1

    def wake(self) -> None:
        self._woken = True

    def wait(self, until_s: float) -> None:
        events = self._events
        while True:
            limit_s = self._now_s if self._woken else until_s
            event_s = events[0][0] if events else math.inf
            if self.stream is not None:
                at_s = self.stream.run(min(event_s, limit_s))
                if at_s < math.inf:
                    self._now_s = at_s
                    self.stream.handle()
                    continue
            if event_s > limit_s or not events:
                break
            at_s, _, callback = heapq.heappop(events)
            self._now_s = at_s
            callback()
        if not self._woken:
            if math.isinf(until_s):
                raise ValueError("waiting for ever: no event is scheduled")
            self._now_s = max(self._now_s, until_s)
        self._woken = False


class SystemClock:
    """Seconds since it was made, from ``first_s`` on; `wake` may be called from any
    thread."""

    def __init__(self, rate: float = 1.0, first_s: float = 0.0) -> None:
        """``rate``: seconds that pass on it in a real one."""
        self._start_s, self._rate, self._first_s = time.monotonic(), rate, first_s
        self._woken = threading.Event()

    @classmethod
    def of_machine(cls) -> SystemClock:
        """Its time is that of others like it, in all processes of this machine."""
        return cls(first_s=time.monotonic())

    def now_s(self) -> float:
        return self._first_s + (time.monotonic() - self._start_s) * self._rate

    def wake(self) -> None:
        self._woken.set()

    def wait(self, until_s: float) -> None:
        left_s = max(0.0, until_s - self.now_s()) / self._rate
        # Longer waits overflow the lock's timeout; returning early is always allowed.
        self._woken.wait(min(left_s, threading.TIMEOUT_MAX))
        self._woken.clear()
