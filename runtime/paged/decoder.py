"""Decoders: one function over weights that somebody else holds.

Llama's scheme with what other families do differently (`config.DecoderConfig`): norms by
root mean square, rotary positions, grouped heads, gated feed-forwards, experts. A decoder
owns no weight and no cache; both are views of memory that may be mapped elsewhere the next
moment. On several GPUs each rank computes its heads and columns, and `Peers` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.nn import functional

from foreserve.runtime.paged.attention import Scored, Step, attend
from foreserve.runtime.paged.config import Activation, DecoderConfig
from foreserve.runtime.paged.layout import Part, kv_heads_of, vocabulary_rows
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
    ) -> None:
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

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

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
            for layer in range(config.layers):
                own = _Layer(weights, layer)
                told = self._attention(own, x, cache[:, layer], step, turned, layer)
                x = x + self._after(own, "after_attention", told)
                told = self._feed_forward(own, self._norm(x, own["mlp_norm"]))
                x = x + self._after(own, "after_mlp", told)
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
        x: torch.Tensor,
        cache: torch.Tensor,
        step: Step,
        turned: list[tuple[torch.Tensor, torch.Tensor]],
        layer: int,
    ) -> torch.Tensor:
        config = self.config
        h = self._norm(x, own["norm"])
        told = functional.linear(h, own["qkv"], own.get("qkv_bias"))
        told = told.view(len(x), -1, config.head_dim)
        q, k, v = told.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if config.qk_norm:
            q, k = self._norm(q, own["q_norm"]), self._norm(k, own["k_norm"])
        cosines, sines = turned[config.rope_of[layer]]
        told = attend(
            turn(q, cosines, sines),
            turn(k, cosines, sines),
            v,
            cache,
            step,
            window=config.windows[layer],
            scale=config.attention_scale,
            cap=config.attention_cap,
        )
        return self._sum(told, own, "out")

    def _feed_forward(self, own: _Layer, h: torch.Tensor) -> torch.Tensor:
        config = self.config
        if config.experts is not None:
            return self.peers.add(self._experts(own, h))
        both = functional.linear(h, own["gate_up"], own.get("gate_up_bias"))
        return self._sum(gated(both, config.activation), own, "down")

    def _experts(self, own: _Layer, h: torch.Tensor) -> torch.Tensor:
        experts, activation = self.config.experts, self.config.activation
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
            told = functional.linear(gated(both, activation), down[expert])
            out.index_add_(0, rows, told * shares[rows, nth, None])
        return out

    def _sum(self, x: torch.Tensor, own: _Layer, name: str) -> torch.Tensor:
        """A product whose columns are spread over the ranks; the bias counts once."""
        told = self.peers.add(functional.linear(x, own[name]))
        bias = own.get(f"{name}_bias")
        return told if bias is None else told + bias

    def _after(self, own: _Layer, name: str, told: torch.Tensor) -> torch.Tensor:
        return self._norm(told, own[name]) if self.config.sandwich else told

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
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
