"""Trace files: canonical CSV and JSONL, the Azure LLM traces, demand tables; all also
gzipped. The format is told from the header.

A fault in a file is one `InvalidInput` line with the line number and what to do about it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from foreserve.models.codec import did_you_mean, dump_json, write_text
from foreserve.models.errors import InvalidInput
from foreserve.traces.trace import Demand, Floats, Trace

if TYPE_CHECKING:
    import pandas as pd

CANONICAL = ("arrival_s", "llm", "input_tokens", "output_tokens")
ALIASES = {"model": "llm", "prefix_id": "prefix"}
OPTIONAL = ("tenant", "slo_class", "prefix")
"""Known columns that this version reads past."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
DEMAND = (
    "t_s",
    "width_s",
    "llm",
    "requests",
    "mean_in_flight",
    "peak_in_flight",
    "input_tokens",
    "output_tokens",
)
CHUNK_ROWS = 500_000

Columns = dict[str, Any]
"""Column name -> values of one chunk, after conversion."""


def read_trace(path: str | os.PathLike[str], *, llm: str | None = None) -> Trace:
    """Read a trace; ``llm`` names the requests of a file without such a column
    (default: the file's name up to the first dot)."""
    file = os.fspath(path)
    name = llm or Path(file).name.split(".")[0]
    if ".jsonl" in Path(file).name:
        chunks = _read_jsonl(file)
        return _to_trace(file, [_canonical(file, *chunk) for chunk in chunks])
    frames = _read_csv(file)
    header, first_line, frame = next(frames)
    convert = _detect(file, header, name)
    parts = [convert(file, frame, first_line)]
    parts += [convert(file, frame, line) for _, line, frame in frames]
    return _to_trace(file, parts)


def _detect(file: str, header: Sequence[str], name: str) -> Callable[..., Columns]:
    present = {ALIASES.get(column, column) for column in header}
    if set(AZURE) <= present:
        return lambda file, frame, line: _azure(file, frame, line, name)
    if set(CANONICAL) <= present:
        return _canonical
    known = {*CANONICAL, *OPTIONAL}
    if len(present & known) >= 2:
        missing = next(column for column in CANONICAL if column not in present)
        strange = sorted(set(header) - known - set(ALIASES))
        for column in strange:
            hint = did_you_mean(column, [missing])
            if hint.startswith("did"):
                raise InvalidInput(
                    f"unknown column {column!r}", file=file, line=1, hint=hint
                )
        raise InvalidInput(
            f"column {missing!r} is missing",
            file=file,
            line=1,
            hint="a trace has the columns " + ",".join(CANONICAL),
        )
    raise InvalidInput(
        f"unknown trace format with columns {','.join(header)[:80]}",
        file=file,
        line=1,
        hint=f"known headers: {','.join(CANONICAL)} or {','.join(AZURE)}",
    )


def _canonical(file: str, frame: pd.DataFrame, line: int) -> Columns:
    frame = frame.rename(columns=ALIASES)
    llm = frame["llm"].astype(str).str.strip()
    empty = np.flatnonzero((llm == "").to_numpy())
    if len(empty):
        raise InvalidInput("empty", file=file, line=line + int(empty[0]), field="llm")
    return {
        "arrival_s": _numbers(file, frame["arrival_s"], line),
        "llm": llm.to_numpy(dtype=object),
        "input_tokens": _integers(file, frame["input_tokens"], line, 1),
        "output_tokens": _integers(file, frame["output_tokens"], line, 0),
        "line": line,
    }


def _azure(file: str, frame: pd.DataFrame, line: int, name: str) -> Columns:
    import pandas as pd

    times = pd.to_datetime(
        frame["TIMESTAMP"].str.strip(), format="ISO8601", utc=True, errors="coerce"
    )
    bad = np.flatnonzero(times.isna().to_numpy())
    if len(bad):
        value = frame["TIMESTAMP"].iloc[bad[0]]
        raise InvalidInput(
            f"{value!r} is not a time stamp",
            file=file,
            line=line + int(bad[0]),
            field="TIMESTAMP",
        )
    seconds = times.dt.as_unit("ns").astype("int64").to_numpy()
    return {
        # Nanoseconds since 1970: made relative to the first row by `_to_trace`.
        "arrival_ns": seconds,
        "llm": np.full(len(frame), name, dtype=object),
        "input_tokens": _integers(file, frame["ContextTokens"], line, 1),
        "output_tokens": _integers(file, frame["GeneratedTokens"], line, 0),
        "line": line,
    }


