"""Attention of ragged sequences over a paged KV cache.

A page holds ``T`` whole tokens of all layers of one LLM, laid out
``[layer][key or value][token][head][number]``; a sequence has a table of its pages, which
may lie anywhere. `plan_step` turns what one iteration computes into index tensors, once for
all layers. On a GPU `kernels` read pages where they lie (`Ragged`). Elsewhere they are
gathered: sequences of about the same lengths attend together (`Bundle`), so that little is
computed for padding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from foreserve.runtime.paged.loading import DTYPES

SCORED_ROWS = 64
"""Logits beside those of next tokens are made for so many tokens at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one sequence computes in an iteration."""

    tokens: Sequence[int]
    """The next ones, at least one."""
    begin: int
    """Position of the first: so many are in its pages already."""
    table: Sequence[int]
    """Its pages, enough for all its tokens."""
    scored: int = 0
    """Logits are wanted after so many of its first tokens, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Sequences that attend together: ``b`` of up to ``t`` tokens, over ``c`` positions."""

    rows: torch.Tensor
    """``[b, t]``: of each token among the iteration's; the last one again as padding."""
    tables: torch.Tensor
    """``[b, pages]``; the first page again as padding."""
    real: torch.Tensor
    """Flat indices of ``rows`` that are no padding."""
    masks: dict[int | None, torch.Tensor]
    """By window: ``[b, 1, group * t, c]``, true where a token sees a position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Tokens of a sequence after each of which logits are wanted; few enough at a time."""

    sequence: int
    first: int
    """Of its tokens in this iteration."""
    rows: slice
    """Of the iteration's tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """The sequences as `kernels.attend` takes them."""

    tables: torch.Tensor
    """Pages of all sequences, one after another."""
    blocks: torch.Tensor
    """``[programs, 4]``: tokens that one program computes, all of one sequence. The first
    one's number in the iteration, how many, the first one's position, and where the
    sequence's pages begin in ``tables``."""
    rows: int
    """Of a program: tokens times query heads per KV head, rounded up."""
    longest: int
    """Most positions that a sequence sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One iteration of one LLM."""

    tokens: torch.Tensor
    """``[n]``: of all sequences, one after another."""
    positions: torch.Tensor
    pages: torch.Tensor
    slots: torch.Tensor
    """``[n]``: where each token's keys and values go: its page, and its place in it."""
    last: torch.Tensor
    """``[sequences]``: index of each one's last token."""
    how: tuple[Bundle, ...] | Ragged
    scored: tuple[Scored, ...] = ()


def cache_view(
    pages: torch.Tensor,
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
) -> torch.Tensor:
    """``[pages, layer, 2, T, head, number]``: ``pages`` (uint8 ``[pages, bytes]``) as one
    LLM sees them, without a copy."""
    kind = DTYPES[dtype]
    row = kv_heads * head_dim
    per_page = pages.shape[1] // (2 * layers * row * kind.itemsize)
    if not per_page:
        raise ValueError(f"a page of {pages.shape[1]} bytes holds no token")
    numbers = pages.view(kind)[:, : per_page * 2 * layers * row]
    return numbers.view(-1, layers, 2, per_page, kv_heads, head_dim)


