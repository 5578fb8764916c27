"""What the decoder's own kernels compute, against plain arithmetic in twice the width.

Run by `test_paged_kernels` in a process of its own, where Triton interprets; on a GPU
`pytest tests/kernel_checks.py` runs them as they are compiled.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import (  # noqa: E402
    JITFunction,
    create_function_from_signature,
)

from foreserve.runtime.paged import fused, kernels  # noqa: E402
from foreserve.runtime.paged.attention import (  # noqa: E402
    Work,
    cache_view,
    plan_step,
)
from foreserve.runtime.paged.decoder import Decoder, gated  # noqa: E402
from foreserve.runtime.paged.rope import turn  # noqa: E402
from tests.paged_llms import (  # noqa: E402
    PAGE_BYTES,
    Llm,
    Pages,
    Sequence_,
    iterate,
)

DEVICE = "cuda" if ON_GPU else "cpu"
NEAR = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
RAGGED = ((1, 0), (5, 0), (1, 40), (3, 17), (19, 30), (1, 5))
"""Tokens, and how many are known already."""


def drawn(shape, seed, dtype="float32"):
    chance = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=chance)
    return values.to(getattr(torch, dtype)).to(DEVICE)


class Case:
    """Sequences of one layer of three, on pages in no order; all else is not a number."""

    def __init__(self, sizes, heads, kv_heads, number, per_page, dtype="float32"):
        self.kind = getattr(torch, dtype)
        width = 3 * 2 * kv_heads * number * self.kind.itemsize
        each = [-(-(count + begin) // per_page) for count, begin in sizes]
        pages = torch.full((sum(each) + 3, per_page * width + 64), 0xFF)
        order = np.random.default_rng(1).permutation(len(pages)).tolist()
        tables = [[order.pop() for _ in range(count)] for count in each]
        self.cache = cache_view(
            pages.to(torch.uint8).to(DEVICE),
            layers=3,
            kv_heads=kv_heads,
            head_dim=number,
            dtype=dtype,
        )[:, 1]
        assert self.cache.shape[2] == per_page
        self.step = plan_step(
            [
                Work(tokens=[0] * count, begin=begin, table=table)
                for (count, begin), table in zip(sizes, tables, strict=True)
            ],
            tokens_per_page=per_page,
            group=heads // kv_heads,
            windows=(),
            device=DEVICE,
            kernels=True,
        )
        self.queries = drawn((len(self.step.tokens), heads, number), 2, dtype)
        self.sizes, self.kv = sizes, []
        for index, ((count, begin), table) in enumerate(
            zip(sizes, tables, strict=True)
        ):
            shape = (2, count + begin, kv_heads, number)
            self.kv.append(drawn(shape, 10 + index, dtype))
            for at in range(count + begin):
                place = self.cache[table[at // per_page], :, at % per_page]
                place[:] = self.kv[-1][:, at]

    def wanted(self, window, scale, cap):
        found, row = [], 0
        for (count, begin), known in zip(self.sizes, self.kv, strict=True):
            asked = self.queries[row : row + count].double()
            row += count
            group = asked.shape[1] // known.shape[2]
            keys, values = known.double().repeat_interleave(group, dim=2)
            scores = torch.einsum("nhd,mhd->hnm", asked, keys) * scale
            if cap is not None:
                scores = torch.tanh(scores / cap) * cap
            back = torch.arange(begin, begin + count)[:, None]
            back = (back - torch.arange(begin + count)).to(DEVICE)
            seen = (back >= 0) & (back < (window or 1 << 30))
            shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            found.append(torch.einsum("hnm,mhd->nhd", shares, values).flatten(1))
        return torch.cat(found)

    def check(self, dtype="float32", window=None, cap=None):
        scale = self.queries.shape[2] ** -0.5
        told = kernels.attend(
            self.queries, self.cache, self.step.how, window=window, scale=scale, cap=cap
        )
        wanted = self.wanted(window, scale, cap)
        assert told.dtype == self.kind
        error = (told.double() - wanted).norm() / wanted.norm()
        assert error < NEAR[dtype], error


@pytest.mark.parametrize("number", [16, 80, 128, 256])
def test_heads_of_any_width(number):
    """Also where it is no power of two, and the tile is wider than a head."""
    Case(RAGGED, 4, 2, number, 7).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (7, 1), (24, 2)])
@pytest.mark.parametrize("window", [None, 24])
def test_groups_and_windows(heads, kv_heads, window):
    """Groups of 1, 7 and 12 query heads, which fill a tile or do not; windows within
    and beyond what is known; pages of a single token."""
    Case(RAGGED, heads, kv_heads, 32, 1).check(window=window)


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(
            "bfloat16",
            marks=pytest.mark.skipif(
                not ON_GPU, reason="Triton's interpreter has no products of bfloat16"
            ),
        ),
        "float16",
    ],
)
def test_short_numbers(dtype):
    """Sums are kept in 32 bits: what is lost is the last rounding and the shares'."""
    Case(RAGGED, 8, 2, 64, 5, dtype).check(dtype)


