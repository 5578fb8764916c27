"""The catalogue: known LLMs and GPU types, one TOML file each, shipped with the package.

A file holds the fields of `ModelSpec` (``llms/``) or `GpuType` (``gpus/``) under their
own names, and says in ``[sources]`` where each value comes from. To add an LLM or a GPU
type is to add a file. Prices are list prices of one day; a cluster file may override
them.
"""

from __future__ import annotations

import json
import tomllib
from functools import cache
from importlib.resources import files
from typing import TypeVar

from foreserve.models.codec import did_you_mean, structure
from foreserve.models.errors import InvalidInput
from foreserve.models.llm import ModelSpec
from foreserve.models.specs import GpuType

Entry = TypeVar("Entry", ModelSpec, GpuType)


@cache
def llms() -> tuple[ModelSpec, ...]:
    """All LLMs of the catalogue, by name."""
    return _load(ModelSpec, "llms")


@cache
def gpus() -> tuple[GpuType, ...]:
    """All GPU types of the catalogue, by name."""
    return _load(GpuType, "gpus")


def llm(name: str) -> ModelSpec:
    """The LLM called ``name``; an unknown name is an `InvalidInput` with a hint."""
    return _find(llms(), name, "LLM")


def gpu(name: str) -> GpuType:
    """The GPU type called ``name``; an unknown name is an `InvalidInput` with a hint."""
    return _find(gpus(), name, "GPU type")


def parse(cls: type[Entry], text: str, file: str) -> Entry:
    """Read one catalogue file; each fault is an `InvalidInput` with file and field."""
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"not valid TOML: {error}", file=file) from None
    # A TOML date has no JSON form: as a string it fails as a wrong type should.
    plain = json.loads(json.dumps(plain, default=str))
    # Without the text, for the codec's line numbers are those of YAML and JSON.
    return structure(cls, plain, text="", file=file)


def _load(cls: type[Entry], folder: str) -> tuple[Entry, ...]:
    entries = []
    for file in files(__name__).joinpath(folder).iterdir():
        if not file.name.endswith(".toml"):
            continue
        entry = parse(cls, file.read_text(encoding="utf-8"), str(file))
        if file.name != f"{entry.name}.toml":
            raise InvalidInput(
                f"{entry.name!r} must be the name of the file",
                file=str(file),
                field="name",
            )
        entries.append(entry)
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _find(entries: tuple[Entry, ...], name: str, what: str) -> Entry:
    for entry in entries:
        if entry.name == name:
            return entry
    names = [entry.name for entry in entries]
    raise InvalidInput(f"unknown {what} {name!r}", hint=did_you_mean(name, names))
