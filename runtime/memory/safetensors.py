"""Checkpoints: safetensors files, laid out as one shard's bytes, or some of them.

The format: eight bytes of length, a JSON object that says of each tensor its type, shape
and place, then the numbers. No library is needed, and nothing in it is executed. Files are
read and not mapped: one that is cut off meanwhile is an error, and not the process's end.
"""

from __future__ import annotations

import json
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import ForeserveError, InvalidInput

ITEM_BYTES: Mapping[str, int] = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What shards are laid out in, by torch's names."""
MOST_HEADER_BYTES = 100 * 1024**2
STEP_BYTES = 4 * 1024**2
"""Copied between two looks at whether to stop; more would need fresh memory each time."""
BLOCK = 2**17
"""Numbers converted in one go: what comes in between stays in a cache."""
LEAST_READ_BYTES = 4096
"""Of a row: where less of it is wanted, all of it is read."""

Raw = NDArray[Any]
Span = tuple[int, int]


class Stopped(ForeserveError):
    """Somebody wanted it no longer."""


class Piece(Protocol):
    """A block of one of the checkpoint's tensors, and where it goes in the shard."""

    @property
    def tensor(self) -> str: ...
    @property
    def rows(self) -> tuple[int, int]: ...
    @property
    def columns(self) -> tuple[int, int] | None:
        """None: all there are."""
        ...

    @property
    def offset_bytes(self) -> int: ...


class Layout(Protocol):
    """One rank's shard of an LLM: what `foreserve.runtime.paged.layout` lays out."""

    @property
    def dtype(self) -> str: ...
    @property
    def pieces(self) -> Sequence[Piece]:
        """In order of offset."""
        ...

    @property
    def num_bytes(self) -> int: ...


class Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """In the file."""

    @property
    def row_size(self) -> int:
        return prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Checkpoint:
    """The tensors of a folder of safetensors files. Any thread."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers alone; raises `InvalidInput` if one is not as it should."""
        self.tensors: dict[str, Stored] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InvalidInput("no *.safetensors file", file=str(folder))
        for file in files:
            for name, stored in read_header(file).items():
                if name in self.tensors:
                    raise InvalidInput(f"{name} is there twice", file=str(file))
                self.tensors[name] = stored

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(
        self,
        name: str,
        rows: Span | None = None,
        columns: Span | None = None,
        *,
        into: Raw | None = None,
    ) -> Raw:
        """A block's numbers, as unsigned integers of their size; None: all there are.
        ``into``: where they are to be (of that shape, in one stretch)."""
        stored = self.tensors.get(name)
        if stored is None:
            raise InvalidInput(f"the checkpoint has no tensor {name!r}")
        first, end = rows or (0, stored.shape[0])
        left, right = columns or (0, stored.row_size)
        width, size = right - left, ITEM_BYTES[stored.dtype]
        row_bytes, at = stored.row_size * size, stored.begin
        shape = (end - first, *stored.shape[1:])
        if width < stored.row_size:
            shape = (end - first, width)
        found = np.empty(shape, f"<u{size}") if into is None else into
        with stored.file.open("rb", buffering=0) as file:
            if width == stored.row_size:
                _read(file, found, at + first * row_bytes)
            elif 2 * width < stored.row_size and width * size >= LEAST_READ_BYTES:
                for row, part in enumerate(found, first):
                    _read(file, part, at + row * row_bytes + left * size)
            else:
                whole = np.empty((end - first, stored.row_size), found.dtype)
                _read(file, whole, at + first * row_bytes)
                found[...] = whole[:, left:right]
        return found


def _read(file: FileIO, into: Raw, at: int) -> None:
    """Fill it from there on in the file."""
    left = into.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(file.fileno(), [left], at)
        if not count:
            raise InvalidInput("it ends before its numbers do", file=str(file.name))
        left, at = left[count:], at + count


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        start = raw.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise InvalidInput("not a safetensors file: too short", file=str(file))
        text = raw.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        return {
            name: _stored(file, name, about, 8 + length, size)
            for name, about in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"not a safetensors file: {error}", file=str(file)
        ) from error


def _stored(file: Path, name: str, about: Any, data: int, size: int) -> Stored:
    dtype, (begin, end) = about["dtype"], about["data_offsets"]
    shape = tuple(int(count) for count in about["shape"])
    if dtype not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise InvalidInput(
            f"{name}: numbers of type {dtype}", file=str(file), hint=f"known: {known}"
        )
    stored = Stored(file, dtype, shape, data + int(begin))
    fits = 0 <= begin <= end and data + end <= size and min(shape, default=1) >= 0
    if not fits or end - begin != stored.num_bytes:
        raise InvalidInput(
            f"{name}: bytes {begin} to {end} for {dtype} of {list(shape)}",
            file=str(file),
        )
    return stored


