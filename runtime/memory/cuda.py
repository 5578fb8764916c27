"""Pages in a GPU's memory, by the driver's virtual memory calls; torch is not touched.

All physical pages are created once, at the start; later a page is only mapped and
unmapped, and nothing returns to the driver before `close`. A page may be mapped in a slot
and in the window at once. The driver maps page by page; access rights are set once for
the whole stretch, and a stretch is unmapped by one call.

Needs ``cuda-bindings``. This has not run on a GPU: it is tested against a driver that is
made up (`tests/fake_cuda.py`), which refuses what the real one's manual forbids.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.runtime.memory.pool import Copying, Run, Span


class CudaFailed(ForeserveError):
    """The driver refused a call; one line says which, and why."""


class OutOfPages(CudaFailed, OSError):
    """It refused to map or to create."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class DeviceSpan:
    """Bytes on a GPU: `torch.as_tensor` and others take it without a copy."""

    address: int
    num_bytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }


@dataclass(slots=True)
class _Copy:
    memory: CudaMemory
    event: Any

    def wait(self) -> None:
        self.memory._enter()
        self.memory.call("cuEventSynchronize", self.event)
        self.memory.call("cuEventDestroy", self.event)


@dataclass(slots=True)
class _Device:
    number: Any
    context: Any
    stream: Any
    handles: list[Any] = field(default_factory=list)


class CudaMemory:
    """``num_pages`` pages of ``page_bytes`` of one GPU, a `pool.Memory`. Any thread."""

    def __init__(
        self, page_bytes: int, num_pages: int, *, device: int = 0, driver: Any = None
    ) -> None:
        """Creates all pages. ``driver``: `cuda.bindings.driver` unless given. Raises
        `CudaFailed` where there is no GPU, or too little memory on it."""
        if num_pages < 1:
            raise InvalidInput(f"a pool of {num_pages} pages: expected at least 1")
        self.page_bytes, self.num_pages = page_bytes, num_pages
        self._cuda = driver or load_driver()
        self._lock = threading.Lock()
        self._here = threading.local()
        try:
            self.call("cuInit", 0)
        except RuntimeError as error:  # The bindings found no driver to call.
            raise CudaFailed(f"no CUDA driver: {error}") from error
        number = self.call("cuDeviceGet", device)
        context = self.call("cuDevicePrimaryCtxRetain", number)
        self._device = _Device(number, context, None)
        self._enter()
        cuda = self._cuda
        self._device.stream = self.call(
            "cuStreamCreate", cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        )
        location = cuda.CUmemLocation()
        location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        self._kind = cuda.CUmemAllocationProp()
        self._kind.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location = location
        self._access = cuda.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = self.granularity_bytes()
        if page_bytes < 1 or page_bytes % least:
            self._leave()
            raise InvalidInput(
                f"pages of {page_bytes} bytes: expected a multiple of {least}"
            )
        try:
            for _ in range(num_pages):
                handle = self.call("cuMemCreate", page_bytes, self._kind, 0)
                self._device.handles.append(handle)
        except CudaFailed:
            self.close()
            raise

    def granularity_bytes(self) -> int:
        """What page sizes are multiples of: 2 MiB on the GPUs known."""
        flags = self._cuda.CUmemAllocationGranularity_flags
        least = flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self.call("cuMemGetAllocationGranularity", self._kind, least))

    def call(self, name: str, *arguments: Any) -> Any:
        """One call of the driver: what it returns, alone if it is one thing."""
        error, *found = getattr(self._cuda, name)(*arguments)
        if int(error) != 0:
            kind = OutOfPages if name in ("cuMemCreate", "cuMemMap") else CudaFailed
            raise kind(f"{name}: {getattr(error, 'name', error)}")
        return found[0] if len(found) == 1 else found

    def _enter(self) -> None:
        """Each thread has to say once which GPU it means."""
        if not getattr(self._here, "entered", False):
            self.call("cuCtxSetCurrent", self._device.context)
            self._here.entered = True

    def reserve(self, num_bytes: int) -> int:
        self._enter()
        # Aligned as the driver does it: a stated alignment has to be a power of two.
        return int(self.call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        self._enter()
        self.call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, pages: Iterable[Run], *, filled: bool = False) -> None:
        self._enter()
        size, at = self.page_bytes, address
        try:
            for first, count in pages:
                for handle in self._device.handles[first : first + count]:
                    self.call("cuMemMap", at, size, 0, handle, 0)
                    at += size
            if at > address:
                self.call("cuMemSetAccess", address, at - address, [self._access], 1)
        except CudaFailed as error:
            self.unmap(address, at - address)
            raise OutOfPages(str(error)) from error

    def unmap(self, address: int, num_bytes: int) -> None:
        """After what was begun on the GPU has ended: kernels may still be reading."""
        if num_bytes:
            self._enter()
            self.call("cuCtxSynchronize")
            try:
                self.call("cuMemUnmap", address, num_bytes)
            except CudaFailed:
                # The manual may be read so that each mapping takes a call of its own.
                for at in range(address, address + num_bytes, self.page_bytes):
                    self.call("cuMemUnmap", at, self.page_bytes)

    def span(self, address: int, num_bytes: int) -> Span:
        return DeviceSpan(address, num_bytes)

    def copy(self, address: int, source: int, num_bytes: int) -> Copying:
        return self._copy("cuMemcpyHtoDAsync", address, source, num_bytes)

    def fetch(self, destination: int, address: int, num_bytes: int) -> Copying:
        return self._copy("cuMemcpyDtoHAsync", destination, address, num_bytes)

    def _copy(self, name: str, to: int, source: int, num_bytes: int) -> Copying:
        self._enter()
        event = self.call(
            "cuEventCreate", self._cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        )
        with self._lock:
            self.call(name, to, source, num_bytes, self._device.stream)
            self.call("cuEventRecord", event, self._device.stream)
        return _Copy(self, event)

    def settle(self) -> None:
        self._enter()
        self.call("cuCtxSynchronize")

    def pin(self, source: int, num_bytes: int) -> None:
        """Page-lock it, without which copies go through a buffer of the driver's."""
        self._enter()
        self.call("cuMemHostRegister", source, num_bytes, 0)

    def unpin(self, source: int) -> None:
        self._enter()
        self.call("cuMemHostUnregister", source)

    def discard(self, pages: Iterable[Run]) -> None:
        """Pages are never given back to the driver."""

    def close(self) -> None:
        self._enter()
        self.call("cuCtxSynchronize")
        while self._device.handles:
            self.call("cuMemRelease", self._device.handles.pop())
        self._leave()

    def _leave(self) -> None:
        if self._device.stream is not None:
            self.call("cuStreamDestroy", self._device.stream)
            self._device.stream = None
            self.call("cuDevicePrimaryCtxRelease", self._device.number)


def load_driver() -> Any:
    """``cuda.bindings.driver``; raises `CudaFailed` where it is not installed."""
    try:
        return import_module("cuda.bindings.driver")
    except ImportError as error:
        raise CudaFailed(f"no cuda-bindings: {error}") from error
