"""What the benchmarks for GPUs have found, on disk after each of their parts.

One part that fails loses itself alone: its error stands where its numbers would. Nothing of
the package's dependencies is needed, since machines with GPUs may lack them.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


class Record:
    def __init__(self, name: str, folder: Path | None, **header: Any) -> None:
        """``folder``: for NAME.json; None: to standard output alone, at the end."""
        self._path = folder and folder / f"{name}.json"
        self.found: dict[str, Any] = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "commit": _said("git", "describe", "--always", "--dirty", "--exclude=*"),
            "device": _said(
                "nvidia-smi",
                "--query-gpu=name,memory.total,driver_version",
                "--format=csv,noheader",
            ),
            "python": platform.python_version(),
            "versions": _versions("torch", "triton", "cuda-bindings", "transformers"),
            **header,
        }
        self.errors = 0
        self._begin_s = time.perf_counter()

    def part(self, name: str, work: Callable[[], Any]) -> Any:
        """Run it and write what is known; None if it failed."""
        begin_s = time.perf_counter()
        sys.stderr.write(f"{name} ...\n")
        sys.stderr.flush()
        found = None
        try:
            found = work()
            self.found[name] = found
        except Exception as error:
            self.errors += 1
            self.found[name] = {
                "error": f"{type(error).__name__}: {error}"[:2000],
                "where": traceback.format_exc().splitlines()[-8:],
            }
            sys.stderr.write(f"{name}: {type(error).__name__}: {error}\n")
        took_s = round(time.perf_counter() - begin_s, 1)
        self.found.setdefault("seconds", {})[name] = took_s
        self._write()
        return found

    def _write(self) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(self.text())

    def text(self) -> str:
        return json.dumps(self.found, indent=1, default=str) + "\n"

    def end(self) -> int:
        """Says what was found; the process's exit code."""
        sys.stdout.write(self.text())
        return 1 if self.errors else 0


def spread(values: Sequence[float], factor: float = 1.0) -> dict[str, Any]:
    values = [value * factor for value in values]
    return {
        "median": round(statistics.median(values), 4),
        "all": [round(value, 4) for value in values],
    }


def timed(work: Callable[[], object]) -> float:
    begin_s = time.perf_counter()
    work()
    return time.perf_counter() - begin_s


def _said(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "none"
    return ran.stdout.strip()


def _versions(*names: str) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
