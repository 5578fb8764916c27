"""Simulated engines of one node behind one port: OpenAI servers that compute nothing.

Engine ``n`` answers under ``/r/n`` as vLLM does at its root: text and chat completions,
streamed or not, models, health, sleep, metrics. Its tokens come when the cost model says,
in model seconds, of which ``--scale`` pass in a real one. Prompts count as many tokens as
words, or as they have token ids; an answer is as long as ``max_tokens`` says, or else as
the LLM's mean one, and says the same for the same prompt.

Beside that ``POST /engines`` makes an engine, ``POST /r/n/load`` returns when its weights
are there, ``POST /r/n/fail`` makes it fail, ``DELETE /r/n`` ends it. Bodies that answer
tell under ``simulated`` when the engine got the request, gave its first and its last token,
in its own seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from foreserve.models.cost import IterationTime
from foreserve.runtime.clock import unix_s
from foreserve.runtime.engines.batch import Batch, Job
from foreserve.runtime.engines.bodies import (
    Refused,
    Telling,
    object_of,
    prompt_of,
    telling,
)
from foreserve.runtime.engines.hosted import KEY
from foreserve.runtime.engines.http import HttpConnection
from foreserve.runtime.engines.series import Series
from foreserve.runtime.engines.simulated import gibberish, seed_of, words


@dataclass(slots=True, eq=False)
class Answer:
    """A request that is being answered."""

    connection: Connection
    job: Job
    telling: Telling
    seed: int
    reason: str
    said: int = 0
    """Tokens that were streamed."""
    begun: bool = False
    """Its first token is there."""


class Engine:
    """One simulated engine: its life, its batch, and who is waiting for an answer."""

    def __init__(self, node: Node, number: int, spec: dict[str, Any]) -> None:
        self.node, self.number, self.spec = node, number, spec
        self.name: str = spec["served_name"]
        self.loaded = self.awake = self.hung = self.lies = False
        self.factor = 1.0
        self._time = IterationTime(**spec["time"])
        self.series = Series(self.name)
        self.batch = Batch(
            self._time,
            spec["room_tokens"],
            max_num_seqs=spec["max_num_seqs"],
            max_num_batched_tokens=spec["max_num_batched_tokens"],
        )
        self.answers: dict[Job, Answer] = {}
        self.visitors: set[Connection] = set()
        """Who waits for a load or a wake."""
        self._timer: asyncio.TimerHandle | None = None
        self._pumped_s = 0.0

    @property
    def held_bytes(self) -> int:
        """Held on each GPU."""
        held = self.spec["resident_bytes"] if self.loaded else 0
        awake = self.spec["active_bytes"] - self.spare_bytes if self.awake else 0
        return int(held + awake)

    @property
    def spare_bytes(self) -> int:
        """Given up on each GPU while it drains."""
        return int((self.batch.room - self.batch.blocks) * self.spec["block_bytes"])

    def slow_down(self, factor: float) -> None:
        """From the next iteration on everything takes so many times as long."""
        self.batch.change_time(self._time.times(factor), self.node.now_s())
        self.pump()

    def submit(self, answer: Answer) -> None:
        job, now_s = answer.job, answer.job.arrival_s
        self._tell(self.batch.advance(now_s))
        self.batch.submit(job)
        self.answers[job] = answer
        self._arm(now_s)

    def leave(self, answer: Answer) -> None:
        """Its client has gone."""
        if self.answers.pop(answer.job, None) is None:
            return
        self.series.finished["abort"] += 1
        now_s = self.node.now_s()
        self._tell(self.batch.advance(now_s))
        self.batch.cancel(answer.job, now_s)
        self._arm(now_s)

    def pump(self) -> None:
        """Say everything that is due."""
        if self.hung:
            return
        now_s = self.node.now_s()
        self._tell(self.batch.advance(now_s))
        for answer in self.answers.values():
            if answer.telling.stream:
                given = self.batch.given(answer.job, now_s)
                if given > answer.said:
                    answer.connection.say(answer, given)
        self._pumped_s = now_s
        self._arm(now_s)

    def stop(self) -> None:
        """Cut everybody off."""
        if self._timer is not None:
            self._timer.cancel()
        self.hung = True
        for answer in list(self.answers.values()):
            answer.connection.abort()
        for visitor in self.visitors:
            visitor.abort()
        self.answers.clear()

    def _tell(self, changed: list[Job]) -> None:
        for job in changed:
            answer = self.answers.get(job)
            if answer is None:
                continue
            assert job.first_s is not None
            if not answer.begun:
                answer.begun = True
                seen = self.series.histograms["time_to_first_token_seconds"]
                seen.observe(job.first_s - job.arrival_s)
            if job.end_s is None:
                if answer.telling.stream:
                    answer.connection.say(answer, job.given)
                continue
            del self.answers[job]
            self.series.finished[answer.reason] += 1
            joined_s = job.joined_s or job.arrival_s
            self.series.finish(
                joined_s - job.arrival_s,
                job.first_s - joined_s,
                job.end_s - job.first_s,
                job.given,
            )
            answer.connection.end(answer)

    def _arm(self, now_s: float) -> None:
        """Come back when something is due: at once for what changes the batch, and no
        more often than a tick for what only goes on."""
        if self._timer is not None:
            self._timer.cancel()
        due_s = self.batch.event_s
        if due_s == float("inf"):
            self._timer = None
            return
        if any(answer.telling.stream for answer in self.answers.values()):
            pause_s = self.node.tick_s * self.node.scale
            token_s = max(self.batch.token_s(now_s), self._pumped_s + pause_s)
            due_s = min(due_s, token_s)
        self._timer = self.node.loop.call_at(self.node.real_s(due_s), self.pump)

    def metrics(self) -> str:
        self._tell(self.batch.advance(self.node.now_s()))
        batch, totals = self.batch, self.batch.totals
        gaps = self.series.histograms["inter_token_latency_seconds"]
        for seconds, count in totals.gaps:
            gaps.observe(seconds, count)
        totals.gaps.clear()
        return self.series.text(
            {
                "num_requests_running": len(batch.running),
                "num_requests_waiting": len(batch.waiting),
                "kv_cache_usage_perc": 1 - batch.free / batch.blocks,
            },
            {
                "prompt_tokens": totals.prompt_tokens,
                "generation_tokens": totals.given_tokens,
                "num_preemptions": totals.preemptions,
                "prefix_cache_queries": 0,
                "prefix_cache_hits": 0,
            },
            asleep=not self.awake,
        )


class Node:
    """The engines of one node, and their time."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, scale: float, tick_s: float
    ) -> None:
        self.loop, self.scale, self.tick_s = loop, scale, tick_s
        self._start_s = loop.time()
        self.engines: dict[int, Engine] = {}
        self.made = self.answers = 0
        """Engines and answers until now."""
        self.made_s = unix_s()
        self.load_failures: Counter[str] = Counter()

    def now_s(self) -> float:
        return (self.loop.time() - self._start_s) * self.scale

    def real_s(self, model_s: float) -> float:
        return self._start_s + model_s / self.scale


