"""Engines that cannot sleep: what a WARM replica of theirs takes."""

from __future__ import annotations

from dataclasses import replace

from foreserve.models.problem import Fleet


def always_awake(fleet: Fleet) -> Fleet:
    """``fleet`` as the books see it when its engines have no real sleep: a WARM replica
    holds its KV memory and its activations too, so all bytes count as resident.

    For solving, reconciling and the agents' ledgers, which then agree that nothing is won
    by demoting alone. Engines are still made with the options of ``fleet``.
    """
    return replace(
        fleet,
        options=tuple(
            replace(
                option,
                resident_bytes=option.resident_bytes + option.active_bytes,
                residue_bytes=option.residue_bytes + option.active_bytes,
                kv_bytes=0,
                activation_bytes=0,
            )
            for option in fleet.options
        ),
    )
