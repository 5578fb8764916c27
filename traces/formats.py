"""Trace files: canonical CSV and JSONL, the Azure LLM traces; all also gzipped. The
format is told from the header.

To add a format: a generator from chunks of cells to `Rows`, and its columns in
`FORMATS`. A fault in a file is one `InvalidInput` line that says where and what to do.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.codec import dump_json, write_text
from foreserve.models.errors import InvalidInput
from foreserve.traces.files import (
    check,
    counts,
    is_jsonl,
    names,
    need_columns,
    numbers,
    read_frames,
    write_file,
)
from foreserve.traces.trace import Floats, Ints, Trace

if TYPE_CHECKING:
    import pandas as pd

CANONICAL = ("arrival_s", "llm", "input_tokens", "output_tokens")
ALIASES = {"model": "llm", "prefix_id": "prefix"}
OPTIONAL = ("tenant", "slo_class", "prefix")
"""Known columns that this version reads past."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """One chunk of a trace file in our terms, whatever its format; [request] each."""

    arrival_s: Floats
    time: pd.Series[Any]
    """The cells ``arrival_s`` is from, for messages."""
    llm: pd.Series[str]
    input_tokens: Ints
    output_tokens: Ints
    """0 is a failed request."""


Frames = Iterator["pd.DataFrame"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of trace file: its header has all ``columns``, or aliases of them."""

    columns: tuple[str, ...]
    convert: Callable[[str, Frames, str], Iterator[Rows]]
    """``convert(file, chunks, llm)``: ``llm`` names the requests of a file that does not
    say. All chunks of a file go through one call, in order."""


