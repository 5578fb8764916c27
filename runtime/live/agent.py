"""The engines of one node, and the books of its memory.

Plain Python and threads: the same object runs in the controller's process, in one of its
own behind a socket, and inside a Ray actor. What holds:

1. No action begins before its peak is booked on each of its GPUs and written to the log,
   in one step; what does not fit is refused here, whatever the controller believes.
2. Bytes are released when the engine is seen to be gone, or to have given them up: when
   it sleeps, or while it drains, so that loads need not wait for its last request.
3. One action per replica at a time, each in a thread; a drop cancels a load.
4. Orders of an older controller are refused, and none is carried out twice.
5. A replica that fails is left alone for a time that doubles, and after ``tries``
   failures in a row until it is forgiven.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from foreserve.models.errors import ForeserveError
from foreserve.models.observed import Phase
from foreserve.models.placement import Kind, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.runtime.clock import Clock, SystemClock
from foreserve.runtime.engines.base import Engine, NoRoom
from foreserve.runtime.ledger import Ledger, OverCommitted
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.life import Door, Life, Signs, line_of
from foreserve.runtime.live.messages import (
    Move,
    NodeReport,
    Order,
    OrderKind,
    Place,
)
from foreserve.runtime.live.patience import Failures, Patience
from foreserve.runtime.live.store import Files, HostStore
from foreserve.runtime.states import check_action, check_move

Make = Callable[[ReplicaOption, ReplicaId], Engine]

BUSY_S = 1.0
"""The books may be closed for so long, while a line of the log goes to a slow disk, before
a report says again what the last one said."""
REMEMBERED = 1000
"""Moves that are kept for whoever asks late."""


class NodeAgent:
    """Owner of everything that runs on ``node``. Any thread may call it; no call blocks
    but `report` with a wait, and `close`."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        node: str,
        make: Make,
        log: IntentLog,
        clock: Clock | None = None,
        patience: Patience | None = None,
        place: Place | None = None,
        files: Files = lambda llm: (),
        keep: Callable[[tuple[str, ...]], None] = lambda llms: None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """``place`` goes into reports, ``facts`` into the log's line of this start;
        ``files`` as for `HostStore`. ``keep`` is told whose weights are to stay in host
        memory, for engines that keep them there themselves."""
        self.node, self._fleet, self._make, self._log = node, fleet, make, log
        self._keep = keep
        self._clock: Clock = clock or SystemClock()
        self._patience, self._place = patience or Patience(), place or Place()
        self._gpus = fleet.cluster.node_by_name[node].gpu_ids()
        self._usable = {gpu: fleet.cluster.usable_bytes(gpu) for gpu in self._gpus}
        self._ledger = Ledger(fleet)
        self._store = HostStore(fleet, node, log, self._now_s, files)
        self._bringing = False
        self._lives: dict[ReplicaId, Life] = {}
        self._failures = Failures(self._patience, self._now_s)
        self._signs = Signs(self._patience, self._now_s)
        self._moves: deque[tuple[float, Move]] = deque(maxlen=REMEMBERED)
        self._version, self._generation, self._step = 0, 0, 0
        self._changed = threading.Condition(threading.RLock())
        self._closed = threading.Event()
        capacity = {str(gpu): num_bytes for gpu, num_bytes in self._usable.items()}
        host = self._store.capacity_bytes if self._store.cached else None
        self._log.append(
            "start", node=node, capacity=capacity, host=host, **(facts or {})
        )
        self._told = self._tell(-1)
        threading.Thread(target=self._watch, name=f"watch-{node}", daemon=True).start()

    # --- what a controller calls ------------------------------------------------------

    def hello(self, generation: int, step: int = 0) -> int:
        """A controller takes over: orders of earlier ones are refused from now on, and so
        are its own up to ``step``, which may come late over a link that it has given up.
        Returns the highest generation that has said hello, which is ``generation`` unless
        the caller itself is late."""
        with self._changed:
            if generation > self._generation:
                self._log.append("fence", generation=generation, at_s=self._now_s())
                self._generation, self._step = generation, 0
                self._touch()
            if generation == self._generation and step > self._step:
                self._step = step
                self._touch()
            return self._generation

    def order(self, order: Order) -> str:
        """Begin one step. Empty, or why it was refused."""
        with self._changed:
            if order.generation != self._generation:
                return self._refuse(
                    order,
                    f"generation {order.generation}, but {self._generation} is in charge",
                )
            if order.step <= self._step:
                return ""  # carried out before, or given up
            self._step = order.step
            self._touch()
            try:
                self._begin(order)
            except ForeserveError as error:
                return self._refuse(order, str(error))
            return ""

    def report(self, after: int = -1, wait_s: float = 0.0) -> NodeReport:
        """What is true now; with ``wait_s`` as soon as it is newer than ``after``."""
        if not self._changed.acquire(timeout=BUSY_S):
            told = self._told
            moves = tuple(move for move in told.moves if move.version > after)
            return replace(told, moves=moves)
        try:
            self._changed.wait_for(
                lambda: self._version > after or self._closed.is_set(), wait_s
            )
            self._told = self._tell(after)
            return self._told
        finally:
            self._changed.release()

    def _tell(self, after: int) -> NodeReport:
        """With the lock."""
        now_s = self._now_s()
        return NodeReport(
            node=self.node,
            version=self._version,
            generation=self._generation,
            step=self._step,
            rows=tuple(life.row(now_s) for life in self._lives.values()),
            moves=tuple(
                replace(move, ago_s=now_s - at_s)
                for at_s, move in self._moves
                if move.version > after
            ),
            troubles=self._failures.told(),
            usable_bytes=dict(self._usable),
            free_bytes={gpu: self._ledger.free_bytes[gpu] for gpu in self._gpus},
            place=self._place,
            host_bytes=self._store.capacity_bytes,
            hosted=self._store.rows(),
        )

    def keep(self, generation: int, llms: tuple[str, ...]) -> None:
        """Whose weights host memory is to keep, as the plan of the controller in charge
        has it. Those of which there are files are brought in while nothing loads."""
        with self._changed:
            if generation == self._generation:
                self._keep(llms)
                self._store.keep(llms)
                if self._store.missing() and not self._bringing:
                    self._bringing = True
                    threading.Thread(target=self._bring, daemon=True).start()

    def forgive(self, key: ReplicaId | None = None) -> None:
        """Try a replica that failed again at once; None: all of them."""
        with self._changed:
            self._failures.forget(key)
            self._touch()

    def close(self, within_s: float = 30.0) -> None:
        """Stop every engine and return when all are gone, or after ``within_s``."""
        with self._changed:
            self._closed.set()
            lives = list(self._lives.values())
        until_s = self._now_s() + within_s
        threads = [self._end(life, "the agent stops") for life in lives]
        for thread in threads:
            if thread is not None:
                thread.join(max(0.0, until_s - self._now_s()))
        self._signs.close()
        with self._changed:
            self._changed.notify_all()

    # --- orders -----------------------------------------------------------------------

    def _begin(self, order: Order) -> None:
        """Check, book, write down, start the thread. Raises before anything has changed."""
        key, now_s = order.replica, self._now_s()
        life = self._lives.get(key)
        phase, story = (life.phase, life.story) if life else (None, [])
        if self._closed.is_set() or (life is not None and life.leaving):
            raise ForeserveError(f"{key}: it is being stopped")
        if order.kind == "hurry":
            if life is not None and phase == "LOADING" and not life.urgent:
                self._hurry(life)
            return
        if order.kind == "quiesce":
            after: Phase | None = "DRAINING"
            if phase != "DRAINING":
                raise ForeserveError(f"{key}: cannot quiesce while {phase or 'absent'}")
        else:
            kind: Kind = order.kind
            after = check_action(kind, key, phase, story)
        if life is not None and life.acting_since_s is not None and after is not None:
            raise ForeserveError(f"{key}: another action is under way")
        if life is None:
            life = self._new(key, now_s)
        if order.urgent:
            life.urgent = True
            life.engine.hurry()  # Nothing is under way yet.
        held = life.held_bytes
        if after is not None and order.kind != "quiesce":
            held = max(held, life.needs_bytes(after))
        try:
            self._ledger.hold(key.gpus, held - life.held_bytes)
        except OverCommitted as error:
            # Whoever asked believes in other books than these: not again at once.
            self._failures.note(key, str(error), ever=True)
            raise
        life.held_bytes = held
        if order.kind == "load":
            self._store.begin(key.llm, life.option.stored_bytes)
        self._log.append(
            "intent",
            at_s=now_s,
            generation=order.generation,
            step=order.step,
            kind=order.kind,
            llm=key.llm,
            gpus=[str(gpu) for gpu in key.gpus],
            phase=after or life.phase,
            held=held,
        )
        self._lives[key] = life
        if after is None:
            self._end(life, "")
            return
        if after != life.phase or order.kind == "load":
            self._enter(life, after)
        if order.kind != "demote":
            self._act(life, order.kind)

    def _new(self, key: ReplicaId, now_s: float) -> Life:
        if not all(gpu in self._usable for gpu in key.gpus):
            raise ForeserveError(f"{key}: not a replica of node {self.node!r}")
        self._failures.check(key)
        option = self._fleet.option_of(key.llm, key.gpus)
        load_s = self._store.load_s(option, key.gpus)
        if load_s != option.load_s:
            option = replace(option, load_s=load_s)
        try:
            engine = self._make(option, key)
        except Exception as error:  # the factory is somebody else's code
            self._failures.note(key, line_of(error))
            self._touch()
            raise ForeserveError(f"{key}: no engine: {line_of(error)}") from error
        return Life(
            id=key,
            option=option,
            engine=engine,
            phase="LOADING",
            since_s=now_s,
        )

    def _hurry(self, life: Life) -> None:
        life.urgent = True
        self._touch()
        threading.Thread(
            target=life.engine.hurry, name=f"hurry-{life.id}", daemon=True
        ).start()

    def _act(self, life: Life, kind: OrderKind) -> None:
        expected_s = life.option.load_s if kind == "load" else life.option.activate_s
        life.acting_since_s = self._now_s()
        life.limit_s = self._patience.limit_s(expected_s)
        thread = threading.Thread(
            target=self._carry_out,
            args=(life, kind),
            name=f"{kind}-{life.id}",
            daemon=True,
        )
        thread.start()

    def _carry_out(self, life: Life, kind: OrderKind) -> None:
        after: Phase = "ACTIVE" if kind == "activate" else "WARM"
        try:
            if kind == "load":
                self._load(life)
            elif kind == "activate":
                life.engine.activate()
            else:
                life.engine.quiesce()
            measured = life.engine.memory_bytes()
            door = Door.of(life.engine) if after == "ACTIVE" else Door()
        except Exception as error:  # whatever an engine raises, the replica has failed
            room = isinstance(error, NoRoom)
            self._end(life, line_of(error), failed=True, ever=room)
            return
        with self._changed:
            if life.leaving or life.acting_since_s is None:
                return
            took_s = self._now_s() - life.acting_since_s
            life.acting_since_s, life.measured_bytes = None, measured
            life.door = door
            needs = life.needs_bytes(after)
            try:
                self._ledger.hold(life.id.gpus, needs - life.held_bytes)
            except OverCommitted as error:
                # Only known now: what it holds asleep is not what the plan believes.
                self._end(life, str(error), failed=True)
                return
            life.held_bytes, life.spare_bytes = needs, 0
            self._enter(life, after, done=kind, took_s=took_s)

    def _bring(self) -> None:
        """Until host memory has what it is to keep. Loads come first: meanwhile, and where
        one begins, it waits."""

        def loads() -> bool:
            lives = tuple(self._lives.values())
            return self._closed.is_set() or any(e.phase == "LOADING" for e in lives)

        while not self._closed.wait(self._patience.watch_s):
            self._store.bring(self._changed, loads)
            with self._changed:
                self._touch()
                if not self._store.missing():
                    self._bringing = False
                    return

    def _load(self, life: Life) -> None:
        """Weights into host memory, where there is room booked for them, and then to the
        GPUs."""
        llm, done = life.id.llm, False
        try:
            self._store.fill(llm, lambda: life.leaving)
            life.engine.start()
            done = True
        finally:
            with self._changed:
                self._store.end(llm, done=done)
                self._touch()

    def _shrink(self, life: Life) -> None:
        """Book that a replica which drains has given up memory for good."""
        with self._changed:
            since_s, spare_bytes = life.shrunk
            more = spare_bytes - life.spare_bytes
            ends = life.leaving or life.acting_since_s is not None
            if life.phase != "DRAINING" or since_s != life.since_s or ends or more <= 0:
                return
            self._ledger.hold(life.id.gpus, -more)
            life.held_bytes, life.spare_bytes = life.held_bytes - more, spare_bytes
            self._log.append(
                "shrink",
                at_s=self._now_s(),
                llm=life.id.llm,
                gpus=[str(gpu) for gpu in life.id.gpus],
                held=life.held_bytes,
            )
            self._touch()

    # --- ends -------------------------------------------------------------------------

    def _end(
        self, life: Life, reason: str, *, failed: bool = False, ever: bool = False
    ) -> threading.Thread | None:
        """Have the engine stopped, in a thread; None if that is under way already.
        ``ever``: it is not to be given up for it."""
        with self._changed:
            if life.leaving:
                return None
            life.leaving = True
            self._touch()
            thread = threading.Thread(
                target=self._stop,
                args=(life, reason, failed, ever),
                name=f"stop-{life.id}",
                daemon=True,
            )
            thread.start()
            return thread

    def _stop(self, life: Life, reason: str, failed: bool, ever: bool) -> None:
        """Stop the engine until it is seen to be gone: only then is its memory free."""
        pause = threading.Event()
        while True:
            try:
                life.engine.stop()
                if not life.engine.alive() and not life.engine.memory_bytes():
                    break
            except Exception as error:  # it must be tried again, whatever it was
                reason = reason or line_of(error)
            pause.wait(self._patience.watch_s)
        with self._changed:
            now_s = self._now_s()
            if failed:
                loaded_s = life.story[1][0] if len(life.story) > 1 else now_s
                settled = now_s - loaded_s >= self._patience.settled_s
                self._failures.note(life.id, reason, settled=settled, ever=ever)
            elif life.phase in ("WARM", "ACTIVE"):
                self._failures.forget(life.id)
            self._ledger.hold(life.id.gpus, -life.held_bytes)
            life.held_bytes = 0
            del self._lives[life.id]
            self._enter(life, None, lost=failed, reason=reason)

    # --- state ------------------------------------------------------------------------

    def _enter(
        self,
        life: Life,
        phase: Phase | None,
        *,
        lost: bool = False,
        done: OrderKind | None = None,
        took_s: float = 0.0,
        reason: str = "",
    ) -> None:
        """Change phase: checked against the table, written down, told."""
        now_s = self._now_s()
        before = life.story[-1][1] if life.story else None
        check_move(life.id, before, phase, life.story)
        life.story.append((now_s, phase))
        if phase is not None:
            life.phase = phase
        life.since_s = now_s
        self._log.append(
            "phase",
            at_s=now_s,
            llm=life.id.llm,
            gpus=[str(gpu) for gpu in life.id.gpus],
            phase=phase,
            held=life.held_bytes,
            lost=lost,
            reason=reason,
        )
        self._touch()
        move = Move(
            version=self._version,
            id=life.id,
            phase=phase,
            before=before,
            ago_s=0.0,
            lost=lost,
            done=done,
            took_s=took_s,
            reason=reason,
        )
        self._moves.append((now_s, move))

    def _refuse(self, order: Order, reason: str) -> str:
        self._log.append(
            "refused",
            at_s=self._now_s(),
            generation=order.generation,
            step=order.step,
            kind=order.kind,
            llm=order.replica.llm,
            gpus=[str(gpu) for gpu in order.replica.gpus],
            reason=reason,
        )
        self._touch()
        return reason

    def _touch(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _now_s(self) -> float:
        return self._clock.now_s()

    def _watch(self) -> None:
        """Notice engines that died, hang, or take too long; and when a wait is over."""
        while not self._closed.wait(self._patience.watch_s):
            with self._changed:
                lives = [life for life in self._lives.values() if not life.leaving]
                if self._failures.over():
                    self._touch()
            for life in lives:
                reason = self._signs.fault(life)
                if reason:
                    self._end(life, reason, failed=True)
                elif life.phase == "DRAINING":
                    self._shrink(life)
            if self._store.look():
                with self._changed:
                    self._touch()
