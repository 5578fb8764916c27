"""What the server knows of its engines, and of the requests that they are answering."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreserve.models.cost import IterationTime
from foreserve.runtime.engines.series import Series
from foreserve.runtime.paged.jobs import Job, Reason
from foreserve.runtime.paged.logprobs import Placed
from foreserve.runtime.paged.text import Speech
from foreserve.runtime.paged.worker import Resident, Service, Worker

if TYPE_CHECKING:
    from foreserve.runtime.paged.exchange import Exchange


@dataclass(slots=True, kw_only=True)
class News:
    """What is new of an answer."""

    text: str = ""
    placed: list[Placed] = field(default_factory=list)
    reason: Reason | None = None
    """How it ended."""
    given: int = 0
    """Tokens so far."""
    last_s: float = 0.0
    """When the last one came."""


class Answer:
    """One choice of a request that is being answered: a `group.Listener`."""

    def __init__(
        self,
        exchange: Exchange,
        engine: Engine,
        speech: Speech,
        news: list[Answer],
        *,
        mute: bool = False,
    ) -> None:
        """``news``: of the worker's thread, where answers go of which there is some.
        ``mute``: only the prompt was asked for; its token is not told."""
        self.exchange, self.engine = exchange, engine
        self._speech, self._all_news, self._mute = speech, news, mute
        self.job: Job
        self.given = 0
        """Tokens, as far as the event loop has heard."""
        self._news: News | None = None

    # --- the worker's thread -------------------------------------------------------------

    def token(self, token: int) -> bool:
        news, scores = self._note(), self.job.scores
        if self._mute:
            return False
        if scores is not None:
            news.placed.append((self._speech.size, scores))
        news.text += self._speech.add(token)
        return self._speech.stopped

    def end(self, reason: Reason) -> None:
        news = self._note()
        news.text += self._speech.end()
        news.reason = reason

    def take(self) -> News:
        """What is new since the last time."""
        news, self._news = self._news, None
        assert news is not None
        news.given = 0 if self._mute else self.job.given
        news.last_s = self.job.last_s
        return news

    # --- the event loop ------------------------------------------------------------------

    def hear(self, news: News) -> None:
        self.given = news.given
        self.engine.heard(self, news.given, news.last_s)
        if news.reason is not None:
            self.engine.ended(self, news.reason, news.given, news.last_s)
        self.exchange.hear(self, news)

    # -------------------------------------------------------------------------------------

    def _note(self) -> News:
        if self._news is None:
            self._news = News()
            self._all_news.append(self)
        return self._news


class Engine:
    """One LLM of the group, as the outside knows it."""

    def __init__(self, number: int, spec: dict[str, Any], made_s: float) -> None:
        """``made_s``: Unix time."""
        self.number, self.made_s = number, made_s
        self.name: str = spec["served_name"]
        self.room_tokens: int = spec["room_tokens"]
        self.followers: Sequence[int] = spec.get("followers", ())
        """Ports of the `following.Door`s of its further GPUs."""
        self.service = Service(
            # Not the name alone: the next one may be made before this one is gone.
            llm=f"{self.name}/{number}",
            folder=Path(spec["checkpoint"]),
            time=IterationTime(**spec["time"]),
            reference_s=spec["exec_s"],
            input_tokens=spec["input_tokens"],
            output_tokens=spec["output_tokens"],
            rate_rps=spec["rate_rps"],
            kept=True,
        )
        self.resident: Resident | None = None
        self.loaded = self.gone = self.urgent = False
        self.lock = threading.Lock()
        """Of these two: a load may end as the engine does."""
        self.series = Series(self.name)
        self.seen: dict[Answer, tuple[int, float]] = {}
        """Tokens given, and when: of those being answered."""

    def room(self, resident: Resident) -> int:
        """Tokens of one request with its answer, as far as is known here: the pool may
        have less for now."""
        return min(self.room_tokens, resident.config.context_tokens)

    def heard(self, answer: Answer, given: int, now_s: float) -> None:
        """For the metrics: tokens have come."""
        before, since_s = self.seen.get(answer, (0, 0.0))
        self.seen[answer] = given, now_s
        if given and not before:
            seen = self.series.histograms["time_to_first_token_seconds"]
            seen.observe(now_s - answer.job.arrival_s)
        elif given > before:
            gap_s = (now_s - since_s) / (given - before)
            seen = self.series.histograms["inter_token_latency_seconds"]
            seen.observe(gap_s, given - before)

    def ended(self, answer: Answer, reason: Reason, given: int, now_s: float) -> None:
        self.seen.pop(answer, None)
        self.series.finished[reason] += 1
        job = answer.job
        if reason != "abort" and job.joined_s is not None and job.first_s is not None:
            self.series.finish(
                job.joined_s - job.arrival_s,
                job.first_s - job.joined_s,
                now_s - job.first_s,
                given,
            )

    def metrics(self, worker: Worker) -> str:
        gauges: dict[str, float] = {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
        }
        counters = dict.fromkeys(
            ("prompt_tokens", "generation_tokens", "num_preemptions"), 0
        )
        number = self.resident.number if self.resident else None
        totals = worker.group.totals.get(-1 if number is None else number)
        if number is not None and totals is not None:
            running, waiting = worker.group.counts(number)
            gauges = {"num_requests_running": running, "num_requests_waiting": waiting}
            pages = max(1, worker.pool.capacity)
            gauges["kv_cache_usage_perc"] = worker.group.held(number) / pages
            counters = {
                "prompt_tokens": totals.prompt_tokens,
                "generation_tokens": totals.given_tokens,
                "num_preemptions": totals.preemptions,
            }
        counters |= {"prefix_cache_queries": 0, "prefix_cache_hits": 0}
        return self.series.text(gauges, counters, asleep=number is None)
