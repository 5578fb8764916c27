"""One request on its way through a group, and who asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from foreserve.models.errors import ForeserveError
from foreserve.runtime.memory.kv import KvTable
from foreserve.runtime.paged.sampling import GREEDY, Sampling
from foreserve.runtime.scheduler import Progress

Reason = Literal["stop", "length", "abort"]


class TooLong(ForeserveError):
    """The pool would never hold that request."""


class Listener(Protocol):
    """Who asked. Called between iterations, by the thread that runs them."""

    def token(self, token: int) -> bool:
        """The next token of the answer; whether that is enough."""
        ...

    def end(self, reason: Reason) -> None:
        """No further token comes."""
        ...


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One request on its way: a `turns.Standing`. Its maker fills in the upper part, the
    group the rest."""

    service: int
    prompt: Sequence[int]
    most_tokens: int
    """Of the answer."""
    listener: Listener
    arrival_s: float
    sampling: Sampling = GREEDY
    chance: np.random.Generator | None = None
    """Needed unless it is greedy."""
    ends: frozenset[int] = frozenset()
    """Tokens that end the answer and are not part of it."""
    known: list[int] = field(default_factory=list)
    """Prompt and answer so far."""
    computed: int = 0
    """Tokens whose keys and values are in its pages."""
    joined_s: float | None = None
    first_s: float | None = None
    last_s: float = 0.0
    """When its last token came."""
    decode_s: float = 0.0
    preemptions: int = 0
    over: bool = False
    progress: Progress = field(init=False)
    table: KvTable = field(init=False)
    prompt_tokens: int = 0
    next_pages: int = 0

    @property
    def pages(self) -> int:
        return self.table.pages

    @property
    def promise(self) -> int:
        return self.table.promise

    @property
    def resident(self) -> bool:
        return self.table.pages > 0

    @property
    def given(self) -> int:
        return len(self.known) - len(self.prompt)


@dataclass(slots=True)
class Totals:
    """Counted since the LLM joined."""

    prompt_tokens: int = 0
    given_tokens: int = 0
    preemptions: int = 0
