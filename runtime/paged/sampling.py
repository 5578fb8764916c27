"""Which token comes next: the likeliest, or one drawn from those likely enough.

Each request draws from a generator of its own, one number per token. So with a seed an
answer depends neither on who else was in the batch nor on how often it was preempted.

What a request does to its logits comes in vLLM's order: bias, penalties, temperature, and
then what leaves out unlikely tokens. Log probabilities are those before any of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput

MOST_LOGPROBS = 20
"""Of the likeliest tokens; OpenAI's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen; OpenAI's names and defaults."""

    temperature: float = 1.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """The fewest of the likeliest tokens whose shares add up to this."""
    top_k: int = 0
    """So many of the likeliest; 0: all."""
    min_p: float = 0.0
    """Those at least so likely, as a share of the likeliest one."""
    seed: int | None = None
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """The same, times how often it has them."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens in prompt and answer, and multiplies those below 0."""
    bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    min_tokens: int = 0
    """No token ends the answer before it has so many."""
    logprobs: int | None = None
    """Log probabilities are told: of each token, and of so many of the likeliest."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InvalidInput("must be from 0 to 100", field="temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("must be above 0, and at most 1", field="top_p")
        if self.top_k < 0:
            raise InvalidInput("must be at least 0", field="top_k")
        if not 0 <= self.min_p <= 1:
            raise InvalidInput("must be from 0 to 1", field="min_p")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise InvalidInput("must be from -2 to 2", field=name)
        if not 0.01 <= self.repetition_penalty <= 100:
            raise InvalidInput("must be from 0.01 to 100", field="repetition_penalty")
        if not all(-100 <= value <= 100 for value in self.bias.values()):
            raise InvalidInput("must be from -100 to 100", field="logit_bias")
        if self.min_tokens < 0:
            raise InvalidInput("must be at least 0", field="min_tokens")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InvalidInput(f"must be from 0 to {MOST_LOGPROBS}", field="logprobs")

    def bend(self, prompt: Sequence[int], ends: Iterable[int]) -> Bend | None:
        """What it does to logits; None: nothing, so that nobody needs to look.
        ``ends``: tokens that would end the answer."""
        if not (
            self.bias
            or self.min_tokens
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
        ):
            return None
        return Bend(self, prompt, ends)


GREEDY = Sampling(temperature=0.0)


class Bend:
    """What one request does to its logits, its answer so far considered. Mutable."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], ends: Iterable[int]
    ) -> None:
        self._sampling = sampling
        self._bias = _Part(sampling.bias.keys(), sampling.bias.values())
        self._ends = _Part(ends, -np.inf)
        self._given = 0
        # Those of the prompt count as seen, but are in the answer 0 times.
        repeats = sampling.repetition_penalty != 1
        seen = dict.fromkeys(prompt) if repeats else {}
        self._places = {token: place for place, token in enumerate(seen)}
        self._tokens = np.fromiter(seen, np.int64)
        self._counts = np.zeros(len(seen), np.float32)

    def add(self, token: int) -> None:
        """The answer has one more."""
        self._given += 1
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._tokens):
                more = max(64, place)
                self._tokens = np.pad(self._tokens, (0, more))
                self._counts = np.pad(self._counts, (0, more))
            self._tokens[place] = token
        self._counts[place] += 1

    def added(self) -> Iterable[_Part]:
        if len(self._bias):
            yield self._bias
        if self._given < self._sampling.min_tokens:
            yield self._ends

    def divided(self) -> Iterable[_Part]:
        if self._sampling.repetition_penalty != 1:
            yield _Part(self._seen[0], self._sampling.repetition_penalty)

    def taken(self) -> Iterable[_Part]:
        present = self._sampling.presence_penalty
        often = self._sampling.frequency_penalty
        if present or often:
            tokens, counts = self._seen
            yield _Part(tokens, -present * (counts > 0) - often * counts)

    @property
    def _seen(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        return self._tokens[: len(self._places)], self._counts[: len(self._places)]


class _Part:
    """Some tokens of a row of logits, and a number for each."""

    def __init__(self, tokens: Iterable[int], values: Iterable[float] | float) -> None:
        if not isinstance(tokens, np.ndarray):
            tokens = np.fromiter(tokens, np.int64)
        self.tokens: NDArray[np.int64] = tokens
        if not isinstance(values, (float, int, np.ndarray)):
            values = np.fromiter(values, np.float32)
        self.values = np.broadcast_to(np.asarray(values, np.float32), tokens.shape)

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Scores:
    """Log probabilities where one token was told."""

    token: int
    own: float | None
    """None: nothing comes before it."""
    top: tuple[tuple[int, float], ...]
    """Of the likeliest, best first."""


def score(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int | None]
) -> list[Scores | None]:
    """Of each row's token, for rows that want so many of the likeliest; of ``logits`` as
    the LLM gave them."""
    scores: list[Scores | None] = [None] * len(tokens)
    rows = [row for row, top in enumerate(tops) if top is not None]
    if not rows:
        return scores
    logs = (logits if len(rows) == len(logits) else logits[rows]).log_softmax(-1)
    told = torch.tensor([tokens[row] for row in rows], device=logits.device)
    own: list[float] = logs.gather(-1, told[:, None])[:, 0].tolist()
    most = min(max(tops[row] or 0 for row in rows), logs.shape[1])
    best = logs.topk(most, dim=-1)
    likely, likely_logs = best.indices.tolist(), best.values.tolist()
    for row, value, *each in zip(rows, own, likely, likely_logs, strict=True):
        top = tuple(zip(*(kind[: tops[row]] for kind in each), strict=True))
        scores[row] = Scores(tokens[row], value, top)
    return scores


