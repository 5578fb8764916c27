"""ACTIVE replicas in virtual time: continuous batching, iteration by iteration.

An engine schedules as vLLM's V1 engine does. In each iteration, within a budget of tokens:

1. Running requests in the order in which they joined: each that decodes takes one token,
   one whose prompt is not done takes as much of it as is left of the budget. Tokens live
   in blocks of the KV cache. When none is free, the request that joined last is preempted:
   its blocks are freed, it goes to the head of the waiting ones, and will compute its
   prompt and what it had answered again.
2. Unless one was preempted, waiting requests join, first come first served, while there
   are budget, blocks for their next tokens and fewer than ``max_num_seqs`` running.

All of it takes one iteration's time. A request whose tokens are all computed gets its next
one at the end of the iteration. A request that comes during an iteration is considered
at the end of it. The work itself is compiled (`core`, `flow`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foreserve.models.cost import IterationTime
from foreserve.models.record import Record
from foreserve.runtime.memory.rules import spare_pages
from foreserve.runtime.simulated import core, flow, layout
from foreserve.runtime.simulated.layout import NONE, Columns

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]

NO_CAP = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits(Record):
    """vLLM's settings of these names."""

    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    block_tokens: int = 16
    whole_prompts: bool = True
    """Requests join only when blocks for all their known tokens are free, not only for
    their first chunk (vLLM since 0.19, pull request 37307)."""
    mixes: bool = True
    """Prompts share iterations with decodes. False: they have iterations of their own,
    and decodes pause (SGLang, earlier engines)."""
    caches_prefixes: bool = True
    """Who was preempted finds those of its full blocks that nobody has taken since. Free
    blocks are taken in the order in which they became free, a request's last ones first."""

    prefix_tokens: int = 0
    """Prompts are compared in pieces of so many tokens, and what an earlier one has in
    common is not computed again while its blocks are there; 0: they are not compared.
    Needs requests that say what they have in common. (vLLM compares block by block.)"""

    def __post_init__(self) -> None:
        if self.prefix_tokens % self.block_tokens:
            raise ValueError("engine: prefix_tokens must be a multiple of block_tokens")
        if not 1 <= self.max_num_seqs < self.max_num_batched_tokens:
            raise ValueError("engine: max_num_batched_tokens must exceed max_num_seqs")


class Taken(NamedTuple):
    """A request on its way, as an engine had it."""

    request: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    given: int
    computed: int
    """Tokens in the KV cache; 0: its prompt is not done."""
    first_token_s: float | None
    last_token_s: float
    preemptions: int


