"""What a layer does between its matrix products, on NVIDIA GPUs, in Triton.

One launch each for what is done to queries, keys and values before attention, for adding
and norming, and for gates. With attention and four products they make nine or ten launches
a layer, where torch takes 48 operations. They round where those do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foreserve.runtime.paged.attention import Step


@triton.jit(do_not_specialize=["pages", "slots"])
def _turn_kernel(
    queries,
    cache,
    both,
    cosines,
    sines,
    pages,
    slots,
    query_norm,
    key_norm,
    page_stride,
    half_stride,
    token_stride,
    head_stride,
    eps,
    offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    NUMBER: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Of one token: queries and keys (normed, ``NORM``) turned to its position; keys and
    values into its place of the cache."""
    kind = queries.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    half = tl.arange(0, HALF)
    there = half < NUMBER // 2
    is_query = row < HEADS
    is_key = (row >= HEADS) & (row < HEADS + KV_HEADS)
    is_value = (row >= HEADS + KV_HEADS) & (row < HEADS + 2 * KV_HEADS)
    mask = (row < HEADS + 2 * KV_HEADS)[:, None] & there[None, :]
    source = both + (token * (HEADS + 2 * KV_HEADS) + row[:, None]) * NUMBER
    source += half[None, :]
    one = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(source + NUMBER // 2, mask=mask, other=0.0).to(tl.float32)
    plain_one, plain_two = one, two
    if NORM:
        mean = (tl.sum(one * one, 1) + tl.sum(two * two, 1)) / NUMBER
        by = (1 / tl.sqrt(mean + eps))[:, None]
        ofq, ofk = query_norm + half, key_norm + half
        q1 = tl.load(ofq, mask=there, other=0.0).to(tl.float32)[None, :]
        q2 = tl.load(ofq + NUMBER // 2, mask=there, other=0.0).to(tl.float32)[None, :]
        k1 = tl.load(ofk, mask=there, other=0.0).to(tl.float32)[None, :]
        k2 = tl.load(ofk + NUMBER // 2, mask=there, other=0.0).to(tl.float32)[None, :]
        weight_one = tl.where(is_query[:, None], q1, k1)
        weight_two = tl.where(is_query[:, None], q2, k2)
        one, two = one * by, two * by
        if not OFFSET:
            one, two = one.to(kind).to(tl.float32), two.to(kind).to(tl.float32)
        one = (one * (offset + weight_one)).to(kind).to(tl.float32)
        two = (two * (offset + weight_two)).to(kind).to(tl.float32)
    angle = token * NUMBER + half
    cosine = tl.load(cosines + angle, mask=there, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sines + angle, mask=there, other=0.0).to(tl.float32)[None, :]
    # Each product is rounded before they are added, as torch does it.
    turned_one = (one * cosine).to(kind).to(tl.float32)
    turned_one -= (two * sine).to(kind).to(tl.float32)
    turned_two = (two * cosine).to(kind).to(tl.float32)
    turned_two += (one * sine).to(kind).to(tl.float32)

    to = queries + (token * HEADS + row[:, None]) * NUMBER + half[None, :]
    tl.store(to, turned_one.to(kind), mask=mask & is_query[:, None])
    tl.store(to + NUMBER // 2, turned_two.to(kind), mask=mask & is_query[:, None])
    to = cache + tl.load(pages + token) * page_stride
    to += tl.load(slots + token) * token_stride
    key_at = to + (row - HEADS)[:, None] * head_stride + half[None, :]
    tl.store(key_at, turned_one.to(kind), mask=mask & is_key[:, None])
    tl.store(key_at + NUMBER // 2, turned_two.to(kind), mask=mask & is_key[:, None])
    to += half_stride
    value_at = to + (row - HEADS - KV_HEADS)[:, None] * head_stride + half[None, :]
    tl.store(value_at, plain_one.to(kind), mask=mask & is_value[:, None])
    tl.store(value_at + NUMBER // 2, plain_two.to(kind), mask=mask & is_value[:, None])


@triton.jit
def _norm_kernel(
    out,
    joined,
    x,
    told,
    weight,
    width,
    eps,
    offset,
    COLUMNS: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """One row of ``x``, with that of ``told`` added (``ADD``; the sum goes into
    ``joined``), by its root mean square."""
    kind = out.dtype.element_ty
    column = tl.arange(0, COLUMNS)
    mask = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    wide = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(told + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(joined + at, wide.to(kind), mask=mask)
        wide = wide.to(kind).to(tl.float32)
    wide = wide * (1 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps))
    by = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if not OFFSET:
        wide = wide.to(kind).to(tl.float32)
    tl.store(out + at, (wide * (offset + by)).to(kind), mask=mask)


@triton.jit
def _gate_kernel(out, both, width, COLUMNS: tl.constexpr, SILU: tl.constexpr):
    kind = out.dtype.element_ty
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < width
    row = tl.program_id(0).to(tl.int64)
    at = both + row * 2 * width + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        opened = gate * tl.sigmoid(gate)
    else:
        # (1 + tanh(y)) / 2 is the sigmoid of 2 y.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        opened = gate * tl.sigmoid(2 * inner)
    opened = opened.to(kind).to(tl.float32)
    tl.store(out + row * width + column, (opened * up).to(kind), mask=mask)


def turn_and_keep(
    both: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: torch.Tensor,
    step: Step,
    heads: int,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    eps: float,
    offset: float,
) -> torch.Tensor:
    """Queries ``[n, heads, number]`` of ``both [n, heads + 2 kv_heads, number]``; its keys
    and values go into ``cache``. ``norms``: of queries and keys."""
    n, rows, number = both.shape
    out = torch.empty((n, heads, number), dtype=both.dtype, device=both.device)
    page, half, token, head, _ = cache.stride()
    query_norm, key_norm = norms or (both, both)
    _turn_kernel[(n, triton.cdiv(rows, 16))](
        out,
        cache,
        both,
        *angles,
        step.pages,
        step.slots,
        query_norm,
        key_norm,
        page,
        half,
        token,
        head,
        eps,
        offset,
        HEADS=heads,
        KV_HEADS=(rows - heads) // 2,
        NUMBER=number,
        HALF=triton.next_power_of_2(number // 2),
        ROWS=16,
        NORM=norms is not None,
        OFFSET=offset != 0,
        num_warps=4,
    )
    return out


def norm(
    x: torch.Tensor,
    told: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    offset: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``x + told`` (or ``x``), and that by its root mean square."""
    x = x.contiguous()
    out = torch.empty_like(x)
    joined = x if told is None else torch.empty_like(x)
    columns = triton.next_power_of_2(x.shape[1])
    _norm_kernel[(len(x),)](
        out,
        joined,
        x,
        x if told is None else told,
        weight,
        x.shape[1],
        eps,
        offset,
        COLUMNS=columns,
        ADD=told is not None,
        OFFSET=offset != 0,
        num_warps=8 if columns > 2048 else 4,
    )
    return joined, out


def gated(both: torch.Tensor, *, silu: bool) -> torch.Tensor:
    """Of a gate and what it lets through, side by side."""
    n, width = both.shape[0], both.shape[1] // 2
    out = torch.empty((n, width), dtype=both.dtype, device=both.device)
    _gate_kernel[(n, triton.cdiv(width, 1024))](
        out, both, width, COLUMNS=1024, SILU=silu, num_warps=4
    )
    return out
