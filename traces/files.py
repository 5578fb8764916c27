"""Tables in files: read in chunks, check cells, write whole files.

A chunk's index holds the line numbers of the file, so a fault in a cell is one
`InvalidInput` that says where it is.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foreserve.models.codec import write_text
from foreserve.models.errors import InvalidInput
from foreserve.traces.parquet import parquet_frames
from foreserve.traces.trace import Floats, Ints

if TYPE_CHECKING:
    import pandas as pd

CHUNK_ROWS = 200_000
CHUNK_ITEMS = 1_000_000
"""A chunk of JSON lines ends early when the lists in it have as many (40 MB or so)."""
GZIP_MAGIC = b"\x1f\x8b"
MAX_COUNT = np.iinfo(np.int32).max
MAX_CELLS = 10_000_000
LARGEST = 1e15
"""No number in a table is larger: 31 million years in seconds."""


def read_frames(
    file: str,
    *,
    header: Sequence[str] = (),
    chunk_rows: int | None = None,
    watch: Callable[[int], None] | None = None,
) -> Iterator[pd.DataFrame]:
    """The rows of a CSV, or by its name JSONL or Parquet file, in chunks; blank lines are
    skipped.

    Cells are text (CSV), or what JSON or Parquet make of them. Columns are those of the
    header or of the first object; ``header`` names them for a CSV that has none, and
    picks them from the objects of a JSONL file, absent ones being None. The index is the
    line (Parquet: row) number, from 1. At least one chunk comes, without rows if there
    is only a header. ``watch`` is told the bytes of the file read so far.
    """
    chunk_rows = chunk_rows or CHUNK_ROWS
    if is_parquet(file):
        yield from parquet_frames(file, chunk_rows, watch)
        return
    with _open_text(file) as (handle, position):
        frames = (
            _jsonl_frames(file, handle, list(header), chunk_rows)
            if is_jsonl(file)
            else _csv_frames(file, handle, list(header), chunk_rows)
        )
        for frame in frames:
            if watch:
                watch(position())
            yield frame


def read_header(file: str) -> list[str]:
    """The columns of a table, without reading its rows."""
    return [str(column) for column in next(read_frames(file, chunk_rows=1)).columns]


def is_jsonl(path: str | os.PathLike[str]) -> bool:
    """Whether the name says JSON lines."""
    return Path(path).name.removesuffix(".gz").endswith(".jsonl")


def is_parquet(path: str | os.PathLike[str]) -> bool:
    """Whether the name says Parquet."""
    return Path(path).suffix == ".parquet"


def _csv_frames(
    file: str, handle: IO[str], header: list[str], chunk_rows: int
) -> Iterator[pd.DataFrame]:
    import pandas as pd

    line = 1
    try:
        # The header is read as a row: pandas would rename a column that comes twice.
        for frame in pd.read_csv(
            handle,
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
            chunksize=chunk_rows,
        ):
            frame.index = pd.RangeIndex(line, line + len(frame))
            line += len(frame)
            if not header:
                header = [str(cell).strip() for cell in frame.iloc[0]]
                frame = frame.iloc[1:]
            frame.columns = pd.Index(header)
            if (frame.iloc[:, 0] == "").any():
                frame = frame[(frame != "").any(axis=1)]
            yield frame
    except pd.errors.EmptyDataError:
        raise InvalidInput("empty file", file=file) from None
    except pd.errors.ParserError as error:
        raise _not_a_table(file, str(error)) from None


def _not_a_table(file: str, text: str) -> InvalidInput:
    what, line = text.strip().splitlines()[-1], None
    if found := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", text):
        what = f"{found[3]} cells, but the header has {found[1]}"
        line = int(found[2])
    elif found := re.search(r"inside string starting at row (\d+)", text):
        what, line = "a quote is not closed", int(found[1]) + 1
    return InvalidInput(f"not a CSV table: {what}", file=file, line=line)


def _jsonl_frames(
    file: str, handle: IO[str], header: list[str], chunk_rows: int
) -> Iterator[pd.DataFrame]:
    import pandas as pd

    rows: dict[int, list[Any]] = {}
    items = 0

    def frame() -> pd.DataFrame:
        table = pd.DataFrame(list(rows.values()), columns=header, dtype=object)
        table.index = pd.Index(list(rows))
        return table

    for line, text in enumerate(handle, start=1):
        if text.isspace():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            what = f"not valid JSON: {error}"
            raise InvalidInput(what, file=file, line=line) from None
        if not isinstance(row, dict):
            raise InvalidInput("not a JSON object", file=file, line=line)
        header = header or list(row)
        # Only what is asked for is kept: a row may hold long lists.
        rows[line] = [row.get(column) for column in header]
        items += sum(len(cell) for cell in rows[line] if isinstance(cell, list))
        if len(rows) == chunk_rows or items >= CHUNK_ITEMS:
            yield frame()
            rows, items = {}, 0
    if not header:
        raise InvalidInput("empty file", file=file)
    yield frame()


@contextmanager
def _open_text(file: str) -> Iterator[tuple[IO[str], Callable[[], int]]]:
    """The (decompressed) text of a file, and how many of its bytes are read; what goes
    wrong is an `InvalidInput`."""
    try:
        with open(file, "rb") as raw:
            start = raw.peek(2)[:2]
            if file.endswith(".gz") and start not in (GZIP_MAGIC, b""):
                raise gzip.BadGzipFile
            plain = gzip.GzipFile(fileobj=raw) if start == GZIP_MAGIC else raw
            with io.TextIOWrapper(plain, encoding="utf-8") as handle:
                yield handle, raw.tell
    except FileNotFoundError:
        raise InvalidInput("no such file", file=file) from None
    except IsADirectoryError:
        raise InvalidInput("is a folder, a file is needed", file=file) from None
    except UnicodeDecodeError:
        raise InvalidInput(
            "not UTF-8 text", file=file, hint="save it with the encoding UTF-8"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InvalidInput(
            "not a whole gzip file", file=file, hint="is it cut off, or not compressed?"
        ) from None


def need_columns(
    file: str, header: Sequence[str], needed: Sequence[str], also: Sequence[str] = ()
) -> None:
    """Each needed column is there once, else `InvalidInput`; ``also`` are known too."""
    for column in needed:
        if header.count(column) > 1:
            raise InvalidInput(f"two columns for {column!r}", file=file, line=1)
        if column in header:
            continue
        hint = f"the columns are {','.join(needed)}"
        for strange in set(header).difference(needed, also):
            if get_close_matches(strange, [column]):
                hint = f"did you mean it by {strange!r}?"
        what = f"column {column!r} is missing"
        raise InvalidInput(what, file=file, line=1, hint=hint)


def check(
    file: str,
    column: pd.Series[Any],
    wrong: NDArray[np.bool_],
    what: str,
    hint: str | None = None,
) -> None:
    """Raise `InvalidInput` at the first cell that is ``wrong``: "'x' is not a number"."""
    if wrong.any():
        row = int(wrong.argmax())
        cell = str(column.iloc[row])
        raise InvalidInput(
            f"{cell if len(cell) < 80 else cell[:70] + '...'!r} {what}",
            file=file,
            line=int(column.index[row]),
            field=str(column.name),
            hint=hint,
        )


def numbers(
    file: str, column: pd.Series[Any], *, least: float = -np.inf, blank: bool = False
) -> Floats:
    """The column as finite numbers of at least ``least``; NaN for an empty cell where
    it may be ``blank``."""
    import pandas as pd

    values: Floats
    if column.dtype.kind in "iuf":
        values = column.to_numpy(dtype=np.float64)
    else:
        # As text first: to_numeric would take JSON's true for 1.
        text = pd.to_numeric(column.astype(str), errors="coerce")
        values = text.to_numpy(dtype=np.float64)
    wrong = ~np.isfinite(values)
    if blank:
        wrong &= (column.astype(str).str.strip() != "").to_numpy()
    check(file, column, wrong, "is not a finite number")
    check(file, column, values < least, f"is less than {least:g}")
    check(file, column, np.abs(values) > LARGEST, f"is more than {LARGEST:g}")
    return values


def counts(file: str, column: pd.Series[Any], *, least: int) -> Ints:
    """The column as whole numbers of at least ``least`` that fit 32 bits."""
    values = numbers(file, column)
    wrong = (values < least) | (values > MAX_COUNT) | (values != np.floor(values))
    check(file, column, wrong, f"is not a whole number from {least} to {MAX_COUNT}")
    return values.astype(np.int32)


def id_lists(
    file: str, column: pd.Series[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The column's lists of ids one after the other: where each starts and the last one
    ends, and the ids. None is an empty list."""
    lists = [[] if cell is None else cell for cell in column]
    wrong = np.array([not isinstance(cell, list) for cell in lists], dtype=bool)
    check(file, column, wrong, "is not a list of ids")
    flat = list(chain.from_iterable(lists))
    # As a whole first, and cell by cell only to say where: JSON's true is no id.
    if not _are_ids(flat):
        wrong = np.array([not _are_ids(cell) for cell in lists], dtype=bool)
        hint = "number the blocks from 0, in the order in which they first come"
        what = f"has an id that is not a whole number from 0 to {MAX_COUNT}"
        check(file, column, wrong, what, hint)
    starts = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(cell) for cell in lists], out=starts[1:])
    return starts, np.array(flat, dtype=np.int32)


