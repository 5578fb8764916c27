"""Attention on NVIDIA GPUs, in Triton: pages are read where they lie.

One kernel for prompts, chunks and decodes alike; where there are few of them and contexts
are long, several programs read parts of a context, and a second kernel joins what they
found. Addresses are 64 bits wide: a page's number times its size is beyond 32. Nothing
behind a sequence's last token is read, so pages may hold anything there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foreserve.runtime.paged.attention import Ragged, Work

LOG2_E = tl.constexpr(1.4426950408889634)
MOST_SPLITS = 32
LEAST_SPLIT = 128
"""Positions, of one part of a context that several programs read."""
PROGRAMS = 264
"""Two for each multiprocessor of an H100 or H200."""


# Not compiled again for each alignment of what moves about.
@triton.jit(
    do_not_specialize=[
        *("most", "total", "tables", "blocks"),
        *("queries_n", "window", "splits"),
    ]
)
def _attend_kernel(
    out,
    most,
    total,
    queries,
    cache,
    tables,
    blocks,
    queries_n,
    page_stride,
    half_stride,
    token_stride,
    head_stride,
    window,
    splits,
    scale,
    cap,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    NUMBER: tl.constexpr,
    PADDED: tl.constexpr,
    PER_PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """One KV head of up to ``ROWS // GROUP`` tokens of a sequence, over all they see, or
    (``SPLIT``) one part of it: then not divided yet, with maximum and sum beside."""
    block = blocks + tl.program_id(0) * 4
    head = tl.program_id(1)
    first = tl.load(block)
    count = tl.load(block + 1).to(tl.int32)
    begin = tl.load(block + 2).to(tl.int32)
    table = tables + tl.load(block + 3)

    rows = tl.arange(0, ROWS)
    token = rows // GROUP
    real = token < count
    at = begin + token
    numbers = tl.arange(0, PADDED)
    there = numbers < NUMBER
    place = (first + token) * HEADS + head * GROUP + rows % GROUP
    asked = tl.load(
        queries + place[:, None] * NUMBER + numbers[None, :],
        mask=real[:, None] & there[None, :],
        other=0.0,
    )

    end = begin + count
    low = 0
    if WINDOW:
        low = tl.maximum(begin - window + 1, 0)
    if SPLIT:
        each = tl.cdiv(tl.cdiv(end - low, splits), COLUMNS) * COLUMNS
        low = low + tl.program_id(2) * each
        end = tl.minimum(end, low + each)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    told = tl.zeros((ROWS, PADDED), tl.float32)
    columns = tl.arange(0, COLUMNS)
    here = cache + head.to(tl.int64) * head_stride
    for start in range(low, end, COLUMNS):
        position = start + columns
        known = position < end
        page = tl.load(table + position // PER_PAGE, mask=known, other=0)
        token_at = here + page * page_stride + (position % PER_PAGE) * token_stride
        keys = tl.load(
            token_at[None, :] + numbers[:, None],
            mask=known[None, :] & there[:, None],
            other=0.0,
        )
        scores = tl.dot(asked, keys, input_precision="ieee")
        if CAP:
            # tanh, of what every version has.
            scores = (2 * tl.sigmoid(2 * scores * (scale / cap)) - 1) * cap * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        seen = known[None, :] & (position[None, :] <= at[:, None])
        if WINDOW:
            seen = seen & (position[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        # Whoever has seen nothing yet has no maximum to subtract.
        floor = tl.where(higher == float("-inf"), 0.0, higher)
        shares = tl.exp2(scores - floor[:, None])
        kept = tl.exp2(best - floor)
        values = tl.load(
            token_at[:, None] + half_stride + numbers[None, :],
            mask=known[:, None] & there[None, :],
            other=0.0,
        )
        sums = sums * kept + tl.sum(shares, 1)
        told = told * kept[:, None]
        told += tl.dot(shares.to(values.dtype), values, input_precision="ieee")
        best = higher

    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * queries_n * HEADS
        tl.store(most + place, best, mask=real)
        tl.store(total + place, sums, mask=real)
    else:
        told = told / tl.where(sums == 0, 1.0, sums)[:, None]
    tl.store(
        out + place[:, None] * NUMBER + numbers[None, :],
        told.to(out.dtype.element_ty),
        mask=real[:, None] & there[None, :],
    )


@triton.jit(do_not_specialize=["most", "total", "rows_n", "splits"])
def _join_kernel(
    out,
    parts,
    most,
    total,
    rows_n,
    splits,
    NUMBER: tl.constexpr,
    PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What the parts of a context said to one head of one token, together."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)
    real = part < splits
    place = row + part.to(tl.int64) * rows_n
    best = tl.load(most + place, mask=real, other=float("-inf"))
    sums = tl.load(total + place, mask=real, other=0.0)
    share = tl.exp2(best - tl.max(best, 0))
    numbers = tl.arange(0, PADDED)
    told = tl.load(
        parts + place[:, None] * NUMBER + numbers[None, :],
        mask=real[:, None] & (numbers < NUMBER)[None, :],
        other=0.0,
    )
    told = tl.sum(told * share[:, None], 0) / tl.sum(sums * share, 0)
    tl.store(
        out + row * NUMBER + numbers,
        told.to(out.dtype.element_ty),
        mask=numbers < NUMBER,
    )


def kinds_of_work(group: int) -> list[Work]:
    """One sequence for each shape that `attend` has a kernel for: little and much, with
    its context whole and in parts. On one page, however long it is."""
    beyond_few = max(16, triton.next_power_of_2(group)) // group + 1
    return [
        Work(tokens=[0] * count, begin=begin, table=[0] * (begin + count))
        for count in (1, beyond_few)
        for begin in (0, 2 * LEAST_SPLIT)
    ]


def attend(
    queries: torch.Tensor,
    cache: torch.Tensor,
    ragged: Ragged,
    *,
    window: int | None,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """``[n, heads * number]`` from ``queries [n, heads, number]``, whose keys and values
    are in this layer's ``cache [pages, 2, T, kv_heads, number]`` already."""
    n, heads, number = queries.shape
    _, _, per_page, kv_heads, _ = cache.shape
    out = torch.empty((n, heads * number), dtype=queries.dtype, device=queries.device)
    padded = max(16, triton.next_power_of_2(number))
    rows = ragged.rows
    columns, warps, stages = _tile(queries.dtype, rows, padded)
    programs = len(ragged.blocks) * kv_heads
    seen = ragged.longest if window is None else min(ragged.longest, window + rows)
    splits = min(PROGRAMS // programs, seen // LEAST_SPLIT, MOST_SPLITS)
    split = splits > 1
    told, most, total = out, out, out
    if split:
        shape = (splits, n, heads)
        told = torch.empty((*shape, number), dtype=torch.float32, device=out.device)
        most, total = torch.empty((2, *shape), dtype=torch.float32, device=out.device)
    page, half, token, head, _ = cache.stride()
    _attend_kernel[(len(ragged.blocks), kv_heads, max(1, splits))](
        told,
        most,
        total,
        queries,
        cache,
        ragged.tables,
        ragged.blocks,
        n,
        page,
        half,
        token,
        head,
        window or 0,
        splits,
        scale,
        cap or 1.0,
        HEADS=heads,
        GROUP=heads // kv_heads,
        NUMBER=number,
        PADDED=padded,
        PER_PAGE=per_page,
        ROWS=rows,
        COLUMNS=columns,
        WINDOW=window is not None,
        CAP=cap is not None,
        SPLIT=split,
        num_warps=warps,
        num_stages=stages,
    )
    if split:
        _join_kernel[(n * heads,)](
            out,
            told,
            most,
            total,
            n * heads,
            splits,
            NUMBER=number,
            PADDED=padded,
            SPLITS=MOST_SPLITS,  # One kernel for any number of them.
            num_warps=4,
        )
    return out


def _tile(kind: torch.dtype, rows: int, padded: int) -> tuple[int, int, int]:
    """Columns, warps and stages of a program: what fits into registers and memory."""
    if kind == torch.float32:
        return 16 if padded > 128 else 32, 4, 2
    return 32 if padded > 128 else 64, 8 if rows > 64 else 4, 2
