"""Base of everything that is written to a file."""

from __future__ import annotations

from typing import Any, ClassVar


class Record:
    """Marks a frozen dataclass as a file record: unknown keys in its file are errors.

    The attribute is read by the codec (pydantic); nothing else depends on it.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "allow_inf_nan": False,
    }
