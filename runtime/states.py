"""The life of a replica: which phase may follow which, and what an action asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foreserve.models.errors import IllegalTransition
from foreserve.models.observed import Phase
from foreserve.models.placement import Kind, ReplicaId

Move = tuple[Phase | None, Phase | None]
"""(before, after); None: the replica is not there."""

LEGAL: frozenset[Move] = frozenset(
    {
        (None, "LOADING"),
        ("LOADING", "WARM"),
        ("WARM", "ACTIVATING"),
        ("ACTIVATING", "ACTIVE"),
        ("ACTIVE", "DRAINING"),
        ("DRAINING", "WARM"),
        # A drop, a cancelled load, or a crash: from anywhere.
        ("LOADING", None),
        ("WARM", None),
        ("ACTIVATING", None),
        ("ACTIVE", None),
        ("DRAINING", None),
    }
)

ASKS: Mapping[Kind, frozenset[Move]] = {
    "demote": frozenset({("ACTIVE", "DRAINING")}),
    "drop": frozenset({("WARM", None), ("LOADING", None)}),
    "load": frozenset({(None, "LOADING")}),
    "activate": frozenset({("WARM", "ACTIVATING")}),
}
"""The moves each action may start; DRAINING becomes WARM by itself once empty."""


def check_move(
    replica: ReplicaId,
    before: Phase | None,
    after: Phase | None,
    story: Sequence[tuple[float, Phase | None]] = (),
) -> None:
    """Raise `IllegalTransition` unless the table has the move.

    ``story`` is what the replica did until now, as (second, phase), and goes into the
    message.
    """
    if (before, after) not in LEGAL:
        raise IllegalTransition(
            f"{replica}: {_name(before)} -> {_name(after)} is no legal move; "
            f"its story: {_tell(story)}"
        )


def check_action(
    kind: Kind,
    replica: ReplicaId,
    phase: Phase | None,
    story: Sequence[tuple[float, Phase | None]] = (),
) -> Phase | None:
    """The phase that ``kind`` leads to from ``phase``; raise if it may not be asked."""
    for before, after in ASKS[kind]:
        if before == phase:
            return after
    raise IllegalTransition(
        f"{replica}: cannot {kind} while {_name(phase)}; its story: {_tell(story)}"
    )


def _name(phase: Phase | None) -> str:
    return phase or "absent"


def _tell(story: Sequence[tuple[float, Phase | None]]) -> str:
    return ", ".join(f"{_name(p)} at {at_s:g} s" for at_s, p in story) or "none"
