"""Engines that cannot sleep, or not from the first: what is to be booked for them."""

from __future__ import annotations

from dataclasses import replace

from foreserve.models.problem import Fleet


def awake_while_loading(fleet: Fleet) -> Fleet:
    """``fleet`` as the books see it when its engines allocate their KV memory at their
    start, and sleep only then: loads have a peak."""
    return replace(
        fleet,
        options=tuple(
            replace(option, load_extra_bytes=option.active_bytes)
            for option in fleet.options
        ),
    )


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
