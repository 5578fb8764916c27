"""The clock of a cluster goes on when its process is started again.

Second 0 is that of the first start. What passes while nobody runs passes on the clock too,
so that the same time of the day stays the same time of its days; and it never goes back,
whatever becomes of the wall's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from foreserve.models.codec import dump_json, write_text
from foreserve.runtime.clock import SystemClock, unix_s


def check_clock(path: Path) -> None:
    """Raise one of a few errors unless the file tells of a clock."""
    known = json.loads(path.read_text())
    float(known["wall_s"]) + float(known["clock_s"])


class KeptClock:
    """A `SystemClock` that is noted in a file from time to time."""

    def __init__(
        self, path: Path, rate: float = 1.0, wall_s: Callable[[], float] = unix_s
    ) -> None:
        """A file that cannot be read counts as none: the clock begins with 0."""
        self._path, self._wall_s = path, wall_s
        first_s = 0.0
        try:
            known = json.loads(path.read_text())
            passed_s = max(0.0, wall_s() - float(known["wall_s"]))
            first_s = float(known["clock_s"]) + passed_s * rate
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.first_s = first_s
        """What it showed when it was made."""
        self.clock = SystemClock(rate, first_s)
        self.note()

    def note(self) -> None:
        """Write down what it shows now."""
        about = {"wall_s": self._wall_s(), "clock_s": self.clock.now_s()}
        write_text(self._path, dump_json(about))
