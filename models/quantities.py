"""Quantities with units in files: ``80GiB``, ``500ms``, ``8GB/s``; SI once read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator

from foreserve.models.errors import InvalidInput

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0}
_SECONDS |= {"h": 3600.0, "d": 86_400.0}
_BYTES = {"B": 1} | {
    prefix + unit: base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT", start=1)
}


def parse_seconds(value: object) -> object:
    """``500ms`` -> 0.5; numbers are seconds; anything else is left to the type check."""
    return _quantity(value, _SECONDS, "500ms, 2.5s, 5m, 1h or 7d")


def parse_bytes(value: object) -> object:
    """``80GiB`` -> 85899345920; numbers are bytes."""
    number = _quantity(value, _BYTES, "80GiB or 2TB")
    return round(number) if isinstance(number, float) else number


def parse_bytes_per_s(value: object) -> object:
    """``8GB/s`` -> 8e9; numbers are bytes per second."""
    return _quantity(value, {f"{u}/s": s for u, s in _BYTES.items()}, "8GB/s")


def _quantity(value: object, units: Mapping[str, float], example: str) -> object:
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z/]+)\s*", value)
    if match and match[2] in units:
        try:
            return float(match[1]) * units[match[2]]
        except ValueError:
            pass
    raise InvalidInput(f"{value!r} is not a quantity", hint=f"write e.g. {example}")


Seconds = Annotated[float, BeforeValidator(parse_seconds)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
BytesPerSecond = Annotated[float, BeforeValidator(parse_bytes_per_s)]
