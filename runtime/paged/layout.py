"""Where each weight of a shard lies: fixed offsets in one stretch of bytes.

Weights follow each other in the order in which an iteration needs them, so a prefix of
the bytes is a prefix of the layers. What one matrix product reads together lies together
(queries, keys and values; gate and up), so it is one weight here and several tensors in
the checkpoint. Pure arithmetic: neither torch nor files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from foreserve.models.errors import InvalidInput
from foreserve.runtime.paged.config import DecoderConfig

ALIGNMENT = 256
ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A block of a checkpoint's tensor, and where it goes."""

    tensor: str
    rows: Span
    columns: Span | None
    """None: all there are (the tensor has one dimension, or is taken whole)."""
    offset_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows = self.rows[1] - self.rows[0]
        if self.columns is None:
            return (rows,)
        return rows, self.columns[1] - self.columns[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    shape: tuple[int, ...]
    offset_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One shard of an LLM."""

    dtype: str
    weights: Mapping[str, Weight]
    """By name, in order of offset: ``embedding``, ``0.qkv``, ..., ``head``."""
    pieces: tuple[Piece, ...]
    """In order of offset."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The share of one of ``size`` ranks."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> Span:
        """Its share of ``count`` rows or columns, which divides by the ranks."""
        each = count // self.size
        return self.rank * each, (self.rank + 1) * each


@dataclass(slots=True)
class _Writer:
    dtype: str
    weights: dict[str, Weight] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    at: int = 0

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        sources: Sequence[tuple[str, Span, Span | None]],
    ) -> None:
        """A weight made of blocks that follow each other."""
        item = ITEM_BYTES[self.dtype]
        self.at = -(-self.at // ALIGNMENT) * ALIGNMENT
        self.weights[name] = Weight(shape=shape, offset_bytes=self.at)
        offset = self.at
        for tensor, rows, columns in sources:
            piece = Piece(
                tensor=tensor, rows=rows, columns=columns, offset_bytes=offset
            )
            self.pieces.append(piece)
            offset += prod(piece.shape) * item
        self.at += prod(shape) * item


def vocabulary_rows(config: DecoderConfig, part: Part) -> Span:
    """Tokens whose embeddings and logits are this rank's; the last may have fewer."""
    each = -(-config.vocabulary // part.size)
    return min(part.rank * each, config.vocabulary), min(
        (part.rank + 1) * each, config.vocabulary
    )


def kv_heads_of(config: DecoderConfig, part: Part) -> Span:
    """Of which there is at least one on each rank: where there are fewer, copies."""
    if config.kv_heads >= part.size:
        return part.of(config.kv_heads)
    head = part.rank * config.kv_heads // part.size
    return head, head + 1


def lay_out(
    config: DecoderConfig, dtype: str = "bfloat16", part: Part | None = None
) -> Layout:
    """The layout of one rank's shard; raises `InvalidInput` if the LLM does not divide."""
    part = part or Part()
    _check(config, part)
    out = _Writer(dtype)
    hidden, dim = config.hidden, config.head_dim
    everything = (0, hidden)
    rows = vocabulary_rows(config, part)
    each = -(-config.vocabulary // part.size)
    embedding = "model.embed_tokens.weight"
    out.add("embedding", (each, hidden), [(embedding, rows, everything)])
    q = _times(part.of(config.heads), dim)
    kv = _times(kv_heads_of(config, part), dim)
    spans = (("q", q), ("k", kv), ("v", kv))
    width = sum(end - begin for _, (begin, end) in spans)
    for layer in range(config.layers):
        name = f"model.layers.{layer}."

        def norm(key: str, tensor: str, size: int = hidden, at: str = name) -> None:
            out.add(key, (size,), [(f"{at}{tensor}.weight", (0, size), None)])

        norm(f"{layer}.norm", "input_layernorm")
        attention = f"{name}self_attn."
        out.add(
            f"{layer}.qkv",
            (width, hidden),
            [(f"{attention}{x}_proj.weight", span, everything) for x, span in spans],
        )
        if config.qkv_bias:
            out.add(
                f"{layer}.qkv_bias",
                (width,),
                [(f"{attention}{x}_proj.bias", span, None) for x, span in spans],
            )
        if config.qk_norm:
            norm(f"{layer}.q_norm", "self_attn.q_norm", dim)
            norm(f"{layer}.k_norm", "self_attn.k_norm", dim)
        out.add(
            f"{layer}.out",
            (hidden, q[1] - q[0]),
            [(f"{attention}o_proj.weight", everything, q)],
        )
        if config.out_bias:
            out.add(
                f"{layer}.out_bias",
                (hidden,),
                [(f"{attention}o_proj.bias", everything, None)],
            )
        if config.sandwich:
            norm(f"{layer}.after_attention", "post_attention_layernorm")
            norm(f"{layer}.mlp_norm", "pre_feedforward_layernorm")
        else:
            norm(f"{layer}.mlp_norm", "post_attention_layernorm")
        if config.experts is None:
            _feed_forward(out, config, part, layer, name)
        else:
            _experts(out, config, part, layer, name)
        if config.sandwich:
            norm(f"{layer}.after_mlp", "post_feedforward_layernorm")
    out.add("norm", (hidden,), [("model.norm.weight", everything, None)])
    if not config.tied:
        out.add("head", (each, hidden), [("lm_head.weight", rows, everything)])
    return Layout(
        dtype=dtype,
        weights=out.weights,
        pieces=tuple(out.pieces),
        num_bytes=-(-out.at // ALIGNMENT) * ALIGNMENT,
    )


def _feed_forward(
    out: _Writer, config: DecoderConfig, part: Part, layer: int, name: str
) -> None:
    hidden, span = config.hidden, part.of(config.inner)
    size, everything = span[1] - span[0], (0, config.hidden)
    halves = [f"{name}mlp.{x}_proj" for x in ("gate", "up")]
    out.add(
        f"{layer}.gate_up",
        (2 * size, hidden),
        [(f"{half}.weight", span, everything) for half in halves],
    )
    if config.mlp_bias:
        out.add(
            f"{layer}.gate_up_bias",
            (2 * size,),
            [(f"{half}.bias", span, None) for half in halves],
        )
    down = f"{name}mlp.down_proj"
    out.add(f"{layer}.down", (hidden, size), [(f"{down}.weight", everything, span)])
    if config.mlp_bias:
        out.add(f"{layer}.down_bias", (hidden,), [(f"{down}.bias", everything, None)])


def _experts(
    out: _Writer, config: DecoderConfig, part: Part, layer: int, name: str
) -> None:
    """Each rank has its share of every expert."""
    experts = config.experts
    assert experts is not None
    hidden, span = config.hidden, part.of(experts.inner)
    size, everything = span[1] - span[0], (0, config.hidden)
    at = f"{name}{experts.prefix}."
    gate, up, down = experts.names
    out.add(
        f"{layer}.router",
        (experts.count, hidden),
        [(f"{at}gate.weight", (0, experts.count), everything)],
    )
    out.add(
        f"{layer}.gate_up",
        (experts.count, 2 * size, hidden),
        [
            (f"{at}experts.{expert}.{half}.weight", span, everything)
            for expert in range(experts.count)
            for half in (gate, up)
        ],
    )
    out.add(
        f"{layer}.down",
        (experts.count, hidden, size),
        [
            (f"{at}experts.{expert}.{down}.weight", everything, span)
            for expert in range(experts.count)
        ],
    )


def _check(config: DecoderConfig, part: Part) -> None:
    inner = config.experts.inner if config.experts else config.inner
    kv_heads = max(config.kv_heads, part.size) % min(config.kv_heads, part.size)
    if config.heads % part.size or inner % part.size or kv_heads:
        raise InvalidInput(
            f"{config.heads} heads, {config.kv_heads} KV heads and {inner} wide layers "
            f"do not divide by {part.size} GPUs"
        )


def _times(span: Span, factor: int) -> Span:
    return span[0] * factor, span[1] * factor