def _canonical(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    for frame in frames:
        yield Rows(
            arrival_s=numbers(file, frame["arrival_s"], least=0),
            time=frame["arrival_s"],
            llm=names(file, frame["llm"]),
            input_tokens=counts(file, frame["input_tokens"], least=1),
            output_tokens=counts(file, frame["output_tokens"], least=0),
        )


def _azure(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    """Stamps with or without zone and decimals; the first one becomes 0."""
    import pandas as pd

    first_ns = None
    for frame in frames:
        cells = frame["TIMESTAMP"]
        stamps = pd.to_datetime(
            cells.astype(str).str.strip(), format="ISO8601", utc=True, errors="coerce"
        )
        check(file, cells, stamps.isna().to_numpy(), "is not a time stamp")
        # Whole nanoseconds: seconds since 1970 would lose the seventh decimal.
        since_1970_ns = stamps.dt.as_unit("ns").astype("int64").to_numpy()
        if first_ns is None and len(frame):
            first_ns = since_1970_ns[0]
        yield Rows(
            arrival_s=(since_1970_ns - (first_ns or 0)) / 1e9,
            time=cells,
            llm=pd.Series(llm, index=frame.index),
            input_tokens=counts(file, frame["ContextTokens"], least=1),
            output_tokens=counts(file, frame["GeneratedTokens"], least=0),
        )


FORMATS = {
    "canonical": Format(columns=CANONICAL, convert=_canonical),
    "azure": Format(columns=AZURE, convert=_azure),
}


def read_trace(
    path: str | os.PathLike[str], *, llm: str | None = None, keep_failed: bool = False
) -> Trace:
    """Read a trace file.

    ``llm`` names the requests of a format without such a column (default: the file's
    name up to the first dot). Failed requests (no output) are dropped and counted;
    ``keep_failed`` keeps them with one output token, for they still took their input.
    """
    file = os.fspath(path)
    frames = (frame.rename(columns=ALIASES) for frame in read_frames(file))
    first = next(frames)
    convert = _detect(file, list(first.columns)).convert
    llm = llm or Path(file).name.split(".")[0]
    return _collect(file, convert(file, chain([first], frames), llm), keep_failed)


def _detect(file: str, header: Sequence[str]) -> Format:
    """The one format whose columns are all there; else what is wrong with the header."""
    shared = {
        name: len(set(header).intersection(each.columns))
        for name, each in FORMATS.items()
    }
    fits = [name for name, n in shared.items() if n == len(FORMATS[name].columns)]
    if len(fits) > 1:
        raise InvalidInput(
            f"the header fits several formats: {', '.join(fits)}",
            file=file,
            line=1,
            hint="keep only the columns of one",
        )
    nearest = max(shared, key=lambda name: shared[name])
    if shared[nearest] < 2:
        known = (",".join(each.columns) for each in FORMATS.values())
        raise InvalidInput(
            f"unknown trace format with columns {','.join(header)[:80]}",
            file=file,
            line=1,
            hint=f"known headers: {' or '.join(known)}",
        )
    need_columns(file, header, FORMATS[nearest].columns, OPTIONAL)
    return FORMATS[nearest]


def _collect(file: str, chunks: Iterator[Rows], keep_failed: bool) -> Trace:
    """All chunks as one trace, compact from the start; LLMs in order of their names."""
    import pandas as pd

    index: dict[str, int] = {}
    # Buffers grow in place: a long trace is never in memory twice.
    buffers = (bytearray(), bytearray(), bytearray(), bytearray())
    latest_s, failed = 0.0, 0
    for rows in chunks:
        if not len(rows.arrival_s):
            continue
        before = np.concatenate([[latest_s], rows.arrival_s[:-1]])
        check(
            file,
            rows.time,
            rows.arrival_s < before,
            "is before the row above: times are not sorted",
            hint=f"sort the rows by {rows.time.name}",
        )
        latest_s = float(rows.arrival_s[-1])
        local, found = pd.factorize(rows.llm)
        codes = np.array([index.setdefault(str(name), len(index)) for name in found])
        columns: tuple[NDArray[Any], ...] = (
            rows.arrival_s,
            codes[local].astype(np.int32),
            rows.input_tokens,
            np.maximum(rows.output_tokens, 1),
        )
        succeeded = rows.output_tokens > 0
        failed += int((~succeeded).sum())
        for buffer, column in zip(buffers, columns, strict=True):
            buffer += (column if keep_failed else column[succeeded]).tobytes()
    if not buffers[0]:
        what = f"no requests in the file but {failed} failed ones (no output tokens)"
        raise InvalidInput(what, file=file)
    llms = tuple(sorted(index))
    order = np.empty(len(llms), dtype=np.int32)
    order[[index[name] for name in llms]] = np.arange(len(llms))
    llm, inputs, outputs = (np.frombuffer(each, np.int32) for each in buffers[1:])
    return Trace(
        arrival_s=np.frombuffer(buffers[0], np.float64),
        llm=order[llm],
        llms=llms,
        input_tokens=inputs,
        output_tokens=outputs,
        dropped=0 if keep_failed else failed,
    )


def write_trace(
    trace: Trace,
    path: str | os.PathLike[str],
    meta: Mapping[str, object] | None = None,
) -> None:
    """Write canonical CSV or JSONL (.gz): same trace, same bytes, whole or not at all.

    ``meta`` (source, licence, ...) goes into the sidecar ``<name>.meta.json``.
    """
    buffer = io.StringIO()
    rows = zip(
        trace.arrival_s.tolist(),
        (trace.llms[i] for i in trace.llm),
        trace.input_tokens.tolist(),
        trace.output_tokens.tolist(),
        strict=True,
    )
    if is_jsonl(path):
        for values in rows:
            buffer.write(json.dumps(dict(zip(CANONICAL, values, strict=True))) + "\n")
    else:
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(CANONICAL)
        for arrival_s, *rest in rows:
            writer.writerow([repr(arrival_s), *rest])
    write_file(path, buffer.getvalue())
    if meta is not None:
        write_text(_sidecar(path), dump_json(dict(meta)))


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What the sidecar of a trace file says; empty if there is none."""
    sidecar = Path(_sidecar(path))
    if not sidecar.exists():
        return {}
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"not valid JSON: {error}", file=str(sidecar)) from None
    if not isinstance(meta, dict):
        raise InvalidInput("not a JSON object", file=str(sidecar))
    return meta


def _sidecar(path: str | os.PathLike[str]) -> str:
    return f"{os.fspath(path)}.meta.json"
