"""Traces in files: the kind is told from the header, requests come in chunks or at once.

A fault in a file is one `InvalidInput` line that says where and what to do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.codec import did_you_mean, dump_json, write_text
from foreserve.models.errors import InvalidInput
from foreserve.traces.files import (
    check,
    is_jsonl,
    need_columns,
    read_frames,
    read_header,
)
from foreserve.traces.prefixes import Prefixes, row_of_prefixes
from foreserve.traces.rates import is_rates
from foreserve.traces.readers import ALIASES, FORMATS, Rows
from foreserve.traces.trace import Floats, Trace
from foreserve.traces.writers import rows_of, write_rows


@dataclass(slots=True, kw_only=True)
class Reading:
    """A trace file being read; the numbers are final when ``chunks`` has ended."""

    file: str
    format: str
    left_out: tuple[str, ...]
    """Columns of the file that our terms have no place for."""
    keep_failed: bool = False
    read: int = 0
    """Rows read."""
    failed: int = 0
    """Failed requests (no input or no output) among them."""
    start: str | None = None
    """Date and time of second 0, where the file has dates; None before it is read."""
    chunks: Iterator[Rows] = field(default_factory=lambda: iter(()))
    """Requests that did not fail, or all with at least a token; times do not decrease."""

    @property
    def dropped(self) -> int:
        return 0 if self.keep_failed else self.failed


def open_trace(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    llm: str | None = None,
    keep_failed: bool = False,
    watch: Callable[[int], None] | None = None,
) -> Reading:
    """Start to read a trace file in chunks; arguments as in `read_trace`. ``watch`` is
    told the bytes of the file read so far."""
    file = os.fspath(path)
    header = read_header(file)
    # A column that has its name already keeps it; two for one are told below.
    known = [ALIASES.get(column, column) for column in header]
    name = format or _detect(file, known)
    if name not in FORMATS:
        hint = did_you_mean(name, list(FORMATS))
        raise InvalidInput(f"no trace format {name!r}", hint=hint)
    kind = FORMATS[name]
    lines = is_jsonl(file)
    needed = kind.columns if lines else kind.fields or kind.columns
    need_columns(file, known, needed, (*kind.optional, *kind.aside, *kind.lists))
    lists = kind.lists if lines else ()
    used = {*kind.columns, *kind.optional, *lists}
    reading = Reading(
        file=file,
        format=name,
        left_out=() if kind.fields else tuple(sorted({*known} - used)),
        keep_failed=keep_failed,
    )
    wanted = kind.fields or [c for c in header if ALIASES.get(c, c) in used]
    # The first line need not have them for others to.
    wanted = [*wanted, *(column for column in lists if column not in wanted)]
    frames = (
        frame.rename(columns=ALIASES)
        for frame in read_frames(file, header=wanted if lines else (), watch=watch)
    )
    llm = llm or Path(file).name.split(".")[0]
    reading.chunks = _checked(reading, kind.convert(file, frames, llm))
    return reading


def _detect(file: str, header: Sequence[str]) -> str:
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
            hint="name one, or keep only its columns",
        )
    if not fits and is_rates(file):
        raise InvalidInput(
            "holds counts, not requests",
            file=file,
            hint="`plan trace compose` draws requests from counts",
        )
    nearest = fits[0] if fits else max(shared, key=lambda name: shared[name])
    if shared[nearest] < 2:
        known = (",".join(each.columns) for each in FORMATS.values())
        raise InvalidInput(
            f"unknown trace format with columns {','.join(header)[:80]}",
            file=file,
            line=1,
            hint=f"known headers: {' or '.join(known)}",
        )
    return nearest


def _checked(reading: Reading, chunks: Iterator[Rows]) -> Iterator[Rows]:
    """In order of time, without failed requests, or with a token for each of them."""
    latest_s = 0.0
    for rows in chunks:
        if not len(rows):
            continue
        before = np.concatenate([[latest_s], rows.arrival_s[:-1]])
        check(
            reading.file,
            rows.time,
            rows.arrival_s < before,
            "is before the row above: times are not sorted",
            hint=f"sort the rows by {rows.time.name}",
        )
        latest_s = float(rows.arrival_s[-1])
        if reading.format == "azure" and reading.start is None:
            reading.start = str(rows.time.iloc[0]).strip()
        good = (rows.output_tokens > 0) & (rows.input_tokens > 0)
        reading.read += len(rows)
        reading.failed += int((~good).sum())
        if good.all():
            yield rows
        elif reading.keep_failed:
            yield replace(
                rows,
                input_tokens=np.maximum(rows.input_tokens, 1),
                output_tokens=np.maximum(rows.output_tokens, 1),
            )
        elif good.any():
            yield rows.where(good)
    if reading.read == reading.dropped:
        what = "no requests in the file"
        if reading.failed:
            what += f" but {reading.failed} failed ones (no output tokens)"
        raise InvalidInput(what, file=reading.file)


def read_trace(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    llm: str | None = None,
    keep_failed: bool = False,
) -> Trace:
    """Read a trace file.

    ``format`` is a name in `FORMATS`; without it the header tells. ``llm`` names the
    requests of a format without such a column (default: the file's name up to the first
    dot). Failed requests (no output) are dropped and counted; ``keep_failed`` keeps them
    with one output token, for they still took their input.

    Blocks of prompts are numbered from 0 in the order in which they first come.
    """
    import pandas as pd

    reading = open_trace(path, format=format, llm=llm, keep_failed=keep_failed)
    index: dict[str, int] = {}
    # Buffers grow in place: a long trace is never in memory twice.
    buffers = (bytearray(), bytearray(), bytearray(), bytearray())
    prefixes: list[Prefixes | None] = []
    requests: list[int] = []
    for rows in reading.chunks:
        local, found = pd.factorize(rows.llm)
        codes = np.array([index.setdefault(str(name), len(index)) for name in found])
        columns: tuple[NDArray[Any], ...] = (
            rows.arrival_s,
            codes[local].astype(np.int32),
            rows.input_tokens,
            rows.output_tokens,
        )
        for buffer, column in zip(buffers, columns, strict=True):
            buffer += column.tobytes()
        prefixes.append(rows.prefixes)
        requests.append(len(rows))
    llms = tuple(sorted(index))
    order = np.empty(len(llms), dtype=np.int32)
    order[[index[name] for name in llms]] = np.arange(len(llms))
    codes, inputs, outputs = (np.frombuffer(each, np.int32) for each in buffers[1:])
    arrival_s = np.frombuffer(buffers[0], np.float64)
    return Trace(
        arrival_s=arrival_s,
        llm=order[codes],
        llms=llms,
        input_tokens=inputs,
        output_tokens=outputs,
        dropped=reading.dropped,
        prefixes=_sound(reading, row_of_prefixes(prefixes, requests), arrival_s),
    )


def _sound(
    reading: Reading, prefixes: Prefixes | None, arrival_s: Floats
) -> Prefixes | None:
    """With dense ids; blocks must not come after different ones."""
    if prefixes is None:
        return None
    prefixes = prefixes.dense()
    if (request := prefixes.contradiction()) is not None:
        raise InvalidInput(
            f"the request at {arrival_s[request]:.10g} s has a block after another one "
            "than an earlier prompt has it",
            file=reading.file,
            field=FORMATS[reading.format].lists[0],
            hint="equal ids must mean equal tokens from the prompt's first one on",
        )
    return prefixes


def write_trace(
    trace: Trace,
    path: str | os.PathLike[str],
    meta: Mapping[str, object] | None = None,
) -> None:
    """Write canonical CSV, JSONL (.gz) or Parquet: same trace, same bytes, whole or not
    at all.

    ``meta`` (source, licence, ...) goes into the sidecar ``<name>.meta.json``.
    """
    write_rows(rows_of(trace), path)
    if meta is not None:
        write_meta(path, meta)


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


def write_meta(path: str | os.PathLike[str], meta: Mapping[str, object]) -> None:
    """Write the sidecar of a trace file."""
    write_text(_sidecar(path), dump_json(dict(meta)))


def _sidecar(path: str | os.PathLike[str]) -> str:
    return f"{os.fspath(path)}.meta.json"