def choose(
    logits: torch.Tensor,
    wanted: Sequence[Sampling],
    chances: Sequence[np.random.Generator | None],
    bends: Sequence[Bend | None] = (),
) -> list[int]:
    """The next token of each row of ``logits [n, vocabulary]``; ``chances`` are needed by
    rows that are not greedy, and move on by a number."""
    if any(bend is not None for bend in bends):
        logits = _bent(logits, bends)
    best: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, one in enumerate(wanted) if one.temperature > 0]
    if not drawn:
        return best
    numbers = []
    for row in drawn:
        chance = chances[row]
        assert chance is not None
        numbers.append(chance.random())
    found = _draw(logits[drawn], [wanted[row] for row in drawn], numbers)
    for row, token in zip(drawn, found, strict=True):
        best[row] = token
    return best


def _bent(logits: torch.Tensor, bends: Sequence[Bend | None]) -> torch.Tensor:
    """With what each row's request does to it; one pass for all rows and each kind."""
    logits = logits.clone()
    known = [(row, bend) for row, bend in enumerate(bends) if bend is not None]

    def places(
        parts: list[tuple[int, _Part]],
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        def column(values: list[NDArray[Any]]) -> torch.Tensor:
            return torch.from_numpy(np.concatenate(values)).to(logits.device)

        rows = column([np.full(len(part), row) for row, part in parts])
        tokens = column([part.tokens for _, part in parts])
        values = column([part.values for _, part in parts]).to(logits.dtype)
        return (rows, tokens), values

    if parts := [(row, part) for row, bend in known for part in bend.added()]:
        at, values = places(parts)
        logits.index_put_(at, values, accumulate=True)
    if parts := [(row, part) for row, bend in known for part in bend.divided()]:
        at, values = places(parts)
        there = logits[at]
        logits[at] = torch.where(there > 0, there / values, there * values)
    if parts := [(row, part) for row, bend in known for part in bend.taken()]:
        at, values = places(parts)
        logits.index_put_(at, values, accumulate=True)
    return logits


def _draw(
    logits: torch.Tensor, wanted: Sequence[Sampling], numbers: Sequence[float]
) -> list[int]:
    """By the inverse of each row's distribution over tokens in order of their share."""

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    heat = column([one.temperature for one in wanted])
    ordered, tokens = (logits.double() / heat).sort(
        dim=-1, descending=True, stable=True
    )
    shares = ordered.softmax(-1)
    before = shares.cumsum(-1) - shares
    ranks = torch.arange(shares.shape[1], device=logits.device)
    most = column([float(one.top_k or shares.shape[1]) for one in wanted])
    least = column([one.min_p for one in wanted]) * shares[:, :1]
    kept = (ranks < most) & (shares >= least)
    # Always the first; then all that begin before the share (of those left) is full.
    full = column([one.top_p for one in wanted]) * (shares * kept).sum(-1, keepdim=True)
    kept &= before < full
    kept[:, 0] = True
    total = (shares * kept).cumsum(-1)
    aims = column(list(numbers)) * total[:, -1:]
    places = (total <= aims).sum(-1, keepdim=True)
    places = places.minimum(kept.sum(-1, keepdim=True) - 1)
    chosen: list[int] = tokens.gather(-1, places)[:, 0].tolist()
    return chosen
