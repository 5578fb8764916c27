"""A cluster that serves: gateway, planner, controller and agents, put together.

State lives in one folder: agents' logs and sockets, the plan that is carried out, the
journal, and how to reach the admin port. Whoever starts again over the same folder finds
the agents, and goes on with that plan.
"""

from __future__ import annotations

import math
import os
import secrets
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from foreserve.cli.agents import agents_of
from foreserve.cli.books import Books
from foreserve.cli.operating import Operating
from foreserve.cli.receipts import Receipts, read_receipts
from foreserve.cli.state import State, Steady
from foreserve.models.codec import (
    dump_json,
    from_json,
    load_plan,
    read_text,
    to_json,
    write_text,
)
from foreserve.models.observed import Observed
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet
from foreserve.planner.online import LivePolicy
from foreserve.planner.proposals import Mode
from foreserve.planner.scenario import Scenario
from foreserve.planner.wishes import Wishes
from foreserve.runtime.clock import unix_s
from foreserve.runtime.controller import Controller
from foreserve.runtime.engines.base import EngineSettings
from foreserve.runtime.gateway.admin import admin_app
from foreserve.runtime.gateway.app import public_app
from foreserve.runtime.gateway.feed import Feed
from foreserve.runtime.gateway.gateway import Gateway, Settings
from foreserve.runtime.gateway.job import ServedLlm
from foreserve.runtime.gateway.keys import ApiKey, hashed
from foreserve.runtime.gateway.metrics import DriftMetrics, Modes
from foreserve.runtime.gateway.server import Server
from foreserve.runtime.gateway.table import RequestRecord, RoutingTable
from foreserve.runtime.journal import Started
from foreserve.runtime.live.awake import always_awake, awake_while_loading
from foreserve.runtime.live.backend import LiveBackend
from foreserve.runtime.live.journal import LiveJournal
from foreserve.runtime.live.since import check_clock
from foreserve.runtime.timeline import Timeline
from foreserve.traces.trace import Demand

REVIEW_S = 3600.0
SAMPLE_S = 1.0
"""Between looks at the queues, for the status page."""
SHOWN_S = 3600.0
"""The status page shows what happened in so many real seconds, or in `SHOWN_EPOCHS`."""
SHOWN_EPOCHS = 4
LATELY_S = 60.0
"""What counts as lately there, in real seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Where and how to serve."""

    folder: Path
    engine: str = "simulated"
    settings: EngineSettings | None = None
    """Of the engines; its folder is replaced by each node's."""
    host: str = "127.0.0.1"
    port: int = 8000
    admin_port: int = 0
    mode: Mode = "automatic"
    keys: tuple[ApiKey, ...] | None = None
    insecure: bool = False
    keep_alive_s: float = 30.0
    time_scale: float = 1.0
    """Seconds that pass for the cluster in a real one (simulated engines only)."""
    sleeps: bool = True
    """Whether WARM engines hold no KV memory; where they do, the books say so too."""
    ray: str | None = None
    """Address of the Ray cluster whose actors the agents are; None: processes here."""
    node_folder: Path | None = None
    """Of the agents' logs, on the machines of that cluster."""


