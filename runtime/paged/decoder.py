"""Decoders: one function over weights that somebody else holds.

Llama's scheme with what other families do differently (`config.DecoderConfig`): norms by
root mean square, rotary positions, grouped heads, gated feed-forwards, experts. A decoder
owns no weight and no cache; both are views of memory that may be mapped elsewhere the next
moment. On several GPUs each rank computes its heads and columns, and `Peers` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch.nn import functional

from foreserve.runtime.paged.attention import (
    Scored,
    Step,
    Work,
    attend,
    cache_view,
    plan_step,
)
from foreserve.runtime.paged.config import Activation, DecoderConfig
from foreserve.runtime.paged.layout import Layout, Part, kv_heads_of, vocabulary_rows
from foreserve.runtime.paged.loading import DTYPES
from foreserve.runtime.paged.rope import frequencies, turn, turns

Weights = Mapping[str, torch.Tensor]


class Peers(Protocol):
    """The ranks of a shard, joined for its life."""

    @property
    def part(self) -> Part: ...

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on all of them; ``values`` may be overwritten."""
        ...

    def join(self, values: torch.Tensor) -> torch.Tensor:
        """The ranks' ``values [n, each]``, side by side, on all of them."""
        ...


@dataclass(frozen=True, slots=True)
class Alone:
    """No peers."""

    part: Part = field(default_factory=Part)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def join(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Decoder:
    """One LLM on one rank. Immutable; what changes is in its arguments."""

    def __init__(
        self,
        config: DecoderConfig,
        peers: Peers | None = None,
        device: torch.device | str = "cpu",
        *,
        kernels: bool | None = None,
    ) -> None:
        """``kernels``: use those of our own; by default where they can be, on GPUs with
        Triton."""
        if kernels is None:
            on_gpu = torch.device(device).type == "cuda"
            kernels = on_gpu and find_spec("triton") is not None
        self.kernels: Any = None
        self.fused: Any = None
        """The modules, which need Triton; both or none."""
        if kernels:
            self.kernels = import_module("foreserve.runtime.paged.kernels")
            self.fused = import_module("foreserve.runtime.paged.fused")
        self.config = config
        self.peers: Peers = peers or Alone()
        self.device = device
        part = self.peers.part
        first, end = kv_heads_of(config, part)
        self.heads, self.kv_heads = config.heads // part.size, end - first
        self.windows = frozenset(config.windows)
        self._frequencies = [
            frequencies(rope, config.head_dim).to(device) for rope in config.ropes
        ]
        self._first_token, end_token = vocabulary_rows(config, part)
        self._own_tokens = end_token - self._first_token

    def prepare(self, layout: Layout, page_bytes: int) -> None:
        """Have all kernels that iterations may launch compiled, each launched once on
        memory of its own; takes seconds where there are any. ``page_bytes``: of the pool
        that will hold the cache. Any thread."""
        if self.kernels is None:
            return
        config, kind = self.config, DTYPES[layout.dtype]
        zeros = partial(torch.zeros, dtype=kind, device=self.device)
        # Two, so that one has the stride to the next.
        pages = torch.zeros(2, page_bytes, dtype=torch.uint8, device=self.device)
        cache = cache_view(
            pages,
            layers=config.layers,
            kv_heads=self.kv_heads,
            head_dim=config.head_dim,
            dtype=layout.dtype,
        )
        x, head = zeros(1, config.hidden), zeros(config.head_dim)
        norms = (head, head) if config.qk_norm else None
        with torch.inference_mode():
            for told in (None, x):
                self._join(x, told, x[0])
            self._gated(zeros(1, layout.weights["0.gate_up"].shape[-2]))
            for work in self.kernels.kinds_of_work(self.group):
                step = self.plan([work], cache)
                both = zeros(
                    len(work.tokens), self.heads + 2 * self.kv_heads, config.head_dim
                )
                rope = config.ropes[0]
                angles = turns(step.positions, self._frequencies[0], rope, kind)
                for window in self.windows:
                    self._seen(both, norms, angles, cache[:, 0], step, window)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def plan(self, work: Sequence[Work], cache: torch.Tensor) -> Step:
        """An iteration of ``work``, over the ``cache`` that it will be called with."""
        return plan_step(
            work,
            tokens_per_page=cache.shape[3],
            group=self.group,
            windows=self.windows,
            device=self.device,
            kernels=self.kernels is not None,
        )

    def __call__(
        self,
        weights: Weights,
        cache: torch.Tensor,
        step: Step,
        hear: Callable[[Scored, torch.Tensor], None] = lambda *_: None,
    ) -> torch.Tensor:
        """Logits of each sequence's next token, float32 ``[sequences, vocabulary]``; keys
        and values of the iteration's tokens go into ``cache`` (`attention.cache_view`).
        ``hear`` is told the logits of ``step.scored``, one after the other."""
        config = self.config
        with torch.inference_mode():
            x = self._embed(weights["embedding"], step.tokens)
            turned = [
                turns(step.positions, frequency, rope, x.dtype)
                for frequency, rope in zip(self._frequencies, config.ropes, strict=True)
            ]
            told = None
            for layer in range(config.layers):
                own = _Layer(weights, layer)
                x, h = self._join(x, told, own["norm"])
                told = self._attention(own, h, cache[:, layer], step, turned, layer)
                told = self._after(own, "after_attention", told)
                x, h = self._join(x, told, own["mlp_norm"])
                told = self._feed_forward(own, h)
                told = self._after(own, "after_mlp", told)
            x = x if told is None else x + told
            for some in step.scored:
                hear(some, self._logits(weights, x[some.rows]))
            return self._logits(weights, x[step.last])

    def _logits(self, weights: Weights, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        x = self._norm(x, weights["norm"])
        head = weights["embedding" if config.tied else "head"]
        logits = self.peers.join(functional.linear(x, head))
        logits = logits[:, : config.vocabulary].float()
        if config.logit_cap is not None:
            logits = torch.tanh(logits / config.logit_cap) * config.logit_cap
        return logits

    def _embed(self, embedding: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if self.peers.part.size > 1:
            mine = tokens - self._first_token
            there = (mine >= 0) & (mine < self._own_tokens)
            x = functional.embedding(mine.where(there, 0), embedding)
            x = self.peers.add(x.masked_fill(~there[:, None], 0))
        else:
            x = functional.embedding(tokens, embedding)
        if self.config.embedding_scale != 1:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        return x

    def _attention(
        self,
        own: _Layer,
        h: torch.Tensor,
        cache: torch.Tensor,
        step: Step,
        turned: list[tuple[torch.Tensor, torch.Tensor]],
        layer: int,
    ) -> torch.Tensor:
        config = self.config
        both = functional.linear(h, own["qkv"], own.get("qkv_bias"))
        both = both.view(len(h), -1, config.head_dim)
        norms = (own["q_norm"], own["k_norm"]) if config.qk_norm else None
        told = self._seen(
            both,
            norms,
            turned[config.rope_of[layer]],
            cache,
            step,
            config.windows[layer],
        )
        return self._sum(told, own, "out")

    def _seen(
        self,
        both: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        step: Step,
        window: int | None,
    ) -> torch.Tensor:
        """What attention says to ``both``: queries, keys and values, not turned yet."""
        config = self.config
        scale, cap = config.attention_scale, config.attention_cap
        if self.kernels is not None:
            eps, offset = config.eps, config.norm_offset
            q = self.fused.turn_and_keep(
                both, angles, cache, step, self.heads, norms, eps=eps, offset=offset
            )
            return self.kernels.attend(
                q, cache, step.how, window=window, scale=scale, cap=cap
            )
        q, k, v = both.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if norms is not None:
            q, k = self._norm(q, norms[0]), self._norm(k, norms[1])
        q, k = turn(q, *angles), turn(k, *angles)
        return attend(q, k, v, cache, step, window=window, scale=scale, cap=cap)

    def _feed_forward(self, own: _Layer, h: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.experts is not None:
            return self.peers.add(self._experts(own, h))
        both = functional.linear(h, own["gate_up"], own.get("gate_up_bias"))
        return self._sum(self._gated(both), own, "down")

    def _experts(self, own: _Layer, h: torch.Tensor) -> torch.Tensor:
        experts = self.config.experts
        assert experts is not None
        shares = functional.linear(h, own["router"]).softmax(-1, dtype=torch.float32)
        shares, chosen = shares.topk(experts.per_token, dim=-1)
        if experts.normalise:
            shares = shares / shares.sum(-1, keepdim=True)
        shares = shares.to(h.dtype)
        gate_up, down = own["gate_up"], own["down"]
        out = torch.zeros_like(h)
        for expert in chosen.unique().tolist():
            rows, nth = (chosen == expert).nonzero(as_tuple=True)
            both = functional.linear(h[rows], gate_up[expert])
            told = functional.linear(self._gated(both), down[expert])
            out.index_add_(0, rows, told * shares[rows, nth, None])
        return out

    def _sum(self, x: torch.Tensor, own: _Layer, name: str) -> torch.Tensor:
        """A product whose columns are spread over the ranks; the bias counts once."""
        told = self.peers.add(functional.linear(x, own[name]))
        bias = own.get(f"{name}_bias")
        return told if bias is None else told + bias

    def _after(self, own: _Layer, name: str, told: torch.Tensor) -> torch.Tensor:
        return self._norm(told, own[name]) if self.config.sandwich else told

    def _join(
        self, x: torch.Tensor, told: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` with what a layer told it, and that normed."""
        if self.fused is not None:
            eps, offset = self.config.eps, self.config.norm_offset
            joined, normed = self.fused.norm(x, told, weight, eps=eps, offset=offset)
            return joined, normed
        x = x if told is None else x + told
        return x, self._norm(x, weight)

    def _gated(self, both: torch.Tensor) -> torch.Tensor:
        activation = self.config.activation
        if self.fused is None:
            return gated(both, activation)
        told: torch.Tensor = self.fused.gated(both, silu=activation == "silu")
        return told

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.fused is not None and x.dim() == 2:
            return self._join(x, None, weight)[1]
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.eps)
        if self.config.norm_offset:
            return (wide * (self.config.norm_offset + weight.float())).to(x.dtype)
        return weight * wide.to(x.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    weights: Weights
    number: int

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights[f"{self.number}.{name}"]

    def get(self, name: str) -> torch.Tensor | None:
        return self.weights.get(f"{self.number}.{name}")


def gated(both: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Of a gate and what it lets through, side by side."""
    gate, up = both.chunk(2, dim=-1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up
