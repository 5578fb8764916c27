"""Kinds of trace files: the columns that tell each, and how its rows become ours.

To add one: a generator from chunks of cells to `Rows`, and its columns in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foreserve.traces.files import (
    check,
    counts,
    id_lists,
    is_jsonl,
    names,
    numbers,
)
from foreserve.traces.prefixes import Prefixes, row_of_prefixes
from foreserve.traces.trace import Floats, Ints

if TYPE_CHECKING:
    import pandas as pd

CANONICAL = ("arrival_s", "llm", "input_tokens", "output_tokens")
ALIASES = {"model": "llm", "prefix_id": "prefix"}
OPTIONAL = ("tenant", "slo_class", "prefix")
"""Known columns that this version reads past."""
TIMES = ("t_s", "input_tokens", "output_tokens")
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens")
MOONCAKE = ("timestamp", "input_length", "output_length")
SPLITWISE = ("arrival_timestamp", "batch_size", "prompt_size", "token_size")
JOURNAL = ("event", "at_s")
PREFIXES = ("prefix_blocks", "prefix_block_tokens")
MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """One chunk of a trace file in our terms, whatever its format; [request] each."""

    arrival_s: Floats
    time: pd.Series[Any]
    """The cells ``arrival_s`` is from, for messages."""
    llm: pd.Series[str]
    input_tokens: Ints
    output_tokens: Ints
    """0 of either is a failed request."""
    prefixes: Prefixes | None = None
    """What prompts of the file have in common; None if this chunk does not say."""

    def __len__(self) -> int:
        return len(self.arrival_s)

    def where(self, mask: NDArray[np.bool_]) -> Rows:
        """Only the requests of ``mask``."""
        return Rows(
            arrival_s=self.arrival_s[mask],
            time=self.time[mask],
            llm=self.llm[mask],
            input_tokens=self.input_tokens[mask],
            output_tokens=self.output_tokens[mask],
            prefixes=None if self.prefixes is None else self.prefixes.take(mask),
        )


def joined(chunks: Sequence[Rows], order: NDArray[np.int64] | None = None) -> Rows:
    """Several chunks as one, its requests in this order."""
    import pandas as pd

    at = slice(None) if order is None else order
    prefixes = row_of_prefixes(
        [rows.prefixes for rows in chunks], [len(rows) for rows in chunks]
    )
    return Rows(
        arrival_s=np.concatenate([rows.arrival_s for rows in chunks])[at],
        time=pd.concat([rows.time for rows in chunks]).iloc[at],
        llm=pd.concat([rows.llm for rows in chunks]).iloc[at],
        input_tokens=np.concatenate([rows.input_tokens for rows in chunks])[at],
        output_tokens=np.concatenate([rows.output_tokens for rows in chunks])[at],
        prefixes=None if prefixes is None else prefixes.take(at),
    )


Frames = Iterator["pd.DataFrame"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A kind of trace file: its header has all ``columns``, or aliases of them."""

    columns: tuple[str, ...]
    convert: Callable[[str, Frames, str], Iterator[Rows]]
    """``convert(file, chunks, llm)``: ``llm`` names the requests of a file that does not
    say. All chunks of a file go through one call, in order."""
    optional: tuple[str, ...] = ()
    """Columns that are read if they are there."""
    aside: tuple[str, ...] = ()
    """Known columns that are left out."""
    fields: tuple[str, ...] = ()
    """What to read of each line where lines are not alike; else the columns."""
    lists: tuple[str, ...] = ()
    """Optional fields that JSON lines alone can have."""


