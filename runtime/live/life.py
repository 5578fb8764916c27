"""One replica of an agent, from its load until it is gone, and the signs of its life."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from foreserve.models.observed import Phase
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.runtime.engines.base import Engine
from foreserve.runtime.ledger import phase_bytes
from foreserve.runtime.live.messages import Row
from foreserve.runtime.live.patience import Patience


@dataclass(frozen=True, slots=True)
class Door:
    """Where requests go; as the engine said when it became ACTIVE."""

    url: str = ""
    served_name: str = ""
    max_num_seqs: int = 0
    room_tokens: int = 0

    @classmethod
    def of(cls, engine: Engine) -> Door:
        return cls(
            engine.url, engine.served_name, engine.max_num_seqs, engine.room_tokens
        )


@dataclass(slots=True, eq=False)
class Life:
    """One life of a replica."""

    id: ReplicaId
    option: ReplicaOption
    engine: Engine
    phase: Phase
    since_s: float
    held_bytes: int = 0
    story: list[tuple[float, Phase | None]] = field(default_factory=list)
    leaving: bool = False
    urgent: bool = False
    """Requests wait for its load."""
    acting_since_s: float | None = None
    """When the action under way began."""
    limit_s: float = math.inf
    """How long it may take."""
    measured_bytes: int | None = None
    spare_bytes: int = 0
    """Given up while it drains."""
    shrunk: tuple[float, int] = (0.0, 0)
    """Since when it was draining when its engine said that it had given up so much."""
    door: Door = Door()
    sign: Future[bool] | None = None
    """Of life: asked for, not there yet."""
    asked_s: float = math.inf
    """Since when it has not answered."""
    misses: int = 0

    def needs_bytes(self, phase: Phase) -> int:
        """Per GPU to book in ``phase``: without real sleep, all of them always."""
        asleep = phase in ("LOADING", "WARM")
        if asleep and not self.engine.capabilities.real_sleep:
            return phase_bytes(self.option, "ACTIVE")
        return phase_bytes(self.option, phase)

    def row(self, now_s: float) -> Row:
        door = self.door
        return Row(
            id=self.id,
            phase=self.phase,
            age_s=now_s - self.since_s,
            held_bytes=self.held_bytes,
            spare_bytes=self.spare_bytes,
            measured_bytes=self.measured_bytes,
            acting=self.acting_since_s is not None,
            urgent=self.urgent,
            leaving=self.leaving,
            url=door.url,
            served_name=door.served_name,
            max_num_seqs=door.max_num_seqs,
            room_tokens=door.room_tokens,
        )


class Signs:
    """Of life: engines are asked in threads, so that none that hangs keeps others from
    being asked. For one thread that looks at each life in turn."""

    def __init__(self, patience: Patience, now_s: Callable[[], float]) -> None:
        self._patience, self._now_s = patience, now_s
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="alive")

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def fault(self, life: Life) -> str:
        """Why it counts as dead, if it does; asks again where there is no question out."""
        now_s, began_s = self._now_s(), life.acting_since_s
        if began_s is not None and now_s - began_s > life.limit_s:
            return f"{life.phase} for more than {life.limit_s:g} s"
        if life.phase == "LOADING":
            return ""
        if life.sign is not None:
            late = now_s - life.asked_s > self._patience.hang_s
            if not life.sign.done():
                return "it does not answer" if late else ""
            error = life.sign.exception()
            life.misses += 1
            if error is None and life.sign.result():
                life.misses = 0
            elif late:  # It gave up waiting just when we do.
                return "it does not answer"
            elif life.misses >= self._patience.misses:
                return "it died" if error is None else line_of(error)
        life.asked_s = math.inf
        life.sign = self._pool.submit(self._ask, life)
        return ""

    def _ask(self, life: Life) -> bool:
        life.asked_s = self._now_s()
        if life.phase == "DRAINING":
            since_s = life.since_s
            life.shrunk = since_s, life.engine.shrink()
        return life.engine.alive()


def line_of(error: BaseException) -> str:
    """The first line of what it says."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
