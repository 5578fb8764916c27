"""Traces into files, chunk by chunk: what is in memory does not grow with the trace."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput
from foreserve.traces import files
from foreserve.traces.files import MAX_COUNT, is_jsonl, is_parquet
from foreserve.traces.parquet import parquet_writer
from foreserve.traces.prefixes import check_equal
from foreserve.traces.readers import (
    AZURE,
    CANONICAL,
    MOONCAKE_BLOCK_TOKENS,
    Rows,
    joined,
)
from foreserve.traces.trace import Floats, Ints, Trace

SUFFIXES = {
    "canonical": (".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet"),
    "azure": (".csv", ".csv.gz"),
    "mooncake": (".jsonl", ".jsonl.gz"),
    "rates": (".csv", ".csv.gz"),
}
"""Formats that can be written, and the names of files that can hold them."""
SCHEMA = {
    "arrival_s": "double",
    "llm": "string",
    "input_tokens": "int32",
    "output_tokens": "int32",
}
AZURE_STEP_S, MOONCAKE_STEP_S = 1e-7, 1e-3
LATEST_S = 5e9
"""More does not fit a date in nanoseconds."""
EPOCH = "1970-01-01"


@dataclass(slots=True, kw_only=True)
class Written:
    """What became of the requests that were written."""

    rows: int = 0
    llms: set[str] = field(default_factory=set)
    moved_s: float = 0.0
    """The furthest that a time was moved to fit the target's clock."""
    first_s: float | None = None
    block_tokens: int | None = None
    """Tokens in a block where prompts were given in blocks ..."""
    kept_block_tokens: int | None = None
    """... and in one of those that are written."""

    def lost(self, format: str) -> list[str]:
        """What the target could not hold, in words."""
        found = []
        if format != "canonical" and len(self.llms) > 1:
            found.append(f"which of {len(self.llms)} LLMs a request is for")
        elif format != "canonical":
            found.append(f"the name of the LLM, {', '.join(self.llms)}")
        if format == "azure" and self.first_s:
            found.append(f"the {self.first_s:g} s before the first request, when read")
        if self.moved_s > 0:
            step_s = AZURE_STEP_S if format == "azure" else MOONCAKE_STEP_S
            found.append(f"times between steps of {step_s:g} s")
        if self.block_tokens != self.kept_block_tokens:
            what = f"what prompts share, in blocks of {self.block_tokens} tokens"
            found.append(f"{what} (a canonical .jsonl holds it)")
        return found


def check_target(path: str | os.PathLike[str], format: str) -> None:
    """`InvalidInput` if a file of this name cannot hold the format."""
    name = os.fspath(path)
    if not name.endswith(SUFFIXES[format]):
        raise InvalidInput(
            f"a name for the format {format} is needed",
            file=name,
            hint="it ends in " + " or ".join(SUFFIXES[format]),
        )


def rows_of(trace: Trace) -> Iterator[Rows]:
    """A trace in chunks."""
    import pandas as pd

    llms = np.array(trace.llms, dtype=object)
    for start in range(0, len(trace), files.CHUNK_ROWS):
        part = slice(start, start + files.CHUNK_ROWS)
        yield Rows(
            arrival_s=trace.arrival_s[part],
            time=pd.Series(trace.arrival_s[part], name="arrival_s"),
            llm=pd.Series(llms[trace.llm[part]]),
            input_tokens=trace.input_tokens[part],
            output_tokens=trace.output_tokens[part],
            prefixes=None if trace.prefixes is None else trace.prefixes.take(part),
        )