def _canonical(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    size: int | None = None
    for frame in frames:
        rows = Rows(
            arrival_s=numbers(file, frame["arrival_s"], least=0),
            time=frame["arrival_s"],
            llm=names(file, frame["llm"]),
            input_tokens=counts(file, frame["input_tokens"], least=1),
            output_tokens=counts(file, frame["output_tokens"], least=0),
        )
        if is_jsonl(file) and "prefix_blocks" in frame:
            size = _block_tokens(file, frame, size)
            rows = _with_blocks(file, rows, frame["prefix_blocks"], size)
        yield rows


def _block_tokens(file: str, frame: pd.DataFrame, size: int | None) -> int | None:
    """How large blocks are, as all rows that say it do; ``size``: those before."""
    column = frame["prefix_block_tokens"]
    listed = [cell not in (None, []) for cell in frame["prefix_blocks"]]
    column = column[column.notna() | np.array(listed, dtype=bool)]
    sizes = counts(file, column, least=1)
    if len(sizes):
        size = int(sizes[0]) if size is None else size
        what = f"is not {size}, as in the lines above"
        hint = "the blocks of a file all have the same size"
        check(file, column, sizes != size, what, hint)
    return size


def _with_blocks(
    file: str, rows: Rows, column: pd.Series[Any], size: int | None
) -> Rows:
    """The requests with the blocks of their prompts, if any has one."""
    starts, ids = id_lists(file, column)
    if size is None or not len(ids):
        return rows
    prefixes = Prefixes(starts=starts, ids=ids, block_tokens=size)
    wrong = prefixes.too_many(rows.input_tokens)
    what = f"has more blocks of {size} tokens than the prompt can hold"
    check(file, column, wrong, what, hint="are its blocks smaller?")
    return replace(rows, prefixes=prefixes)


def _times(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    """Canonical but for the name of the time; it need not name an LLM."""
    for frame in frames:
        yield Rows(
            arrival_s=numbers(file, frame["t_s"], least=0),
            time=frame["t_s"],
            llm=names(file, frame["llm"]) if "llm" in frame else _all(frame, llm),
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
        # Years that nanoseconds cannot hold are no dates of requests.
        year = stamps.dt.year.to_numpy()
        wrong = stamps.isna().to_numpy() | (year < 1700) | (year > 2250)
        check(file, cells, wrong, "is not a time stamp")
        # Whole nanoseconds: seconds since 1970 would lose the seventh decimal.
        since_1970_ns = stamps.dt.as_unit("ns").astype("int64").to_numpy()
        if first_ns is None and len(frame):
            first_ns = since_1970_ns[0]
        yield Rows(
            arrival_s=(since_1970_ns - (first_ns or 0)) / 1e9,
            time=cells,
            llm=_all(frame, llm),
            input_tokens=counts(file, frame["ContextTokens"], least=1),
            output_tokens=counts(file, frame["GeneratedTokens"], least=0),
        )


def _burstgpt(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    """Seconds from midnight of the first day. Failed requests have no response tokens;
    some rows have no request tokens, and cannot be served either."""
    for frame in frames:
        yield Rows(
            arrival_s=numbers(file, frame["Timestamp"], least=0),
            time=frame["Timestamp"],
            llm=names(file, frame["Model"]),
            input_tokens=counts(file, frame["Request tokens"], least=0),
            output_tokens=counts(file, frame["Response tokens"], least=0),
        )


def _mooncake(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    """Milliseconds; the clock may be coarse, so that many requests share a time."""
    for frame in frames:
        rows = Rows(
            arrival_s=numbers(file, frame["timestamp"], least=0) / 1e3,
            time=frame["timestamp"],
            llm=_all(frame, llm),
            input_tokens=counts(file, frame["input_length"], least=1),
            output_tokens=counts(file, frame["output_length"], least=0),
        )
        if is_jsonl(file):
            size = MOONCAKE_BLOCK_TOKENS
            rows = _with_blocks(file, rows, frame["hash_ids"], size)
        yield rows


def _splitwise(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    """Seconds; a row is one request: ``batch_size`` is 1 in traces of arrivals. The
    wider table of SageServe names an LLM, and its output of 0 means 1."""
    for frame in frames:
        named = "model_type" in frame
        batch = counts(file, frame["batch_size"], least=1)
        check(file, frame["batch_size"], batch != 1, "is not one request")
        yield Rows(
            arrival_s=numbers(file, frame["arrival_timestamp"], least=0),
            time=frame["arrival_timestamp"],
            llm=names(file, frame["model_type"]) if named else _all(frame, llm),
            input_tokens=counts(file, frame["prompt_size"], least=1),
            output_tokens=np.maximum(
                counts(file, frame["token_size"], least=0), int(named)
            ).astype(np.int32),
        )


def _journal(file: str, frames: Frames, llm: str) -> Iterator[Rows]:
    """The ``request`` lines of a run's journal: they are in order of their ends, so all
    of them have to be seen before the first can be given."""
    request: list[Floats] = []
    chunks: list[Rows] = []
    for frame in frames:
        rows = frame[frame["event"] == "request"]
        request.append(numbers(file, rows["request"], least=0))
        chunks.extend(_canonical(file, iter([rows]), llm))
    whole = joined(chunks)
    yield joined([whole], np.lexsort((np.concatenate(request), whole.arrival_s)))


def _all(frame: pd.DataFrame, llm: str) -> pd.Series[str]:
    import pandas as pd

    return pd.Series(llm, index=frame.index)


FORMATS = {
    "canonical": Format(
        columns=CANONICAL, convert=_canonical, aside=OPTIONAL, lists=PREFIXES
    ),
    "times": Format(columns=TIMES, convert=_times, optional=("llm",)),
    "azure": Format(columns=AZURE, convert=_azure),
    "burstgpt": Format(
        columns=BURSTGPT,
        convert=_burstgpt,
        aside=("Session ID", "Elapsed time", "Total tokens", "Log Type"),
    ),
    "mooncake": Format(columns=MOONCAKE, convert=_mooncake, lists=("hash_ids",)),
    "splitwise": Format(
        columns=SPLITWISE,
        convert=_splitwise,
        optional=("model_type",),
        aside=("request_id", "request_type", "application_id"),
    ),
    "journal": Format(
        columns=JOURNAL, convert=_journal, fields=("event", "request", *CANONICAL)
    ),
}
