"""An engine that only waits, and fails as told: for tests of what owns engines."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from foreserve.models.placement import ReplicaId
from foreserve.models.problem import ReplicaOption
from foreserve.runtime.engines.base import (
    Capabilities,
    EngineFailed,
    EngineSettings,
    NoRoom,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting(EngineSettings):
    """What goes wrong, by LLM."""

    load_fails: dict[str, int] = field(default_factory=dict)
    """How many loads of it fail in each agent's life."""
    no_room: bool = False
    """That is what they fail for."""
    real_sleep: bool = True
    seed: int | None = None
    """Set: of every seven calls one fails."""


FAILED: dict[tuple[Path, str], int] = {}


class WaitingEngine:
    """Takes the option's times; dies when told."""

    def __init__(
        self, option: ReplicaOption, replica: ReplicaId, settings: Waiting
    ) -> None:
        self.option, self.replica, self.settings = option, replica, settings
        self.served_name, self.max_num_seqs = replica.llm, option.concurrency
        self.room_tokens = 1000
        self.capabilities = Capabilities(real_sleep=settings.real_sleep)
        self.up = self.hangs = self.stubborn = self.hurried = False
        self.gives_up_bytes = 0 if settings.seed is None else 8
        self._stopped = threading.Event()
        seed = settings.seed
        self._rng = None if seed is None else np.random.default_rng([seed, len(MADE)])
        MADE.append(self)

    @property
    def url(self) -> str:
        if self._stopped.is_set():
            raise EngineFailed("stopped")
        return f"http://127.0.0.1:9/r/{self.replica}"

    def start(self) -> None:
        self._take(self.option.load_s)
        done = FAILED.get((self.settings.folder, self.replica.llm), 0)
        if done < self.settings.load_fails.get(self.replica.llm, 0):
            FAILED[self.settings.folder, self.replica.llm] = done + 1
            failed = NoRoom if self.settings.no_room else EngineFailed
            raise failed("no such weights")
        self.up = True

    def activate(self) -> None:
        self._take(self.option.activate_s)

    def quiesce(self) -> None:
        self._take(self.option.activate_s)

    def hurry(self) -> None:
        self.hurried = True

    def shrink(self) -> int:
        return self.gives_up_bytes

    def stop(self) -> None:
        if not self.stubborn:
            self.up = False
        self._stopped.set()

    def alive(self) -> bool:
        if self.hangs:
            self._stopped.wait()
        return self.up

    def memory_bytes(self) -> int | None:
        return None

    def _take(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise EngineFailed("stopped")
        if self._rng is not None and self._rng.random() < 1 / 7:
            raise EngineFailed("bad luck")


MADE: list[WaitingEngine] = []
"""All of them."""
ENGINES: dict[ReplicaId, WaitingEngine] = {}
"""The last one made of each replica, in this process."""


def make(
    option: ReplicaOption, replica: ReplicaId, settings: EngineSettings
) -> WaitingEngine:
    assert isinstance(settings, Waiting)
    ENGINES[replica] = WaitingEngine(option, replica, settings)
    return ENGINES[replica]
