"""When to plan again before the epoch is over: what was seen against what was planned for.

Pure: the plan's epoch, what was seen of it so far, and what is lost, in; reasons out. The
bound on a peak is passed by chance in one epoch out of twenty for every LLM, so passing
it is no reason by itself: the LLM must also have more requests in the system than all
that the epoch holds of it, ACTIVE and WARM, can work on, and that by at least half of an
instance: the on-demand rule starts single replicas without a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

from foreserve.models.observed import Observed
from foreserve.models.plan import Epoch
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why to plan again: an LLM above its forecast, or GPUs that are gone."""

    text: str
    llm: str | None = None
    factor: float = 1.0
    """How many times the bound on its peak the LLM's requests in the system are."""
    lost_gpus: tuple[GpuId, ...] = ()


def in_system(observed: Observed) -> dict[str, int]:
    """Requests of each LLM that wait or are worked on now; LLMs without any are absent."""
    found = {llm: count for llm, count in observed.waiting.items() if count}
    for replica in observed.replicas:
        if replica.in_flight:
            found[replica.llm] = found.get(replica.llm, 0) + replica.in_flight
    return found


def replan_now(
    fleet: Fleet,
    epoch: Epoch,
    peaks: Mapping[str, float],
    lost_gpus: frozenset[GpuId] = frozenset(),
) -> tuple[Reason, ...]:
    """Reasons to plan ``epoch`` again now; () to go on as planned.

    ``peaks``: most requests of each LLM in the system at once since the epoch began, or
    since it was last planned. An epoch planned around ``lost_gpus``, and for such peaks,
    gives no reason again.
    """
    found = []
    held = [gpu for gpu in sorted(epoch.placement.by_gpu) if gpu in lost_gpus]
    for node, gpus in groupby(held, key=lambda gpu: gpu.node):
        own = tuple(gpus)
        llms = sorted({r.llm for gpu in own for r in epoch.placement.by_gpu[gpu]})
        text = f"{len(own)} GPUs of {node} are lost, planned for {', '.join(llms)}"
        found.append(Reason(text=text, lost_gpus=own))
    for row in epoch.demand:
        seen, room = peaks.get(row.llm, 0.0), _room(fleet, epoch, row.llm)
        half = fleet.llm_by_name[row.llm].instance_concurrency / 2
        if seen >= max(row.peak_high, room) + half:
            text = (
                f"{seen:g} requests of {row.llm} at once: 95 % of the peaks were "
                f"expected below {row.peak_high:.3g}, its replicas hold {room}"
            )
            factor = seen / max(row.peak_high, 1.0)
            found.append(Reason(text=text, llm=row.llm, factor=max(1.0, factor)))
    return tuple(found)


def _room(fleet: Fleet, epoch: Epoch, llm: str) -> int:
    """Requests that all replicas of ``llm`` can work on at once, the WARM ones too."""
    return sum(
        fleet.option_of(replica.llm, replica.gpus).concurrency
        for replica in epoch.placement.of(llm)
    )
