"""Which hardware a logical GPU is: the one table, fixed while an agent lives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from foreserve.models.errors import InvalidInput
from foreserve.models.record import Record
from foreserve.models.specs import GpuId, Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Device(Record):
    """The hardware of one logical GPU."""

    gpu: GpuId
    index: int
    """Of the GPU, as its driver numbers them; or of a core that stands in for it."""


@dataclass(frozen=True, kw_only=True)
class Binding(Record):
    """The devices of one node; none for engines that need no hardware."""

    devices: tuple[Device, ...] = ()
    machine: str = ""
    """Its address, where that may be another one than the controller's."""

    def __post_init__(self) -> None:
        for what in (
            Counter(device.gpu for device in self.devices),
            Counter(device.index for device in self.devices),
        ):
            for name, count in what.items():
                if count > 1:
                    raise InvalidInput(f"binding: {name} is bound {count} times")

    @classmethod
    def of_node(cls, node: Node, indices: Sequence[int]) -> Binding:
        """Logical GPU i is ``indices[i]``; `InvalidInput` if there are too few."""
        if len(indices) < node.gpus:
            raise InvalidInput(
                f"node {node.name!r}: {node.gpus} GPUs planned, {len(indices)} found"
            )
        return cls(
            devices=tuple(
                Device(gpu=gpu, index=index)
                for gpu, index in zip(node.gpu_ids(), indices, strict=False)
            )
        )

    @cached_property
    def index_of(self) -> Mapping[GpuId, int]:
        return {device.gpu: device.index for device in self.devices}

    def of(self, gpus: Iterable[GpuId]) -> tuple[int, ...]:
        """The devices of a replica, in its order; () where there is no hardware."""
        if not self.devices:
            return ()
        try:
            return tuple(self.index_of[gpu] for gpu in gpus)
        except KeyError as error:
            raise InvalidInput(f"GPU {error.args[0]} is bound to nothing") from None
