"""Which token comes next: the likeliest, or one drawn from those likely enough.

Each request draws from a generator of its own, one number per token. So with a seed an
answer depends neither on who else was in the batch nor on how often it was preempted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foreserve.models.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen; OpenAI's names and defaults."""

    temperature: float = 1.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """The fewest of the likeliest tokens whose shares add up to this."""
    top_k: int = 0
    """So many of the likeliest; 0: all."""
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InvalidInput("must be from 0 to 100", field="temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidInput("must be above 0, and at most 1", field="top_p")
        if self.top_k < 0:
            raise InvalidInput("must be at least 0", field="top_k")


GREEDY = Sampling(temperature=0.0)


def choose(
    logits: torch.Tensor,
    wanted: Sequence[Sampling],
    chances: Sequence[np.random.Generator | None],
) -> list[int]:
    """The next token of each row of ``logits [n, vocabulary]``; ``chances`` are needed by
    rows that are not greedy, and move on by a number."""
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
    # Always the first; then all that begin before the share is full.
    kept = (ranks < most) & (before < column([one.top_p for one in wanted]))
    kept[:, 0] = True
    total = (shares * kept).cumsum(-1)
    aims = column(list(numbers)) * total[:, -1:]
    places = (total <= aims).sum(-1, keepdim=True)
    places = places.minimum(kept.sum(-1, keepdim=True) - 1)
    chosen: list[int] = tokens.gather(-1, places)[:, 0].tolist()
    return chosen
