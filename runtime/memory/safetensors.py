"""Checkpoints: safetensors files read in place, and laid out as one shard's bytes.

The format: eight bytes of length, a JSON object that says of each tensor its type, shape
and place, then the numbers. No library is needed, and nothing in it is executed.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
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
STEP_BYTES = 16 * 1024**2
"""Copied between two looks at whether to stop."""

Raw = NDArray[Any]


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
    def pieces(self) -> Sequence[Piece]: ...
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
        self._maps: dict[Path, Raw] = {}

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    def raw(self, name: str) -> Raw:
        """Its numbers, in place and read-only, as unsigned integers of their size."""
        stored = self.tensors.get(name)
        if stored is None:
            raise InvalidInput(f"the checkpoint has no tensor {name!r}")
        if stored.file not in self._maps:
            with stored.file.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[stored.file] = np.frombuffer(mapped, np.uint8)
        part = self._maps[stored.file][stored.begin :][: stored.num_bytes]
        # Tensors may begin at any byte; numpy copes with that.
        kind = f"<u{ITEM_BYTES[stored.dtype]}"
        return part.view(kind).reshape(stored.shape)


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
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Copy all pieces into ``memory`` (bytes, at least the layout's), as the layout's
    numbers. Raises `Stopped` soon after ``stop`` says so, `InvalidInput` where a tensor is
    missing or too small."""
    for piece in layout.pieces:
        source = _block(checkpoint, piece)
        kind = checkpoint.tensors[piece.tensor].dtype
        wanted = DTYPES[layout.dtype]
        size = source.size * ITEM_BYTES[wanted]
        there = memory[piece.offset_bytes : piece.offset_bytes + size]
        target = there.view(f"<u{ITEM_BYTES[wanted]}").reshape(source.shape)
        for rows in _steps(source):
            if stop():
                raise Stopped(f"{piece.tensor}: not wanted any more")
            target[rows] = _as(source[rows], kind, wanted)


def _block(checkpoint: Checkpoint, piece: Piece) -> Raw:
    source = checkpoint.raw(piece.tensor)
    spans = [piece.rows] if piece.columns is None else [piece.rows, piece.columns]
    if len(spans) != source.ndim or any(
        end > have for (_, end), have in zip(spans, source.shape, strict=True)
    ):
        raise InvalidInput(
            f"{piece.tensor}: {source.shape} where {spans} is needed",
            hint="do config.json and weights belong together?",
        )
    return source[tuple(slice(*span) for span in spans)]


def _steps(source: Raw) -> Iterator[slice]:
    """Rows of about `STEP_BYTES` at a time."""
    row = source[:1].nbytes
    rows = max(1, STEP_BYTES // max(row, 1))
    for at in range(0, len(source), rows):
        yield slice(at, at + rows)


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
