"""One node as the controller knows it: its last report, and the orders on their way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue

from foreserve.models.observed import Phase
from foreserve.models.placement import ReplicaId
from foreserve.models.problem import Fleet
from foreserve.runtime.gateway.table import Routable
from foreserve.runtime.live.eta import Estimate, StepTimes
from foreserve.runtime.live.messages import Link, NodeReport, Order, OrderKind

BECOMES: Mapping[OrderKind, Phase] = {
    "load": "LOADING",
    "activate": "ACTIVATING",
    "demote": "DRAINING",
}
"""How a replica is seen from the order on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """What is known of one node, for people."""

    node: str
    error: str
    """Why it is lost; empty where it is not."""
    report: NodeReport | None
    """The last one."""
    age_s: float
    """Of the report."""


@dataclass(slots=True, eq=False)
class Remote:
    """Mutable; whoever owns it locks."""

    name: str
    open: Callable[[], Link]
    queue: SimpleQueue[Order | None] = field(default_factory=SimpleQueue)
    """Orders to be sent; None: no more will come."""
    report: NodeReport | None = None
    at_s: float = 0.0
    """When the report came."""
    lost: bool = True
    error: str = "not reached yet"
    pending: dict[ReplicaId, Order] = field(default_factory=dict)
    """The last order on each replica, until a report has it."""

    served_since_s: dict[ReplicaId, float] = field(default_factory=dict)
    """When each became ACTIVE last, as far as this controller, or the agent, knows."""
    keeps: tuple[str, ...] = ()
    """LLMs whose weights its host memory is to keep."""

    @property
    def here(self) -> NodeReport | None:
        """The last report, while the node answers."""
        return None if self.lost else self.report

    def order(self, order: Order) -> None:
        self.pending[order.replica] = order
        self.queue.put(order)

    def take(self, report: NodeReport, now_s: float) -> None:
        """``report`` has come: see who has become ACTIVE, and who is gone."""
        known, rows = (
            self.served_since_s,
            () if self.report is None else self.report.rows,
        )
        served = {row.id for row in rows if row.phase == "ACTIVE"}
        self.served_since_s = {}
        for row in report.rows:
            if row.phase == "ACTIVE" and row.id not in served:
                age_s = row.age_s if self.report is None else 0.0
                self.served_since_s[row.id] = now_s - age_s
            elif row.phase in ("ACTIVE", "DRAINING", "WARM") and row.id in known:
                self.served_since_s[row.id] = known[row.id]
        self.report, self.at_s = report, now_s

    def phases(self) -> Iterator[tuple[ReplicaId, Phase, bool]]:
        """Replicas of a node that answers, as if the orders on their way had come: id,
        phase, whether it is on its way out."""
        report = self.here
        if report is None:
            return
        there = set()
        for row in report.rows:
            there.add(row.id)
            order = self.pending.get(row.id)
            phase = BECOMES.get(order.kind, row.phase) if order else row.phase
            leaving = row.leaving or (order is not None and order.kind == "drop")
            yield row.id, phase, leaving
        for key, order in self.pending.items():
            if key not in there and order.kind == "load":
                yield key, "LOADING", False

    def routable(self) -> Iterator[Routable]:
        """ACTIVE, with no order on the way that would end that."""
        report = self.here
        if report is None:
            return
        rows = {row.id: row for row in report.rows}
        for key, phase, leaving in self.phases():
            if phase == "ACTIVE" and not leaving:
                row = rows[key]
                yield Routable(
                    id=key,
                    url=row.url,
                    max_num_seqs=row.max_num_seqs,
                    room_tokens=row.room_tokens,
                    served_name=row.served_name,
                    key=report.place.key,
                )

    def spare_bytes(self) -> dict[ReplicaId, int]:
        """What replicas that drain have given up on each of their GPUs."""
        rows = () if self.here is None else self.here.rows
        return {row.id: row.spare_bytes for row in rows if row.phase == "DRAINING"}

    def waited_with(self, now_s: float) -> Iterator[ReplicaId]:
        """Replicas that failed and may not be tried yet."""
        if self.here is not None:
            for trouble in self.here.troubles:
                if trouble.retry_in_s > now_s - self.at_s:
                    yield trouble.id

    def estimates(
        self, llm: str, fleet: Fleet, times: StepTimes, now_s: float
    ) -> Iterator[Estimate]:
        """Until each replica of ``llm`` serves that is there, or may be tried again;
        infinite for one that may not."""
        report = self.here
        if report is None:
            return
        passed_s = now_s - self.at_s
        ages = {row.id: row.age_s + passed_s for row in report.rows}
        for key, phase, leaving in self.phases():
            if key.llm == llm and not leaving:
                age_s = 0.0 if key in self.pending else ages[key]
                yield times.left(fleet.option_of(llm, key.gpus), phase, age_s)
        for trouble in report.troubles:
            if trouble.id.llm != llm:
                continue
            if math.isinf(trouble.retry_in_s):
                yield math.inf, math.inf
                continue
            retry_s = max(0.0, trouble.retry_in_s - passed_s)
            option = fleet.option_of(llm, trouble.id.gpus)
            p50_s, p90_s = times.left(option, None, 0.0)
            yield retry_s + p50_s, retry_s + p90_s

    def status(self, now_s: float) -> NodeStatus:
        return NodeStatus(
            node=self.name,
            error=self.error if self.lost else "",
            report=self.report,
            age_s=now_s - self.at_s,
        )
