"""What one replica holds within its SLO, for a distribution of lengths (B_mk, mu_mk)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from foreserve.models.cost import IterationTime
from foreserve.models.lengths import Lengths
from foreserve.models.record import Record
from foreserve.models.specs import Slo

_TAIL = 0.01
"""The share of requests that may miss (an `Slo` is a 99th percentile)."""
_KV_SIGMAS = 2.33
"""The cache overflows in one moment of a hundred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Record):
    """The most one replica takes on within its SLO."""

    concurrency: int
    rate_rps: float
    ttft_s: float
    """Mean at that rate."""
    ttft_p99_s: float
    tpot_s: float


def capacity(
    time: IterationTime,
    slo: Slo,
    lengths: Lengths,
    *,
    kv_tokens: float,
    max_num_seqs: int,
    state_tokens: float = 0.0,
) -> Capacity | None:
    """Largest concurrency whose P99 TTFT and TPOT stay within ``slo``; None if not one.

    In steady state ``b`` sequences decode together. Long outputs are overrepresented
    among them, so each holds ``E[out * (in + out / 2)] / E[out]`` tokens of context.
    Every step brings ``b / E[out]`` new prompts: the mean TPOT is ``decode(b) + b /
    E[out] * E[chunk]``. A request's own varies with the prompts it happens to meet, as a
    compound Poisson sum over its ``out`` steps (taken as normal, or as one prompt that
    uses up all slack): the share of requests beyond the target, over all lengths, counts.

    Prompts queue for the tokens of an iteration as in an M/G/1 queue whose service is
    what a prompt adds: mean wait by Pollaczek and Khinchine, its tail taken as
    exponential. The 99th percentile of the TTFT is that of the wait plus that of the
    prompt alone plus the step under way and the own one (a bound on the sum's).

    ``kv_tokens`` must hold the sequences in flight to their end, but for one moment in a
    hundred; ``state_tokens`` is what a sequence keeps whatever its length (windows,
    linear attention), counted in tokens. All of it grows with ``b``: binary search,
    O(n log b) for a sample of n lengths.
    """
    inputs, outputs = lengths.input_tokens, np.maximum(1.0, lengths.output_tokens)
    mean_output = float(outputs.mean())
    weight = outputs / outputs.sum()
    context = float(weight @ (inputs + outputs / 2))
    held = inputs + outputs + state_tokens
    held_mean = float(weight @ held)
    held_sd = math.sqrt(max(0.0, float(weight @ held**2) - held_mean**2))
    chunk_s = np.array([time.chunk_s(x, x * x) for x in inputs.tolist()])
    alone_s = np.array([time.prefill_s(x, x * x) for x in inputs.tolist()])
    chunk_mean_s, chunk2_mean_s2 = float(chunk_s.mean()), float((chunk_s**2).mean())
    long_s = float(np.quantile(alone_s, 1 - _TAIL))

    def step_s(batch: int) -> float:
        return time.decode_s(batch, batch * context)

    def tpot_s(batch: int) -> float:
        return step_s(batch) + batch / mean_output * chunk_mean_s

    def rate_rps(batch: int) -> float:
        return batch / (float(alone_s.mean()) + mean_output * tpot_s(batch))

    sorted_s = np.sort(chunk_s)

    def slow_share(batch: int) -> float:
        """Requests whose TPOT is beyond the target: by many prompts or by one."""
        mean_s, rate = tpot_s(batch), rate_rps(batch)
        deviation = np.sqrt(2 * rate * chunk2_mean_s2 * mean_s / outputs + 1e-30)
        many = [math.erfc(d) / 2 for d in ((slo.tpot_s - mean_s) / deviation).tolist()]
        slack_s = outputs * (slo.tpot_s - step_s(batch))
        longer = 1 - np.searchsorted(sorted_s, slack_s) / len(sorted_s)
        one = -np.expm1(-rate * outputs * mean_s * longer)
        return float(np.maximum(many, one).mean())

    def waits_s(batch: int) -> tuple[float, float]:
        """Mean and 99th percentile of the wait for room in an iteration."""
        busy = min(rate_rps(batch) * chunk_mean_s, 0.999)
        scale_s = chunk2_mean_s2 / (2 * chunk_mean_s * (1 - busy))
        tail_s = scale_s * math.log(busy / _TAIL) if busy > _TAIL else 0.0
        return busy * scale_s, tail_s

    def fits(batch: int) -> bool:
        held_tokens = batch * held_mean + _KV_SIGMAS * held_sd * math.sqrt(batch)
        if held_tokens > kv_tokens or tpot_s(batch) > slo.tpot_s:
            return False
        if long_s + 2 * step_s(batch) + waits_s(batch)[1] > slo.ttft_s:
            return False
        return slow_share(batch) <= _TAIL

    if not fits(1):
        return None
    low, high = 1, max_num_seqs
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    wait_s, tail_s = waits_s(low)
    ttft_s = float(alone_s.mean()) + 1.5 * step_s(low) + wait_s
    return Capacity(
        concurrency=low,
        rate_rps=low / (ttft_s + mean_output * tpot_s(low)),
        ttft_s=ttft_s,
        ttft_p99_s=long_s + 2 * step_s(low) + tail_s,
        tpot_s=tpot_s(low),
    )


def cold_loss_s(concurrency: float, cold_s: float, residence_s: float) -> float:
    """Expected waiting-seconds of one missing instance (loss_m of (O2)).

    A missing instance leaves half its slots' load uncovered on average (the rounding up
    of the need). Those ``concurrency / 2`` requests turn over every ``residence_s``, so
    ``concurrency / 2 * (1 + cold_s / residence_s)`` requests meet the cold start and wait
    half of it on average.
    """
    affected = concurrency / 2 * (1 + cold_s / residence_s)
    return affected * cold_s / 2 if math.isfinite(cold_s) else math.inf
