"""Reports of plan against actual: of a whole run's journal, and those in a live one's."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from foreserve.models.drift import EpochDrift
from foreserve.models.errors import InvalidInput
from foreserve.models.plan import Plan
from foreserve.runtime.drift import BusyS, Drift
from foreserve.runtime.journal import Ended, Event, parse


def fold(plan: Plan, events: Iterable[Event], busy_s: BusyS) -> Iterator[EpochDrift]:
    """Drift of ``plan`` over a whole run's events; epochs are as long as its first."""
    first = plan.epochs[0]
    drift = Drift(
        plan.fleet,
        epoch_s=first.end_s - first.start_s,
        busy_s=busy_s,
        origin_s=plan.start_s,
        until_s=plan.end_s,
    )
    drift.adopt(-math.inf, plan)
    ended_s = None
    for event in events:
        yield from drift.advance(event.at_s)
        drift.record(event)
        if isinstance(event, Ended):
            ended_s = event.at_s
    if ended_s is None:
        raise InvalidInput("journal: no whole run, its last line is missing")
    yield from drift.finish(ended_s)


def read_drift(path: str | os.PathLike[str]) -> Iterator[EpochDrift]:
    """The reports in a live cluster's journal; others of its lines are not looked at, and
    one that is still being written is left out."""
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if b'"event":"drift"' in line and line.endswith(b"\n"):
                    yield from _reports([line.decode()], os.fspath(path))
    except FileNotFoundError:
        raise InvalidInput("no such file", file=os.fspath(path)) from None


def last_drift(
    path: Path, count: int, *, most_bytes: int = 8 << 20
) -> list[EpochDrift]:
    """The last reports in a journal, at most ``count``, of its last ``most_bytes``."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most_bytes))
        lines = file.read().split(b"\n")[1:-1]
    own = (x.decode() for x in reversed(lines) if b'"event":"drift"' in x)
    return list(_reports(islice(own, count), None))[::-1]


def _reports(lines: Iterable[str], file: str | None) -> Iterator[EpochDrift]:
    for line in lines:
        if json.loads(line).get("event") != "drift":
            continue
        yield from (x for x in parse([line], file) if isinstance(x, EpochDrift))
