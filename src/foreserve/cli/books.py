"""What a serving cluster keeps of its own past: its clock and what has come.

A thread writes it down at the end of each epoch, and once more at the end of all.
"""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

from foreserve.models.problem import Fleet
from foreserve.planner.arrivals import Arrivals
from foreserve.planner.fleet import busy_s
from foreserve.runtime.gateway.table import RequestRecord
from foreserve.runtime.live.since import KeptClock


class Books:
    """Of the cluster in ``folder``. `start`, then `close` once."""

    def __init__(
        self, folder: Path, fleet: Fleet, *, epoch_s: float, rate: float = 1.0
    ) -> None:
        """``rate``: seconds of the cluster's clock in a real one."""
        self._kept = KeptClock(folder / "clock.json", rate)
        self.clock = self._kept.clock
        self.epoch_s, self._rate = epoch_s, rate
        self.arrivals = Arrivals(
            [llm.name for llm in fleet.llms],
            epoch_s=epoch_s,
            busy_s=partial(busy_s, fleet),
            since_s=self._kept.first_s,
            path=folder / "arrivals.npz",
        )
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="books", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Write down what there is, and end."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write()

    def ended(self, record: RequestRecord) -> None:
        """A request has."""
        if record.reason != "client_left" or record.output_tokens:
            self.arrivals.add(
                record.arrival_s,
                record.llm,
                record.input_tokens,
                record.output_tokens,
            )

    def _work(self) -> None:
        while not self._ending.wait(self._left_s()):
            self._write()

    def _left_s(self) -> float:
        """Real seconds until the epoch ends."""
        left_s = self.epoch_s - self.clock.now_s() % self.epoch_s
        return min(left_s / self._rate, threading.TIMEOUT_MAX)

    def _write(self) -> None:
        self._kept.note()
        self.arrivals.save(self.clock.now_s())