class Serving:
    """All of it. `start`, then `stop` once."""

    def __init__(
        self,
        scenario: Scenario,
        fleet: Fleet,
        options: ServeOptions,
        *,
        first: Plan | None = None,
        history: Demand | None = None,
    ) -> None:
        self.made_with = fleet
        fleet = fleet if options.sleeps else always_awake(fleet)
        if options.sleeps and options.engine == "vllm":
            fleet = awake_while_loading(fleet)
        self.fleet, self.options = fleet, options
        folder = options.folder
        self.state = state = State(folder)
        self._lock_file = state.intents("controller.log")
        state.check_lines("journal.jsonl")
        state.read("clock.json", check_clock)
        self.books = Books(
            folder, fleet, epoch_s=scenario.epoch, rate=options.time_scale
        )
        if self.books.lost:
            state.note("arrivals.npz", self.books.lost)
        self.clock = self.books.clock
        self.feed = Feed()
        self.timeline = Timeline(
            epoch_s=scenario.epoch,
            keep_s=max(SHOWN_S * options.time_scale, SHOWN_EPOCHS * scenario.epoch),
            recent_s=LATELY_S * options.time_scale,
        )
        self.receipts = Receipts(
            fleet,
            self.clock.now_s,
            state.read("receipts.json", read_receipts) or (),
            partial(self._write, "receipts.json"),
        )
        self.journal = LiveJournal(
            folder / "journal.jsonl",
            self.timeline,
            self.feed,
            self.books,
            failed=lambda error: state.note("journal", error),
        )
        self.table = RoutingTable(
            self.clock.now_s,
            on_need=self.clock.wake,
            began=self.journal.accepted,
            ended=self._ended,
        )
        self.agents = agents_of(
            fleet,
            self.made_with,
            folder,
            options.engine,
            options.settings,
            options.ray,
            options.node_folder,
        )
        self.backend = LiveBackend(
            fleet=fleet,
            clock=self.clock,
            table=self.table,
            nodes=self.agents.nodes,
            log=self._lock_file,
            journal=self.journal,
        )
        self.table.eta = self.backend.eta
        last_plan, wishes = self._last_plan(), self._last_wishes()
        self.policy = LivePolicy(
            scenario=scenario,
            fleet=fleet,
            arrivals=self.books.arrivals,
            wake=self.clock.wake,
            now_s=self.clock.now_s,
            mode=options.mode,
            history=history,
            first=first or last_plan,
            keep_alive_s=options.keep_alive_s,
            adopted=self._keep,
            wishes=wishes,
            wished=self._keep_wishes,
            saw=self._saw,
        )
        state.on_note = self._less
        if state.notes:
            self._less()
        self.controller = Controller(
            policy=Steady(self.policy, state),
            backend=self.backend,
            clock=self.clock,
            fleet=fleet,
            journal=self.journal,
        )
        created_s = int(unix_s())
        self.gateway = Gateway(
            table=self.table,
            llms={
                llm.name: ServedLlm(
                    created_s=created_s,
                    slo_ttft_s=llm.slo.ttft_s,
                    slo_tpot_s=llm.slo.tpot_s,
                )
                for llm in fleet.llms
            },
            rng=np.random.default_rng(),
            settings=Settings(time_scale=options.time_scale),
            keys=options.keys,
            plan_id=lambda: self.policy.plan_id,
            state=self._state,
        )
        self.gateway.metrics.registry.register(
            Modes(get_args(Mode), lambda: self.policy.mode, lambda: dict(state.notes))
        )
        self.failed: BaseException | None = None
        """What ended the controller, if it was not asked to end."""
        self.operator = Operating(
            clock=self.clock,
            fleet=fleet,
            policy=self.policy,
            controller=self.controller,
            backend=self.backend,
            timeline=self.timeline,
            receipts=self.receipts,
            state=self.gateway.state,
            failed=lambda: self.failed,
            folder=state,
            drifted=self.books.drift,
            time_scale=options.time_scale,
        )
        self.token, self.reader = (secrets.token_urlsafe(24) for _ in range(2))
        self.server = Server(
            self.gateway,
            public_app(self.gateway),
            host=options.host,
            port=options.port,
            admin=admin_app(
                self.operator, hashed(self.token), hashed(self.reader), feed=self.feed
            ),
            admin_port=options.admin_port,
            open_to_all=options.insecure,
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._control, name="controller")
        self._sampler = threading.Thread(
            target=self._sample, name="sampler", daemon=True
        )

    def start(self) -> None:
        """Reach the agents, then serve; returns when both ports answer."""
        self.journal.record(
            Started(at_s=self.clock.now_s(), policy="live", start_s=0.0, end_s=0.0)
        )
        self.backend.start()
        self._thread.start()
        self._sampler.start()
        if self.policy.plan_id is not None:
            self.books.adopt(self.policy.plan)
        self.books.start(self.journal, DriftMetrics(self.gateway.metrics.registry))
        self.server.start()
        about = {
            "pid": os.getpid(),
            "host": self.options.host,
            "port": self.server.port,
            "admin_port": self.server.admin_port,
            "token": self.token,
            "reader_token": self.reader,
        }
        path = self.options.folder / "admin.json"
        write_text(path, dump_json(about))
        path.chmod(0o600)

    def stop(self, grace_s: float = 30.0, *, engines: bool = True) -> None:
        """Answer what was accepted, then end; agents and engines too if ``engines``."""
        self.feed.close()
        self.server.stop(grace_s)
        self._stopping.set()
        self.clock.wake()
        self._thread.join()
        self._sampler.join()
        self.policy.close()
        self.books.close()
        self.backend.close(stop_engines=engines)
        self.agents.close(stop=engines)
        self.journal.close()
        self._lock_file.close()
        for name in ("admin.json", "page.html"):
            (self.options.folder / name).unlink(missing_ok=True)

    def _control(self) -> None:
        try:
            while not self._stopping.is_set():
                self.controller.turn(self.clock.now_s() + REVIEW_S)
                if self.controller.desired is not None:
                    self.backend.keep(self.controller.desired.hosted)
        except BaseException as error:
            self.failed = error
            raise

    def _sample(self) -> None:
        """Look at the queues every second."""
        while not self._stopping.wait(SAMPLE_S):
            in_flight: Counter[str] = Counter()
            for replica, count in self.table.in_flight().items():
                in_flight[replica.llm] += count
            self.timeline.sample(self.clock.now_s(), self.table.waiting(), in_flight)

    def _saw(self, observed: Observed) -> None:
        self.state.try_("timeline", lambda: self.timeline.saw(observed))
        self.state.try_("receipts", lambda: self.receipts.saw(observed))

    def _ended(self, record: RequestRecord) -> None:
        self.journal.ended(record)
        self.state.try_("arrivals", lambda: self.books.ended(record))

    def _less(self) -> None:
        """What is kept, or what watches, has failed: nothing is planned on its word."""
        if self.policy.mode == "automatic":
            self.policy.set_mode("recommend")

    def _keep(self, plan: Plan) -> None:
        """The plan that is carried out from now on, for whoever starts again."""
        self._write("plan.json", to_json(plan))
        self.books.adopt(plan)
        now_s = self.clock.now_s()
        self.timeline.planned(now_s, plan.at(now_s).demand)

    def _keep_wishes(self, wishes: Wishes) -> None:
        """What the operator wants, likewise."""
        self._write("wishes.json", to_json(wishes))

    def _write(self, name: str, text: str) -> None:
        self.state.try_(name, lambda: write_text(self.state.path(name), text))

    def _last_wishes(self) -> Wishes:
        found = self.state.read(
            "wishes.json", lambda path: from_json(Wishes, read_text(path))
        )
        return found or Wishes()

    def _last_plan(self) -> Plan | None:
        """What is there is served on, and planned anew, if that cannot be read."""
        plan = self.state.read("plan.json", load_plan)
        return plan if plan is not None and plan.fleet == self.fleet else None

    def _state(self, llm: str) -> str:
        """Of an LLM that nobody serves now."""
        if self.policy.wishes.refuses(llm):
            return "held"
        phases = {r.phase for r in self._observed.replicas if r.llm == llm}
        for phase, state in (
            ("ACTIVATING", "activating"),
            ("WARM", "warm"),
            ("LOADING", "loading"),
            ("DRAINING", "draining"),
        ):
            if phase in phases:
                return state
        # Infinite only where no replica of it may be tried any more.
        return "failed" if math.isinf(self.backend.eta(llm)[0]) else "absent"

    @property
    def _observed(self) -> Observed:
        return self.policy.observed
