"""The memory ledger: every byte on a GPU, by kind, with who holds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from foreserve.models.placement import Placement
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId

RowKind = Literal["weights", "residue", "activation", "kv", "reserve", "free"]
"""weights and residue (CUDA context, graphs, NCCL) of a resident replica; activation peak
and KV cache of an ACTIVE one; reserve: what the cluster keeps back for fragmentation and
for the error of these rows; free: the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """``num_bytes`` of ``gpu`` used as ``kind``, by ``llm`` where one holds them."""

    gpu: GpuId
    kind: RowKind
    llm: str | None
    num_bytes: int


def ledger(fleet: Fleet, placement: Placement) -> Iterator[LedgerRow]:
    """Rows of every GPU, which sum to its memory; ``free`` is negative if over-booked."""
    for gpu in fleet.cluster.gpus:
        memory_bytes = fleet.cluster.type_of(gpu).memory_bytes
        usable_bytes = fleet.cluster.usable_bytes(gpu)
        free_bytes = usable_bytes
        for replica in placement.by_gpu.get(gpu, ()):
            option = fleet.option_of(replica.llm, replica.gpus)
            rows: list[tuple[RowKind, int]] = [
                ("weights", option.resident_bytes - option.residue_bytes),
                ("residue", option.residue_bytes),
            ]
            if replica.state == "ACTIVE":
                rows.append(("activation", option.activation_bytes))
                rows.append(("kv", option.kv_bytes))
            for kind, num_bytes in (row for row in rows if row[1]):
                free_bytes -= num_bytes
                yield LedgerRow(
                    gpu=gpu, kind=kind, llm=replica.llm, num_bytes=num_bytes
                )
        reserve_bytes = memory_bytes - usable_bytes
        yield LedgerRow(gpu=gpu, kind="reserve", llm=None, num_bytes=reserve_bytes)
        yield LedgerRow(gpu=gpu, kind="free", llm=None, num_bytes=free_bytes)