def fill(
    layout: Layout,
    checkpoint: Checkpoint,
    memory: Raw,
    *,
    begin: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Write the shard's bytes from ``begin`` on into ``memory``, as many as that has or
    there are, as the layout's numbers; what is between the pieces is zero. Raises
    `Stopped` soon after ``stop`` says so, `InvalidInput` where a tensor is missing or too
    small."""
    end = min(begin + len(memory), layout.num_bytes)
    pieces, done = layout.pieces, begin
    first = bisect_right(pieces, begin, key=lambda piece: piece.offset_bytes)
    for piece in pieces[max(0, first - 1) :]:
        if piece.offset_bytes >= end:
            break
        memory[done - begin : max(done, piece.offset_bytes) - begin] = 0
        last = _fill(
            layout.dtype, checkpoint, piece, memory[: end - begin], begin, stop
        )
        done = max(done, last)
    memory[done - begin : max(done, end) - begin] = 0


def _fill(
    wanted_name: str,
    checkpoint: Checkpoint,
    piece: Piece,
    memory: Raw,
    begin: int,
    stop: Callable[[], bool],
) -> int:
    """What of one piece lies between ``begin`` and so many bytes behind it; where it
    ends."""
    shape = _shape(checkpoint, piece)
    kind, wanted = checkpoint.tensors[piece.tensor].dtype, DTYPES[wanted_name]
    size = ITEM_BYTES[wanted]
    row_bytes = prod(shape[1:]) * size
    # In the piece, from here on.
    least = max(0, begin - piece.offset_bytes)
    most = min(shape[0] * row_bytes, begin + len(memory) - piece.offset_bytes)
    for first, last in _steps(least // row_bytes, -(-most // row_bytes), row_bytes):
        if stop():
            raise Stopped(f"{piece.tensor}: not wanted any more")
        rows = piece.rows[0] + first, piece.rows[0] + last
        at, end = first * row_bytes, last * row_bytes
        place = piece.offset_bytes - begin
        inside = at >= least and end <= most
        target = memory[place + max(at, least) : place + min(end, most)]
        if inside:
            there = target.view(f"<u{size}").reshape(last - first, *shape[1:])
            if kind == wanted:
                checkpoint.read(piece.tensor, rows, piece.columns, into=there)
            else:
                read = checkpoint.read(piece.tensor, rows, piece.columns)
                flat, done = read.reshape(-1), there.reshape(-1)
                for i in range(0, len(flat), BLOCK):
                    done[i : i + BLOCK] = _as(flat[i : i + BLOCK], kind, wanted)
        else:
            read = _as(checkpoint.read(piece.tensor, rows, piece.columns), kind, wanted)
            part = read.reshape(-1).view(np.uint8)
            target[...] = part[max(0, least - at) :][: len(target)]
    return piece.offset_bytes + shape[0] * row_bytes


def _shape(checkpoint: Checkpoint, piece: Piece) -> tuple[int, ...]:
    """Of the block; raises `InvalidInput` if the tensor does not have it."""
    stored = checkpoint.tensors.get(piece.tensor)
    if stored is None:
        raise InvalidInput(f"the checkpoint has no tensor {piece.tensor!r}")
    spans = [piece.rows] if piece.columns is None else [piece.rows, piece.columns]
    if len(spans) != len(stored.shape) or any(
        end > have for (_, end), have in zip(spans, stored.shape, strict=True)
    ):
        raise InvalidInput(
            f"{piece.tensor}: {stored.shape} where {spans} is needed",
            hint="do config.json and weights belong together?",
        )
    return tuple(end - begin for begin, end in spans)


def _steps(first: int, last: int, row_bytes: int) -> Iterator[Span]:
    """Rows of about `STEP_BYTES` at a time."""
    rows = max(1, STEP_BYTES // max(row_bytes, 1))
    for at in range(first, last, rows):
        yield at, min(at + rows, last)


def _as(numbers: Raw, kind: str, wanted: str) -> Raw:
    """The bits of ``numbers`` of type ``kind`` as type ``wanted``, rounded to nearest,
    ties to even."""
    if kind == wanted:
        return numbers
    if kind == "BF16":
        wide = (numbers.astype(np.uint32) << 16).view(np.float32)
    elif kind in ("F64", "F32", "F16"):
        wide = numbers.view(f"<f{ITEM_BYTES[kind]}").astype(np.float32)
    else:
        raise InvalidInput(f"weights of type {kind} cannot become {wanted}")
    if wanted == "F32":
        return wide.view(np.uint32)
    if wanted == "F16":
        return wide.astype(np.float16).view(np.uint16)
    bits = wide.view(np.uint32)
    even = (bits >> 16) & 1
    rounded: Raw = ((bits + 0x7FFF + even) >> 16).astype(np.uint16)
    # Rounding must not turn a NaN into infinity.
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded)
