"""How ACTIVE replicas serve: the settings of engines, and of groups that share GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foreserve.models.errors import InvalidInput
from foreserve.models.record import Record

Scheduler = Literal[
    "fcfs", "round-robin", "static", "mlfq", "db-level", "db-mean", "db-prod"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingRules(Record):
    """Names that vLLM has too mean what they mean there."""

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    prefix_caching: bool = True
    """Prompts that begin alike are computed once, where the trace tells what they share."""
    lending: bool = True
    """A DRAINING replica lends KV memory that it can spare to weights that are loaded,
    until it needs it back (WarmServe's grace period)."""
    scheduler: Scheduler = "db-mean"
    """Whose turn it is where several LLMs are ACTIVE on the same GPUs."""
    page_bytes: int = 2 * 1024**2
    """Of the KV cache that they share."""
    swapping: bool = True
    """Their requests give way to host memory where that is faster than computing again."""
    near: float = 0.1
    """A turn changes hands only for a cost lower by this share."""
    patience: float | None = None
    """Who was not served for this many times its LLM's usual time goes first."""
    tenure: float = 1.0
    """A replica that has become ACTIVE keeps its GPUs for this many times what it would
    take to have it back."""
    turn_s: float = 30.0
    """After so long one that works gives way to an LLM that has none; ``tenure`` holds."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs < self.max_num_batched_tokens:
            raise InvalidInput("max_num_batched_tokens must exceed max_num_seqs")
        if not 0 <= self.near < 1:
            raise InvalidInput("near must be in [0, 1)")
        if self.page_bytes <= 0:
            raise InvalidInput("page must be positive")
        if self.patience is not None and self.patience <= 0:
            raise InvalidInput("patience must be positive")
        if self.tenure < 0 or self.turn_s < 0:
            raise InvalidInput("tenure and turn must not be negative")
