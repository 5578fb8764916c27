"""Scenarios that ship with the package; `init.yaml` is what `plan init` writes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def scenario_path(name: str) -> Path:
    """Path of the shipped scenario ``name`` (whether it exists is the reader's check)."""
    return Path(str(files(__name__) / f"{name}.yaml"))
