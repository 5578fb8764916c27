"""Files in the kernel's page cache: read them in, hold them there, see what is there.

Whoever maps such a file, as loaders of safetensors do, reads memory and not the disk. The
kernel may evict what it caches whenever it needs room, unless it is locked (`mlock`), which
takes a limit (RLIMIT_MEMLOCK) or a right (CAP_IPC_LOCK) that is often missing. Neither is
memory pinned for a GPU's copies. Linux only; elsewhere nothing is held, or seen.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

CHUNK = 8 * 2**20
LINUX = sys.platform == "linux"
FAILED = ctypes.c_void_p(-1).value
Area = tuple[int, int]
"""Address and length of a mapping."""


class Cancelled(Exception):
    """Reading was given up."""


class Held:
    """Some files. Calls are made one at a time but for `resident_bytes`; `close` lets the
    kernel have them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)
        self.num_bytes = sum(path.stat().st_size for path in paths)
        self.locked = False
        self._maps: list[Area] = []
        """While they are locked."""

    def read(self, stopped: Callable[[], bool]) -> None:
        """Bring all of it in; `Cancelled` once ``stopped`` says so."""
        buffer = memoryview(bytearray(CHUNK))
        for path in self.paths:
            with path.open("rb", buffering=0) as file:
                if LINUX:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                while file.readinto(buffer):
                    if stopped():
                        raise Cancelled

    def lock(self) -> bool:
        """Forbid the kernel to evict any of it; False, and nothing held, if it does not
        let us."""
        if not self.locked and LINUX:
            maps = self._map()
            if len(maps) == len(self.paths) and all(
                _libc().mlock(address, length) == 0 for address, length in maps
            ):
                self._maps, self.locked = maps, True
            else:
                _unmap(maps)
        return self.locked

    def resident_bytes(self) -> int | None:
        """How much of it is in memory now; None where that cannot be seen. May be called
        while another thread calls `close`."""
        if not LINUX:
            return None
        maps = self._map()
        try:
            if len(maps) < len(self.paths):
                return None
            return sum(_resident(address, length) for address, length in maps)
        finally:
            _unmap(maps)

    def close(self, *, drop: bool) -> None:
        """Unlock; ``drop``: and tell the kernel that nobody needs it any more."""
        maps, self._maps, self.locked = self._maps, [], False
        _unmap(maps)
        if drop and LINUX:
            for path in self.paths:
                with suppress(OSError), path.open("rb", buffering=0) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _map(self) -> list[Area]:
        """All of the files that can be mapped."""
        maps: list[Area] = []
        for path in self.paths:
            with suppress(OSError), path.open("rb", buffering=0) as file:
                length = os.fstat(file.fileno()).st_size
                address = _libc().mmap(
                    None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0
                )
                if address not in (None, FAILED):
                    maps.append((address, length))
        return maps


def _unmap(maps: list[Area]) -> None:
    for address, length in maps:
        _libc().munmap(address, length)


def available_bytes() -> int | None:
    """Memory of this machine that can be had without evicting anybody; None if unknown."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _resident(address: int, length: int) -> int:
    pages = -(-length // mmap.PAGESIZE)
    seen = (ctypes.c_ubyte * pages)()
    if _libc().mincore(address, length, seen):
        return 0
    there = sum(bytes(seen).translate(_LOWEST_BIT))
    return min(length, there * mmap.PAGESIZE)


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    size, address = ctypes.c_size_t, ctypes.c_void_p
    libc.mmap.restype = address
    libc.mmap.argtypes = [
        address,
        size,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = libc.mlock.argtypes = [address, size]
    libc.mincore.argtypes = [address, size, ctypes.c_void_p]
    return libc
