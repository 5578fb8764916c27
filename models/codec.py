"""Files <-> frozen dataclasses: canonical JSON out, strict and helpful reading in.

Reading goes through pydantic over the plain dataclasses. Each fault becomes a one-line
`InvalidInput` with file, line, field and the closest allowed key. Writing is canonical
(sorted keys, shortest floats, fixed layout), so load-then-dump gives the same bytes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from foreserve.models.errors import InvalidInput
from foreserve.models.plan import SCHEMA_VERSION, Plan

T = TypeVar("T")

UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")


def to_json(record: object) -> str:
    """Canonical JSON text of a record, ending in a newline."""
    return dump_json(to_plain(record))


def to_plain(record: object) -> Any:
    """A record as plain data (dicts, lists, strings, numbers), as in its file."""
    return _adapter(type(record)).dump_python(record, mode="json")


def dump_json(plain: object) -> str:
    """Canonical JSON text of plain data: sorted keys, one space indent, no NaN."""
    text = json.dumps(
        plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False
    )
    return text + "\n"


def digest(record: object) -> str:
    """SHA-256 of the canonical JSON: equal records have equal digests."""
    return hashlib.sha256(to_json(record).encode()).hexdigest()


def from_json(cls: type[T], text: str, file: str | None = None) -> T:
    """Read one record; every fault is an `InvalidInput` with its place."""
    try:
        plain = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except json.JSONDecodeError as error:
        whole = text.rstrip().endswith(("}", "]"))
        hint = None if whole or not text.strip() else "is the file cut off?"
        what = "empty file" if not text.strip() else f"not valid JSON: {error.msg}"
        raise InvalidInput(what, file=file, line=error.lineno, hint=hint) from None
    except InvalidInput as error:
        raise error.at(file=file) from None
    return structure(cls, plain, text=text, file=file)


def structure(cls: type[T], plain: object, *, text: str, file: str | None) -> T:
    """Turn plain data read from ``text`` into ``cls``; all faults in one pass."""
    from pydantic import ValidationError

    try:
        value: T = _adapter(cls).validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        # A misspelt key is also a missing one: name the misspelling first.
        errors = sorted(error.errors(), key=lambda e: e["type"] not in UNKNOWN_KEY)
        faults = [_fault(cls, fault, text, file) for fault in errors]
        first, rest = faults[0], faults[1:]
        raise InvalidInput(
            first.message,
            file=first.file,
            line=first.line,
            field=first.field,
            hint=first.hint,
            also=rest,
        ) from None
    return value


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Read a plan file, refusing plans of a newer schema before anything else."""
    file = os.fspath(path)
    text = read_text(path)
    try:
        head = json.loads(text)
    except json.JSONDecodeError:
        head = None  # `from_json` below says what is wrong and where
    version = head.get("schema_version") if isinstance(head, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InvalidInput(
            f"plan has schema version {version}, this foreserve reads up to "
            f"{SCHEMA_VERSION}",
            file=file,
            field="schema_version",
            hint="upgrade foreserve, or solve again with this version",
        )
    return from_json(Plan, text, file)


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file; a missing or binary one is an `InvalidInput`."""
    file = os.fspath(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidInput("no such file", file=file) from None
    except IsADirectoryError:
        raise InvalidInput("is a folder, a file is needed", file=file) from None
    except UnicodeDecodeError:
        raise InvalidInput("not UTF-8 text", file=file) from None


def read_yaml(text: str, file: str | None = None) -> Any:
    """Plain data (as JSON would give it) from YAML or JSON text; faults with their line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        plain = YAML(typ="safe", pure=True).load(text)
        return json.loads(json.dumps(plain, allow_nan=False))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        what = (error.problem or "not valid YAML").splitlines()[0]
        raise InvalidInput(f"not valid YAML: {what}", file=file, line=line) from None
    except (YAMLError, TypeError, ValueError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInput(f"not valid YAML: {what}", file=file) from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write to a temporary file beside ``path``, then rename: whole or not at all."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def did_you_mean(wrong: str, allowed: Sequence[str]) -> str:
    """A hint that names the closest allowed word, or lists them all."""
    close = difflib.get_close_matches(wrong, allowed, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "one of " + ", ".join(sorted(allowed))


_ADAPTERS: dict[type, Any] = {}


def _adapter(cls: type) -> Any:
    from pydantic import TypeAdapter

    if cls not in _ADAPTERS:
        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = dict(pairs)
    if len(plain) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidInput(f"key {twice!r} appears twice in one object")
    return plain


def _no_constant(name: str) -> float:
    raise InvalidInput(f"{name} is not a number", hint="every number must be finite")


def _fault(
    cls: type, fault: Mapping[str, Any], text: str, file: str | None
) -> InvalidInput:
    loc: tuple[str | int, ...] = fault["loc"]
    kind, message, hint = fault["type"], fault["msg"], None
    if kind in UNKNOWN_KEY:
        message = f"unknown key {str(loc[-1])!r}"
        hint = did_you_mean(str(loc[-1]), _keys_at(cls, loc[:-1]))
    elif kind in ("missing", "missing_argument"):
        message, hint = "required key is missing", None
    elif kind == "value_error":
        original = fault["ctx"]["error"]
        message = getattr(original, "message", str(original))
        hint = getattr(original, "hint", None)
        loc += _location(getattr(original, "field", None))
    else:
        shown = repr(fault["input"])
        message = f"{message[0].lower()}{message[1:]}"
        message += f", got {shown if len(shown) <= 40 else shown[:37] + '...'}"
    return InvalidInput(
        message,
        file=file,
        line=line_of(text, loc),
        field=".".join(str(part) for part in loc) or None,
        hint=hint,
    )


def placed(error: InvalidInput, text: str, file: str) -> InvalidInput:
    """The error of a field of the record in ``text``, with the file and its line."""
    if error.file is not None or error.field is None:
        return error
    return error.at(file=file, line=line_of(text, _location(error.field)))


def _location(field: str | None) -> tuple[str | int, ...]:
    """A dotted field as keys and indices."""
    parts = field.split(".") if field else []
    return tuple(int(part) if part.isdecimal() else part for part in parts)


def _keys_at(cls: Any, loc: Sequence[str | int]) -> list[str]:
    """Keys that the record at ``loc`` inside ``cls`` allows."""
    for part in loc:
        if is_dataclass(cls):
            cls = typing.get_type_hints(cls).get(str(part), object)
        else:
            args = typing.get_args(cls) or (object,)
            cls = args[0] if isinstance(part, int) else args[-1]
        if typing.get_origin(cls) in (typing.Union, types.UnionType):
            cls = next(a for a in typing.get_args(cls) if a is not type(None))
    # A field is called ``for_`` where its key is a word of Python.
    return [f.name.rstrip("_") for f in fields(cls)] if is_dataclass(cls) else []


def line_of(text: str, loc: Sequence[str | int]) -> int | None:
    """1-based line of the value at ``loc`` in YAML or JSON ``text``; None if unknown."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        node = YAML(typ="rt").load(text)
    except YAMLError:
        return None
    line: int | None = None
    for part in loc:
        marks: Any = getattr(node, "lc", None)
        try:
            position = marks.key(part) if isinstance(node, dict) else marks.item(part)
            line, node = position[0] + 1, node[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return line
