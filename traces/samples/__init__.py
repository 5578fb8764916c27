"""Traces that ship with the package; their README says where each is from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def sample_path(name: str) -> Path:
    """Path of the shipped sample ``name`` (whether it exists is the reader's check)."""
    return Path(str(files(__name__) / f"{name}.csv.gz"))