def merge_rows(sources: Sequence[Iterator[Rows]]) -> Iterator[Rows]:
    """Several sources on one clock as one; ties keep the order of ``sources``. Memory
    holds about a chunk of each. Prompts of different sources have nothing in common."""
    sources = [_apart(rows, index, len(sources)) for index, rows in enumerate(sources)]
    held: list[list[Rows]] = [[] for _ in sources]
    open_ = set(range(len(sources)))
    while True:
        for index in [i for i in sorted(open_) if not held[i]]:
            _pull(sources[index], held[index], open_, index)
        ends = {index: float(held[index][-1].arrival_s[-1]) for index in open_}
        until_s = min(ends.values(), default=np.inf)
        ready, rest = [], []
        for chunks in held:
            both = [(c, c.arrival_s < until_s) for c in chunks]
            ready += [c.where(mask) for c, mask in both if mask.any()]
            rest.append([c.where(~mask) for c, mask in both if not mask.all()])
        held = rest
        if ready:
            arrival_s = np.concatenate([rows.arrival_s for rows in ready])
            yield joined(ready, np.argsort(arrival_s, kind="stable"))
        if not open_:
            return
        # Whoever ends first may go on at the same time: its next chunk is needed.
        for index in [i for i, end in ends.items() if end == until_s]:
            _pull(sources[index], held[index], open_, index)


def _apart(chunks: Iterator[Rows], index: int, count: int) -> Iterator[Rows]:
    for rows in chunks:
        if rows.prefixes is not None:
            rows = replace(rows, prefixes=rows.prefixes.apart(index, count))
        yield rows


def _pull(
    source: Iterator[Rows], held: list[Rows], open_: set[int], index: int
) -> None:
    rows = next(source, None)
    if rows is None:
        open_.discard(index)
    else:
        held.append(rows)


def write_rows(
    chunks: Iterable[Rows],
    path: str | os.PathLike[str],
    format: str = "canonical",
    *,
    start: str | None = None,
    gzip_level: int = 9,
) -> Written:
    """Write requests in order of time: same requests, same bytes, whole or not at all.

    ``start`` is the date and time of second 0 for formats that need one (default: that
    of 1970). Mooncake needs ids of all blocks: those that are not known get one that no
    other has.
    """
    check_target(path, format)
    written = Written()
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if is_parquet(path):
            with parquet_writer(str(path), temporary, SCHEMA) as add:
                for rows in _noted(chunks, written):
                    add([rows.arrival_s, rows.llm.to_numpy(), *_tokens(rows)])
        else:
            with _text_file(temporary, target, gzip_level) as handle:
                kind = "lines" if format == "canonical" and is_jsonl(path) else format
                rows_noted = _noted(chunks, written)
                _WRITERS[kind](handle, rows_noted, written, start or EPOCH)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _noted(chunks: Iterable[Rows], written: Written) -> Iterator[Rows]:
    for rows in chunks:
        if written.first_s is None and len(rows):
            written.first_s = float(rows.arrival_s[0])
        written.rows += len(rows)
        written.llms.update(map(str, rows.llm.unique()))
        if rows.prefixes is not None:
            size = rows.prefixes.block_tokens
            check_equal(written.block_tokens or size, size)
            written.block_tokens = size
        yield rows


def _tokens(rows: Rows) -> tuple[Ints, Ints]:
    return rows.input_tokens, rows.output_tokens


@contextmanager
def _text_file(temporary: Path, target: Path, level: int) -> Iterator[IO[bytes]]:
    with temporary.open("wb") as raw:
        if target.suffix != ".gz":
            yield raw
            return
        # No file name and no time in the header: same requests, same bytes.
        with gzip.GzipFile(
            filename="", mode="wb", fileobj=raw, mtime=0, compresslevel=level
        ) as packed:
            yield packed  # type: ignore[misc]


def _csv(
    handle: IO[bytes], chunks: Iterable[Rows], written: Written, start: str
) -> None:
    import pandas as pd

    handle.write((",".join(CANONICAL) + "\n").encode())
    for rows in chunks:
        columns = (rows.arrival_s, rows.llm.to_numpy(), *_tokens(rows))
        table = pd.DataFrame(dict(zip(CANONICAL, columns, strict=True)))
        text = table.to_csv(header=False, index=False, lineterminator="\n")
        handle.write(text.encode())


