"""Prompts that begin alike: the blocks of tokens that each shares with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from foreserve.models.errors import InvalidInput

MAX_ID = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefixes:
    """The blocks of every prompt, in order, from its first token on; read-only.

    Equal ids are equal tokens from the prompt's first one up to the end of the block:
    what was computed for one request serves the other, if it is for the same LLM.
    """

    starts: NDArray[np.int64]
    """[request + 1]: the blocks of request i are ``ids[starts[i]:starts[i + 1]]``. They
    may end before the prompt does: of the rest nothing is known."""
    ids: NDArray[np.int32]
    block_tokens: int
    """Tokens in a block; the last one of a prompt may have fewer."""

    def __post_init__(self) -> None:
        if (self.starts.dtype.name, self.ids.dtype.name) != ("int64", "int32"):
            raise InvalidInput("prefixes: int64 starts and int32 ids are needed")
        if self.starts.ndim != 1 or self.ids.ndim != 1 or not len(self.starts):
            raise InvalidInput("prefixes: starts must be [request + 1], ids [block]")
        if self.starts[0] != 0 or self.starts[-1] != len(self.ids):
            raise InvalidInput("prefixes: starts must go from 0 to the number of ids")
        if (self.starts[1:] < self.starts[:-1]).any():
            raise InvalidInput("prefixes: starts must not decrease")
        if self.ids.min(initial=0) < 0:
            raise InvalidInput("prefixes: ids must not be negative")
        if self.block_tokens < 1:
            raise InvalidInput("prefixes: a block must have a token at least")
        self.starts.setflags(write=False)
        self.ids.setflags(write=False)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def blocks(self) -> NDArray[np.int64]:
        """[request] how many there are of its prompt."""
        return np.diff(self.starts)

    def too_many(self, input_tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[request] whether it has more blocks than fit its prompt."""
        # More than enough blocks for a prompt would leave one of them empty.
        return (self.blocks - 1) * self.block_tokens >= np.maximum(input_tokens, 1)

    def lists(self) -> list[list[int]]:
        """The blocks of each request in Python's terms."""
        ids, ends = self.ids.tolist(), self.starts.tolist()
        return [ids[low:high] for low, high in pairwise(ends)]

    def take(self, rows: slice | NDArray[np.bool_] | NDArray[np.int64]) -> Prefixes:
        """Those of some requests, in the order of ``rows`` (a mask, or indices)."""
        first, blocks = self.starts[:-1][rows], self.blocks[rows]
        starts = _starts(blocks)
        at = np.arange(starts[-1]) + np.repeat(first - starts[:-1], blocks)
        return replace(self, starts=starts, ids=self.ids[at])

    def dense(self) -> Prefixes:
        """The same with ids from 0 in the order in which they first come."""
        import pandas as pd

        if (self.ids - _latest(self.ids)).max(initial=0) <= 1:
            return self  # as in Mooncake's traces: no need for a table of ids
        codes, _ = pd.factorize(self.ids)
        return replace(self, ids=codes.astype(np.int32))

    def apart(self, index: int, count: int) -> Prefixes:
        """The same with ids that those of ``count`` - 1 others, made apart too, never
        equal; nothing needs to be known of these."""
        if int(self.ids.max(initial=0)) * count + index > MAX_ID:
            raise InvalidInput(
                f"prefixes: an id is too large to be told from {count - 1} other sources",
                hint="number the blocks from 0, or convert the sources one by one",
            )
        return replace(self, ids=self.ids * np.int32(count) + np.int32(index))

    def contradiction(self) -> int | None:
        """The first request with a block that comes after another one than before, which
        equal tokens from the first one on cannot; None if there is none. The ids must be
        dense."""
        before = np.concatenate([np.array([-1], np.int32), self.ids])[:-1]
        before[self.starts[:-1][self.blocks > 0]] = -1
        wrong = before != before[_new(self.ids)][self.ids]
        if not wrong.any():
            return None
        return int(np.searchsorted(self.starts, wrong.argmax(), side="right")) - 1

    def found_tokens(self, input_tokens: NDArray[np.int32]) -> NDArray[np.int64]:
        """[request] prompt tokens that a cache without limits has when it comes, if all
        requests before it, in this order, were computed. A prompt's last token never
        counts: engines compute it to get the first token of the answer."""
        ids = self.dense().ids
        passed = np.concatenate([[0], np.cumsum(_new(ids))])
        # Blocks with none before them in the prompt, nor themselves, that is new.
        old = passed[1:] == np.repeat(passed[self.starts[:-1]], self.blocks)
        blocks = np.diff(np.concatenate([[0], np.cumsum(old)])[self.starts])
        found: NDArray[np.int64] = np.minimum(
            blocks * self.block_tokens, input_tokens.astype(np.int64) - 1
        )
        return found


def row_of_prefixes(
    parts: Sequence[Prefixes | None], requests: Sequence[int]
) -> Prefixes | None:
    """Those of several lists of requests as of one; ``None`` are so many requests
    without blocks. None if nobody has any."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    for part in known:
        check_equal(known[0].block_tokens, part.block_tokens)
    blocks = [
        np.zeros(count, np.int64) if part is None else part.blocks
        for part, count in zip(parts, requests, strict=True)
    ]
    return Prefixes(
        starts=_starts(np.concatenate(blocks)),
        ids=np.concatenate([part.ids for part in known]),
        block_tokens=known[0].block_tokens,
    )


def check_equal(block_tokens: int, other: int) -> None:
    """`InvalidInput` if blocks of such sizes are in one trace."""
    if block_tokens != other:
        raise InvalidInput(
            f"prefixes: blocks of {block_tokens} and of {other} tokens in one trace",
            hint="leave the blocks of one out: convert it to CSV first",
        )


def told_apart(parts: Sequence[Prefixes | None]) -> list[Prefixes | None]:
    """The same with ids of their own each; one alone keeps its ids."""
    if sum(part is not None for part in parts) < 2:
        return list(parts)
    found: list[Prefixes | None] = []
    used = 0
    for part in parts:
        if part is not None:
            part = part.dense()
            part = replace(part, ids=part.ids + np.int32(used))
            used = int(part.ids.max(initial=used - 1)) + 1
        found.append(part)
    return found


def _starts(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])


def _new(ids: NDArray[np.int32]) -> NDArray[np.bool_]:
    """[block] whether dense ids come for the first time."""
    new: NDArray[np.bool_] = ids > _latest(ids)
    return new


def _latest(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """[block] the highest id before it, or -1."""
    highest = np.concatenate([np.array([-1], np.int32), ids])[:-1]
    return np.maximum.accumulate(highest, out=highest)
