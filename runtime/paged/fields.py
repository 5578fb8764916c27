"""Fields of a body: of the type that they have to be, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreserve.runtime.engines.bodies import Refused

LARGEST = 2**31


def flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if not (value is None or isinstance(value, bool)):
        raise Refused(400, f"{name}: expected true or false")
    return bool(value)


def number(
    body: Mapping[str, Any], name: str, default: float, said: str | None = None
) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(400, f"{said or name}: expected a number")
    if abs(value) >= LARGEST:
        raise Refused(400, f"{said or name}: too large a number")
    return float(value)


def whole(
    body: Mapping[str, Any], name: str, default: int, least: int, most: int = LARGEST
) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise Refused(400, f"{name}: expected a whole number")
    if not least <= value <= most:
        above = "" if most == LARGEST else f", at most {most}"
        raise Refused(400, f"{name}: expected at least {least}{above}")
    return value
