"""Pages in host memory: one anonymous file (memfd) that is mapped piece by piece.

A slot is a range that may not be touched (PROT_NONE); mapping puts pieces of the file over
it at fixed addresses, which Python's own ``mmap`` cannot, so this calls the C library.
Other processes map the same pages when they are handed the file descriptor.

Each run of pages is one mapping of the process, and Linux allows 65,530 of them
(``vm.max_map_count``): pools take pages in long runs where they can.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from typing import Any

from foreserve.models.errors import InvalidInput
from foreserve.runtime.memory.pool import Copying, Run, Span

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_LIBC.memcpy.restype = ctypes.c_void_p
_LIBC.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

# Linux, x86-64 and arm64 alike.
MAP_FIXED, MAP_NORESERVE, MAP_POPULATE = 0x10, 0x4000, 0x8000
PROT_NONE = 0
PUNCH_HOLE, KEEP_SIZE = 0x2, 0x1
POPULATE_WRITE = 23


class _Done:
    def wait(self) -> None:
        pass


class PosixMemory:
    """``num_pages`` pages of ``page_bytes`` of host memory, a `pool.Memory`."""

    def __init__(
        self,
        page_bytes: int,
        num_pages: int,
        *,
        fd: int | None = None,
        populate: bool = True,
    ) -> None:
        """``fd``: another process's memory, which is not closed here. ``populate``: what
        will be filled gets its page tables when it is mapped, so that copies, which go on
        beside, need not wait for one after the other."""
        if page_bytes < 1 or page_bytes % mmap.PAGESIZE:
            raise InvalidInput(
                f"pages of {page_bytes} bytes: expected a multiple of {mmap.PAGESIZE}"
            )
        if num_pages < 1:
            raise InvalidInput(f"a pool of {num_pages} pages: expected at least 1")
        self.page_bytes, self.num_pages = page_bytes, num_pages
        self._populate = populate
        self._owned = fd is None
        self.fd = os.memfd_create("foreserve-pages") if fd is None else fd
        """To be handed to other processes."""
        if self._owned:
            os.ftruncate(self.fd, page_bytes * num_pages)
        self._ranges: dict[int, int] = {}

    @property
    def resident_bytes(self) -> int:
        """What the machine has given for these pages so far."""
        return os.fstat(self.fd).st_blocks * 512

    def create(self) -> None:
        """Have the machine give the memory of all pages now, not when they are touched,
        which takes far longer the first time. Raises `OSError` if it has too little."""
        size = self.page_bytes * self.num_pages
        os.posix_fallocate(self.fd, 0, size)
        address = self.reserve(size)
        self.map(address, [(0, self.num_pages)])
        # Kernels before 5.14 do not know it; then touching has to do.
        _LIBC.madvise(address, size, POPULATE_WRITE)
        self.unmap(address, size)
        self.free(address, size)

    def reserve(self, num_bytes: int) -> int:
        address = _map(None, num_bytes, PROT_NONE, _EMPTY, -1, 0)
        self._ranges[address] = num_bytes
        return address

    def free(self, address: int, num_bytes: int) -> None:
        _checked(_LIBC.munmap(address, num_bytes))
        del self._ranges[address]

    def map(self, address: int, pages: Iterable[Run], *, filled: bool = False) -> None:
        access, at = mmap.PROT_READ | mmap.PROT_WRITE, address
        flags = mmap.MAP_SHARED | MAP_FIXED
        if filled and self._populate:
            flags |= MAP_POPULATE
        try:
            for first, count in pages:
                size = count * self.page_bytes
                _map(at, size, access, flags, self.fd, first * self.page_bytes)
                at += size
        except OSError:
            self.unmap(address, at - address)
            raise

    def unmap(self, address: int, num_bytes: int) -> None:
        if num_bytes:
            _map(address, num_bytes, PROT_NONE, _EMPTY | MAP_FIXED, -1, 0)

    def span(self, address: int, num_bytes: int) -> Span:
        kind: Any = ctypes.c_ubyte * num_bytes
        return kind.from_address(address)

    def copy(self, address: int, source: int, num_bytes: int) -> Copying:
        _LIBC.memcpy(address, source, num_bytes)
        return _Done()

    def fetch(self, destination: int, address: int, num_bytes: int) -> Copying:
        _LIBC.memcpy(destination, address, num_bytes)
        return _Done()

    def settle(self) -> None:
        """Nothing to do: nothing goes on beside."""

    def pin(self, source: int, num_bytes: int) -> None:
        """Nothing to do: host memory is copied from as it is."""

    def unpin(self, source: int) -> None:
        pass

    def discard(self, pages: Iterable[Run]) -> None:
        for first, count in pages:
            start, size = first * self.page_bytes, count * self.page_bytes
            _checked(_LIBC.fallocate(self.fd, PUNCH_HOLE | KEEP_SIZE, start, size))

    def close(self) -> None:
        for address, num_bytes in tuple(self._ranges.items()):
            self.free(address, num_bytes)
        if self._owned:
            os.close(self.fd)


_EMPTY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE


def _map(
    address: int | None, size: int, access: int, flags: int, fd: int, offset: int
) -> int:
    found = _LIBC.mmap(address, size, access, flags, fd, offset)
    if found is None or found == ctypes.c_void_p(-1).value:
        errno = ctypes.get_errno()
        raise OSError(errno, f"mmap of {size} bytes: {os.strerror(errno)}")
    return int(found)


def _checked(result: int) -> None:
    if result != 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
