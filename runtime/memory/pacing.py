"""How fast weights may be copied beside serving."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol


def next_rate(
    bytes_per_s: float,
    tpot_s: float,
    alone_s: float,
    *,
    most_loss: float,
    least_bytes_per_s: float,
    most_bytes_per_s: float,
) -> float:
    """The rate of copies beside serving, after decode iterations of ``tpot_s`` were seen
    that take ``alone_s`` without copies: halved if they lost more than ``most_loss`` of
    it, else a tenth up. Never below the least, or nothing would ever arrive."""
    too_much = tpot_s > alone_s * (1 + most_loss)
    changed = bytes_per_s * (0.5 if too_much else 1.1)
    return min(max(changed, least_bytes_per_s), most_bytes_per_s)


@dataclass(slots=True)
class TokenBucket:
    """Lets bytes through at a rate; after a pause up to ``burst_bytes`` at once."""

    burst_bytes: float
    bytes_per_s: float = math.inf
    """May be changed at any time."""
    _level: float = 0.0
    _seen_s: float = -math.inf

    def wait_s(self, now_s: float) -> float:
        """Until the next bytes may go."""
        self._fill(now_s)
        return max(0.0, -self._level / self.bytes_per_s)

    def spend(self, num_bytes: int, now_s: float) -> None:
        """They go now; the next ones wait for as long as these were worth."""
        self._fill(now_s)
        if not math.isinf(self.bytes_per_s):
            self._level -= num_bytes

    def _fill(self, now_s: float) -> None:
        if math.isinf(self.bytes_per_s) or math.isinf(self._seen_s):
            self._level = 0.0
        else:
            gained = (now_s - self._seen_s) * self.bytes_per_s
            self._level = min(self.burst_bytes, self._level + gained)
        self._seen_s = now_s


class Rated(Protocol):
    """What a `Pacer` paces: `loading.Link`."""

    @property
    def busy(self) -> bool:
        """Whether a load is under way."""
        ...

    def set_rate(self, bytes_per_s: float) -> None: ...


@dataclass(slots=True)
class Pacer:
    """Holds a link to what the iterations beside it may lose. For one thread, which runs
    them: `ran` after each, `idle` when there are none."""

    link: Rated
    least_bytes_per_s: float
    first_bytes_per_s: float
    """When copies begin beside iterations, until these tell."""
    most_bytes_per_s: float
    most_loss: float = 0.05
    every: int = 8
    """Iterations between two changes of the rate, which goes by their median."""
    _rate: float = 0.0
    """The last one it set; 0 before the first."""
    _lifted: bool = True
    _alone: float | None = None
    _beside: list[float] = field(default_factory=list)

    def ran(self, took_s: float, expected_s: float) -> None:
        """An iteration took so long; ``expected_s`` is what the cost model says of its
        batch, so that iterations of all sizes can be compared."""
        ratio = took_s / expected_s
        if not self.link.busy:
            self._beside.clear()
            self._learn(ratio)
            return
        if self._lifted:
            self._set(self._rate or self.first_bytes_per_s)
        self._beside.append(ratio)
        if len(self._beside) < self.every:
            return
        seen = median(self._beside)
        self._beside.clear()
        if self._alone is None:
            # Nothing is known of iterations without copies: slow ones must do.
            self._learn(seen)
            return
        self._set(
            next_rate(
                self._rate,
                seen,
                self._alone,
                most_loss=self.most_loss,
                least_bytes_per_s=self.least_bytes_per_s,
                most_bytes_per_s=self.most_bytes_per_s,
            )
        )

    def idle(self) -> None:
        """Nobody is served: copies go as fast as they can, until somebody is."""
        self._beside.clear()
        if not self._lifted:
            self._lifted = True
            self.link.set_rate(math.inf)

    def _learn(self, ratio: float) -> None:
        known = ratio if self._alone is None else self._alone
        self._alone = known + 0.05 * (ratio - known)

    def _set(self, bytes_per_s: float) -> None:
        self._rate, self._lifted = bytes_per_s, False
        self.link.set_rate(bytes_per_s)
