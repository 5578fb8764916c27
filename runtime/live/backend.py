"""The live cluster as a `Backend`: what its agents report, and orders to them.

Two threads a node: one asks for reports, which come as soon as something has changed, one
sends orders, each written to the log before it is sent. Neither `observe` nor `apply`
waits for anything but a lock. The agents hold the truth, so a backend that starts anew over
living agents goes on where the last one stopped; its generation is higher, which fences
that one.

Who is routable: ACTIVE, with no order on the way that would end that, on a node that
answers. A replica that drains becomes WARM when the table has nothing in flight for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from foreserve.models.errors import ForeserveError
from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.placement import Action, HostCopy, ReplicaId
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.runtime.clock import Clock, SystemClock
from foreserve.runtime.gateway.table import Routable
from foreserve.runtime.journal import Recorder
from foreserve.runtime.live.eta import Estimate, StepTimes, soonest
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.journal import Notes
from foreserve.runtime.live.messages import (
    Link,
    Move,
    NodeReport,
    Order,
    OrderKind,
    Trouble,
)
from foreserve.runtime.live.remote import NodeStatus, Remote

POLL_S = 1.0
"""A report comes at least so often."""
ANSWER_S = 3.0
"""A node that takes longer to answer is lost."""
AGAIN_S = 0.5
"""Between tries to reach a lost node."""
DRAIN_S = 0.02
"""Between looks at the table while something drains."""


class Routes(Protocol):
    """What the backend needs of the gateway's table."""

    def publish(self, replicas: Sequence[Routable]) -> None: ...

    def abandon(self, replicas: Iterable[ReplicaId]) -> None: ...

    def in_flight(self) -> Mapping[ReplicaId, int]: ...

    def idle_since_s(self) -> Mapping[ReplicaId, float]: ...

    def waiting(self) -> Mapping[str, int]: ...

    def unserved_since_s(self) -> Mapping[str, float]: ...

    def watch(self, gpus: frozenset[GpuId]) -> None: ...


