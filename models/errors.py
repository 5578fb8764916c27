"""The small error tree: broken input is an exception, an outcome never is."""

from __future__ import annotations

from collections.abc import Sequence


class ForeserveError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidInput(ForeserveError, ValueError):
    """The user's file or flag is wrong. One line: what, where, and a hint.

    ``file``, ``line`` (1-based) and ``field`` are filled in by whoever knows them, nearest
    to the user; the command line prints ``str(error)`` and exits with code 2. A file with
    several faults raises the first and lists the others in ``also``.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
        hint: str | None = None,
        also: Sequence[InvalidInput] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file, self.line, self.field, self.hint = file, line, field, hint
        self.also = tuple(also)

    def __str__(self) -> str:
        where = self.file or ""
        if self.line is not None:
            where += f":{self.line}"
        parts = [where] if where else []
        if self.field:
            parts.append(self.field)
        text = ": ".join([*parts, self.message])
        return f"{text} (hint: {self.hint})" if self.hint else text

    def at(
        self,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> InvalidInput:
        """The same error with the place filled in where it was not known yet."""
        return InvalidInput(
            self.message,
            file=self.file or file,
            line=self.line if self.line is not None else line,
            field=self.field or field,
            hint=self.hint,
            also=self.also,
        )


class IllegalTransition(ForeserveError):
    """A replica was asked to make a move its state table does not allow."""
