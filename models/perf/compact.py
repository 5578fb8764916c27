"""The compact form: a few coefficients in place of the kernel tables.

Fitted by least squares of relative errors over the sizes an engine meets; the error of
the fit travels with the coefficients. `decode_many` evaluates whole fleets at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from foreserve.models.cost import IterationTime
from foreserve.models.perf.kernels import Floats
from foreserve.models.perf.measured import MeasuredTiming

BATCHES = np.array(
    [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256], dtype=np.float64
)
CONTEXTS = np.array([128, 512, 1024, 2048, 4096, 8192], dtype=np.float64)
MOST_CONTEXT_TOKENS = 1e6
"""Of a whole batch: more does not fit a GPU."""
PROMPTS = np.array(
    [16, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192]
)
LINEAR_FROM_TOKENS = 256.0
"""Shorter prompts take as long as reading the weights does."""


def compact(timing: MeasuredTiming) -> IterationTime:
    """Coefficients of ``timing``, with the interval of the model and of this fit."""
    llm = timing.llm
    batch, context = (
        grid.ravel() for grid in np.meshgrid(BATCHES, CONTEXTS, indexing="ij")
    )
    held = batch * context <= MOST_CONTEXT_TOKENS
    batch, context = batch[held], context[held]
    decode = timing.decode(batch, context)
    share = llm.moe.experts_per_token / llm.moe.experts if llm.moe else 0.0
    columns = [np.ones_like(batch), batch, batch * context, 1 - (1 - share) ** batch]
    found = _positive_least_squares(columns if share else columns[:3], decode.seconds)
    base, per_seq, per_context, experts = (*found, 0.0)[:4]

    tokens = PROMPTS.astype(np.float64)
    prefill = timing.prefill(tokens)
    long = tokens >= LINEAR_FROM_TOKENS
    columns = [np.ones_like(tokens), tokens, tokens**2]
    found = _positive_least_squares([c[long] for c in columns], prefill.seconds[long])
    made = IterationTime(
        prefill_base_s=found[0],
        prefill_s_per_token=found[1],
        prefill_s_per_token2=found[2],
        prefill_floor_s=float(prefill.seconds[0]),
        decode_base_s=base,
        decode_s_per_seq=per_seq,
        decode_s_per_context_token=per_context,
        decode_experts_s=experts,
        expert_share=share,
        relative_error=0.0,
        source=timing.source,
    )
    again = np.concatenate(
        [
            decode_many([made], batch, batch * context)[0] / decode.seconds,
            prefill_many(made, tokens) / prefill.seconds,
        ]
    )
    errors = np.abs(again - 1)
    # The corners of the grid exceed most memories, and were not measured therefore.
    usual = (batch <= 64) & (context <= 4096)
    low, high = timing.corrections.tpot_interval
    return replace(
        made,
        relative_error=float(np.hypot((high - low) / 2, np.quantile(errors, 0.9))),
        fit_error=float(np.median(errors)),
        extrapolated=bool(
            decode.extrapolated[usual].any() or prefill.extrapolated.any()
        ),
    )


def _positive_least_squares(columns: Sequence[Floats], values: Floats) -> list[float]:
    """Least squares of relative errors, coefficients >= 0 (time never falls with work).

    Few columns: drop the most negative coefficient until none is.
    """
    matrix = np.stack(columns, axis=1) / values[:, None]
    kept = list(range(len(columns)))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept], np.ones(len(values)), rcond=None)
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    result = [0.0] * len(columns)
    for index, value in zip(kept, found, strict=True):
        result[index] = float(value)
    return result


def decode_many(
    times: Sequence[IterationTime], batch: ArrayLike, context_tokens: ArrayLike
) -> Floats:
    """Decode steps of many replicas at once: [times, *shape of batch], seconds."""
    sizes = np.broadcast_arrays(
        np.asarray(batch, dtype=np.float64),
        np.asarray(context_tokens, dtype=np.float64),
    )
    shape = (len(times),) + (1,) * sizes[0].ndim
    table = np.array(
        [
            (
                t.decode_base_s,
                t.decode_s_per_seq,
                t.decode_s_per_context_token,
                t.decode_experts_s,
                t.expert_share,
            )
            for t in times
        ]
    )
    base, seq, token, experts, share = (column.reshape(shape) for column in table.T)
    touched = 1 - (1 - share) ** sizes[0] if share.any() else 0.0
    return np.asarray(base + seq * sizes[0] + token * sizes[1] + experts * touched)


def prefill_many(time: IterationTime, tokens: Floats) -> Floats:
    """Prompts of ``tokens`` each, alone: [prompts], seconds."""
    seconds = time.prefill_base_s + time.prefill_s_per_token * tokens
    seconds = seconds + time.prefill_s_per_token2 * tokens**2
    return np.maximum(seconds, time.prefill_floor_s)
