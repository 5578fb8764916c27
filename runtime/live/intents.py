"""A file of JSON lines of which each is on the disk before what it tells of begins."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foreserve.models.errors import ForeserveError


class IntentLog:
    """Appends lines, each forced to the disk. One writer: the file is locked.

    A last line that a crash cut off is removed when the file is opened: what it was to
    tell of has not begun.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """`ForeserveError` if another process writes to ``path``."""
        self.path = Path(path)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise ForeserveError(f"{self.path}: in use by another process") from None
        text = self.path.read_bytes()
        os.ftruncate(self._file, text.rfind(b"\n") + 1)

    def append(self, event: str, **facts: Any) -> None:
        """Write one line; it is on the disk when this returns."""
        line = json.dumps({"event": event, **facts}, sort_keys=True)
        os.write(self._file, line.encode() + b"\n")
        os.fsync(self._file)

    def lines(self) -> Iterator[dict[str, Any]]:
        """What was written so far, by this process and earlier ones."""
        with self.path.open("rb") as file:
            for line in file:
                yield json.loads(line)

    def close(self) -> None:
        """Let another process write; nothing more can be appended here."""
        # By name: closing alone would wait for a line that is just on its way to the disk.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)
        self._file = -1
