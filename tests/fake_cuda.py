"""A CUDA driver that is made up: what of ``cuda.bindings.driver`` the page pool calls.

It holds bytes and refuses what the manual forbids: mapping over a mapping or outside of a
reservation, touching what has no access rights, unmapping part of a mapping, freeing a
range with mappings, and any call of a thread without a context.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

GRANULE = 4096


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201


OK, BAD = CUresult.CUDA_SUCCESS, CUresult.CUDA_ERROR_INVALID_VALUE
NO_CONTEXT = CUresult.CUDA_ERROR_INVALID_CONTEXT


@dataclass
class Mapping:
    handle: int
    size: int
    access: bool = False


@dataclass
class FakeCuda:
    """One GPU with ``memory_bytes``; pass it as ``driver``."""

    memory_bytes: int = 1 << 30
    handles: dict[int, np.ndarray] = field(default_factory=dict)
    reserved: dict[int, int] = field(default_factory=dict)
    mapped: dict[int, Mapping] = field(default_factory=dict)
    pinned: dict[int, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    events: int = 0
    streams: int = 0
    fail_at: str | None = None
    """The next call of that name fails."""
    _here: threading.local = field(default_factory=threading.local)
    _next: int = 0x7F0000000000

    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_BLOCKING_SYNC=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(
        CU_MEM_ALLOC_GRANULARITY_MINIMUM=0
    )
    CUmemLocation = SimpleNamespace
    CUmemAllocationProp = SimpleNamespace
    CUmemAccessDesc = SimpleNamespace

    @property
    def mapped_bytes(self) -> int:
        return sum(mapping.size for mapping in self.mapped.values())

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found
        self.calls.append(name)
        if self.fail_at == name:
            self.fail_at = None
            return lambda *_: (CUresult.CUDA_ERROR_OUT_OF_MEMORY,)
        free = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")
        if name not in free and not getattr(self._here, "context", None):
            return lambda *_: (NO_CONTEXT,)
        return found

    def cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return (OK, 0) if ordinal == 0 else (BAD, None)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return OK, "context"

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:
        return (OK,)

    def cuCtxSetCurrent(self, context: str) -> tuple[Any, ...]:
        self._here.context = context
        return (OK,)

    def cuCtxSynchronize(self) -> tuple[Any, ...]:
        return (OK,)

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:
        self.streams += 1
        return OK, "stream"

    def cuStreamDestroy(self, stream: str) -> tuple[Any, ...]:
        self.streams -= 1
        return (OK,)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:
        self.events += 1
        return OK, "event"

    def cuEventRecord(self, event: str, stream: str) -> tuple[Any, ...]:
        return (OK,)

    def cuEventSynchronize(self, event: str) -> tuple[Any, ...]:
        return (OK,)

    def cuEventDestroy(self, event: str) -> tuple[Any, ...]:
        self.events -= 1
        return (OK,)

    def cuMemGetAllocationGranularity(self, kind: Any, flag: int) -> tuple[Any, ...]:
        return OK, GRANULE

    def cuMemCreate(self, size: int, kind: Any, flags: int) -> tuple[Any, ...]:
        used = sum(len(content) for content in self.handles.values())
        if size % GRANULE or kind.location.id != 0:
            return BAD, None
        if used + size > self.memory_bytes:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self._next += 1
        self.handles[self._next] = np.zeros(size, np.uint8)
        return OK, self._next

    def cuMemRelease(self, handle: int) -> tuple[Any, ...]:
        if any(mapping.handle == handle for mapping in self.mapped.values()):
            return (BAD,)
        del self.handles[handle]
        return (OK,)

    def cuMemAddressReserve(
        self, size: int, alignment: int, address: int, flags: int
    ) -> tuple[Any, ...]:
        alignment = alignment or GRANULE
        if size % GRANULE or alignment & (alignment - 1):
            return BAD, None
        self._next = -(-self._next // alignment) * alignment
        found = self._next
        self._next += size + alignment
        self.reserved[found] = size
        return OK, found

    def cuMemAddressFree(self, address: int, size: int) -> tuple[Any, ...]:
        inside = any(address <= at < address + size for at in self.mapped)
        if self.reserved.get(address) != size or inside:
            return (BAD,)
        del self.reserved[address]
        return (OK,)

    def cuMemMap(
        self, address: int, size: int, offset: int, handle: int, flags: int
    ) -> tuple[Any, ...]:
        reserved = any(
            at <= address and address + size <= at + length
            for at, length in self.reserved.items()
        )
        over = any(
            at < address + size and address < at + mapping.size
            for at, mapping in self.mapped.items()
        )
        if not reserved or over or len(self.handles[handle]) != size or offset:
            return (BAD,)
        self.mapped[address] = Mapping(handle, size)
        return (OK,)

    def _inside(self, address: int, size: int) -> list[tuple[int, Mapping]] | None:
        """Whole mappings that fill the range, or None."""
        found, at = [], address
        while at < address + size:
            mapping = self.mapped.get(at)
            if mapping is None:
                return None
            found.append((at, mapping))
            at += mapping.size
        return found if at == address + size else None

    def cuMemSetAccess(
        self, address: int, size: int, access: list[Any], count: int
    ) -> tuple[Any, ...]:
        inside = self._inside(address, size)
        if inside is None or len(access) != count or access[0].flags != 3:
            return (BAD,)
        for _, mapping in inside:
            mapping.access = True
        return (OK,)

    def cuMemUnmap(self, address: int, size: int) -> tuple[Any, ...]:
        inside = self._inside(address, size)
        if inside is None:
            return (BAD,)
        for at, _ in inside:
            del self.mapped[at]
        return (OK,)

    def _pieces(self, address: int, size: int) -> list[np.ndarray] | None:
        """The bytes at ``address``, piece by piece; None without access."""
        found, at = [], address
        while at < address + size:
            base = max((b for b in self.mapped if b <= at), default=-1)
            mapping = self.mapped.get(base)
            if mapping is None or at >= base + mapping.size or not mapping.access:
                return None
            end = min(address + size, base + mapping.size)
            found.append(self.handles[mapping.handle][at - base : end - base])
            at = end
        return found

    def cuMemcpyHtoDAsync(
        self, address: int, source: int, size: int, stream: str
    ) -> tuple[Any, ...]:
        pieces = self._pieces(address, size)
        if pieces is None:
            return (BAD,)
        data = np.frombuffer(ctypes.string_at(source, size), np.uint8)
        at = 0
        for piece in pieces:
            piece[:] = data[at : at + len(piece)]
            at += len(piece)
        return (OK,)

    def cuMemcpyDtoHAsync(
        self, destination: int, address: int, size: int, stream: str
    ) -> tuple[Any, ...]:
        pieces = self._pieces(address, size)
        if pieces is None:
            return (BAD,)
        data = b"".join(piece.tobytes() for piece in pieces)
        ctypes.memmove(destination, data, size)
        return (OK,)

    def cuMemHostRegister(self, source: int, size: int, flags: int) -> tuple[Any, ...]:
        if source in self.pinned:
            return (BAD,)
        self.pinned[source] = size
        return (OK,)

    def cuMemHostUnregister(self, source: int) -> tuple[Any, ...]:
        return (OK,) if self.pinned.pop(source, None) else (BAD,)
