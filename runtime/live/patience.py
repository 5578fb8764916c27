"""How long an agent waits for what, and what it waits with because it failed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from foreserve.models.errors import ForeserveError
from foreserve.models.placement import ReplicaId
from foreserve.runtime.live.messages import Trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an agent waits for what."""

    watch_s: float = 0.5
    """Between looks at each engine."""
    hang_s: float = 5.0
    """An engine that does not say for so long whether it lives counts as dead."""
    misses: int = 2
    """So many times in a row it must say that it does not live: one may be the machine's
    being busy."""
    act_factor: float = 5.0
    act_least_s: float = 60.0
    """An action may take this many times what the plan says, and at least so long."""
    first_retry_s: float = 1.0
    last_retry_s: float = 60.0
    tries: int = 5
    settled_s: float = 60.0
    """What fails after having served so long fails for the first time again."""

    def retry_in_s(self, failures: int) -> float:
        if failures >= self.tries:
            return math.inf
        return min(self.last_retry_s, self.first_retry_s * 2.0 ** (failures - 1))

    def limit_s(self, expected_s: float) -> float:
        """After which an action has failed."""
        return max(self.act_least_s, self.act_factor * expected_s)


@dataclass(slots=True)
class _Failing:
    failures: int
    reason: str
    retry_s: float


class Failures:
    """Replicas that failed and have not served long since. Its owner locks."""

    def __init__(self, patience: Patience, now_s: Callable[[], float]) -> None:
        self._patience, self._now_s = patience, now_s
        self._of: dict[ReplicaId, _Failing] = {}

    def note(
        self, key: ReplicaId, reason: str, *, settled: bool = False, ever: bool = False
    ) -> None:
        """One more failure in a row, the first if it had ``settled``; ``ever``: it is not
        to be given up for it."""
        before = self._of.get(key)
        failures = 1 if before is None or settled else before.failures + 1
        if ever:
            failures = max(1, min(failures, self._patience.tries - 1))
        retry_s = self._now_s() + self._patience.retry_in_s(failures)
        self._of[key] = _Failing(failures, reason, retry_s)

    def check(self, key: ReplicaId) -> None:
        """`ForeserveError` while the replica is to be left alone."""
        failing = self._of.get(key)
        if failing is not None and failing.retry_s > self._now_s():
            raise ForeserveError(
                f"{key}: failed {failing.failures} times, at last: {failing.reason}"
            )

    def forget(self, key: ReplicaId | None = None) -> None:
        """Nothing is held against the replica any more; None: against any."""
        if key is None:
            self._of.clear()
        else:
            self._of.pop(key, None)

    def over(self) -> bool:
        """Whether a wait is over since the last time this was asked."""
        now_s = self._now_s()
        found = [f for f in self._of.values() if 0 < f.retry_s <= now_s]
        for failing in found:
            failing.retry_s = 0.0
        return bool(found)

    def told(self) -> tuple[Trouble, ...]:
        now_s = self._now_s()
        return tuple(
            Trouble(
                id=key,
                failures=failing.failures,
                reason=failing.reason,
                retry_in_s=max(0.0, failing.retry_s - now_s),
            )
            for key, failing in self._of.items()
        )
