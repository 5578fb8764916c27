"""Faults to come, as a person writes them down: what breaks, when, and for how long."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from foreserve.models.codec import did_you_mean, placed, read_text, read_yaml, structure
from foreserve.models.errors import InvalidInput
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet
from foreserve.models.quantities import Seconds
from foreserve.models.record import Record
from foreserve.models.specs import GpuId

FaultKind = Literal[
    "gpu-loss", "node-loss", "slow-node", "replica-crash", "load-failure"
]
"""gpu-loss, node-loss: every replica that touches it vanishes, and its memory is of no use
until it is back; slow-node: iterations and loads take ``factor`` times as long;
replica-crash: it vanishes; load-failure: loads end in nothing, those that end while it
lasts, or the first one where no ``for`` is given."""

TARGETS: dict[FaultKind, tuple[str, ...]] = {
    "gpu-loss": ("GPU",),
    "node-loss": ("node",),
    "slow-node": ("node",),
    "replica-crash": ("replica",),
    "load-failure": ("node", "GPU", "replica"),
}
EXAMPLES = {"node": "n0", "GPU": "n0/3", "replica": "llm@n0/0"}

_TARGET = re.compile(r"(?:(.+)@)?([^/@]+)(?:/(\d+)(?:x(\d+))?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A node, one of its GPUs, or the replica of ``llm`` whose first GPU that is."""

    node: str
    index: int | None = None
    llm: str | None = None
    tp: int | None = None

    @property
    def what(self) -> str:
        if self.llm is not None:
            return "replica"
        return "node" if self.index is None else "GPU"

    def covers(self, gpu: GpuId) -> bool:
        """Whether ``gpu`` is (a part of) it."""
        if gpu.node != self.node or self.index is None:
            return gpu.node == self.node
        return self.index <= gpu.index < self.index + (self.tp or 1)

    def hits(self, replica: ReplicaId) -> bool:
        """Whether ``replica`` is it, or lies on it."""
        gpus = [gpu.index for gpu in replica.gpus if gpu.node == self.node]
        if self.llm is None:
            return bool(gpus) if self.index is None else self.index in gpus
        tp = len(replica.gpus) if self.tp is None else self.tp
        return (self.llm, [self.index], tp) == (replica.llm, gpus[:1], len(gpus))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Record):
    """One thing that breaks at ``at``, for the time ``for`` or for good."""

    at: Seconds
    """On the clock of the trace."""
    kind: FaultKind
    target: str
    """``n0``, ``n0/3`` or ``llm@n0/0``."""
    for_: Annotated[Seconds | None, Field(alias="for")] = None
    factor: float | None = None
    """Of a slow-node: how many times as long everything takes."""

    def __post_init__(self) -> None:
        if self.at < 0:
            raise InvalidInput("at must not be negative", field="at")
        if self.for_ is not None and self.for_ <= 0:
            raise InvalidInput("for must be positive", field="for")
        if self.kind == "replica-crash" and self.for_ is not None:
            raise InvalidInput("a replica-crash takes no time", field="for")
        if (self.kind == "slow-node") != (self.factor is not None):
            needs = "needs a" if self.kind == "slow-node" else "has no"
            raise InvalidInput(f"a {self.kind} {needs} factor", field="factor")
        if self.factor is not None and self.factor < 1:
            raise InvalidInput("a factor below 1 is no fault", field="factor")
        allowed, found = TARGETS[self.kind], self.where.what
        if found not in allowed:
            raise InvalidInput(
                f"a {self.kind} has no {found} as its target: {self.target!r}",
                field="target",
                hint="e.g. " + " or ".join(EXAMPLES[what] for what in allowed),
            )

    @property
    def where(self) -> Target:
        match = _TARGET.fullmatch(self.target)
        if not match or (match[1] and match[3] is None):
            raise InvalidInput(
                f"{self.target!r} is no node, GPU or replica",
                field="target",
                hint="e.g. " + ", ".join(EXAMPLES.values()),
            )
        llm, node, index, tp = match.groups()
        return Target(
            node=node,
            index=int(index) if index else None,
            llm=llm,
            tp=int(tp) if tp else None,
        )

    @property
    def until_s(self) -> float | None:
        """None: for good (or, of a replica-crash and the first load, at once)."""
        return None if self.for_ is None else self.at + self.for_


def check_faults(faults: Sequence[Fault], fleet: Fleet) -> None:
    """Each target exists in the fleet; `InvalidInput` with its field otherwise."""
    nodes = fleet.cluster.node_by_name
    for number, fault in enumerate(faults):
        where, field = fault.where, f"faults.{number}.target"
        if where.node not in nodes:
            hint = did_you_mean(where.node, list(nodes))
            raise InvalidInput(
                f"the cluster has no node {where.node!r}", field=field, hint=hint
            )
        gpus = nodes[where.node].gpus
        if where.index is not None and where.index >= gpus:
            raise InvalidInput(
                f"the cluster has no GPU {where.node}/{where.index}",
                field=field,
                hint=f"{where.node}/0 to {where.node}/{gpus - 1}",
            )
        if where.llm is not None and where.llm not in fleet.llm_by_name:
            hint = did_you_mean(where.llm, list(fleet.llm_by_name))
            raise InvalidInput(
                f"the fleet has no LLM {where.llm!r}", field=field, hint=hint
            )


def load_faults(path: str | os.PathLike[str], fleet: Fleet) -> tuple[Fault, ...]:
    """Read a fault script, YAML or JSON, and check it against ``fleet``."""
    file, text = os.fspath(path), read_text(path)
    plain = read_yaml(text, file)
    if not isinstance(plain, dict):
        raise InvalidInput(
            "a list under the key `faults` is expected",
            file=file,
            hint="e.g. faults: [{at: 2h, kind: gpu-loss, target: n0/3, for: 10m}]",
        )
    script = structure(_Script, plain, text=text, file=file)
    try:
        check_faults(script.faults, fleet)
    except InvalidInput as error:
        raise placed(error, text, file) from None
    return script.faults


@dataclass(frozen=True, slots=True, kw_only=True)
class _Script(Record):
    faults: tuple[Fault, ...]