def test_capped():
    Case(RAGGED, 4, 2, 32, 7).check(cap=3.0)
    Case(RAGGED, 4, 2, 32, 7).check(cap=3.0, window=9)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sizes", [((1, 0), (1, 70), (1, 41)), ((20, 45), (1, 7))])
def test_contexts_in_parts(monkeypatch, sizes, window):
    """Several programs read parts of a context, some of which hold nothing for a token:
    together they say what one says."""
    monkeypatch.setattr(kernels, "LEAST_SPLIT", 16)
    Case(sizes, 4, 2, 32, 7).check(window=window)


def test_addresses_beyond_32_bits():
    """A page's number times its numbers is more than 2^31 (nobody has touched the other
    pages' memory)."""
    stride = 1 << 29
    pages = torch.empty(9 * stride if not ON_GPU else 5 * stride, dtype=torch.uint8)
    pages = pages.to(DEVICE) if ON_GPU else pages
    last = len(pages) // stride - 1
    cache = pages.view(torch.float16).view(-1, 1, 2, 4, 1, stride // 16)[..., :16][:, 0]
    assert cache.stride(0) * last >= 1 << 29
    known = drawn((2, 3, 1, 16), 3, "float16")
    cache[last, :, :3] = known
    work = [Work(tokens=[0], begin=2, table=[last])]
    step = plan_step(
        work, tokens_per_page=4, group=1, windows=(), device=DEVICE, kernels=True
    )
    asked = drawn((1, 1, 16), 4, "float16")
    told = kernels.attend(asked, cache, step.how, window=None, scale=0.25, cap=None)
    shares = (asked.double()[0] @ known[0, :, 0].double().T * 0.25).softmax(-1)
    assert torch.allclose(told.double(), shares @ known[1, :, 0].double(), atol=2e-3)


@pytest.mark.parametrize(
    ("dtype", "number"), [("float32", 80), ("bfloat16", 64), ("bfloat16", 80)]
)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_turning_and_keeping(dtype, offset, number):
    """Queries come out as torch norms and turns them; keys and values are in the cache,
    and nothing else has changed there."""
    heads, kv_heads, sizes = 12, 3, ((4, 0), (1, 9))
    case = Case(sizes, heads, kv_heads, number, 4, dtype)
    before = case.cache.clone()
    n = len(case.step.tokens)
    both = drawn((n, heads + 2 * kv_heads, number), 5, dtype)
    angles = drawn((n, 1, number // 2), 6).repeat(1, 1, 2)
    angles = angles.cos().to(case.kind), angles.sin().to(case.kind)
    weights = drawn((number,), 7, dtype), drawn((number,), 8, dtype)
    told = fused.turn_and_keep(
        both,
        angles,
        case.cache,
        case.step,
        heads,
        None if offset is None else weights,
        eps=1e-6,
        offset=offset or 0.0,
    )
    q, k, v = both.split((heads, kv_heads, kv_heads), dim=1)
    if offset is not None:
        q, k = normed(q, weights[0], offset), normed(k, weights[1], offset)
    before[case.step.pages, 0, case.step.slots] = turn(k, *angles)
    before[case.step.pages, 1, case.step.slots] = v
    near(told, turn(q, *angles), dtype)
    near(case.cache, before, dtype)
    where = case.step.pages, 1, case.step.slots
    assert torch.equal(case.cache[where], v)


def normed(x, weight, offset):
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    if offset:
        return (wide * (offset + weight.float())).to(x.dtype)
    return weight * wide.to(x.dtype)


def near(told, wanted, dtype):
    """But for the last bits of some: the interpreter cuts bfloat16 off."""
    step = 2e-6 if dtype == "float32" else 1.6e-2 if ON_GPU else 4e-2
    torch.testing.assert_close(told, wanted, rtol=step, atol=step, equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 200), ("bfloat16", 64), ("bfloat16", 200)]
)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_and_gates(dtype, offset, width):
    """With and without something to add; both gates."""
    x, told = drawn((5, width), 1, dtype), drawn((5, width), 2, dtype)
    weight = drawn((width,), 3, dtype)
    joined, out = fused.norm(x, told, weight, eps=1e-6, offset=offset)
    near(joined, x + told, dtype)
    near(out, normed(x + told, weight, offset), dtype)
    joined, out = fused.norm(x, None, weight, eps=1e-6, offset=offset)
    assert joined is x
    near(out, normed(x, weight, offset), dtype)
    near(fused.gated(x, silu=True), gated(x, "silu"), dtype)
    near(fused.gated(x, silu=False), gated(x, "gelu_tanh"), dtype)


class Noted:
    """A kernel that notes how Triton would compile it for an H100, at each launch."""

    def __init__(self, kernel, seen):
        self.kernel, self.seen = kernel, seen
        plain = JITFunction(kernel.fn, **kernel.kwargs)
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(
            plain.signature, plain.params, backend
        )

    def __getitem__(self, grid):
        def launch(*args, **how):
            _, kinds, options = self.bind(*args, **how)
            self.seen.add(f"{self.kernel.fn.__name__} {kinds} {options}")
            return self.kernel[grid](*args, **how)

        return launch


@pytest.fixture
def launched(monkeypatch):
    """Each kernel that Triton would compile, as it tells them apart: by kinds of
    arguments, by ones, by what 16 divides."""
    seen = set()
    for module in (kernels, fused):
        for name in KERNELS & vars(module).keys():
            monkeypatch.setattr(module, name, Noted(getattr(module, name), seen))
    return seen


KERNELS = {name for one in (kernels, fused) for name in vars(one) if "_kernel" in name}


@pytest.mark.skipif(ON_GPU, reason="LLMs of tests are in the host's memory")
@pytest.mark.parametrize(
    ("family", "more"), [("qwen3-moe", {}), ("gemma2", {"sliding_window": 12})]
)
def test_whole_llms(family, more, tmp_path, monkeypatch, launched):
    """Norms of heads, experts, caps and windows, over pages that nobody has emptied: a
    prompt of one token alone, decodes of one and of two, then prompts in chunks, decodes
    and contexts in parts beside each other. Answers are those of plain torch, and no
    kernel is launched that `Decoder.prepare` has not had compiled."""
    monkeypatch.setattr(kernels, "LEAST_SPLIT", 12)
    llm = Llm(tmp_path, family, **more)
    wanted = answers(llm, Pages(20))
    assert not launched
    llm.decoder = Decoder(llm.config, kernels=True)
    llm.decoder.prepare(llm.layout, PAGE_BYTES)
    prepared = frozenset(launched)
    assert {key.split()[0] for key in prepared} == KERNELS
    pages = Pages(20)
    pages.bytes[:] = 0xFF
    pages.empty = False
    assert answers(llm, pages) == wanted
    assert launched == prepared


def answers(llm, pages):
    asked = [
        Sequence_(llm, [(37 * i + n) % 500 for n in range(i)], tokens)
        for i, tokens in ((1, 4), (5, 3), (25, 2), (18, 2))
    ]
    for together in (1, 2):
        for _ in range(2):
            iterate(llm, pages, asked[:together], chunk=17)
    while running := [one for one in asked if not one.done]:
        iterate(llm, pages, running, chunk=17)
    return [one.answer for one in asked]
