"""Child processes that leave nothing behind: each in a session of its own, under a guard.

What was started is on file, and whoever starts next reads it first (`reap`), so that
not even the death of everybody at once leaves an engine running unseen.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

GUARD = Path(__file__).with_name("guard.py")


class Seen(NamedTuple):
    """A process, as /proc has it."""

    pid: int
    session: int
    started: int
    """Clock ticks since the machine did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Enough to prove later that a process is the one that was started."""

    session: int
    started: int
    boot: str


class Child:
    """A command under a guard. Any thread may call anything; `stop` more than once."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        name: str,
        *,
        grace_s: float,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """Started at once. What it prints is appended to ``folder/name.log``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name}.log"
        self._grace_s = grace_s
        self._lock = threading.Lock()
        guarded = [sys.executable, "-I", "-S", str(GUARD), str(grace_s), *command]
        handed = {"FORESERVE_FDS": " ".join(map(str, pass_fds))}
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                guarded,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {}), **handed},
                pass_fds=tuple(pass_fds),
                start_new_session=True,
            )
        self._record = folder / f"{name}-{uuid.uuid4().hex[:8]}.process.json"
        _write(self._record, self._guard.pid)

    @property
    def session(self) -> int:
        """All its processes are of this session, which is also its process group."""
        return self._guard.pid

    def running(self) -> bool:
        return self._guard.poll() is None

    def pids(self) -> list[int]:
        """Of all its processes, the guard among them."""
        return [
            process.pid for process in _processes() if process.session == self.session
        ]

    def stop(self) -> None:
        """Asked to end, killed after the grace; returns when nothing is left of it."""
        self._end(2 * self._grace_s + 1.0)

    def kill(self) -> None:
        """As `stop`, without asking: it would not answer."""
        self._end(0.0)

    def _end(self, within_s: float) -> None:
        with self._lock:
            if self._guard.stdin is not None:
                with suppress(OSError):
                    self._guard.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._guard.wait(within_s)
            _end_session(self.session)
            self._guard.wait()
            self._record.unlink(missing_ok=True)

    def why(self) -> str:
        """The last thing of interest that it printed, for messages."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-200:]
        except OSError:
            return "no log"
        told = [line.strip() for line in lines if line.strip()]
        errors = [line for line in told if "Error" in line or "error:" in line]
        return (errors or told or ["nothing printed"])[-1][-300:]

    def pss_bytes(self) -> int | None:
        """Memory of all its processes, shared parts divided; None if none can be read."""
        sizes = [size for pid in self.pids() if (size := _pss_bytes(pid)) is not None]
        return sum(sizes) if sizes else None


def reap(folder: Path) -> list[int]:
    """End what an owner that is gone left running; the sessions that were ended. Only
    processes that the records in ``folder`` prove to be ours are touched."""
    ended = []
    for path in sorted(folder.glob("*.process.json")):
        try:
            record = Record(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            path.rename(path.with_suffix(".broken"))  # It proves nothing.
            continue
        if record.boot == _boot() and _is_ours(record):
            _end_session(record.session)
            ended.append(record.session)
        path.unlink(missing_ok=True)
    return ended


def _is_ours(record: Record) -> bool:
    members = [p for p in _processes() if p.session == record.session]
    leader = next((p for p in members if p.pid == record.session), None)
    if leader is not None:
        return leader.started == record.started
    # A number is not given again while a session has it.
    return any(p.started >= record.started for p in members)


def _end_session(session: int) -> None:
    """Kill all that is left of it, and wait until it is gone."""
    pause = threading.Event()
    while left := [p.pid for p in _processes() if p.session == session]:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        pause.wait(0.01)


def _write(path: Path, pid: int) -> None:
    seen = _seen(pid)
    started = seen.started if seen else 0
    record = {"session": pid, "started": started, "boot": _boot()}
    path.write_text(json.dumps(record))


def _processes() -> list[Seen]:
    found = (_seen(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def _seen(pid: int) -> Seen | None:
    """None if there is no such process, or it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = text.rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        return None
    return Seen(pid, int(fields[3]), int(fields[19]))


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pss_bytes(pid: int) -> int | None:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None
