"""Checkpoints: safetensors files, read in place, laid out into a shard's bytes."""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from foreserve.models.errors import InvalidInput
from foreserve.runtime.paged.layout import ITEM_BYTES, Layout, Piece

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STORED: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
MOST_HEADER_BYTES = 100 * 1024**2


class _Stored(NamedTuple):
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """In the file."""


class Checkpoint:
    """The tensors of a folder of safetensors files, mapped and not copied."""

    def __init__(self, folder: Path) -> None:
        """Reads the headers alone."""
        self._stored: dict[str, _Stored] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InvalidInput("no *.safetensors file", file=str(folder))
        for file in files:
            self._stored.update(_header(file))

    def tensor(self, name: str) -> torch.Tensor:
        """Read-only: whoever writes to it ends the process."""
        if name not in self._stored:
            raise InvalidInput(f"the checkpoint has no tensor {name!r}")
        stored = self._stored[name]
        if stored.file not in self._maps:
            with stored.file.open("rb") as file:
                # Copy on write, so that torch takes it; nobody writes.
                self._maps[stored.file] = mmap.mmap(
                    file.fileno(), 0, access=mmap.ACCESS_COPY
                )
        flat = torch.frombuffer(
            self._maps[stored.file],
            dtype=stored.dtype,
            count=prod(stored.shape),
            offset=stored.begin,
        )
        return flat.view(stored.shape)


def _header(file: Path) -> dict[str, _Stored]:
    """Eight bytes of length, a JSON object, then the numbers."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        start = raw.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MOST_HEADER_BYTES):
            raise InvalidInput("not a safetensors file: too short", file=str(file))
        try:
            header = json.loads(raw.read(length))
            header.pop("__metadata__", None)
            found = {
                name: _stored(file, name, about, 8 + length, size)
                for name, about in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"not a safetensors file: {error}", file=str(file)
            ) from error
    return found


def _stored(
    file: Path, name: str, about: Mapping[str, object], data: int, size: int
) -> _Stored:
    shape, offsets, dtype = about["shape"], about["data_offsets"], about["dtype"]
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    if dtype not in STORED:
        raise InvalidInput(
            f"{name}: stored as {dtype}",
            file=str(file),
            hint=f"expected {', '.join(STORED)}",
        )
    kind = STORED[str(dtype)]
    begin, end = offsets
    if end - begin != prod(shape) * kind.itemsize or data + end > size:
        raise InvalidInput(f"{name}: {end - begin} bytes for {shape}", file=str(file))
    return _Stored(file, kind, tuple(shape), data + begin)


def fill(layout: Layout, checkpoint: Checkpoint, memory: torch.Tensor) -> None:
    """Copy all pieces into ``memory`` (uint8, at least ``layout.num_bytes``), which may be
    anywhere, converted to the layout's numbers."""
    for piece in layout.pieces:
        copy(layout, piece, checkpoint, memory)


def copy(
    layout: Layout, piece: Piece, checkpoint: Checkpoint, memory: torch.Tensor
) -> None:
    """One piece."""
    source = checkpoint.tensor(piece.tensor)
    if source.dim() != len(piece.shape) or any(
        end > size
        for (_, end), size in zip(
            (piece.rows, piece.columns or piece.rows), source.shape, strict=False
        )
    ):
        raise InvalidInput(
            f"{piece.tensor}: {tuple(source.shape)} where {piece.shape} is needed"
        )
    block = source[slice(*piece.rows)]
    if piece.columns is not None:
        block = block[:, slice(*piece.columns)]
    _view(memory, layout.dtype, piece.offset_bytes, piece.shape).copy_(block)


def views(layout: Layout, memory: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights by name, without a copy: ``memory`` (uint8) is where they are."""
    return {
        name: _view(memory, layout.dtype, weight.offset_bytes, weight.shape)
        for name, weight in layout.weights.items()
    }


def _view(
    memory: torch.Tensor, dtype: str, offset: int, shape: tuple[int, ...]
) -> torch.Tensor:
    size = prod(shape) * ITEM_BYTES[dtype]
    return memory[offset : offset + size].view(DTYPES[dtype]).view(shape)


def tensor(span: object) -> torch.Tensor:
    """uint8, over memory that a pool shows (`memory.pool.Span`), without a copy."""
    if hasattr(span, "__cuda_array_interface__"):
        return torch.as_tensor(span, device="cuda")
    return torch.frombuffer(span, dtype=torch.uint8)
