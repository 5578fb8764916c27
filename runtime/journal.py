"""What happened, as one JSON object a line: same run, same bytes.

A journal is enough to compute the run's outcome again, and its ``request`` lines are a
trace: ``arrival_s``, ``llm``, ``input_tokens``, ``output_tokens`` of every request that
came, in order of their ends. Times are those of the run's clock, never the wall's.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from foreserve.models.codec import structure, to_plain
from foreserve.models.drift import EpochDrift
from foreserve.models.errors import InvalidInput
from foreserve.models.faults import Fault, FaultKind
from foreserve.models.observed import Phase
from foreserve.models.placement import Action, Placement, ReplicaId
from foreserve.models.record import Record
from foreserve.models.specs import GpuId


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(Record):
    """First line: whose run this is. Requests arrive from ``start_s`` until ``end_s``."""

    at_s: float
    policy: str
    start_s: float
    end_s: float
    seed: int | None = None
    initial: Placement = field(default_factory=Placement)
    """What was in place already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision(Record):
    """Something new was wanted, or something was done."""

    at_s: float
    desired: Placement | None = None
    """None: as before."""
    actions: tuple[Action, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal(Record):
    """A policy wanted what cannot be; the placement before stays desired."""

    at_s: float
    desired: Placement
    violations: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChange(Record):
    """A replica entered ``phase``; None: it is gone."""

    at_s: float
    llm: str
    gpus: tuple[GpuId, ...]
    phase: Phase | None
    lost: bool = False
    """Gone without having been asked to."""
    revoked: bool = False
    """Lost because a replica that served took back memory that it had lent."""
    from_storage: bool = False
    """Of a load: it reads storage, not pinned host memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Faulted(Record):
    """A fault began. What it took is in the `PhaseChange`s that follow."""

    at_s: float
    kind: FaultKind
    target: str
    until_s: float | None = None
    """None: for good, or for no time."""
    factor: float | None = None
    replicas: int = 0
    """Replicas that vanish."""
    requests: int = 0
    """Requests that these were working on, which start anew."""

    @property
    def fault(self) -> Fault:
        """As it was written down, but for when it began."""
        lasts_s = None if self.until_s is None else self.until_s - self.at_s
        return Fault(
            at=self.at_s,
            kind=self.kind,
            target=self.target,
            for_=lasts_s,
            factor=self.factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted(Record):
    """A request came to a live cluster, which will write its `RequestEnd`; where there is
    none, the process that would have written it has ended before."""

    at_s: float
    request: int
    """Its number in this run, as in its end."""
    llm: str
    input_tokens: int
    """Probably."""


Result = Literal["finished", "failed", "unfinished"]
RESULTS: tuple[Result, ...] = ("unfinished", "finished", "failed")
"""By the numbers that `RequestTable` has for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd(Record):
    """All about one request, written once: when it ends, or when the run does."""

    at_s: float
    request: int
    """Its row in the trace."""
    llm: str
    arrival_s: float
    input_tokens: int
    output_tokens: int
    result: Result
    first_token_s: float | None = None
    gpus: tuple[GpuId, ...] | None = None
    """Where it was worked on last; None: nowhere."""
    reason: str | None = None
    """Why it failed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTable:
    """All requests of a run in columns, in the order of arrival: its owner fills in what
    comes of them."""

    llms: Sequence[str]
    first_request: int
    """The number of the first one."""
    arrival_s: NDArray[np.float64]
    llm: NDArray[np.int32]
    """Index into ``llms``."""
    input_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    """Asked for, whether they came or not."""
    first_token_s: NDArray[np.float64]
    """NaN where there was none."""
    end_s: NDArray[np.float64]
    """When it ended, was given up, or the run stopped."""
    result: NDArray[np.int8]
    """Index into `RESULTS`."""
    where: NDArray[np.int32]
    """Index into ``replicas`` of where it was worked on last; -1: nowhere."""
    replicas: Sequence[ReplicaId]

    @property
    def finish_s(self) -> NDArray[np.float64]:
        """NaN where it did not finish."""
        done = self.result == RESULTS.index("finished")
        return np.where(done, self.end_s, np.nan)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestEnds:
    """Requests that ended since the last time: `RequestEnd`s by the thousand."""

    table: RequestTable
    rows: NDArray[np.int32]
    """In the order of their ends."""

    def worked_on(self) -> Iterator[ReplicaId]:
        """The replicas that these requests were worked on."""
        for index in np.unique(self.table.where[self.rows]).tolist():
            if index >= 0:
                yield self.table.replicas[index]

    def events(self) -> Iterator[RequestEnd]:
        """One by one."""
        t = self.table
        requests = (t.arrival_s, t.llm, t.input_tokens, t.output_tokens)
        ends = (t.first_token_s, t.end_s, t.result, t.where)
        columns: list[list[Any]] = [c[self.rows].tolist() for c in (*requests, *ends)]
        for row, *values in zip(self.rows.tolist(), *columns, strict=True):
            arrival_s, llm, given, asked, first_s, end_s, result, where = values
            reason = None
            if RESULTS[result] == "failed":
                tokens = given + asked - 1
                reason = f"{tokens} tokens exceed the KV cache of every ACTIVE replica"
            yield RequestEnd(
                at_s=end_s,
                request=t.first_request + row,
                llm=t.llms[llm],
                arrival_s=arrival_s,
                input_tokens=given,
                output_tokens=asked,
                result=RESULTS[result],
                first_token_s=None if math.isnan(first_s) else first_s,
                gpus=t.replicas[where].gpus if where >= 0 else None,
                reason=reason,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(Record):
    """What is known of an LLM's requests beside single ones, when the run ends."""

    at_s: float
    llm: str
    gaps: tuple[tuple[int, int], ...]
    """Between tokens: (bin of `models.gaps`, how many), where there are any."""
    gaps_s: float
    """Their sum."""
    preemptions: int = 0
    found_tokens: int = 0
    """Of prompts, not computed because an earlier request's had been."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Record):
    """Last line: nothing is known of what came after."""

    at_s: float


Event = (
    Started
    | Decision
    | Refusal
    | PhaseChange
    | Faulted
    | Accepted
    | RequestEnd
    | Served
    | EpochDrift
    | Ended
)

EVENTS: Mapping[str, type[Event]] = {
    "started": Started,
    "decision": Decision,
    "refusal": Refusal,
    "phase": PhaseChange,
    "fault": Faulted,
    "accepted": Accepted,
    "request": RequestEnd,
    "served": Served,
    "drift": EpochDrift,
    "ended": Ended,
}
_NAMES = {cls: name for name, cls in EVENTS.items()}


class Recorder(Protocol):
    """Whoever wants to know what happens."""

    def record(self, event: Event | RequestEnds) -> None: ...


def name_of(event: Event) -> str:
    """What an event is called in a journal."""
    return _NAMES[type(event)]


def line_of(event: Event) -> str:
    """An event as its line in a journal, without the line's end."""
    return json.dumps(
        {"event": _NAMES[type(event)], **to_plain(event)},
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )


class Journal:
    """Writes events as JSON lines: to ``path``, or to ``lines`` where there is none.

    A file (``.gz``: compressed) appears under its name when the journal is closed, whole;
    if the ``with`` block ends in an error it does not appear.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.lines: list[str] = []
        self._path = Path(path) if path is not None else None
        self._raw: IO[bytes] | None = None
        self._out: IO[bytes] | gzip.GzipFile | None = None
        if self._path is not None:
            name = f".{self._path.name}.{os.getpid()}.tmp"
            self._temporary = self._path.with_name(name)
            self._raw = self._out = self._temporary.open("wb")
            if self._path.suffix == ".gz":
                # No file name and no time in the header: same events, same bytes.
                self._out = gzip.GzipFile(
                    filename="", mode="wb", fileobj=self._raw, mtime=0
                )

    def record(self, event: Event | RequestEnds) -> None:
        if isinstance(event, RequestEnds):
            for end in event.events():
                self.record(end)
            return
        line = line_of(event)
        if self._path is None:
            self.lines.append(line)
        elif self._out is None:
            raise ValueError(f"{self._path}: the journal is closed")
        else:
            self._out.write(line.encode() + b"\n")

    def close(self) -> None:
        """Finish the file and give it its name."""
        if self._path is not None and self._finish():
            self._temporary.replace(self._path)

    def _finish(self) -> bool:
        if self._raw is None or self._out is None:
            return False
        self._out.close()
        self._raw.close()
        self._raw = self._out = None
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._finish():
            self._temporary.unlink()


def read_journal(path: str | os.PathLike[str]) -> Iterator[Event]:
    """Events of a journal file, one by one; `InvalidInput` where a line is none."""
    file = os.fspath(path)
    opened = gzip.open if file.endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            yield from parse(lines, file)
    except FileNotFoundError:
        raise InvalidInput("no such file", file=file) from None
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError):
        raise InvalidInput("not a whole journal", file=file) from None


def parse(lines: Iterable[str], file: str | None = None) -> Iterator[Event]:
    """Events of journal lines."""
    for number, line in enumerate(lines, start=1):
        try:
            plain = json.loads(line)
            cls = EVENTS[plain.pop("event")]
        except (ValueError, AttributeError, KeyError, TypeError):
            raise InvalidInput("not a journal line", file=file, line=number) from None
        try:
            yield structure(cls, plain, text=line, file=file)
        except InvalidInput as error:
            raise InvalidInput(
                error.message,
                file=file,
                line=number,
                field=error.field,
                hint=error.hint,
            ) from None