class Engines:
    """All engines of a cluster, the requests on their way to them, and the time.

    Its owner opens and closes engines and calls `run`. ``state`` may be read by anyone;
    `layout` says what is in it.
    """

    def __init__(self, llms: int, requests: Columns, start_s: float = 0.0) -> None:
        self.state = layout.empty(llms, requests)
        self.top["now_s"] = start_s
        self._times: dict[int, IterationTime] = {}
        self._lanes: list[list[tuple[Any, int, int]]] = [[] for _ in range(llms)]
        """By LLM: (key, engine, cap) of those that take requests, sorted."""

    @property
    def top(self) -> Any:
        return self.state.top[0]

    def row(self, e: int) -> Any:
        """All numbers of one engine, by the names of `layout.ENGINE`."""
        return self.state.engines[e]

    def run(self, until_s: float) -> bool:
        """Let everything happen up to and including ``until_s``. True: stopped right after
        an event that is for the owner to deal with (see the end of `layout.TOP`)."""
        top = self.top
        while True:
            flow.run(self.state, until_s)
            if not top["full"]:
                break
            self._more_jobs()
            top["full"] = False
        return bool(
            top["woken"]
            or top["revoked"]
            or top["emptied"] != NONE
            or top["foreign"] != NONE
        )

    # --- engines ---------------------------------------------------------------------

    def open(
        self,
        llm: int,
        key: Any,
        time: IterationTime,
        kv_tokens: int,
        limits: EngineLimits,
        *,
        cap: int = NO_CAP,
        life: int = 0,
        speed: float = 1.0,
    ) -> int:
        """A new engine for ``llm``; its number. It takes requests at once, ``cap`` of them
        at most; among equals the router prefers small ``key``s. ``life`` is noted with
        each request that ends there."""
        closed = np.flatnonzero(self.state.engines["llm"] == NONE)
        if not len(closed):
            self._more_engines()
            closed = np.flatnonzero(self.state.engines["llm"] == NONE)
        self._widen(limits)
        e = int(closed[0])
        self.state.engines[e] = np.zeros((), layout.ENGINE)
        row = self.row(e)
        for name in layout.LINKS:
            row[name] = NONE
        row["llm"], row["life"] = llm, life
        row["max_tokens"] = limits.max_num_batched_tokens
        row["max_seqs"], row["block"] = limits.max_num_seqs, limits.block_tokens
        row["unit"] = limits.prefix_tokens // limits.block_tokens
        row["whole"], row["mixes"] = limits.whole_prompts, limits.mixes
        row["caches"] = limits.caches_prefixes
        row["blocks"] = row["free"] = kv_tokens // limits.block_tokens
        row["start_s"], row["next_s"] = -math.inf, math.inf
        row["idle_since_s"] = self.top["now_s"]
        self.state.phase[e] = 0
        self.state.prefix_users[e], self.state.prefix_lost[e] = 0, -1
        self._times[e] = time
        self._set_times(e, speed)
        flow.add_engine(self.state, e)
        self._lanes[llm].append((key, e, cap))
        self._write_lane(llm)
        return e

    def serve_queue(self, llm: int) -> None:
        """Send what waits for ``llm`` to the engines that take it."""
        flow.drain_queue(self.state, llm, float(self.top["now_s"]))

    def withdraw(self, e: int) -> None:
        """The engine takes no more requests; `run` stops when it has none."""
        llm = int(self.row(e)["llm"])
        self._lanes[llm] = [entry for entry in self._lanes[llm] if entry[1] != e]
        self.row(e)["lane"] = NONE
        self._write_lane(llm)

    def close(self, e: int) -> None:
        """The engine is gone, and what it had goes back to the head of its LLM's queue to
        start anew: what was streamed of it is lost."""
        for slot in reversed(self._jobs(e)):
            core.restart(self.state, slot)
            flow.enqueue(self.state, slot, True)
        self.withdraw(e)
        flow.remove_engine(self.state, e)
        self.row(e)["llm"] = NONE
        del self._times[e]

    def submit(self, e: int, request: int, now_s: float) -> None:
        """Give the engine a request by hand; ``now_s`` is not after its ``next_s``."""
        core.submit(self.state, e, self.new_job(request), now_s)
        flow.place_engine(self.state, e)

    def advance(self, e: int) -> list[int]:
        """Take the engine to its ``next_s`` by hand; the requests that end there."""
        top = self.top
        top["now_s"], top["ended"] = self.row(e)["next_s"], 0
        core.advance(self.state, e)
        flow.place_engine(self.state, e)
        ended: list[int] = self.state.order[: top["ended"]].tolist()
        return ended

    def set_speed(self, e: int, factor: float) -> None:
        """From its next iteration on, iterations take ``factor`` times the cost model's."""
        core.rebase(self.state, e, float(self.top["now_s"]))
        self._set_times(e, factor)
        flow.place_engine(self.state, e)

    def spare_blocks(self, e: int, cap: int) -> int:
        """Blocks that the engine lends or could lend; it is to have at most ``cap``
        requests."""
        row = self._now(e)
        blocks, in_flight = int(row["blocks"]), int(row["in_flight"])
        return spare_pages(blocks, in_flight, cap, self.used_blocks(e))

    def lend(self, e: int, blocks: int) -> int:
        """Set that many more blocks aside until the engine misses them, or as many as are
        free; how many."""
        row = self._now(e)
        unused = int(row["blocks"] - row["lent"]) - self.used_blocks(e)
        lent = max(0, min(blocks, unused))
        core.lend(self.state, e, lent)
        return lent

    def _now(self, e: int) -> Any:
        """The engine's row as of now: an iteration that begins now is under way."""
        core.rebase(self.state, e, float(self.top["now_s"]))
        flow.place_engine(self.state, e)
        return self.row(e)

    def running(self, e: int) -> int:
        row = self.row(e)
        return int(row["in_flight"] - row["waiting"])

    def used_blocks(self, e: int) -> int:
        """By the end of the iteration under way."""
        return int(core.used_at(self.state, e, float(self.top["now_s"])))

    def new_job(self, request: int) -> int:
        """A job for ``request``, to be submitted or queued by hand."""
        if self.top["free_job"] == NONE:
            self._more_jobs()
        return int(core.new_job(self.state, request))

    def take_out(self, e: int) -> list[Taken]:
        """All that the engine has, with its progress; the iteration under way is lost."""
        core.rebase(self.state, e, float(self.top["now_s"]))
        state, row = self.state, self.row(e)
        decoding, taken = set(), []
        slot = int(row["decoding_first"])
        while slot != NONE:
            decoding.add(slot)
            slot = int(state.jobs[slot]["next"])
        for slot in self._jobs(e):
            job = state.jobs[slot]
            # A prompt that is half done begins again.
            steps = int(row["step"] - job["begun"]) if slot in decoding else 0
            first_s, last_s = float(job["first_s"]), float(job["last_s"])
            if slot in decoding:
                last_s = max(last_s, float(row["last_s"]))
            taken.append(
                Taken(
                    request=int(job["request"]),
                    arrival_s=float(state.arrival_s[job["request"]]),
                    input_tokens=int(job["input"]),
                    output_tokens=int(job["output"]),
                    given=int(job["given"]) + steps,
                    computed=int(job["computed"]) + steps if slot in decoding else 0,
                    first_token_s=None if math.isnan(first_s) else first_s,
                    last_token_s=last_s,
                    preemptions=int(job["preemptions"]),
                )
            )
        self._clear(e)
        return taken

    def _clear(self, e: int) -> None:
        """Free the jobs of an engine that is about to be closed."""
        for slot in self._jobs(e):
            core.free(self.state, slot)
        row = self.row(e)
        for name in layout.LINKS:
            row[name] = NONE
        row["chunks"] = row["in_flight"] = 0

    def _jobs(self, e: int) -> list[int]:
        """All jobs of the engine, by their requests' numbers."""
        state, row = self.state, self.row(e)
        found = [int(row["prompt"])] if row["prompt"] != NONE else []
        found += state.chunk_job[e, : row["chunks"]].tolist()
        for first in ("waiting_first", "decoding_first"):
            slot = int(row[first])
            while slot != NONE:
                found.append(slot)
                slot = int(state.jobs[slot]["next"])
        return sorted(found, key=lambda slot: int(state.jobs[slot]["request"]))

    def _set_times(self, e: int, factor: float) -> None:
        row, time = self.row(e), self._times[e]
        for name in layout.TIMES:
            scale = 1.0 if name == "expert_share" else factor
            row[name] = getattr(time, name) * scale

    def _write_lane(self, llm: int) -> None:
        state, lane = self.state, self._lanes[llm]
        lane.sort(key=lambda entry: entry[0])
        state.lanes[llm] = len(lane)
        for i, (_, e, cap) in enumerate(lane):
            row = self.row(e)
            row["lane"] = i
            state.lane_engine[llm, i] = e
            state.lane_load[llm, i] = row["in_flight"]
            state.lane_cap[llm, i] = cap
            state.lane_room[llm, i] = row["blocks"] * row["block"]

    def give_up(self, now_s: float) -> None:
        """Book every request that has come and not ended as unfinished."""
        state = self.state
        for llm in range(len(state.queue)):
            slot = int(state.queue_first[llm])
            while slot != NONE:
                following = int(state.jobs[slot]["next"])
                core.end(state, slot, layout.UNFINISHED, NONE, now_s)
                slot = following
            state.queue[llm], state.queue_first[llm] = 0, NONE
            state.queue_last[llm] = NONE
        for e in sorted(self._times):
            for slot in self._jobs(e):
                core.end(
                    state, slot, layout.UNFINISHED, int(self.row(e)["life"]), now_s
                )

    # --- space -----------------------------------------------------------------------

    def _more_jobs(self) -> None:
        jobs, top = self.state.jobs, self.top
        count = len(jobs)
        grown = np.concatenate([jobs, np.zeros(count, layout.JOB)])
        layout.chain(grown, count, int(top["free_job"]))
        top["free_job"] = count
        self.state = self.state._replace(jobs=grown)

    def _more_engines(self) -> None:
        s = self.state
        more = np.zeros(len(s.engines), layout.ENGINE)
        more["llm"] = NONE
        self.state = s._replace(
            engines=np.concatenate([s.engines, more]),
            **{name: layout.doubled(getattr(s, name), 0) for name in layout.BY_ENGINE},
            **{name: layout.doubled(getattr(s, name), 1) for name in layout.BY_LANE},
        )

    def _widen(self, limits: EngineLimits) -> None:
        """Columns for the most blocks and sequences of any engine."""
        s = self.state
        while s.ends.shape[1] < limits.max_num_seqs:
            names = ("ends", "chunk_job", "chunk_end")
            s = s._replace(
                **{name: layout.doubled(getattr(s, name), 1) for name in names}
            )
        while s.phase.shape[1] < limits.block_tokens:
            s = s._replace(phase=layout.doubled(s.phase, 1))
        self.state = s


def is_compiled() -> bool:
    """Whether the core's machine code is on disk."""
    return any(Path(layout.cache_folder()).rglob("flow.run-*.nbc"))


def compile_core() -> None:
    """Make it, which takes some 20 s; engines do it by themselves at first use."""
    one = np.ones(1, np.int32)
    engines = Engines(1, Columns(np.zeros(1), np.zeros(1, np.int32), one, one))
    engines.run(math.inf)
