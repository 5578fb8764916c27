"""What a serving cluster keeps of its own past: its clock, what has come, and what became
of each epoch's plan.

All of it is the work of one thread of its own, so that whoever tells of an event waits for
nothing: events are queued, and looked at once a second.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from foreserve.models.codec import to_plain
from foreserve.models.drift import EpochDrift, Step, total
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet
from foreserve.planner.arrivals import Arrivals
from foreserve.planner.fleet import busy_s
from foreserve.runtime.drift import Drift
from foreserve.runtime.drift_reports import last_drift
from foreserve.runtime.gateway.metrics import DriftMetrics
from foreserve.runtime.gateway.table import RequestRecord
from foreserve.runtime.journal import Event, Recorder, RequestEnds
from foreserve.runtime.live.since import KeptClock

TICK_S = 1.0
"""Between looks at what has happened, in real seconds."""
NOTED_S = 30.0
"""The clock is written down so often, in real seconds."""
SHOWN = 24
"""Epochs whose reports are kept at hand."""

log = logging.getLogger(__name__)


class Books:
    """Of the cluster in ``folder``; a `Recorder`. `start`, then `close` once."""

    def __init__(
        self, folder: Path, fleet: Fleet, *, epoch_s: float, rate: float = 1.0
    ) -> None:
        """``rate``: seconds of the cluster's clock in a real one."""
        self._kept = KeptClock(folder / "clock.json", rate)
        self.clock = self._kept.clock
        self.epoch_s = epoch_s
        counted = partial(busy_s, fleet)
        self.arrivals = Arrivals(
            [llm.name for llm in fleet.llms],
            epoch_s=epoch_s,
            busy_s=counted,
            since_s=self._kept.first_s,
            path=folder / "arrivals.npz",
        )
        self.lost = self.arrivals.dropped if self.arrivals.broken else ""
        """Why what had come before cannot be read."""
        if self.arrivals.dropped and not self.lost:
            log.warning("forecasts begin anew: %s", self.arrivals.dropped)
        self._drift = Drift(
            fleet,
            epoch_s=epoch_s,
            busy_s=counted,
            since_s=self._kept.first_s,
            on_step=self._step,
        )
        self._reports = deque(last_drift(folder / "journal.jsonl", SHOWN), SHOWN)
        self._told = self._tell()
        self._new: deque[Event | tuple[float, Plan]] = deque()
        self._journal: Recorder | None = None
        self._metrics: DriftMetrics | None = None
        self._saved = self._noted_s = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="books", daemon=True)

    def start(self, journal: Recorder, metrics: DriftMetrics | None = None) -> None:
        """Reports go to ``journal`` and ``metrics``."""
        self._journal, self._metrics = journal, metrics
        self._thread.start()

    def close(self) -> None:
        """Write down what there is, and end."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._journal is None:
            return
        self.tick()
        self._report(self._drift.finish(self.clock.now_s()))
        self._save()

    def record(self, event: Event | RequestEnds) -> None:
        if not isinstance(event, RequestEnds):
            self._new.append(event)

    def adopt(self, plan: Plan) -> None:
        """``plan`` is carried out from now on."""
        self._new.append((self.clock.now_s(), plan))

    def ended(self, record: RequestRecord) -> None:
        """A request has."""
        if record.reason != "client_left" or record.output_tokens:
            self.arrivals.add(
                record.arrival_s,
                record.llm,
                record.input_tokens,
                record.output_tokens,
            )

    def drift(self) -> Mapping[str, Any]:
        """The last epochs' reports, for the admin port (docs/drift.md)."""
        return self._told

    def tick(self) -> None:
        """Look at what has happened; for the thread, or in its place."""
        now_s = self.clock.now_s()
        for _ in range(len(self._new)):
            event = self._new.popleft()
            if isinstance(event, tuple):
                self._drift.adopt(*event)
            else:
                self._drift.record(event)
        self._report(self._drift.advance(now_s))
        if now_s // self.epoch_s != self._saved:
            self._saved = now_s // self.epoch_s
            self._save()

    def _work(self) -> None:
        ticks = 0
        while not self._ending.wait(TICK_S):
            try:
                self.tick()
                ticks += 1
                if ticks % round(NOTED_S / TICK_S) == 0:
                    self._kept.note()
            except Exception:  # books must not end the serving, nor each other
                log.exception("books")

    def _save(self) -> None:
        self._kept.note()
        self.arrivals.save(self.clock.now_s())

    def _step(
        self, step: Step, llm: str, predicted_s: float, measured_s: float
    ) -> None:
        if self._metrics is not None:
            self._metrics.step(step, llm, predicted_s, measured_s)

    def _report(self, epochs: list[EpochDrift]) -> None:
        for epoch in epochs:
            assert self._journal is not None
            self._journal.record(epoch)
            self._reports.append(epoch)
            if self._metrics is not None:
                for row in epoch.llms:
                    self._metrics.report(row)
        if epochs:
            self._told = self._tell()

    def _tell(self) -> Mapping[str, Any]:
        epochs = list(self._reports)
        names = dict.fromkeys(row.llm for epoch in epochs for row in epoch.llms)
        return {
            "epoch_s": self.epoch_s,
            "epochs": [
                {
                    "epoch": epoch.epoch,
                    "start_s": epoch.start_s,
                    "end_s": epoch.end_s,
                    "late": epoch.late,
                    "faults": epoch.faults,
                    **to_plain(total(epoch.llms)),
                }
                for epoch in epochs
            ],
            "by_llm": {
                name: to_plain(
                    total(x for e in epochs for x in e.llms if x.llm == name)
                )
                for name in names
            },
            "total": to_plain(total(x for e in epochs for x in e.llms)),
            "latest": to_plain(epochs[-1]) if epochs else None,
        }