def _lines(
    handle: IO[bytes], chunks: Iterable[Rows], written: Written, start: str
) -> None:
    for rows in chunks:
        names = {name: json.dumps(str(name)) for name in rows.llm.unique()}
        ends = [""] * len(rows)
        if rows.prefixes is not None:
            size = written.kept_block_tokens = rows.prefixes.block_tokens
            after = f', "prefix_block_tokens": {size}'
            ends = [
                f', "prefix_blocks": {ids}{after}' if ids else ""
                for ids in rows.prefixes.lists()
            ]
        columns = (
            rows.arrival_s.tolist(),
            rows.llm,
            *map(np.ndarray.tolist, _tokens(rows)),
            ends,
        )
        handle.write(
            "".join(
                f'{{"arrival_s": {at_s!r}, "llm": {names[llm]}, '
                f'"input_tokens": {inputs}, "output_tokens": {outputs}{end}}}\n'
                for at_s, llm, inputs, outputs, end in zip(*columns, strict=True)
            ).encode()
        )


def _azure(
    handle: IO[bytes], chunks: Iterable[Rows], written: Written, start: str
) -> None:
    """Seven decimals and no zone, as in 2023."""
    import pandas as pd

    base = pd.to_datetime(start, utc=True, errors="coerce")
    if pd.isna(base):
        raise InvalidInput(f"{start!r} is not a date and time to start from")
    handle.write((",".join(AZURE) + "\n").encode())
    for rows in chunks:
        steps = _stepped(rows.arrival_s, AZURE_STEP_S, written)
        stamps = (
            base.to_datetime64() + (steps * 100).astype("timedelta64[ns]")
        ).astype(str)
        columns = ([s[:27].replace("T", " ") for s in stamps], *_tokens(rows))
        table = pd.DataFrame(dict(zip(AZURE, columns, strict=True)))
        text = table.to_csv(header=False, index=False, lineterminator="\n")
        handle.write(text.encode())


def _mooncake(
    handle: IO[bytes], chunks: Iterable[Rows], written: Written, start: str
) -> None:
    """Ids as they are. Blocks that are not known count from 0 on, or if there are ids,
    from the highest down: those that are to come are not known either."""
    below, above, shift = 0, MAX_COUNT + 1, None
    for rows in chunks:
        known: list[list[int]] = [[]] * len(rows)
        prefixes = rows.prefixes
        if prefixes is not None and prefixes.block_tokens == MOONCAKE_BLOCK_TOKENS:
            written.kept_block_tokens = prefixes.block_tokens
            shift = below if shift is None else shift
            known = replace(prefixes, ids=prefixes.ids + np.int32(shift)).lists()
            below = max(below, shift + 1 + int(prefixes.ids.max(initial=-1)))
        milliseconds = _stepped(rows.arrival_s, MOONCAKE_STEP_S, written)
        columns = [column.tolist() for column in (milliseconds, *_tokens(rows))]
        lines = []
        for at, inputs, outputs, blocks in zip(*columns, known, strict=True):
            unknown = -(-inputs // MOONCAKE_BLOCK_TOKENS) - len(blocks)
            if shift is None:
                first, below = below, below + unknown
            else:
                first = above = above - unknown
            blocks = [*blocks, *range(first, first + unknown)]
            lines.append(
                f'{{"timestamp": {at}, "input_length": {inputs}, '
                f'"output_length": {outputs}, "hash_ids": {blocks}}}\n'
            )
        if below > above:
            raise InvalidInput("no ids are left for the blocks that have none")
        handle.write("".join(lines).encode())


def _stepped(arrival_s: Floats, step_s: float, written: Written) -> NDArray[np.int64]:
    """Times as whole steps; notes how far that moves them."""
    if len(arrival_s) and arrival_s[-1] > LATEST_S:
        raise InvalidInput(f"a request at {arrival_s[-1]:g} s is too late for a clock")
    steps = np.rint(arrival_s / step_s)
    if len(steps):
        moved_s = np.abs(steps * step_s - arrival_s)
        # What doubles cannot tell apart has not moved.
        moved_s[moved_s < 1e-12 + 4e-16 * arrival_s] = 0.0
        written.moved_s = max(written.moved_s, float(moved_s.max()))
    found: NDArray[np.int64] = steps.astype(np.int64)
    return found


_WRITERS: dict[str, Callable[[IO[bytes], Iterable[Rows], Written, str], None]] = {
    "canonical": _csv,
    "lines": _lines,
    "azure": _azure,
    "mooncake": _mooncake,
}
