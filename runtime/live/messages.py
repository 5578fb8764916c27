"""What a controller and the agents of its nodes say to each other: plain values that
pickle, so that they pass a call, a socket, or Ray alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from foreserve.models.errors import ForeserveError
from foreserve.models.observed import Phase
from foreserve.models.placement import ReplicaId
from foreserve.models.specs import GpuId
from foreserve.runtime.live.binding import Binding

OrderKind = Literal["load", "hurry", "activate", "demote", "quiesce", "drop"]
"""`Kind`; hurry: requests wait for what loads; quiesce: nothing is in flight any more, so
DRAINING may become WARM."""


class LinkLost(ForeserveError):
    """A node does not answer."""


class Link(Protocol):
    """A way to one agent. One call at a time."""

    def call(self, name: str, *args: Any, timeout_s: float) -> Any:
        """What the agent's method ``name`` returns or raises; `LinkLost` if there is no
        answer within ``timeout_s``, after which the link is of no use."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One step on one replica. (generation, step) is its identity: sent twice, it is
    carried out once."""

    generation: int
    """Of the controller: each start of one has a higher number."""
    step: int
    """Counts from 1 in each generation."""
    kind: OrderKind
    replica: ReplicaId
    urgent: bool = False
    """Of a load: requests wait for its LLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One resident replica, as its agent has it."""

    id: ReplicaId
    phase: Phase
    age_s: float
    """Since when it is in this phase."""
    held_bytes: int
    """Booked on each of its GPUs."""
    spare_bytes: int = 0
    """What it would hold more in its phase, had it not given that up to drain."""
    measured_bytes: int | None = None
    """As the engine says, where it can, after its last action."""
    acting: bool = False
    """An action is under way."""
    urgent: bool = False
    """Its load knows that requests wait for it."""
    leaving: bool = False
    """It is being stopped, and holds its memory until it is seen to be gone."""
    url: str = ""
    served_name: str = ""
    max_num_seqs: int = 0
    room_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A replica entered ``phase``; None: it is gone."""

    version: int
    """Of the agent's state: moves are told in this order."""
    id: ReplicaId
    phase: Phase | None
    before: Phase | None
    ago_s: float
    lost: bool = False
    """Gone without having been asked to."""
    done: OrderKind | None = None
    """The action that led here, and how long that took."""
    took_s: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A replica failed; its agent loads it no more until some time has passed."""

    id: ReplicaId
    failures: int
    """In a row."""
    reason: str
    """Of the last one."""
    retry_in_s: float
    """Infinite: it was tried often enough, until somebody forgives it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an agent lives, from its start to its end."""

    pid: int = 0
    binding: Binding = field(default_factory=Binding)
    key: str = field(default="", repr=False)
    """What callers have to show to its engines; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """Weights of one LLM in the host memory of a node."""

    llm: str
    held_bytes: int
    """Booked."""
    whole: bool
    """All of it has been read, so that loads copy from here."""
    readers: int
    """Loads under way."""
    resident_bytes: int | None = None
    """Of its files, what was in memory when last looked; None where there are none."""
    locked: bool = False
    """The kernel does not evict them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """One node at one instant."""

    node: str
    version: int
    generation: int
    step: int
    """The last order of this generation that was dealt with."""
    rows: tuple[Row, ...]
    moves: tuple[Move, ...]
    """Since the version that was asked about; older ones may be missing."""
    troubles: tuple[Trouble, ...]
    usable_bytes: dict[GpuId, int]
    free_bytes: dict[GpuId, int]
    place: Place = Place()
    host_bytes: int = 0
    """Host memory that weights may take."""
    hosted: tuple[HostRow, ...] = ()