def _to_trace(file: str, parts: Sequence[Columns]) -> Trace:
    if not parts or not sum(len(part["llm"]) for part in parts):
        raise InvalidInput("no requests in the file", file=file)
    columns = {
        key: np.concatenate([part[key] for part in parts])
        for key in parts[0]
        if key != "line"
    }
    if "arrival_ns" in columns:
        stamps = columns.pop("arrival_ns")
        columns["arrival_s"] = (stamps - stamps[0]) / 1e9
    arrival = columns["arrival_s"]
    first_line = parts[0]["line"]
    if arrival[0] < 0 or (arrival < 0).any():
        row = int(np.flatnonzero(arrival < 0)[0])
        raise InvalidInput(
            f"{arrival[row]:g} is negative",
            file=file,
            line=first_line + row,
            field="arrival_s",
        )
    back = np.flatnonzero(np.diff(arrival) < 0)
    if len(back):
        row = int(back[0]) + 1
        raise InvalidInput(
            f"times are not sorted: {arrival[row]:g} after {arrival[row - 1]:g}",
            file=file,
            line=first_line + row,
            field="arrival_s",
            hint="sort the rows by time",
        )
    kept = columns["output_tokens"] > 0
    llms, codes = np.unique(columns["llm"].astype(str), return_inverse=True)
    return Trace(
        arrival_s=arrival[kept],
        llm=codes.astype(np.int32)[kept],
        llms=tuple(str(name) for name in llms),
        input_tokens=columns["input_tokens"][kept].astype(np.int32),
        output_tokens=columns["output_tokens"][kept].astype(np.int32),
        dropped=int((~kept).sum()),
    )


def _numbers(file: str, column: pd.Series[Any], line: int) -> Floats:
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InvalidInput(
            f"{str(column.iloc[bad[0]])!r} is not a finite number",
            file=file,
            line=line + int(bad[0]),
            field=str(column.name),
        )
    return values


def _integers(file: str, column: pd.Series[Any], line: int, least: int) -> Floats:
    values = _numbers(file, column, line)
    bad = np.flatnonzero((values < least) | (values != np.floor(values)))
    if len(bad):
        raise InvalidInput(
            f"{values[bad[0]]:g} is not a whole number of at least {least}",
            file=file,
            line=line + int(bad[0]),
            field=str(column.name),
        )
    return values


def _read_csv(file: str) -> Iterator[tuple[list[str], int, pd.DataFrame]]:
    """(header, number of the first line, cells as text) of each chunk."""
    import pandas as pd

    with _open_text(file) as handle:
        line = 2
        try:
            reader = pd.read_csv(
                handle,
                dtype=str,
                keep_default_na=False,
                skip_blank_lines=False,
                skipinitialspace=True,
                index_col=False,
                chunksize=CHUNK_ROWS,
            )
            for frame in _strict(reader):
                frame.columns = [str(column).strip() for column in frame.columns]
                # A blank line at the end is no row.
                while len(frame) and not any(frame.iloc[-1].astype(str)):
                    frame = frame.iloc[:-1]
                yield list(frame.columns), line, frame
                line += len(frame)
        except pd.errors.EmptyDataError:
            raise InvalidInput("empty file", file=file) from None
        except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
            what = str(error).strip().splitlines()[-1]
            raise InvalidInput(f"not a CSV table: {what}", file=file) from None


