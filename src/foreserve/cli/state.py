"""The state of a cluster that serves, and what is done where it cannot be relied upon.

What cannot be read is set aside under another name, with one line of why; what cannot be
written, or fails while it watches, is told once. The cluster serves on, but carries out no
plan that nobody has looked at: its mode falls from ``automatic`` to ``recommend`` until
somebody sets it again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from foreserve.models.errors import ForeserveError, InvalidInput
from foreserve.models.observed import Observed
from foreserve.models.placement import Placement
from foreserve.planner.online import LivePolicy
from foreserve.runtime.live.intents import IntentLog

Found = TypeVar("Found")

TAIL_BYTES = 1 << 20
"""Of a journal, what is looked at before it is gone on with."""
PROBE = b"whether this folder keeps what is written to it\n"

log = logging.getLogger(__name__)


class State:
    """The folder of a cluster's state. Any thread may use it."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder; `InvalidInput` if nothing can be kept there."""
        self.folder = folder
        self.notes: dict[str, str] = {}
        """Why the cluster does not plan by itself: a line by what it is about."""
        self.on_note: Callable[[], object] = lambda: None
        """Called when there is a new one."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(error) from None
        self.check()

    def check(self) -> None:
        """`InvalidInput` unless what is written to the folder reaches its disk."""
        probe = self.folder / f".probe.{os.getpid()}"
        try:
            with probe.open("wb") as file:
                file.write(PROBE)
                file.flush()
                os.fsync(file.fileno())
            probe.replace(probe.with_suffix(".done"))
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise self._refused(error) from None
        finally:
            for path in (probe, probe.with_suffix(".done")):
                path.unlink(missing_ok=True)

    def note(self, what: str, why: object) -> None:
        """Something is amiss; told once until `clear`."""
        if what not in self.notes:
            line = next(iter(str(why).splitlines()), "") or type(why).__name__
            self.notes[what] = f"{what}: {line}"
            log.warning("%s", self.notes[what])
            self.on_note()

    def clear(self) -> None:
        """Somebody has seen to it."""
        self.notes = {}

    def try_(self, what: str, act: Callable[[], object]) -> None:
        """Do something that must not end the serving if it fails."""
        try:
            act()
        except Exception as error:
            self.note(what, error)

    # --- files ------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        return self.folder / name

    def aside(self, name: str, why: object) -> None:
        """Give a file of no use another name, which no earlier one has."""
        path = self.path(name)
        target, number = path.with_name(f"{name}.broken"), 1
        while target.exists():
            target, number = path.with_name(f"{name}.broken.{number}"), number + 1
        path.replace(target)
        self.note(name, f"set aside as {target.name}: {why}")

    def intents(self, name: str) -> IntentLog:
        """The log of orders. One that cannot be read is set aside, and the next begins
        with a generation that no controller has had: each byte that was lost may have
        been the line of one."""
        path = self.path(name)
        *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
        generation, lost = 0, 0 if rest[:1] in (b"", b"{") else len(rest)
        for line in lines:
            try:
                generation = max(generation, json.loads(line).get("generation", 0))
            except (ValueError, AttributeError, TypeError):
                lost += len(line) + 1
        if not lost:
            return IntentLog(path)
        IntentLog(path).close()  # nobody else may be using it
        self.aside(name, f"{lost} bytes of it are no orders")
        intents = IntentLog(path)
        intents.append("generation", generation=generation + lost)
        return intents

    def check_lines(self, name: str) -> None:
        """Set a file of JSON lines aside if one of the last ones is none. A last line
        that was cut off is its writer's to remove."""
        path = self.path(name)
        if not path.exists():
            return
        try:
            with path.open("rb") as file:
                skipped = max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES)
                file.seek(skipped)
                lines = file.read().split(b"\n")[1 if skipped else 0 : -1]
            for line in lines:
                if not isinstance(json.loads(line)["at_s"], int | float):
                    raise ValueError("a line without its time")
        except (ValueError, KeyError, TypeError, OSError) as error:
            self.aside(name, f"a line cannot be read: {error}")

    def read(self, name: str, read: Callable[[Path], Found]) -> Found | None:
        """What is in a file, if it is there; set aside if it is of no use."""
        path = self.path(name)
        if path.exists():
            try:
                return read(path)
            except (ForeserveError, ValueError, KeyError, TypeError, OSError) as error:
                self.aside(name, error)
        return None

    def _refused(self, error: OSError) -> InvalidInput:
        return InvalidInput(
            f"nothing can be kept there: {error.strerror or error}",
            file=str(self.folder),
            hint="--state FOLDER, on a disk that can be written",
        )


class Steady:
    """A policy that goes on with what was wanted before where the one below it fails."""

    def __init__(self, policy: LivePolicy, state: State) -> None:
        self._policy, self._state = policy, state
        self._wanted = Placement()

    @property
    def name(self) -> str:
        return self._policy.name

    def decide(self, now_s: float, observed: Observed) -> Placement:
        try:
            self._wanted = self._policy.decide(now_s, observed)
        except Exception as error:
            self._state.note("decision", f"{type(error).__name__}: {error}")
        return self._wanted

    def next_review_s(self, now_s: float) -> float:
        return self._policy.next_review_s(now_s)