def _are_ids(cells: list[Any]) -> bool:
    return not cells or (
        set(map(type, cells)) == {int} and min(cells) >= 0 and max(cells) <= MAX_COUNT
    )


def names(file: str, column: pd.Series[Any]) -> pd.Series[str]:
    """The column as text without blanks around it; none may be empty."""
    text = column.astype(str).str.strip()
    check(file, column, (column.isna() | (text == "")).to_numpy(), "is not a name")
    return text


def on_grid(
    file: str,
    series: pd.Series[Any],
    column: pd.Series[Any],
    t_s: Floats,
    width_s: float,
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.int64], float]:
    """Where each row belongs in an array [series, window]: the names of the series in
    order (that of the numbers, if all are numbers), each row's series and window, and
    the start of the first window. ``column`` holds the cells ``t_s`` is from."""
    import pandas as pd

    codes, found = pd.factorize(series)
    decimal = all(str(name).isdecimal() for name in found)
    labels = sorted(map(str, found), key=(lambda n: (int(n), n)) if decimal else None)
    place = {name: row for row, name in enumerate(labels)}
    rows = np.array([place[str(name)] for name in found], dtype=np.int64)[codes]
    start_s = float(t_s.min())
    after = (t_s - start_s) / width_s
    wrong = np.abs(after - np.rint(after)) > 1e-3
    check(file, column, wrong, "is not a whole number of epochs after the first")
    wrong = after * len(labels) >= MAX_CELLS
    check(file, column, wrong, f"is more than {MAX_CELLS} cells after the first")
    windows = np.rint(after).astype(np.int64)
    again = pd.Series(rows * (windows.max() + 1) + windows).duplicated().to_numpy()
    check(file, column, again, "has a second row for the same LLM or client")
    return tuple(labels), rows, windows, start_s


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write text, gzipped if the name says so: whole or not at all, same bytes always."""
    target = Path(path)
    if target.suffix != ".gz":
        write_text(target, text)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        # mtime 0: no time stamp in the header.
        temporary.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
