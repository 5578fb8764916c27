"""One request on its way through a group, and who asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from foreserve.models.errors import ForeserveError
from foreserve.runtime.memory.books import Pages
from foreserve.runtime.memory.kv import KvTable
from foreserve.runtime.memory.rules import pages_of
from foreserve.runtime.paged.sampling import (
    GREEDY,
    Bend,
    Sampling,
    Scores,
    choose,
    score,
)
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
    echoes: bool = False
    """Log probabilities of the prompt's tokens are wanted, as of those of the answer."""
    known: list[int] = field(default_factory=list)
    """Prompt and answer so far."""
    computed: int = 0
    """Tokens whose keys and values are in its pages, or in those it has away."""
    away: Pages | None = None
    """On the host, while it is swapped."""
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
    bend: Bend | None = field(init=False)
    scores: Scores | None = None
    """Of the token that the listener hears now, if it wants them."""
    prompt_scores: list[Scores] = field(default_factory=list)
    """From the second token on; all there when the listener hears of the first one."""

    def __post_init__(self) -> None:
        self.bend = self.sampling.bend(self.prompt, self.ends)

    def take(self, token: int) -> None:
        """The answer goes on with it."""
        self.known.append(token)
        if self.bend is not None:
            self.bend.add(token)

    def scored(self, count: int) -> int:
        """After how many of the next ``count`` tokens that it computes logits are wanted,
        beside those of what is not known yet."""
        left = len(self.prompt) - 1 - self.computed
        if not self.echoes or len(self.prompt_scores) == len(self.prompt) - 1:
            return 0
        return max(0, min(count, left))

    def hear(self, begin: int, logits: torch.Tensor) -> None:
        """What the LLM would have said after the prompt's tokens from ``begin`` on."""
        del self.prompt_scores[begin:]
        said = self.prompt[begin + 1 : begin + 1 + len(logits)]
        tops = [self.sampling.logprobs] * len(said)
        self.prompt_scores += [one for one in score(logits, said, tops) if one]

    @property
    def pages(self) -> int:
        return self.table.pages

    @property
    def most_pages(self) -> int:
        """That it may come to need."""
        tokens = len(self.prompt) + self.most_tokens - 1
        return pages_of(tokens, self.table.per_page)

    @property
    def promise(self) -> int:
        return self.table.promise

    @property
    def resident(self) -> bool:
        return self.table.pages > 0

    @property
    def chunk(self) -> list[int]:
        """Those of its next iteration."""
        return self.known[self.computed : self.computed + (self.prompt_tokens or 1)]

    @property
    def given(self) -> int:
        return len(self.known) - len(self.prompt)


def next_tokens(logits: torch.Tensor, jobs: Sequence[Job]) -> list[int]:
    """The next token of each, by its row of ``logits``; those that want `Job.scores` have
    them then."""
    chosen = choose(
        logits,
        [job.sampling for job in jobs],
        [job.chance for job in jobs],
        [job.bend for job in jobs],
    )
    told = score(logits, chosen, [job.sampling.logprobs for job in jobs])
    for job, one in zip(jobs, told, strict=True):
        job.scores = one
    return chosen


@dataclass(slots=True)
class Totals:
    """Counted since the LLM joined."""

    prompt_tokens: int = 0
    given_tokens: int = 0
    preemptions: int = 0
