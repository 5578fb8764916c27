"""One HTTP request for tokens: its prompts' choices, on their way together.

Each choice is a request of its own to the group, with a generator of its own; prompts are
computed for each. The first ones of a prompt are told what a single one would be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from foreserve.runtime.engines.bodies import NULL, Refused, telling
from foreserve.runtime.paged import logprobs
from foreserve.runtime.paged.answers import Answer, Engine, News
from foreserve.runtime.paged.asked import Asked
from foreserve.runtime.paged.jobs import Job, TooLong
from foreserve.runtime.paged.text import Speech
from foreserve.runtime.paged.tools import Calls
from foreserve.runtime.paged.worker import Resident

if TYPE_CHECKING:
    from foreserve.runtime.paged.server import Connection


def chances(
    seed: int | None, choices: int, fresh: np.random.Generator
) -> list[np.random.Generator]:
    """Of the choices of one prompt; the first one's is that of a single answer."""
    if seed is None:
        return fresh.spawn(choices)
    root = np.random.SeedSequence(seed % 2**64)
    others = root.spawn(choices - 1)
    return [np.random.default_rng(one) for one in (root, *others)]


class Choice:
    """One choice as it is written. For the event loop."""

    def __init__(self, index: int, echoed: str, calls: Calls | None) -> None:
        """``echoed``: said before the answer."""
        self.index, self.echoed, self.calls = index, echoed, calls
        self.reason: str | None = None
        self.texts: list[str] = []
        self.placed: list[logprobs.Placed] = []
        self.called: list[dict[str, object]] = []
        """Like log probabilities: of a whole answer, or of what is not said yet."""
        self.begun = False


