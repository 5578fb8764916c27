"""What the live backend knows, as plain data for people and their tools."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from foreserve.models.observed import HOLDS_KV
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.runtime.live.backend import LiveBackend
from foreserve.runtime.live.messages import NodeReport, Row


def nodes(backend: LiveBackend) -> list[dict[str, Any]]:
    """A row a node: whether it answers, and why not."""
    return [
        {
            "node": status.node,
            "state": "lost" if status.error else "up",
            "error": status.error or None,
            "report_age_s": status.age_s if status.report is not None else None,
            "replicas": len(status.report.rows) if status.report is not None else 0,
            **_place(status.report),
        }
        for status in backend.status()
    ]


def _place(report: NodeReport | None) -> dict[str, Any]:
    """Where the agent was when it was heard of last: the hardware of each GPU."""
    if report is None:
        return {"machine": None, "pid": None, "devices": {}}
    binding = report.place.binding
    return {
        "machine": binding.machine or None,
        "pid": report.place.pid,
        "devices": {str(gpu): index for gpu, index in binding.index_of.items()},
    }


def engines(backend: LiveBackend) -> list[dict[str, Any]]:
    """A row a replica that is there, or that has failed and is waited with."""
    rows = []
    for status in backend.status():
        if status.report is None or status.error:
            continue
        troubles = {trouble.id: trouble for trouble in status.report.troubles}
        for row in status.report.rows:
            rows.append(
                {
                    "node": status.node,
                    "replica": str(row.id),
                    "llm": row.id.llm,
                    "gpus": [str(gpu) for gpu in row.id.gpus],
                    "phase": row.phase,
                    "age_s": row.age_s + status.age_s,
                    "leaving": row.leaving,
                    "reserved_bytes": row.held_bytes,
                    "observed_bytes": row.measured_bytes,
                    "url": row.url or None,
                    "failures": troubles[row.id].failures if row.id in troubles else 0,
                }
            )
            troubles.pop(row.id, None)
        for trouble in troubles.values():
            given_up = math.isinf(trouble.retry_in_s)
            rows.append(
                {
                    "node": status.node,
                    "replica": str(trouble.id),
                    "llm": trouble.id.llm,
                    "gpus": [str(gpu) for gpu in trouble.id.gpus],
                    "phase": None,
                    "url": None,
                    "failures": trouble.failures,
                    "error": trouble.reason,
                    "given_up": given_up,
                    "retry_in_s": None if given_up else trouble.retry_in_s,
                }
            )
    return rows


def ledger(backend: LiveBackend) -> list[dict[str, Any]]:
    """A row for each GPU and kind of bytes that is booked there, and one of kind ``all``
    with capacity, what is free, and what the engines themselves say that they hold (null if
    not all of them can)."""
    rows: list[dict[str, Any]] = []
    for status in backend.status():
        if status.report is not None and not status.error:
            rows += _of_node(backend.fleet, status.report)
            rows += host_rows(status.report)
    return rows


def host_rows(report: NodeReport) -> list[dict[str, Any]]:
    """A row for each LLM whose weights are booked in the node's host memory, and one for
    all of it."""
    place = {"node": report.node, "device": "host", "kind": "host"}
    rows: list[dict[str, Any]] = [
        {
            **place,
            "llm": row.llm,
            "reserved_bytes": row.held_bytes,
            "observed_bytes": row.resident_bytes,
            "whole": row.whole,
            "locked": row.locked,
            "readers": row.readers,
        }
        for row in report.hosted
    ]
    booked = sum(row.held_bytes for row in report.hosted)
    total = {"reserved_bytes": booked, "capacity_bytes": report.host_bytes}
    return [*rows, {**place, "llm": None, **total}]


def _of_node(fleet: Fleet, report: NodeReport) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for gpu, usable_bytes in report.usable_bytes.items():
        here = [row for row in report.rows if gpu in row.id.gpus]
        kinds: Counter[str] = Counter()
        for row in here:
            kinds.update(_kinds(fleet, row))
        place = {"node": report.node, "device": str(gpu)}
        rows += (
            {**place, "kind": kind, "reserved_bytes": num_bytes}
            for kind, num_bytes in sorted(kinds.items())
            if num_bytes
        )
        rows.append({**place, "kind": "all", **_sums(report, gpu, usable_bytes, here)})
    return rows


def _sums(
    report: NodeReport, gpu: GpuId, usable_bytes: int, here: list[Row]
) -> dict[str, int | None]:
    measured = [row.measured_bytes for row in here if row.measured_bytes is not None]
    return {
        "capacity_bytes": usable_bytes,
        "reserved_bytes": sum(row.held_bytes for row in here),
        "free_bytes": report.free_bytes[gpu],
        "observed_bytes": sum(measured) if len(measured) == len(here) else None,
    }


def _kinds(fleet: Fleet, row: Row) -> Mapping[str, int]:
    """What the bytes that are booked for a replica are for."""
    option = fleet.option_of(row.id.llm, row.id.gpus)
    known = {"weights": option.shard_bytes, "residue": option.residue_bytes}
    if row.phase in HOLDS_KV or row.held_bytes >= option.active_bytes + sum(
        known.values()
    ):
        kv_bytes = option.kv_bytes - row.spare_bytes
        known |= {"kv": kv_bytes, "activation": option.activation_bytes}
    return known
