"""What has come so far, for the forecasts of a cluster that serves: bounded, and kept.

Single requests are kept only as long as others may come that belong between them; what is
older is counted into epochs, exactly as `bin_demand` would count all requests from the
first on (to the last bit: a test compares). So memory and time do not grow with the
requests served: `add` takes O(1), `demand` O(n log n) in the n requests of the last
`LATE_S` and of those still in flight, and O(epochs kept) to copy the rest.
"""

from __future__ import annotations

import os
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreserve.traces.trace import Demand, Floats, Trace, count_demand

LATE_S = 960.0
"""A request is told of when it has ended, which a deadline allows to be so much later."""
MOST_EPOCHS = 4032
"""That are kept: two weeks of five minutes. A forecast takes the longer the more there are:
2 s with these, for 16 LLMs on a busy core."""
WATCHED = 0.5
"""Share of an epoch that must have been seen, for its counts to stand for all of it."""
DAY_S = 86_400.0

Row = tuple[float, int, int, int]
"""(arrival, number of the LLM, input tokens, output tokens)."""


def trace_of(llms: Sequence[str], rows: Iterable[Row] = ()) -> Trace:
    """Requests as a trace, in order of arrival."""
    columns = list(zip(*sorted(rows), strict=True)) or [(), (), (), ()]
    return Trace(
        arrival_s=np.array(columns[0], dtype=np.float64),
        llm=np.array(columns[1], dtype=np.int32),
        llms=tuple(llms),
        input_tokens=np.maximum(1, np.array(columns[2], dtype=np.int32)),
        output_tokens=np.maximum(1, np.array(columns[3], dtype=np.int32)),
    )