def plan_step(
    work: Sequence[Work],
    *,
    tokens_per_page: int,
    group: int,
    windows: Collection[int | None],
    device: torch.device | str = "cpu",
    kernels: bool = False,
) -> Step:
    """``group``: query heads per KV head; ``windows``: those of the LLM's layers;
    ``kernels``: for them. All numbers go to the device in one copy, which nobody waits
    for (but for those of bundles)."""
    counts = np.array([len(one.tokens) for one in work])
    begins = np.array([one.begin for one in work])
    ends = begins + counts
    firsts = counts.cumsum() - counts
    tokens = np.fromiter(chain.from_iterable(one.tokens for one in work), np.int64)
    positions = np.arange(len(tokens)) + np.repeat(begins - firsts, counts)
    used = -(-ends // tokens_per_page)
    tables = np.fromiter(
        chain.from_iterable(
            islice(one.table, count)
            for one, count in zip(work, used.tolist(), strict=True)
        ),
        np.int64,
    )
    at = used.cumsum() - used
    pages = tables[np.repeat(at, counts) + positions // tokens_per_page]
    last = firsts + counts - 1
    parts = [tokens, positions, pages, positions % tokens_per_page, last]
    if not kernels:
        alike: dict[tuple[int, int], list[int]] = {}
        for index, (count, end) in enumerate(
            zip(counts.tolist(), ends.tolist(), strict=True)
        ):
            size = (count - 1).bit_length(), (end - 1).bit_length()
            alike.setdefault(size, []).append(index)
        bundles = tuple(
            _bundle(
                [work[i] for i in members],
                [int(firsts[i]) for i in members],
                tokens_per_page,
                group,
                windows,
                device,
            )
            for members in alike.values()
        )
        return _step(_moved(parts, device), bundles, _scored(work, firsts.tolist()))
    rows = max(16, 1 << (group - 1).bit_length())
    if group * int(counts.max()) > rows:
        rows = max(rows, 64)  # Prompts: the more, the less often keys are read.
    each = rows // group
    programs = -(-counts // each)
    skipped = each * (
        np.arange(programs.sum()) - np.repeat(programs.cumsum() - programs, programs)
    )
    blocks = np.stack(
        [
            np.repeat(firsts, programs) + skipped,
            np.minimum(np.repeat(counts, programs) - skipped, each),
            np.repeat(begins, programs) + skipped,
            np.repeat(at, programs),
        ],
        axis=1,
    )
    *moved, tables_, blocks_ = _moved([*parts, tables, blocks.ravel()], device)
    ragged = Ragged(
        tables=tables_, blocks=blocks_.view(-1, 4), rows=rows, longest=int(ends.max())
    )
    return _step(moved, ragged, _scored(work, firsts.tolist()))


def _scored(work: Sequence[Work], firsts: Sequence[int]) -> tuple[Scored, ...]:
    return tuple(
        Scored(
            sequence=index,
            first=at,
            rows=slice(first + at, first + min(at + SCORED_ROWS, one.scored)),
        )
        for index, (one, first) in enumerate(zip(work, firsts, strict=True))
        for at in range(0, one.scored, SCORED_ROWS)
    )


def _step(
    parts: Sequence[torch.Tensor],
    how: tuple[Bundle, ...] | Ragged,
    scored: tuple[Scored, ...],
) -> Step:
    tokens, positions, pages, slots, last = parts
    return Step(
        tokens=tokens,
        positions=positions,
        pages=pages,
        slots=slots,
        last=last,
        how=how,
        scored=scored,
    )


def _moved(
    parts: Sequence[NDArray[np.int64]], device: torch.device | str
) -> tuple[torch.Tensor, ...]:
    """Onto the device, all in one copy that nobody waits for."""
    sizes = [len(part) for part in parts]
    on_gpu = torch.device(device).type == "cuda"
    staged = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=on_gpu)
    np.concatenate(parts, out=staged.numpy())
    moved: tuple[torch.Tensor, ...] = staged.to(device, non_blocking=True).split(sizes)
    return moved


def _bundle(
    work: Sequence[Work],
    starts: Sequence[int],
    tokens_per_page: int,
    group: int,
    windows: Collection[int | None],
    device: torch.device | str,
) -> Bundle:
    counts = torch.tensor([len(one.tokens) for one in work])
    begins = torch.tensor([one.begin for one in work])
    most = int(counts.max())
    steps = torch.arange(most).expand(len(work), most)
    real = steps < counts[:, None]
    steps = steps.minimum(counts[:, None] - 1)
    used = [-(-(one.begin + len(one.tokens)) // tokens_per_page) for one in work]
    width = max(used)
    tables = torch.tensor(
        [
            [*one.table[:count], *([one.table[0]] * (width - count))]
            for one, count in zip(work, used, strict=True)
        ]
    )
    at = begins[:, None] + steps
    seen = torch.arange(width * tokens_per_page)
    # Between the token itself and the beginning of its window.
    back = at[:, :, None] - seen
    masks = {}
    for window in windows:
        mask = back >= 0
        if window is not None:
            mask &= back < window
        masks[window] = mask[:, None].repeat(1, 1, group, 1).to(device)
    return Bundle(
        rows=(torch.tensor(starts)[:, None] + steps).to(device),
        tables=tables.to(device),
        real=real.flatten().nonzero()[:, 0].to(device),
        masks=masks,
    )


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache: torch.Tensor,
    step: Step,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """``[n, heads * number]`` from ``queries [n, heads, number]``, after ``keys`` and
    ``values [n, kv_heads, number]`` have gone into this layer's ``cache
    [pages, 2, T, kv_heads, number]``."""
    cache[step.pages, 0, step.slots] = keys
    cache[step.pages, 1, step.slots] = values
    n, heads, number = queries.shape
    kv_heads = keys.shape[1]
    out = torch.empty_like(queries).view(n, heads * number)
    assert isinstance(step.how, tuple)
    for bundle in step.how:
        b, t = bundle.rows.shape
        # Query heads of one KV head are so many more tokens of it.
        asked = (
            queries[bundle.rows]
            .view(b, t, kv_heads, -1, number)
            .permute(0, 2, 3, 1, 4)
            .reshape(b, kv_heads, -1, number)
        )
        known_keys, known_values = (
            # Whole pages at a time; indexing by them would go number by number.
            cache[:, half]
            .index_select(0, bundle.tables.flatten())
            .view(b, -1, kv_heads, number)
            .transpose(1, 2)
            for half in (0, 1)
        )
        mask = bundle.masks[window]
        if cap is None:
            told = scaled_dot_product_attention(
                asked, known_keys, known_values, attn_mask=mask, scale=scale
            )
        else:
            scores = torch.tanh(asked @ known_keys.mT * (scale / cap)) * cap
            scores = scores.masked_fill(~mask, float("-inf"))
            shares = scores.softmax(-1, dtype=torch.float32).to(queries.dtype)
            told = shares @ known_values
        told = told.view(b, kv_heads, -1, t, number).permute(0, 3, 1, 2, 4)
        told = told.reshape(b * t, heads * number)
        out[bundle.rows.flatten()[bundle.real]] = told[bundle.real]
    return out