class LiveBackend:
    """A `Backend` over the agents of ``nodes``."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        clock: Clock,
        table: Routes,
        nodes: Mapping[str, Callable[[], Link]],
        log: IntentLog,
        journal: Recorder,
        times: StepTimes | None = None,
    ) -> None:
        """``nodes``: by name, what opens a link to its agent, which may take seconds and
        raise `LinkLost`. ``journal`` is told of phases and faults, by `observe`.
        ``times``: what is known of how long steps take."""
        self.fleet, self.clock, self.table = fleet, clock, table
        self.times = times or StepTimes()
        self._log, self._journal = log, journal
        lines = log.lines()
        self.generation = 1 + max((n.get("generation", 0) for n in lines), default=0)
        self._log.append("generation", generation=self.generation)
        self._step = 0
        self._lock = threading.RLock()
        self._nodes = {name: Remote(name, open_) for name, open_ in nodes.items()}
        self._notes = Notes()
        self.published: tuple[Routable, ...] = ()
        """Who is routable, as the table was told last."""
        self._draining = threading.Event()
        self._reached = threading.Event()
        self._closed = threading.Event()

    # --- life -------------------------------------------------------------------------

    def start(self, wait_s: float = 30.0) -> None:
        """Reach the agents. Returns when each has reported, or after ``wait_s``: those that
        have not are lost until they do."""
        self.table.publish(())
        for node in self._nodes.values():
            self._thread(self._listen, node)
            self._thread(self._send, node)
        self._thread(self._drain)
        clock = SystemClock()
        while any(node.report is None for node in self._nodes.values()):
            left_s = wait_s - clock.now_s()
            if left_s <= 0 or not self._reached.wait(left_s):
                return
            self._reached.clear()

    def close(self, *, stop_engines: bool = False) -> None:
        """End the threads. Agents and engines go on, unless they are to stop as well."""
        self._closed.set()
        self._draining.set()
        self.table.publish(())
        for node in self._nodes.values():
            node.queue.put(None)
        if not stop_engines:
            return

        def stop(node: Remote) -> None:
            try:
                node.open().call("close", timeout_s=60.0)
            except ForeserveError as error:
                node.error = str(error)

        threads = [self._thread(stop, node) for node in self._nodes.values()]
        for thread in threads:
            thread.join()

    def _thread(self, target: Callable[..., None], *args: object) -> threading.Thread:
        name = f"{target.__name__}-{getattr(args[0], 'name', '')}" if args else None
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        thread.start()
        return thread

    # --- Backend -------------------------------------------------------------------------

    def observe(self) -> Observed:
        in_flight, idle = self.table.in_flight(), self.table.idle_since_s()
        waiting = self.table.waiting()
        with self._lock:
            now_s = self.clock.now_s()
            self._notes.tell(self._journal, now_s)
            self._hurry(waiting)
            replicas: list[ObservedReplica] = []
            busy: set[ReplicaId] = set()
            lost: set[GpuId] = set()
            for node in self._nodes.values():
                if node.here is None:
                    lost.update(self.fleet.cluster.node_by_name[node.name].gpu_ids())
                busy.update(node.waited_with(now_s))
                spare = node.spare_bytes()
                for key, phase, leaving in node.phases():
                    if leaving:
                        busy.add(key)
                    works = in_flight.get(key, 0)
                    serves = phase in ("ACTIVE", "DRAINING")
                    idles = phase == "ACTIVE" and not works
                    replicas.append(
                        ObservedReplica(
                            llm=key.llm,
                            gpus=key.gpus,
                            phase=phase,
                            in_flight=works if serves else 0,
                            idle_since_s=idle.get(key) if idles else None,
                            served_since_s=node.served_since_s.get(key),
                            spare_bytes=spare.get(key, 0),
                        )
                    )
        return Observed(
            now_s=now_s,
            replicas=tuple(replicas),
            waiting=waiting,
            unserved_since_s=self.table.unserved_since_s(),
            lost_gpus=frozenset(lost),
            busy=frozenset(busy),
        )

    def apply(self, actions: Sequence[Action]) -> None:
        with self._lock:
            for action in actions:
                self._order(action.kind, action.replica)
            self._publish()

    def watch(self, gpus: frozenset[GpuId]) -> None:
        self.table.watch(gpus)

    def keep(self, copies: Sequence[HostCopy]) -> None:
        """Whose weights the plan wants in host memory; agents know within a second."""
        with self._lock:
            for name, node in self._nodes.items():
                llms = sorted(copy.llm for copy in copies if copy.node == name)
                node.keeps = tuple(llms)

    # --- for the gateway and for people -----------------------------------------------

    def eta(self, llm: str) -> Estimate:
        """Seconds (p50, p90) until ``llm`` serves: what is under way, else a load by the
        plan's times. Infinite where no replica of it may be tried any more."""
        with self._lock:
            now_s = self.clock.now_s()
            found = [
                estimate
                for node in self._nodes.values()
                for estimate in node.estimates(llm, self.fleet, self.times, now_s)
            ]
            if not found:
                options = (o for o in self.fleet.options if o.llm == llm)
                found = [self.times.left(option, None, 0.0) for option in options]
            return soonest(found)

    def status(self) -> tuple[NodeStatus, ...]:
        """Every node with its last report."""
        with self._lock:
            now_s = self.clock.now_s()
            return tuple(node.status(now_s) for node in self._nodes.values())

    def troubles(self) -> tuple[Trouble, ...]:
        """Replicas that have failed and not served long since."""
        with self._lock:
            reports = [n.report for n in self._nodes.values() if n.report is not None]
            return tuple(t for report in reports for t in report.troubles)

    def forgive(self, node: str, key: ReplicaId | None = None) -> None:
        """Have failed replicas of ``node`` tried again at once. Waits for the agent."""
        link = self._nodes[node].open()
        link.call("forgive", key, timeout_s=ANSWER_S)
        link.close()

    # --- what is true -----------------------------------------------------------------

    def _publish(self) -> None:
        """Tell the table who is routable, if that has changed. With the lock."""
        if self._closed.is_set():
            return
        found = [r for node in self._nodes.values() for r in node.routable()]
        routable = tuple(sorted(found, key=lambda r: r.id))
        if routable != self.published:
            self.published = routable
            self.table.publish(routable)

    # --- reports ----------------------------------------------------------------------

    def _listen(self, node: Remote) -> None:
        """Ask for reports until the backend is closed."""
        while not self._closed.is_set():
            try:
                link = node.open()
            except ForeserveError as error:
                self._lose(node, error)
                self._closed.wait(AGAIN_S)
                continue
            try:
                self._take_over(link)
                after, kept = -1, None
                while not self._closed.is_set():
                    if node.keeps != kept:
                        kept = node.keeps
                        link.call("keep", self.generation, kept, timeout_s=ANSWER_S)
                    report: NodeReport = link.call(
                        "report", after, POLL_S, timeout_s=ANSWER_S
                    )
                    self._take(node, report, fresh=after < 0)
                    after = report.version
            except Exception as error:  # whatever the agent raises, it is of no use
                self._lose(node, error)
                self._closed.wait(AGAIN_S)
            finally:
                link.close()

    def _take_over(self, link: Link) -> None:
        # What was ordered over another link has come by now, or shall not any more.
        in_charge = link.call("hello", self.generation, self._step, timeout_s=ANSWER_S)
        if in_charge != self.generation:
            raise ForeserveError(_fenced(in_charge, self.generation))

    def _take(self, node: Remote, report: NodeReport, *, fresh: bool) -> None:
        if report.generation != self.generation:
            raise ForeserveError(_fenced(report.generation, self.generation))
        with self._lock:
            before = node.report
            now_s = self.clock.now_s()
            if fresh:
                # Moves of before are history, and orders that were on their way are lost.
                node.pending.clear()
                for row in report.rows:
                    self._notes.phase(row.id, row.phase, now_s)
            elif before is not None and before.version == report.version:
                node.report, node.at_s = report, now_s
                return
            else:
                for move in report.moves:
                    self._moved(move, now_s)
                done = [k for k, o in node.pending.items() if o.step <= report.step]
                for key in done:
                    del node.pending[key]
            node.take(report, now_s)
            node.lost = False
            self._publish()
            # One that serves is never dropped: it has failed, and will answer nobody.
            self.table.abandon(
                row.id
                for row in report.rows
                if row.leaving and row.phase in ("ACTIVE", "DRAINING")
            )
            if any(row.phase == "DRAINING" for row in report.rows):
                self._draining.set()
        self._reached.set()
        self.clock.wake()

    def _moved(self, move: Move, now_s: float) -> None:
        at_s = now_s - move.ago_s
        if move.lost:
            loads = move.before == "LOADING"
            self._notes.fault(
                "load-failure" if loads else "replica-crash", str(move.id), 1, at_s
            )
        self._notes.phase(move.id, move.phase, at_s, lost=move.lost)
        option = self.fleet.option_of(move.id.llm, move.id.gpus)
        if move.done == "activate":
            self.times.note("activate", option.activate_s, move.took_s)
        elif move.done == "load":
            self.times.note("load", option.load_s, move.took_s)

    def _lose(self, node: Remote, error: Exception) -> None:
        """The node does not answer: nothing on it is routable, its GPUs are gone."""
        if self._closed.is_set():
            return
        with self._lock:
            node.error = str(error)
            if node.lost:
                return
            node.lost = True
            now_s = self.clock.now_s()
            rows = node.report.rows if node.report is not None else ()
            self._notes.fault("node-loss", node.name, len(rows), now_s)
            for row in rows:
                self._notes.phase(row.id, None, now_s, lost=True)
            node.pending.clear()
            self._publish()
            self.table.abandon(row.id for row in rows)
        self.clock.wake()

    # --- orders -----------------------------------------------------------------------

    def _order(self, kind: OrderKind, key: ReplicaId) -> None:
        """Queue an order; with the lock."""
        node = self._nodes[key.gpus[0].node]
        if node.lost:
            return
        self._step += 1
        order = Order(
            generation=self.generation,
            step=self._step,
            kind=kind,
            replica=key,
            urgent=kind == "load" and bool(self.table.waiting().get(key.llm)),
        )
        node.order(order)

    def _hurry(self, waiting: Mapping[str, int]) -> None:
        """Tell agents of loads under way for which requests have begun to wait: until
        then they take spare memory only. With the lock."""
        for node in self._nodes.values():
            for row in () if node.here is None else node.here.rows:
                loads = row.phase == "LOADING" and not (row.urgent or row.leaving)
                if loads and waiting.get(row.id.llm) and row.id not in node.pending:
                    self._order("hurry", row.id)

    def _send(self, node: Remote) -> None:
        link: Link | None = None
        while (order := node.queue.get()) is not None:
            if node.pending.get(order.replica) is not order:
                continue  # the node was lost in between
            try:
                if link is None:
                    link = node.open()
                self._log.append(
                    "intent",
                    at_s=self.clock.now_s(),
                    node=node.name,
                    generation=order.generation,
                    step=order.step,
                    kind=order.kind,
                    llm=order.replica.llm,
                    gpus=[str(gpu) for gpu in order.replica.gpus],
                )
                link.call("order", order, timeout_s=ANSWER_S)
            except Exception as error:  # above all that the link is lost
                # The same node answers `report` or not: it says what has become of it.
                if link is not None:
                    link.close()
                link = None
                with self._lock:
                    node.error = str(error)
                    if node.pending.get(order.replica) is order:
                        del node.pending[order.replica]
                self.clock.wake()
        if link is not None:
            link.close()

    def _drain(self) -> None:
        """Tell agents of replicas that drain and have nothing in flight any more."""
        while not self._closed.is_set():
            self._draining.wait()
            self._draining.clear()
            while not self._closed.is_set() and self._quiesce():
                self._closed.wait(DRAIN_S)

    def _quiesce(self) -> bool:
        """Order what can be; whether anything is left to wait for."""
        in_flight = self.table.in_flight()
        with self._lock:
            left = False
            for node in self._nodes.values():
                if node.here is None:
                    continue
                for row in node.here.rows:
                    if row.phase != "DRAINING" or row.leaving or row.acting:
                        continue
                    left = True
                    if row.id not in node.pending and not in_flight.get(row.id, 0):
                        self._order("quiesce", row.id)
            return left


def _fenced(in_charge: int, own: int) -> str:
    return f"a controller of generation {in_charge} is in charge, this one is of {own}"