class Arrivals:
    """The requests that have come; any thread may add and ask.

    Epochs are numbered from second 0 of the clock. One of which too little was seen (the
    cluster was down) is taken to have been as the same one a day before, else as the one
    before it: what nobody counted was not zero.
    """

    def __init__(
        self,
        llms: Sequence[str],
        *,
        epoch_s: float,
        busy_s: Callable[[Trace], Floats],
        since_s: float = 0.0,
        path: Path | None = None,
    ) -> None:
        """``busy_s``: how long each request is in flight, as the plans count it;
        ``since_s``: from when on requests are told of. What ``path`` has from before is
        gone on with, if there is such a file; `save` writes it."""
        self.llms, self.epoch_s = tuple(llms), epoch_s
        self.dropped = ""
        """Why what was in the file is not used; "" where it is, or there is none."""
        self.broken = False
        """Whether that is because it could not be read; it has another name then."""
        self.late = 0
        """Requests that came too late to be counted."""
        self._busy_s, self._path = busy_s, path
        self._number = {llm: i for i, llm in enumerate(self.llms)}
        self._lock = threading.Lock()
        self._first = 0
        """Number of the oldest epoch that is kept."""
        self._done: list[Floats] = []
        """Of each epoch that is done with: [5, llm], as in `Demand`."""
        self._seen: list[float] = []
        """Of each, the seconds of it in which requests were told of."""
        self._new: deque[Row] = deque()
        """Not looked at yet."""
        self._rows: list[Row] = []
        self._watched: list[tuple[float, float]] = []
        """Stretches in which requests were told of; the last one goes on."""
        if path is not None and path.exists():
            self._load(path)
        if not self._watched and not self._done:
            # Epochs before the first start: there is nothing to be said of them.
            self._first = int(since_s // epoch_s)
        self._watched.append((since_s, np.inf))

    def add(
        self, arrival_s: float, llm: str, input_tokens: int, output_tokens: int
    ) -> None:
        """One request; of an LLM that is not served here it is not kept."""
        if llm not in self._number:
            return
        row = (arrival_s, self._number[llm], input_tokens, max(1, output_tokens))
        self._new.append(row)  # at once, also while others count

    def demand(self, epochs: int) -> Demand:
        """The whole epochs before number ``epochs``, as far back as they are kept."""
        with self._lock:
            self._take()
            self._fold(self._settled(epochs * self.epoch_s))
            later = self._count(self._next, epochs)
            seen = [self._seen_of(e) for e in range(self._next, epochs)]
            columns = np.concatenate(
                [np.array(self._done).reshape(-1, 5, len(self.llms)), later]
            )
            first, watched = self._first, np.array([*self._seen, *seen])
        known = max(0, epochs - first)
        columns = self._filled(columns[:known], watched[:known] / self.epoch_s)
        rate, mean, peak, inputs, outputs = columns.transpose(1, 2, 0).copy()
        return Demand(
            epoch_s=self.epoch_s,
            start_s=first * self.epoch_s,
            llms=self.llms,
            rate_rps=rate,
            mean_load=mean,
            peak_load=peak,
            input_tokens=inputs,
            output_tokens=outputs,
        )

    def save(self, now_s: float) -> None:
        """Write all of it to the file, whole or not at all."""
        assert self._path is not None
        with self._lock:
            self._take()
            self._fold(self._settled(now_s))
            begun, _ = self._watched[-1]
            stretches = [*self._watched[:-1], (begun, max(begun, now_s))]
            kept = {
                "llms": np.array(self.llms),
                "epoch_s": np.array(self.epoch_s),
                "first": np.array(self._first),
                "done": np.array(self._done).reshape(-1, 5, len(self.llms)),
                "seen": np.array(self._seen),
                "rows": np.array(self._rows, dtype=np.float64).reshape(-1, 4),
                "watched": np.array(stretches),
            }
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **kept)  # type: ignore[arg-type]
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)

    # With the lock.

    @property
    def _next(self) -> int:
        """The oldest epoch that is not done with."""
        return self._first + len(self._done)

    def _take(self) -> None:
        edge_s = self._next * self.epoch_s
        for _ in range(len(self._new)):
            row = self._new.popleft()
            self.late += row[0] < edge_s
            self._rows.append(row)

    def _settled(self, now_s: float) -> int:
        """The first epoch to which requests may still come."""
        return max(self._next, int((now_s - LATE_S) // self.epoch_s))

    def _fold(self, epoch: int) -> None:
        """Be done with the epochs before number ``epoch``."""
        if epoch <= self._next:
            return
        begin = max(self._next, epoch - MOST_EPOCHS)
        if begin > self._next:
            self._first, self._done, self._seen = begin, [], []
        counted = self._count(begin, epoch)
        self._seen += [self._seen_of(e) for e in range(begin, epoch)]
        self._done += list(counted)
        excess = len(self._done) - MOST_EPOCHS
        if excess > 0:
            self._first += excess
            del self._done[:excess], self._seen[:excess]
        edge_s = epoch * self.epoch_s
        trace = trace_of(self.llms, self._rows)
        stays = trace.arrival_s + self._busy_s(trace) > edge_s
        rows = zip(sorted(self._rows), stays.tolist(), strict=True)
        self._rows = [row for row, kept in rows if kept or row[0] >= edge_s]
        self._watched = [(a, b) for a, b in self._watched if b > edge_s]

    def _count(self, begin: int, end: int) -> NDArray[np.float64]:
        """Epochs ``begin`` to ``end`` from the requests: [epoch, 5, llm]."""
        if end <= begin:
            return np.zeros((0, 5, len(self.llms)))
        trace = trace_of(
            self.llms, (r for r in self._rows if r[0] < end * self.epoch_s)
        )
        found = count_demand(
            trace,
            epoch_s=self.epoch_s,
            busy_s=self._busy_s(trace),
            edges=np.arange(begin, end + 1, dtype=np.float64) * self.epoch_s,
        )
        columns = (
            found.rate_rps,
            found.mean_load,
            found.peak_load,
            found.input_tokens,
            found.output_tokens,
        )
        return np.array(columns).transpose(2, 0, 1)

    def _seen_of(self, epoch: int) -> float:
        start_s, end_s = epoch * self.epoch_s, (epoch + 1) * self.epoch_s
        parts = ((max(a, start_s), min(b, end_s)) for a, b in self._watched)
        seen_s = sum(b - a for a, b in parts if b > a)
        return self.epoch_s if seen_s >= end_s - start_s else seen_s

    # The rest.

    def _filled(self, columns: Floats, share: Floats) -> Floats:
        """``columns`` [epoch, 5, llm] of epochs of which this share was seen, as if all of
        each had been."""
        day = round(DAY_S / self.epoch_s)
        for i in np.flatnonzero(share < 1.0):
            if share[i] >= WATCHED:
                columns[i, :2] /= share[i]
            elif i >= day > 0:
                columns[i] = columns[i - day]
            elif i > 0:
                columns[i] = columns[i - 1]
        return columns

    def _load(self, path: Path) -> None:
        """Take over what is in the file; one that is no such file is set aside."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
                found = {name: kept[name] for name in kept.files}
            llms = tuple(str(llm) for llm in found["llms"])
            epoch_s, first = float(found["epoch_s"]), int(found["first"])
            done, seen = found["done"], found["seen"].tolist()
            rows, watched = found["rows"].tolist(), found["watched"].tolist()
            if done.shape != (len(seen), 5, len(llms)):
                raise ValueError("columns of unequal length")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            path.replace(path.with_name(path.name + ".broken"))
            self.dropped = f"{path.name} cannot be read: {error}"
            self.broken = True
            return
        if epoch_s != self.epoch_s:
            self.dropped = f"{path.name} counts in epochs of {epoch_s:g} s"
            return
        place = {llm: i for i, llm in enumerate(llms)}
        columns = np.zeros((len(seen), 5, len(self.llms)))
        for i, llm in enumerate(self.llms):
            if llm in place:
                columns[:, :, i] = done[:, :, place[llm]]
        self._first, self._done, self._seen = first, list(columns), seen
        self._rows = [
            (arrival_s, self._number[llms[int(llm)]], int(given), int(asked))
            for arrival_s, llm, given, asked in rows
            if llms[int(llm)] in self._number
        ]
        self._watched = [(a, b) for a, b in watched]
