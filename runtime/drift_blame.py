"""Whose fault it was that a request was not answered within its targets.

Exactly one of `BLAMES`: the first of the rules that holds, in the order of docs/drift.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from foreserve.models.drift import Blame, Demanded
from foreserve.models.placement import ReplicaId
from foreserve.models.plan import Epoch
from foreserve.models.problem import Fleet
from foreserve.runtime.drift_lives import Lives
from foreserve.runtime.drift_model import in_one_piece
from foreserve.runtime.journal import RequestEnd

FAULTS = frozenset({"engine_lost", "gateway_lost", "model_failed", "internal"})
"""Why requests fail of which nobody need be asked any further."""
CLIENT_LEFT = "client_left"
TOO_LONG = ("context_length_exceeded", "exceed the KV cache")
"""Part of why requests fail that no replica could hold."""


Verdict = Literal["first", "rest", "left"]


class Miss(NamedTuple):
    """A request that was not answered within its targets."""

    llm: int
    arrival_s: float
    answered_s: float
    """Its first token; its end, where there was none."""
    end_s: float
    key: ReplicaId | None
    late_first: bool
    """Its first token was late, or never came."""
    reason: str | None


def judge(fleet: Fleet, end: RequestEnd, key: ReplicaId | None) -> Verdict | None:
    """None: its targets were met; ``left``: nobody can say; what was missed:
    ``first``, the first token, or ``rest``."""
    slo = fleet.llm_by_name[end.llm].slo
    first_s, tokens = end.first_token_s, end.output_tokens
    waited_s = (end.at_s if first_s is None else first_s) - end.arrival_s
    rest_s = 0.0 if first_s is None else end.at_s - first_s
    steps = max(1, tokens - 1) if tokens > 1 else math.inf
    if end.result == "finished" and first_s is not None:
        if waited_s <= slo.ttft_s:
            return None if rest_s / steps <= slo.tpot_s else "rest"
        if key is not None and tokens > 1:
            time = fleet.option_of(key.llm, key.gpus).time
            whole = in_one_piece(time, first_s, end.at_s, tokens)
            if whole and waited_s <= slo.ttft_s + (tokens - 1) * slo.tpot_s:
                return None
        return "first"
    if end.reason == CLIENT_LEFT and waited_s <= slo.ttft_s:
        return "left" if rest_s / steps <= slo.tpot_s else "rest"
    return "first" if first_s is None or waited_s > slo.ttft_s else "rest"


def blame_of(miss: Miss, llm: str, lives: Lives, passed_s: float, short: bool) -> Blame:
    """``passed_s``: when the LLM's peak first was above its bound, in the epochs from the
    request's arrival to its booking; infinite: never. ``short``: `fell_short` says so of
    the epoch's plan, or every GPU was taken when it came."""
    reason = miss.reason or ""
    if any(part in reason for part in TOO_LONG):
        return "capacity"
    until_s = miss.answered_s if miss.late_first else miss.end_s
    if reason in FAULTS or lives.suffered(llm, miss.key, miss.arrival_s, until_s):
        return "fault"
    if passed_s <= until_s:
        return "forecast"
    if short:
        return "capacity"
    return "load" if miss.late_first and _had_to_load(miss, llm, lives) else "queue"


def _had_to_load(miss: Miss, llm: str, lives: Lives) -> bool:
    """Whether it waited for a replica to come up: the one that answered it, or, where none
    did, any of its LLM."""
    if miss.key is None:
        return not lives.was_active(llm, miss.arrival_s)
    served = lives.served_by(miss.key, miss.answered_s)
    return served is not None and served.begin_s > miss.arrival_s


def forecasts(epoch: Epoch | None, llms: Iterable[str]) -> list[Demanded | None]:
    """What each LLM was planned for; None where there was no plan with a forecast."""
    if epoch is None or not epoch.demand:
        return [None for _ in llms]
    rows = {row.llm: row for row in epoch.demand}
    found: list[Demanded | None] = []
    for llm in llms:
        row = rows.get(llm)
        found.append(
            Demanded(
                rate_rps=row.rate_rps if row else 0.0,
                mean_load=row.mean_load if row else 0.0,
                peak_load=row.peak_load if row else 0.0,
                peak_high=row.peak_high if row else 0.0,
            )
        )
    return found


def fell_short(fleet: Fleet, epoch: Epoch, llm: str, peak: float) -> bool:
    """Whether the plan left demand of ``llm`` unserved, or held too little of it for a
    peak within its forecast while nothing more of it would have fitted anywhere."""
    placement = epoch.placement
    own = placement.of(llm)
    shares = sum(replica.traffic_share for replica in own)
    if 0 < shares < 1 - 1e-6:
        return True
    room = sum(fleet.option_of(r.llm, r.gpus).concurrency for r in own)
    if room >= peak:
        return False
    most = fleet.llm_by_name[llm].max_replicas
    if most is not None and len(own) >= most:
        return True
    cluster = fleet.cluster
    free = {gpu: cluster.usable_bytes(gpu) for gpu in cluster.gpus}
    for replica in placement.replicas:
        for gpu in replica.gpus:
            free[gpu] -= fleet.bytes_on_gpu(replica)
    taken = {gpu for replica in own for gpu in replica.gpus}
    return not any(
        option.llm == llm
        and taken.isdisjoint(gpus)
        and all(free[gpu] >= option.resident_bytes for gpu in gpus)
        for option, gpus in fleet.candidates()
    )
