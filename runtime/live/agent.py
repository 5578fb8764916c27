"""The engines of one node, and the books of its memory.

Plain Python and threads: the same object runs in the controller's process, in one of its
own behind a socket, and inside a Ray actor. What holds:

1. No action begins before its peak is booked on each of its GPUs and written to the log,
   in one step; what does not fit is refused here, whatever the controller believes.
2. Bytes are released when the engine is seen to be gone, or seen to have given them up.
3. One action per replica at a time, each in a thread; a drop cancels a load.
4. Orders of an older controller are refused, and none is carried out twice.
5. A replica that fails is left alone for a time that doubles, and after ``tries``
   failures in a row until it is forgiven.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from foreserve.models.errors import ForeserveError
from foreserve.models.observed import Phase
from foreserve.models.placement import Kind, ReplicaId
from foreserve.models.problem import Fleet, ReplicaOption
from foreserve.runtime.clock import Clock, SystemClock
from foreserve.runtime.engines.base import Engine
from foreserve.runtime.ledger import Ledger, OverCommitted, phase_bytes
from foreserve.runtime.live.intents import IntentLog
from foreserve.runtime.live.messages import (
    Move,
    NodeReport,
    Order,
    OrderKind,
    Row,
    Trouble,
)
from foreserve.runtime.states import check_action, check_move

Make = Callable[[ReplicaOption, ReplicaId], Engine]

REMEMBERED = 1000
"""Moves that are kept for whoever asks late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long an agent waits for what."""

    watch_s: float = 0.5
    """Between looks at each engine."""
    hang_s: float = 5.0
    """An engine that does not say for so long whether it lives counts as dead."""
    misses: int = 2
    """So many times in a row it must say that it does not live: one may be the machine's
    being busy."""
    act_factor: float = 5.0
    act_least_s: float = 60.0
    """An action may take this many times what the plan says, and at least so long."""
    first_retry_s: float = 1.0
    last_retry_s: float = 60.0
    tries: int = 5
    settled_s: float = 60.0
    """What fails after having served so long fails for the first time again."""

    def retry_in_s(self, failures: int) -> float:
        if failures >= self.tries:
            return math.inf
        return min(self.last_retry_s, self.first_retry_s * 2.0 ** (failures - 1))


@dataclass(frozen=True, slots=True)
class _Door:
    """Where requests go; as the engine said when it became ACTIVE."""

    url: str = ""
    served_name: str = ""
    max_num_seqs: int = 0
    room_tokens: int = 0

    @classmethod
    def of(cls, engine: Engine) -> _Door:
        return cls(
            engine.url, engine.served_name, engine.max_num_seqs, engine.room_tokens
        )


@dataclass(slots=True, eq=False)
class _Life:
    """One life of a replica, from its load until it is gone."""

    id: ReplicaId
    option: ReplicaOption
    engine: Engine
    phase: Phase
    since_s: float
    held_bytes: int
    story: list[tuple[float, Phase | None]] = field(default_factory=list)
    leaving: bool = False
    acting_since_s: float | None = None
    """When the action under way began."""
    limit_s: float = math.inf
    """How long it may take."""
    measured_bytes: int | None = None
    door: _Door = _Door()
    sign: Future[bool] | None = None
    """Of life: asked for, not there yet."""
    asked_s: float = math.inf
    """Since when it has not answered."""
    misses: int = 0


@dataclass(slots=True)
class _Failing:
    failures: int
    reason: str
    retry_s: float


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
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """``facts`` go into the log's line of this start."""
        self.node, self._fleet, self._make, self._log = node, fleet, make, log
        self._clock: Clock = clock or SystemClock()
        self._patience = patience or Patience()
        self._gpus = fleet.cluster.node_by_name[node].gpu_ids()
        self._usable = {gpu: fleet.cluster.usable_bytes(gpu) for gpu in self._gpus}
        self._ledger = Ledger(fleet)
        self._lives: dict[ReplicaId, _Life] = {}
        self._failing: dict[ReplicaId, _Failing] = {}
        self._moves: deque[tuple[float, Move]] = deque(maxlen=REMEMBERED)
        self._version, self._generation, self._step = 0, 0, 0
        self._changed = threading.Condition(threading.RLock())
        self._closed = threading.Event()
        capacity = {str(gpu): num_bytes for gpu, num_bytes in self._usable.items()}
        self._log.append("start", node=node, capacity=capacity, **(facts or {}))
        self._pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="alive")
        threading.Thread(target=self._watch, name=f"watch-{node}", daemon=True).start()

    # --- what a controller calls ------------------------------------------------------

    def hello(self, generation: int) -> int:
        """A controller takes over: orders of earlier ones are refused from now on.
        Returns the highest generation that has said hello, which is ``generation`` unless
        the caller itself is late."""
        with self._changed:
            if generation > self._generation:
                self._log.append("fence", generation=generation, at_s=self._now_s())
                self._generation, self._step = generation, 0
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
                return ""  # carried out before
            self._step = order.step
            self._touch()
            try:
                self._begin(order)
            except ForeserveError as error:
                return self._refuse(order, str(error))
            return ""

    def report(self, after: int = -1, wait_s: float = 0.0) -> NodeReport:
        """What is true now; with ``wait_s`` as soon as it is newer than ``after``."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._version > after or self._closed.is_set(), wait_s
            )
            now_s = self._now_s()
            return NodeReport(
                node=self.node,
                version=self._version,
                generation=self._generation,
                step=self._step,
                rows=tuple(self._row(life, now_s) for life in self._lives.values()),
                moves=tuple(
                    replace(move, ago_s=now_s - at_s)
                    for at_s, move in self._moves
                    if move.version > after
                ),
                troubles=tuple(
                    Trouble(
                        id=key,
                        failures=failing.failures,
                        reason=failing.reason,
                        retry_in_s=max(0.0, failing.retry_s - now_s),
                    )
                    for key, failing in self._failing.items()
                ),
                usable_bytes=dict(self._usable),
                free_bytes={gpu: self._ledger.free_bytes[gpu] for gpu in self._gpus},
            )

    def forgive(self, key: ReplicaId | None = None) -> None:
        """Try a replica that failed again at once; None: all of them."""
        with self._changed:
            if key is None:
                self._failing.clear()
            else:
                self._failing.pop(key, None)
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
        self._pool.shutdown(wait=False, cancel_futures=True)
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
        held = life.held_bytes
        if after is not None:
            held = max(held, self._needs(life, after))
        try:
            self._ledger.hold(key.gpus, held - life.held_bytes)
        except OverCommitted as error:
            # Whoever asked believes in other books than these: not again at once.
            self._failed(key, str(error), most=self._patience.tries - 1)
            raise
        life.held_bytes = held
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

    def _new(self, key: ReplicaId, now_s: float) -> _Life:
        if not all(gpu in self._usable for gpu in key.gpus):
            raise ForeserveError(f"{key}: not a replica of node {self.node!r}")
        failing = self._failing.get(key)
        if failing is not None and failing.retry_s > now_s:
            raise ForeserveError(
                f"{key}: failed {failing.failures} times, at last: {failing.reason}"
            )
        option = self._fleet.option_of(key.llm, key.gpus)
        try:
            engine = self._make(option, key)
        except Exception as error:  # the factory is somebody else's code
            self._failed(key, _line(error))
            raise ForeserveError(f"{key}: no engine: {_line(error)}") from error
        return _Life(
            id=key,
            option=option,
            engine=engine,
            phase="LOADING",
            since_s=now_s,
            held_bytes=0,
        )

    def _act(self, life: _Life, kind: OrderKind) -> None:
        expected_s = life.option.load_s if kind == "load" else life.option.activate_s
        patience = self._patience
        life.acting_since_s = self._now_s()
        life.limit_s = max(patience.act_least_s, patience.act_factor * expected_s)
        thread = threading.Thread(
            target=self._carry_out,
            args=(life, kind),
            name=f"{kind}-{life.id}",
            daemon=True,
        )
        thread.start()

    def _carry_out(self, life: _Life, kind: OrderKind) -> None:
        after: Phase = "ACTIVE" if kind == "activate" else "WARM"
        try:
            if kind == "load":
                life.engine.start()
            elif kind == "activate":
                life.engine.activate()
            else:
                life.engine.quiesce()
            measured = life.engine.memory_bytes()
            door = _Door.of(life.engine) if after == "ACTIVE" else _Door()
        except Exception as error:  # whatever an engine raises, the replica has failed
            self._end(life, _line(error), failed=True)
            return
        with self._changed:
            if life.leaving or life.acting_since_s is None:
                return
            took_s = self._now_s() - life.acting_since_s
            life.acting_since_s, life.measured_bytes = None, measured
            life.door = door
            needs = self._needs(life, after)
            try:
                self._ledger.hold(life.id.gpus, needs - life.held_bytes)
            except OverCommitted as error:
                # Only known now: what it holds asleep is not what the plan believes.
                self._end(life, str(error), failed=True)
                return
            life.held_bytes = needs
            self._enter(life, after, done=kind, took_s=took_s)

    def _needs(self, life: _Life, phase: Phase) -> int:
        """Bytes per GPU to book in ``phase``: without real sleep, all of them always."""
        asleep = phase in ("LOADING", "WARM")
        if asleep and not life.engine.capabilities.real_sleep:
            return phase_bytes(life.option, "ACTIVE")
        return phase_bytes(life.option, phase)

    # --- ends -------------------------------------------------------------------------

    def _end(
        self, life: _Life, reason: str, *, failed: bool = False
    ) -> threading.Thread | None:
        """Have the engine stopped, in a thread; None if that is under way already."""
        with self._changed:
            if life.leaving:
                return None
            life.leaving = True
            self._touch()
            thread = threading.Thread(
                target=self._stop,
                args=(life, reason, failed),
                name=f"stop-{life.id}",
                daemon=True,
            )
            thread.start()
            return thread

    def _stop(self, life: _Life, reason: str, failed: bool) -> None:
        """Stop the engine until it is seen to be gone: only then is its memory free."""
        pause = threading.Event()
        while True:
            try:
                life.engine.stop()
                if not life.engine.alive() and not life.engine.memory_bytes():
                    break
            except Exception as error:  # it must be tried again, whatever it was
                reason = reason or _line(error)
            pause.wait(self._patience.watch_s)
        with self._changed:
            now_s = self._now_s()
            if failed:
                loaded_s = life.story[1][0] if len(life.story) > 1 else now_s
                settled = now_s - loaded_s >= self._patience.settled_s
                self._failed(life.id, reason, settled=settled)
            elif life.phase in ("WARM", "ACTIVE"):
                self._failing.pop(life.id, None)
            self._ledger.hold(life.id.gpus, -life.held_bytes)
            life.held_bytes = 0
            del self._lives[life.id]
            self._enter(life, None, lost=failed, reason=reason)

    def _failed(
        self,
        key: ReplicaId,
        reason: str,
        *,
        settled: bool = False,
        most: int | None = None,
    ) -> None:
        """One more failure in a row, the first if it had ``settled``; not counted beyond
        ``most``, so that it is never given up."""
        before = self._failing.get(key)
        failures = 1 if before is None or settled else before.failures + 1
        failures = failures if most is None else max(1, min(failures, most))
        retry_s = self._now_s() + self._patience.retry_in_s(failures)
        self._failing[key] = _Failing(failures, reason, retry_s)
        self._touch()

    # --- state ------------------------------------------------------------------------

    def _enter(
        self,
        life: _Life,
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

    def _row(self, life: _Life, now_s: float) -> Row:
        door = life.door
        return Row(
            id=life.id,
            phase=life.phase,
            age_s=now_s - life.since_s,
            held_bytes=life.held_bytes,
            measured_bytes=life.measured_bytes,
            acting=life.acting_since_s is not None,
            leaving=life.leaving,
            url=door.url,
            served_name=door.served_name,
            max_num_seqs=door.max_num_seqs,
            room_tokens=door.room_tokens,
        )

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

    # --- watching ---------------------------------------------------------------------

    def _watch(self) -> None:
        """Notice engines that died, hang, or take too long; and when a wait is over."""
        while not self._closed.wait(self._patience.watch_s):
            now_s = self._now_s()
            with self._changed:
                lives = [life for life in self._lives.values() if not life.leaving]
                over = [f for f in self._failing.values() if 0 < f.retry_s <= now_s]
                for failing in over:
                    failing.retry_s = 0.0
                    self._touch()
            for life in lives:
                reason = self._fault(life, now_s)
                if reason:
                    self._end(life, reason, failed=True)

    def _fault(self, life: _Life, now_s: float) -> str:
        began_s = life.acting_since_s
        if began_s is not None and now_s - began_s > life.limit_s:
            return f"{life.phase} for more than {life.limit_s:g} s"
        if life.phase == "LOADING":
            return ""
        if life.sign is None:
            life.asked_s = math.inf
            life.sign = self._pool.submit(self._ask, life)
            return ""
        if not life.sign.done():
            late = now_s - life.asked_s > self._patience.hang_s
            return "it does not answer" if late else ""
        sign, life.sign = life.sign, None
        error = sign.exception()
        if error is None and sign.result():
            life.misses = 0
            return ""
        life.misses += 1
        if life.misses < self._patience.misses:
            return ""
        return "it died" if error is None else _line(error)

    def _ask(self, life: _Life) -> bool:
        life.asked_s = self._now_s()
        return life.engine.alive()


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
