"""The catalogue: known LLMs and GPU types, one TOML file each, shipped with the package.

A file holds the fields of `ModelSpec` (``llms/``) or `GpuType` (``gpus/``) under their
own names, and says in ``[sources]`` where each value comes from. To add an LLM or a GPU
type is to add a file. Prices are list prices of one day; a cluster file may override
them.

An LLM that is not shipped is named by a path: another such TOML file, or the
``config.json`` of its checkpoint. Files in `USER_FOLDER` go by their names alone.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from foreserve.models.codec import did_you_mean, read_text, structure
from foreserve.models.errors import InvalidInput
from foreserve.models.huggingface import from_config
from foreserve.models.llm import ModelSpec
from foreserve.models.specs import GpuType

Entry = TypeVar("Entry", ModelSpec, GpuType)

USER_FOLDER = Path("catalog")
"""Where `plan catalog add` writes, below the working folder; its LLMs come first."""
ALWAYS_WRITTEN = ("weight_dtype", "kv_bytes_per_value", "tp")


@cache
def llms() -> tuple[ModelSpec, ...]:
    """All LLMs of the catalogue, by name."""
    return _load(ModelSpec, "llms")


@cache
def gpus() -> tuple[GpuType, ...]:
    """All GPU types of the catalogue, by name."""
    return _load(GpuType, "gpus")


def user_llms() -> tuple[ModelSpec, ...]:
    """The LLMs of `USER_FOLDER`, by name; read anew at each call."""
    return tuple(_read_toml(path) for path in sorted(USER_FOLDER.glob("*.toml")))


def llm(name: str) -> ModelSpec:
    """The LLM of this name, or of the TOML file or ``config.json`` at this path.

    An unknown name is an `InvalidInput` with a hint.
    """
    if is_path(name):
        return read_llm(name)
    own = USER_FOLDER / f"{name}.toml"
    return _read_toml(own) if own.is_file() else _find(llms(), name, "LLM")


def is_path(name: str) -> bool:
    """Whether ``name`` speaks of a file or folder, and not of a catalogue entry."""
    return name.endswith((".toml", ".json")) or "/" in name or os.sep in name


def read_llm(path: str | os.PathLike[str], *, name: str | None = None) -> ModelSpec:
    """The LLM in a TOML file, a ``config.json``, or a folder that holds one.

    From a ``config.json`` the LLM is called ``name``, else after ``_name_or_path``, else
    after the file's folder. Beside it, ``hf_quant_config.json`` says how the weights are
    stored where the ``config.json`` does not. Faults are `InvalidInput`.
    """
    target = Path(path)
    if target.is_dir():
        target = target / "config.json"
    if target.suffix == ".toml":
        return _read_toml(target)
    config = _read_object(target)
    beside = target.with_name("hf_quant_config.json")
    if "quantization_config" not in config and beside.is_file():
        config = {**config, "quantization_config": _read_object(beside)}
    hub_id = str(config.get("_name_or_path") or "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        hub_id = ""
    if name is None:
        own = (
            target.stem
            if target.name != "config.json"
            else target.absolute().parent.name
        )
        name = re.sub(r"[^a-z0-9._-]+", "-", (Path(hub_id).name or own).lower())
    return from_config(config, name=name, hub_id=hub_id or None, file=str(target))


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


def to_toml(entry: ModelSpec | GpuType) -> str:
    """The text of a catalogue file, which `parse` reads back to an equal entry."""
    return "\n".join(_toml_lines(entry, ())) + "\n"


def _toml_lines(record: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Own values first, then each record or mapping as a table, as TOML wants it."""
    tables: list[tuple[str, Any]] = []
    if isinstance(record, Mapping):
        values = dict(record)
    else:
        values = {f.name: getattr(record, f.name) for f in fields(record)}
        for f in fields(record):
            silent = f.default is not MISSING and f.name not in ALWAYS_WRITTEN
            if values[f.name] is None or (silent and values[f.name] == f.default):
                del values[f.name]
    for key, value in values.items():
        if is_dataclass(value) or isinstance(value, Mapping):
            tables.append((key, value))
        else:
            yield f"{key} = {_toml_value(value)}"
    for key, value in tables:
        yield ""
        yield f"[{'.'.join((*path, key))}]"
        yield from _toml_lines(value, (*path, key))


def _toml_value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1_000_000:
        return f"{value:_}"
    # JSON's strings, numbers, booleans and lists of them are also TOML's.
    return json.dumps(value, ensure_ascii=False)


def _read_object(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"not valid JSON: {error.msg}", file=str(path), line=error.lineno
        ) from None
    if not isinstance(plain, dict):
        raise InvalidInput("a JSON object is expected", file=str(path))
    return plain


def _read_toml(path: Path) -> ModelSpec:
    entry = parse(ModelSpec, read_text(path), str(path))
    _check_name(entry, path.name, str(path))
    return entry


def _check_name(entry: ModelSpec | GpuType, file_name: str, file: str) -> None:
    if file_name != f"{entry.name}.toml":
        raise InvalidInput(
            f"{entry.name!r} must be the name of the file", file=file, field="name"
        )


def _load(cls: type[Entry], folder: str) -> tuple[Entry, ...]:
    entries = []
    for file in files(__name__).joinpath(folder).iterdir():
        if not file.name.endswith(".toml"):
            continue
        entry = parse(cls, file.read_text(encoding="utf-8"), str(file))
        _check_name(entry, file.name, str(file))
        entries.append(entry)
    return tuple(sorted(entries, key=lambda entry: entry.name))


def _find(entries: tuple[Entry, ...], name: str, what: str) -> Entry:
    for entry in entries:
        if entry.name == name:
            return entry
    names = [entry.name for entry in entries]
    raise InvalidInput(f"unknown {what} {name!r}", hint=did_you_mean(name, names))
