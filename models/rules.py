"""What an operator may ask for beyond the least: rows of the formulation that are off
unless they are set."""

from __future__ import annotations

from dataclasses import dataclass

from foreserve.models.errors import InvalidInput
from foreserve.models.placement import State
from foreserve.models.record import Record
from foreserve.models.specs import GpuId


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing(Record):
    """ACTIVE replicas of several LLMs may share the same GPUs (C3), at the price of (O3).

    The load of a group is ``booked_load`` times the booked part of its rates, summed over
    its members. Its answers take 1 / (1 - level) times as long as alone, where level is
    the first of ``levels`` that is not below the load.
    """

    most: int = 4
    """LLMs in a group."""
    booked_load: float = 0.8
    """rho of a group that is booked in full (a replica's ``rate_rps`` is this part of
    what it can do at all)."""
    levels: tuple[float, ...] = (0.2, 0.4, 0.55, 0.7, 0.8)
    """Ascending; a group is loaded up to the last of them at most."""
    idle_lends: bool = True
    """In scenarios in which none of a group's LLMs is asked for, its GPUs may be used by
    WARM replicas that lie beside it."""

    def __post_init__(self) -> None:
        if self.most < 1:
            raise InvalidInput("sharing.most must be at least 1")
        if not 0 < self.booked_load < 1:
            raise InvalidInput("sharing.booked_load must be between 0 and 1")
        ascending = all(
            a < b for a, b in zip(self.levels, self.levels[1:], strict=False)
        )
        if not (self.levels and ascending and self.levels[0] > 0):
            raise InvalidInput("sharing.levels: positive, ascending numbers")
        if self.levels[-1] >= 1:
            raise InvalidInput("sharing.levels: the last must be below 1")

    @property
    def most_booked(self) -> float:
        """Parts of their rates that a group's members may be booked for, summed."""
        return min(1.0, self.levels[-1] / self.booked_load)

    def slowdown(self, load: float) -> float:
        """1 / (1 - level) of a group at ``load``; that of the last level beyond it."""
        level = next((v for v in self.levels if load <= v + 1e-9), self.levels[-1])
        return 1 / (1 - level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Held(Record):
    """A replica that has to be there in every epoch; ``state`` None: in either state."""

    llm: str
    gpus: tuple[GpuId, ...]
    state: State | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules(Record):
    """Rules of the whole fleet; those of one LLM are in `ServedLlm`."""

    max_llms_per_gpu: int | None = None
    """Replicas, ACTIVE and WARM, on one GPU (C10)."""
    apart: tuple[tuple[str, str], ...] = ()
    """Pairs of LLMs that never lie on the same GPU (C10)."""
    closed: tuple[GpuId, ...] = ()
    """GPUs that hold nothing (C10): out for repair, or somebody else's."""
    held: tuple[Held, ...] = ()
    """Pins and frozen replicas (C10)."""
    load_window_s: float | None = None
    """Loads of an epoch must be done within this time of its start (C7)."""
    keep_serving: bool = False
    """An LLM that serves before an epoch and is asked for in it does not stop for the
    move (C8)."""

    def __post_init__(self) -> None:
        if self.max_llms_per_gpu is not None and self.max_llms_per_gpu < 1:
            raise InvalidInput("max_llms_per_gpu must be at least 1")
        if self.load_window_s is not None and self.load_window_s <= 0:
            raise InvalidInput("load_window must be positive")
        for one, other in self.apart:
            if one == other:
                raise InvalidInput(f"apart: {one!r} cannot be apart from itself")