class Exchange:
    """A request that is being answered."""

    def __init__(
        self,
        connection: Connection,
        engine: Engine,
        resident: Resident,
        asked: Asked,
        body: Mapping[str, Any],
        number: str,
        *,
        chat: bool,
    ) -> None:
        """``asked``: what is understood of ``body``; ``number``: of the answer. Raises
        `Refused` if there is no room for it."""
        room, most_tokens = engine.room(resident), asked.most_tokens
        most = [
            max(1, room - len(prompt)) if most_tokens is None else most_tokens
            for prompt in asked.prompts
        ]
        for prompt, tokens in zip(asked.prompts, most, strict=True):
            if len(prompt) + tokens > room:
                raise Refused(
                    400,
                    f"{len(prompt)} prompt tokens and {tokens} more do not fit into "
                    f"{room}",
                    "context_length_exceeded",
                )
        self._connection, self._words, self._asked = connection, resident.words, asked
        count = len(asked.prompts) * asked.choices
        self._telling = telling(
            engine.name, number, chat, body, count, created_s=connection.node.unix_s()
        )
        self.over = False
        self.answers: list[Answer] = []
        self._choices: dict[Answer, Choice] = {}
        node, sampling = connection.node, asked.sampling
        own = () if asked.ignore_end else resident.config.end_tokens
        ends = frozenset(
            token
            for token in (*own, *asked.stop_tokens)
            if 0 <= token < resident.config.vocabulary
        )
        now_s = node.worker.now_s()
        assert resident.number is not None
        for at, prompt in enumerate(asked.prompts):
            for i, chance in enumerate(
                chances(sampling.seed, asked.choices, node.chance)
            ):
                index = at * asked.choices + i
                answer = Answer(
                    self,
                    engine,
                    Speech(
                        resident.words,
                        asked.stops,
                        keep_stop=asked.keep_stop,
                        deaf=sampling.min_tokens,
                        after=() if chat else prompt,
                    ),
                    node.news,
                    mute=not most[at],
                )
                answer.job = Job(
                    service=resident.number,
                    prompt=prompt,
                    most_tokens=max(1, most[at]),
                    listener=answer,
                    arrival_s=now_s,
                    sampling=sampling,
                    chance=chance,
                    ends=ends if most[at] else frozenset(),
                    echoes=asked.echoes and sampling.logprobs is not None,
                )
                calls = Calls(f"{number}-{index}", most=asked.most_calls)
                self.answers.append(answer)
                self._choices[answer] = Choice(
                    index,
                    asked.texts[at] if asked.echoes else "",
                    calls if asked.calls else None,
                )
        self._open = len(self.answers)

    def cancel(self) -> None:
        """The client has gone."""
        self.over = True
        worker = self._connection.node.worker
        jobs = [answer.job for answer in self.answers]

        def cancel() -> None:
            for job in jobs:
                worker.group.cancel(job)

        worker.ask(cancel)

    def reject(self, error: BaseException) -> None:
        """The group did not take it."""
        if self.over:
            return
        self._end()
        if isinstance(error, TooLong):
            code = "context_length_exceeded"
            self._connection.refuse(Refused(400, str(error), code))
        else:  # Asleep by now.
            self._connection.refuse(Refused(503, "the engine sleeps"))

    def hear(self, answer: Answer, news: News) -> None:
        """There is news of one of its answers."""
        if self.over:
            return
        if news.reason == "abort":
            self._end()
            self._connection.abort()
            return
        choice = self._choices[answer]
        text, job, words = news.text, answer.job, self._words
        if not choice.begun:
            choice.begun = True
            text = choice.echoed + text
            if job.echoes:
                choice.placed = logprobs.echoed(
                    job.prompt, choice.echoed, job.prompt_scores, words
                )
        begin = len(choice.echoed)
        choice.placed += [(begin + at, one) for at, one in news.placed]
        if choice.calls is not None:
            text, calls = choice.calls.add(text)
            choice.called += calls
            if news.reason is not None:
                more, calls = choice.calls.end()
                text += more
                choice.called += calls
        if news.reason is not None:
            called = news.reason == "stop" and choice.calls and choice.calls.made
            choice.reason = "tool_calls" if called else news.reason
            self._open -= 1
        if self._telling.stream:
            self._say(choice, text)
        else:
            choice.texts.append(text)
        if not self._open:
            self._finish()

    # -------------------------------------------------------------------------------------

    def _say(self, choice: Choice, text: str) -> None:
        if not (text or choice.called or choice.reason):
            return
        told = self._told(choice, text)
        self._connection.transport.write(self._telling.say(told))
        choice.called, choice.placed = [], []

    def _told(self, choice: Choice, text: str) -> bytes:
        return self._telling.choice(
            _escaped(text),
            index=choice.index,
            reason=choice.reason,
            logprobs=self._logprobs(choice),
            calls=_listed(choice.called),
        )

    def _finish(self) -> None:
        self._end()
        telling, more = self._telling, self._totals()
        if telling.stream:
            self._connection.transport.write(telling.close(more))
            self._connection.rest()
            return
        choices = [
            self._told(choice, "".join(choice.texts))
            for choice in self._choices.values()
        ]
        self._connection.send(200, telling.whole(choices, more))

    def _end(self) -> None:
        self.over = True
        self._connection.exchange = None

    def _totals(self) -> dict[str, Any]:
        jobs = [answer.job for answer in self.answers]
        prompt = sum(len(one) for one in self._asked.prompts)
        given = sum(answer.given for answer in self.answers)
        joined = [job.joined_s for job in jobs if job.joined_s is not None]
        first = [job.first_s for job in jobs if job.first_s is not None]
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": given,
                "total_tokens": prompt + given,
            },
            "paged": {
                "arrival_s": jobs[0].arrival_s,
                "joined_s": min(joined, default=None),
                "first_token_s": min(first, default=None),
                "end_s": max(job.last_s for job in jobs),
                "preemptions": sum(job.preemptions for job in jobs),
            },
        }

    def _logprobs(self, choice: Choice) -> bytes:
        if self._asked.sampling.logprobs is None:
            return NULL
        write = logprobs.of_chat if self._telling.chat else logprobs.of_text
        return write(choice.placed, self._words)


def _escaped(text: str) -> bytes:
    """As it stands between the quotes in JSON."""
    return json.dumps(text)[1:-1].encode()


def _listed(values: list[dict[str, object]]) -> bytes:
    """As they stand between the brackets in JSON."""
    return json.dumps(values)[1:-1].encode()
