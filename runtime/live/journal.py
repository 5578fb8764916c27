"""The journal of a cluster that serves: one file, which grows from start to start."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from foreserve.models.faults import FaultKind
from foreserve.models.observed import Phase
from foreserve.models.placement import ReplicaId
from foreserve.runtime.gateway.table import RequestRecord
from foreserve.runtime.journal import (
    Accepted,
    Event,
    Faulted,
    PhaseChange,
    Recorder,
    RequestEnd,
    RequestEnds,
    line_of,
)

LONGEST_S = 1000.0
"""No request is under way for longer: the gateway's deadlines are shorter."""
LOST = "gateway_lost"
"""Why requests failed of which nobody has told the end."""
BLOCK = 1 << 16


class Notes:
    """What is to be told to a journal, whose times only grow: nodes report late, and each
    in its own order. Its owner locks."""

    def __init__(self) -> None:
        self._notes: list[PhaseChange | Faulted] = []
        self._told_s = 0.0

    def phase(
        self, key: ReplicaId, phase: Phase | None, at_s: float, *, lost: bool = False
    ) -> None:
        self._notes.append(
            PhaseChange(at_s=at_s, llm=key.llm, gpus=key.gpus, phase=phase, lost=lost)
        )

    def fault(self, kind: FaultKind, target: str, replicas: int, at_s: float) -> None:
        self._notes.append(
            Faulted(at_s=at_s, kind=kind, target=target, replicas=replicas)
        )

    def tell(self, journal: Recorder, now_s: float) -> None:
        """Tell all of them."""
        for note in sorted(self._notes, key=lambda note: note.at_s):
            self._told_s = max(self._told_s, note.at_s)
            journal.record(replace(note, at_s=self._told_s))
        self._told_s = now_s
        self._notes.clear()


class LiveJournal:
    """One line an event, from several threads; each is with the system, though not on the
    disk, when the call returns, so that none is lost with the process.

    Requests are written down when they are accepted and when they have ended. Those that
    an earlier process took with it are ended by the next one that opens the file.
    """

    def __init__(
        self,
        path: Path,
        *also: Recorder,
        failed: Callable[[Exception], object] | None = None,
    ) -> None:
        """``also`` are told of each event, once it is written. What cannot be written, or
        fails while it is told, goes to ``failed``, if there is such; else it is raised."""
        self._also, self._failed = also, failed
        left, at_s = _left_open(path)
        self._log = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._requests = 0
        for accepted in left:
            self.record(
                RequestEnd(
                    at_s=at_s,
                    request=accepted["request"],
                    llm=accepted["llm"],
                    arrival_s=accepted["at_s"],
                    input_tokens=accepted["input_tokens"],
                    output_tokens=0,
                    result="failed",
                    reason=LOST,
                )
            )

    def record(self, event: Event | RequestEnds) -> None:
        if isinstance(event, RequestEnds):
            return
        line = f"{line_of(event)}\n".encode()
        try:
            with self._lock:
                written = self._log.write(line)
                if written < len(line):  # no half lines
                    self._log.truncate(self._log.tell() - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._amiss(error)
        for recorder in self._also:
            try:
                recorder.record(event)
            except Exception as error:
                self._amiss(error)

    def _amiss(self, error: Exception) -> None:
        if self._failed is None:
            raise error
        self._failed(error)

    def accepted(self, llm: str, at_s: float, input_tokens: int) -> int:
        """A request will be answered; its number in this run."""
        with self._lock:
            number, self._requests = self._requests, self._requests + 1
        self.record(
            Accepted(at_s=at_s, request=number, llm=llm, input_tokens=input_tokens)
        )
        return number

    def ended(self, record: RequestRecord) -> None:
        """A request has ended."""
        self.record(
            RequestEnd(
                at_s=record.end_s,
                request=record.number,
                llm=record.llm,
                arrival_s=record.arrival_s,
                input_tokens=record.input_tokens,
                output_tokens=record.output_tokens,
                result=record.result,
                first_token_s=record.first_token_s,
                gpus=None if record.replica is None else record.replica.gpus,
                reason=record.reason,
            )
        )

    def close(self) -> None:
        with self._lock:
            self._log.close()


def _left_open(path: Path) -> tuple[list[dict[str, Any]], float]:
    """Requests of the last run that were accepted and have no end, in their order, and
    when it was last heard of. A line that a crash has cut off is removed."""
    if not path.exists():
        return [], 0.0
    _trim(path)
    ended: set[int] = set()
    left: list[dict[str, Any]] = []
    last_s: float | None = None
    for line in _backwards(path):
        try:
            event = json.loads(line)
        except ValueError:  # not ours to mend
            continue
        if last_s is None:
            last_s = event["at_s"]
        if event["event"] == "request":
            ended.add(event["request"])
        elif event["event"] == "accepted" and event["request"] not in ended:
            left.append(event)
        if event["event"] == "started" or event["at_s"] < last_s - LONGEST_S:
            break
    return left[::-1], last_s or 0.0


def _trim(path: Path) -> None:
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = 0
        for begin in range(max(0, end - 1) // BLOCK * BLOCK, -1, -BLOCK):
            file.seek(begin)
            at = file.read(BLOCK).rfind(b"\n")
            if at >= 0:
                keep = begin + at + 1
                break
        file.truncate(keep)


def _backwards(path: Path) -> Iterator[bytes]:
    """Whole lines of a file, the last one first; reads no more than is asked for."""
    with path.open("rb") as file:
        begin, rest = file.seek(0, os.SEEK_END), b""
        while begin > 0:
            size = min(BLOCK, begin)
            begin -= size
            file.seek(begin)
            rest, *lines = (file.read(size) + rest).split(b"\n")
            yield from (line for line in reversed(lines) if line)
        if rest:
            yield rest