def _strict(reader: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
    """Chunks of a reader; rows longer than the header are an error, not a warning."""
    import pandas as pd

    while True:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = next(reader, None)
        if frame is None:
            return
        yield frame


def _read_jsonl(file: str) -> Iterator[tuple[pd.DataFrame, int]]:
    import pandas as pd

    rows: list[Mapping[str, Any]] = []
    with _open_text(file) as handle:
        for line, text in enumerate(handle, start=1):
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                raise InvalidInput(
                    f"not valid JSON: {error.msg}", file=file, line=line
                ) from None
            row = {ALIASES.get(k, k): v for k, v in dict(row).items()}
            for column in CANONICAL:
                if column not in row:
                    raise InvalidInput(
                        "required key is missing", file=file, line=line, field=column
                    )
            rows.append({column: row[column] for column in CANONICAL})
    if not rows:
        raise InvalidInput("empty file", file=file)
    yield pd.DataFrame(rows).astype({"llm": str}), 1


@contextmanager
def _open_text(file: str) -> Iterator[IO[str]]:
    """The (decompressed) text of a file; what goes wrong is an `InvalidInput`."""
    try:
        opener = gzip.open if file.endswith(".gz") else open
        with opener(file, "rt", encoding="utf-8", newline=None) as handle:
            yield handle
    except FileNotFoundError:
        raise InvalidInput("no such file", file=file) from None
    except IsADirectoryError:
        raise InvalidInput("is a folder, a file is needed", file=file) from None
    except UnicodeDecodeError:
        raise InvalidInput("not UTF-8 text", file=file) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InvalidInput(
            "not a whole gzip file", file=file, hint="is the file cut off?"
        ) from None


def write_trace(
    trace: Trace,
    path: str | os.PathLike[str],
    meta: Mapping[str, object] | None = None,
) -> None:
    """Write canonical CSV or JSONL (.gz): same trace, same bytes, whole or not at all.

    ``meta`` (source, licence, ...) goes into the sidecar ``<name>.meta.json``.
    """
    jsonl = ".jsonl" in Path(path).name
    buffer = io.StringIO()
    rows = zip(
        trace.arrival_s.tolist(),
        (trace.llms[i] for i in trace.llm),
        trace.input_tokens.tolist(),
        trace.output_tokens.tolist(),
        strict=True,
    )
    if jsonl:
        for values in rows:
            buffer.write(json.dumps(dict(zip(CANONICAL, values, strict=True))) + "\n")
    else:
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(CANONICAL)
        for arrival_s, *rest in rows:
            writer.writerow([repr(arrival_s), *rest])
    _write(path, buffer.getvalue())
    if meta is not None:
        write_text(f"{os.fspath(path)}.meta.json", dump_json(dict(meta)))


def read_demand(path: str | os.PathLike[str]) -> Demand:
    """Read a demand table: one row per LLM and epoch; absent rows are zero."""
    file = os.fspath(path)
    parts = []
    for header, line, frame in _read_csv(file):
        for column in DEMAND:
            if column not in header:
                raise InvalidInput(
                    f"column {column!r} is missing",
                    file=file,
                    line=1,
                    hint="a demand table has the columns " + ",".join(DEMAND),
                )
        parts.append(
            {
                name: frame[name].to_numpy(dtype=object)
                if name == "llm"
                else _numbers(file, frame[name], line)
                for name in DEMAND
            }
        )
    table = {name: np.concatenate([part[name] for part in parts]) for name in DEMAND}
    widths = np.unique(table["width_s"])
    if len(widths) != 1:
        raise InvalidInput("no rows or unequal width_s", file=file, field="width_s")
    epoch_s = float(widths[0])
    llms, rows = np.unique(table["llm"].astype(str), return_inverse=True)
    start_s = float(table["t_s"].min())
    epochs = np.rint((table["t_s"] - start_s) / epoch_s).astype(int)
    shape = (len(llms), int(epochs.max()) + 1)

    def spread(name: str, scale: float = 1.0) -> Floats:
        values = np.zeros(shape)
        values[rows, epochs] = table[name] * scale
        return values

    return Demand(
        epoch_s=epoch_s,
        start_s=start_s,
        llms=tuple(str(name) for name in llms),
        rate_rps=spread("requests", 1 / epoch_s),
        mean_load=spread("mean_in_flight"),
        peak_load=spread("peak_in_flight"),
        input_tokens=spread("input_tokens"),
        output_tokens=spread("output_tokens"),
    )


def write_demand(demand: Demand, path: str | os.PathLike[str]) -> None:
    """Write a demand table; epochs without any load are left out, but for the first
    and the last, which give the table its span."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(DEMAND)
    ends = (0, demand.num_epochs - 1)
    for epoch in range(demand.num_epochs):
        for row, llm in enumerate(demand.llms):
            if demand.peak_load[row, epoch] == 0 and epoch not in ends:
                continue
            writer.writerow(
                [
                    f"{demand.start_s + epoch * demand.epoch_s:g}",
                    f"{demand.epoch_s:g}",
                    llm,
                    round(float(demand.rate_rps[row, epoch]) * demand.epoch_s),
                    f"{demand.mean_load[row, epoch]:.4g}",
                    f"{demand.peak_load[row, epoch]:g}",
                    f"{demand.input_tokens[row, epoch]:.5g}",
                    f"{demand.output_tokens[row, epoch]:.5g}",
                ]
            )
    _write(path, buffer.getvalue())


def _write(path: str | os.PathLike[str], text: str) -> None:
    target = Path(path)
    if target.suffix != ".gz":
        write_text(target, text)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # mtime 0: the same trace gives the same bytes.
        temporary.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
