"""What iterations of tiny LLMs on a CPU are taken to last, until it is measured."""

from __future__ import annotations

from foreserve.models.cost import IterationTime

TINY = IterationTime(
    prefill_base_s=0.002,
    prefill_s_per_token=2e-5,
    prefill_s_per_token2=0.0,
    decode_base_s=0.002,
    decode_s_per_seq=2e-4,
    decode_s_per_context_token=0.0,
    relative_error=1.0,
    source="a guess, until it is measured",
)