class Connection(HttpConnection):
    """One client connection."""

    def __init__(self, node: Node, key: bytes) -> None:
        super().__init__(key)
        self.node = node
        self._answer: tuple[Engine, Answer] | None = None
        self._later: asyncio.TimerHandle | None = None

    @property
    def occupied(self) -> bool:
        return self._answer is not None or self._later is not None

    def left(self) -> None:
        if self._later is not None:
            self._later.cancel()
        if self._answer is not None:
            engine, answer = self._answer
            self._answer = None
            engine.leave(answer)

    # --- routes --------------------------------------------------------------------------

    def handle(self, method: str, path: str, body: bytes) -> None:
        node = self.node
        if path.startswith("/r/"):
            number, _, rest = path[3:].partition("/")
            engine = node.engines.get(int(number)) if number.isdigit() else None
            if engine is None:
                self.abort()  # As where no process listens any more.
                return
            if engine.hung and rest != "fail" and method != "DELETE":
                self._later = node.loop.call_later(3600, self.abort)
                return
            self._route_engine(engine, method, rest, body)
        elif (method, path) == ("POST", "/engines"):
            engine = Engine(node, node.made, object_of(body))
            node.engines[node.made] = engine
            node.made += 1
            self.json({"number": engine.number})
        elif (method, path) == ("POST", "/fail"):
            what = object_of(body)
            node.load_failures[what["llm"]] += what.get("times", 1)
            self.json({})
        elif (method, path) == ("GET", "/health"):
            self.json({})
        else:
            raise Refused(404, "Not Found")

    def _route_engine(
        self, engine: Engine, method: str, path: str, body: bytes
    ) -> None:
        routes: dict[tuple[str, str], Callable[[Engine, bytes], None]] = {
            ("POST", "v1/completions"): partial(self._complete, chat=False),
            ("POST", "v1/chat/completions"): partial(self._complete, chat=True),
            ("POST", "load"): self._load,
            ("POST", "fail"): self._fail,
            ("POST", "sleep"): self._sleep,
            ("POST", "wake_up"): self._wake,
            ("POST", "shrink"): self._shrink,
            ("DELETE", ""): self._delete,
            ("GET", "v1/models"): self._models,
            ("GET", "health"): lambda engine, _: self.json({}),
            ("GET", "version"): lambda engine, _: self.json({"version": "simulated"}),
            ("GET", "memory"): lambda engine, _: self.json(
                {"bytes": engine.held_bytes}
            ),
            ("GET", "is_sleeping"): lambda engine, _: self.json(
                {"is_sleeping": not engine.awake}
            ),
            ("GET", "metrics"): lambda engine, _: self.send(
                200, engine.metrics().encode(), b"text/plain; version=0.0.4"
            ),
        }
        route = routes.get((method, path))
        if route is None:
            raise Refused(404, "Not Found")
        if not engine.loaded and path not in ("load", "fail", "memory", ""):
            raise Refused(503, "the engine is still loading")
        route(engine, body)

    def _load(self, engine: Engine, body: bytes) -> None:
        failures = self.node.load_failures

        def done() -> None:
            if failures[engine.name] > 0:
                failures[engine.name] -= 1
                del self.node.engines[engine.number]
                self.refuse(Refused(500, "the load failed, as it was asked to"))
                return
            engine.loaded = True
            self.json({})

        self._after(engine, engine.spec["load_s"] * engine.factor, done)

    def _wake(self, engine: Engine, body: bytes) -> None:
        def done() -> None:
            engine.awake = True
            engine.batch.grow()
            self.json({})

        seconds = 0.0 if engine.awake else engine.spec["activate_s"]
        self._after(engine, seconds, done)

    def _sleep(self, engine: Engine, body: bytes) -> None:
        for answer in list(engine.answers.values()):
            answer.connection.abort()
        engine.awake = False
        self.json({})

    def _shrink(self, engine: Engine, body: bytes) -> None:
        engine.pump()
        if engine.awake:
            engine.batch.shrink()
        self.json({"bytes": engine.spare_bytes})

    def _delete(self, engine: Engine, body: bytes) -> None:
        del self.node.engines[engine.number]
        engine.stop()
        self.json({})

    def _fail(self, engine: Engine, body: bytes) -> None:
        what = object_of(body)
        if what["kind"] == "die":
            del self.node.engines[engine.number]
            engine.stop()
        elif what["kind"] == "hang":
            engine.hung = True
        elif what["kind"] == "gibberish":
            engine.lies = True
        elif what["kind"] == "slow":
            engine.factor = float(what["factor"])
            engine.slow_down(engine.factor)
        else:
            raise Refused(400, "kind: expected die, hang, gibberish or slow")
        self.json({})

    def _models(self, engine: Engine, body: bytes) -> None:
        card = {
            "id": engine.name,
            "object": "model",
            "created": int(self.node.made_s),
            "owned_by": "foreserve",
            "max_model_len": engine.spec["room_tokens"],
        }
        self.json({"object": "list", "data": [card]})

    def _complete(self, engine: Engine, body: bytes, *, chat: bool) -> None:
        asked = object_of(body)
        if asked.get("model") != engine.name:
            raise Refused(404, f"The model `{asked.get('model')}` does not exist.")
        if not engine.awake:
            raise Refused(503, "the engine sleeps")
        if asked.get("n") not in (None, 1):
            raise Refused(400, "n: only 1 is simulated")
        tokens, text = prompt_of(asked, chat)
        seed = seed_of(engine.name, text)
        wanted = asked.get("max_completion_tokens") or asked.get("max_tokens")
        length = int(wanted or max(1, round(engine.spec["output_tokens"])))
        job = Job(tokens, max(1, length), arrival_s=self.node.now_s())
        if not engine.batch.fits(job):
            if engine.spare_bytes:
                raise Refused(503, "the engine drains")
            raise Refused(
                400,
                f"{tokens} prompt tokens and {length} more do not fit into "
                f"{engine.spec['room_tokens']}",
                "context_length_exceeded",
            )
        self.node.answers += 1
        number = f"{engine.number}-{self.node.answers}"
        answer = Answer(
            connection=self,
            job=job,
            telling=telling(engine.name, number, chat, asked, created_s=unix_s()),
            seed=gibberish(seed) if engine.lies else seed,
            reason="length" if wanted else "stop",
        )
        self._answer = engine, answer
        engine.submit(answer)

    # --- answers -------------------------------------------------------------------------

    def say(self, answer: Answer, given: int) -> None:
        """Stream what it has beyond what was said; its last token is for `end`."""
        text = words(answer.seed, answer.said, given).encode()
        telling = answer.telling
        self.transport.write(telling.say(telling.choice(text)))
        answer.said = given

    def end(self, answer: Answer) -> None:
        """All of it is there."""
        self._answer = None
        job = answer.job
        usage = {
            "prompt_tokens": job.input_tokens,
            "completion_tokens": job.given,
            "total_tokens": job.input_tokens + job.given,
        }
        times = {
            "arrival_s": job.arrival_s,
            "joined_s": job.joined_s,
            "first_token_s": job.first_s,
            "end_s": job.end_s,
            "preemptions": job.preemptions,
        }
        text = words(answer.seed, answer.said, job.given).encode()
        told = answer.telling.end(
            text, answer.reason, {"usage": usage, "simulated": times}
        )
        if not answer.telling.stream:
            self.send(200, told)
            return
        self.transport.write(told)
        self.rest()

    def _after(
        self, engine: Engine, model_s: float, callback: Callable[[], None]
    ) -> None:
        def done() -> None:
            self._later = None
            engine.visitors.discard(self)
            callback()

        engine.visitors.add(self)
        self._later = self.node.loop.call_later(model_s / self.node.scale, done)


async def serve(
    listener: socket.socket, scale: float, tick_s: float, key: bytes
) -> None:
    loop = asyncio.get_running_loop()
    node = Node(loop, scale, tick_s)

    server = await loop.create_server(lambda: Connection(node, key), sock=listener)
    asked = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, asked.set)
    async with server:
        await asked.wait()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--tick-ms", type=float, default=1.0)
    given = parser.parse_args()
    listener = socket.socket(fileno=given.fd)
    key = os.environ.get(KEY, "").encode()
    asyncio.run(serve(listener, given.scale, given.tick_ms / 1000, key))


if __name__ == "__main__":
    main()
