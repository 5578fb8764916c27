"""One LLM on several GPUs: the process of the first one leads, those of the others follow.

All of them are processes of one GPU each, with a pool, loop and LLMs of their own, so
LLMs of any TP size take from the same pages. The leader decides who is computed. Before an
iteration it parks the loops of the others, in order of their GPUs, each between two
iterations of its own; there a page is granted for what is new, or not. Then all compute.

No two leaders wait for each other: whoever waits has parked only loops of GPUs before the
one that he waits for. What a leader had is free when its connection ends, however it went.
A second connection tells leaders of their requests: who waited for pages may come, or has
to give up his (`line`).
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from multiprocessing import ProcessError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreserve.models.cost import IterationTime
from foreserve.models.errors import ForeserveError
from foreserve.runtime.paged.layout import Part
from foreserve.runtime.paged.loads import NoRoom
from foreserve.runtime.paged.mirror import Leader, Mirror, Share
from foreserve.runtime.paged.peers import WITHIN_S, Ranks, meeting

if TYPE_CHECKING:
    from foreserve.runtime.paged.worker import Resident, Service, Worker


SALT = b"follow "
"""Before the key, which may be empty, and then nobody would greet."""


Hear = Callable[[str, int], None]
"""What a follower says of one of the leader's requests: that it may ``come``, or has to
``give_way``."""


class FollowerFailed(ForeserveError):
    """A follower did not do its part, or is gone; one line says why."""


class Followers:
    """The leader's end: a `mirror.Team`. For one thread at a time."""

    def __init__(self, host: str, ports: Sequence[int], key: bytes) -> None:
        """``ports``: of the followers' `Door`s, in order of their GPUs."""
        self._host = host
        self.places = tuple(ports)
        self._links: list[Connection] = []
        self._news: list[Connection] = []
        """Second ones; those that are listened to end with the first."""
        self._asked: list[list[int]] = []
        """Numbers of the last shares that each was asked for: none that were refused
        before."""
        self._hurried = False
        """Since the last `fetch`."""
        self.part = Part(rank=0, size=len(ports) + 1)
        try:
            for port in ports:
                for links in (self._links, self._news):
                    links.append(Client((host, port), authkey=SALT + key))
        except (OSError, EOFError, ProcessError) as error:
            self.close()
            raise FollowerFailed(f"a follower is not there: {error}") from error

    # --- states --------------------------------------------------------------------

    def begin(self, service: Service, leader: str, hear: Hear) -> Ranks:
        """All know of the LLM and its ``leader``, and form its group. ``hear`` is called
        by threads of this."""
        stated = {**asdict(service), "folder": str(service.folder)}
        for rank, link in enumerate(self._links, 1):
            size = self.part.size
            self._send(
                link, do="begin", service=stated, rank=rank, size=size, leader=leader
            )
        for link in self._links:
            number, news = self._told(link)["number"], self._news.pop(0)
            self._send(news, do="listen", to=number)
            threading.Thread(target=_listen, args=(news, hear), daemon=True).start()
        store = meeting(self._host)
        for link in self._links:
            self._send(link, do="meet", host=self._host, port=store.port)
        try:
            ranks = Ranks(self.part, self._host, store)
        except RuntimeError as error:
            raise FollowerFailed(f"the ranks did not meet: {error}") from error
        self._all()
        return ranks

    def fetch(self, *, urgent: bool) -> None:
        """They load their shards; `settle` waits for it. ``urgent``: requests wait."""
        self._hurried = urgent
        for link in self._links:
            self._send(link, do="fetch", urgent=urgent)

    def hurry(self) -> None:
        """Requests wait for it now."""
        if not self._hurried:
            self._hurried = True
            for link in self._links:
                self._send(link, do="hurry")

    def settle(self, leaving: threading.Event, urgent: threading.Event) -> None:
        for link in self._links:
            while not link.poll(0.01):
                if leaving.is_set():
                    raise FollowerFailed("cancelled")
                if urgent.is_set():
                    self.hurry()
            self._told(link)

    def keep(self) -> bool:
        """Whether all shards are there still; those that are stay."""
        for link in self._links:
            self._send(link, do="keep")
        return all([self._told(link)["whole"] for link in self._links])

    def wake(self) -> None:
        for link in self._links:
            self._send(link, do="wake")
        self._all()

    def sleep(self) -> None:
        for link in self._links:
            self._send(link, do="sleep")
        self._all()

    def close(self) -> None:
        """They give up all that the LLM has there; any number of calls."""
        for link in (*self._links, *self._news):
            link.close()

    # --- iterations ----------------------------------------------------------------

    def park(
        self, shares: Sequence[Share], largest: int
    ) -> tuple[list[int | None], dict[int, int]]:
        """Have the others stand still with pages for what is to be computed: where there
        are none for it, if there are not, and what room each place has for all requests
        of this leader. ``largest``: pages that one of the LLM's may come to need. `go`
        must follow."""
        full: list[int | None] = [None] * len(shares)
        rooms: dict[int, int] = {}
        work = [asdict(share) for share in shares]
        self._asked = []
        for place, link in zip(self.places, self._links, strict=True):
            left = [i for i, at in enumerate(full) if at is None]
            self._asked.append(left)
            self._send(link, do="step", work=[work[i] for i in left], largest=largest)
            told = self._told(link)
            for i, ready in zip(left, told["ready"], strict=True):
                full[i] = None if ready else place
            rooms[place] = told["room"]
        return full, rooms

    def go(self, chosen: Sequence[int]) -> None:
        """They compute those of `park`'s shares, or nothing; the leader does, too."""
        for link, asked in zip(self._links, self._asked, strict=True):
            self._send(link, chosen=[asked.index(i) for i in chosen])

    def reserve(self, pages: int) -> int:
        """A request may come to need so many: how many each of them could have. If there
        are enough, they stay. Of one that is gone the next iteration tells."""
        try:
            for link in self._links:
                self._send(link, do="reserve", pages=pages)
            return min([int(self._told(link)["pages"]) for link in self._links])
        except FollowerFailed:
            return pages

    def release(
        self, request: int, but: int | None = None, *, last: bool = False
    ) -> None:
        """Its pages are free, and it waits for none, ``but`` at one place. ``last``: there
        is no other. One that is gone has none."""
        for place, link in zip(self.places, self._links, strict=True):
            if place != but:
                with suppress(FollowerFailed):
                    self._send(link, do="release", request=request, last=last)

    # -------------------------------------------------------------------------------

    def _send(self, link: Connection, **asked: Any) -> None:
        try:
            link.send_bytes(json.dumps(asked).encode())
        except (OSError, EOFError) as error:
            raise FollowerFailed("a follower is gone") from error

    def _all(self) -> None:
        for link in self._links:
            self._told(link)

    def _told(self, link: Connection) -> dict[str, Any]:
        try:
            if not link.poll(WITHIN_S):
                raise FollowerFailed(f"a follower said nothing for {WITHIN_S} s")
            told: dict[str, Any] = json.loads(link.recv_bytes())
        except (OSError, EOFError) as error:
            raise FollowerFailed("a follower is gone") from error
        if "error" in told:
            raise (NoRoom if told["no_room"] else FollowerFailed)(told["error"])
        return told


def _listen(news: Connection, hear: Hear) -> None:
    with suppress(OSError, EOFError, ForeserveError), news:
        while True:
            what, request = json.loads(news.recv_bytes())
            hear(what, request)


class _Left(Exception):
    """The leader is gone, or an iteration failed."""


class Following:
    """The follower's end of one LLM, for its thread."""

    def __init__(self, worker: Worker, link: Connection, door: Door) -> None:
        self._worker, self._link, self._door = worker, link, door
        self._number = -1
        self.news: Connection | None = None
        """To tell its leader."""
        self._resident: Resident | None = None
        self._changes: dict[str, Callable[..., dict[str, Any] | None]] = {
            "begin": self._begin,
            "meet": self._meet,
            "fetch": self._fetch,
            "wake": self._wake,
            "sleep": self._sleep,
        }

    def run(self) -> None:
        why = ""
        try:
            while True:
                asked = json.loads(self._link.recv_bytes())
                if asked["do"] == "listen":
                    self._door.listen(asked["to"], self._link)
                    return
                self._answer(asked)
        except (EOFError, OSError):
            pass
        except _Left as error:
            why = str(error)
        if why:
            sys.stderr.write(f"{why}\n")
            sys.stderr.flush()
        self._link.close()
        self._door.follows.pop(self._number, None)
        if self._resident is not None:
            self._worker.drop(self._resident)
        if self.news is not None:
            self.news.close()

    def _answer(self, asked: dict[str, Any]) -> None:
        do = asked.pop("do")
        if do == "step":
            shares = [Share(**share) for share in asked["work"]]
            largest = asked["largest"]
            failed = self._worker.ask(lambda: self._step(shares, largest)).result()
            if failed:
                raise _Left(failed)
            return
        if do == "release":
            request, last = asked["request"], asked["last"]
            self._worker.ask(
                lambda: self._mirror().release(request, last=last)
            ).result()
            return
        if do == "reserve":
            pages = asked["pages"]
            room = self._worker.ask(lambda: self._mirror().reserve(pages)).result()
            self._say({"pages": room})
            return
        if do == "hurry":
            return  # What was to be hurried has come.
        if do == "keep":
            self._say({"whole": self._worker.settle(self._known())})
            return
        told: dict[str, Any] = {}
        try:
            told = self._changes[do](**asked) or {}
        except (ForeserveError, RuntimeError) as error:
            told = {"error": str(error), "no_room": isinstance(error, NoRoom)}
        self._say(told)

    def _begin(
        self, service: dict[str, Any], rank: int, size: int, leader: str
    ) -> dict[str, Any]:
        self._number = self._door.add(self)
        stated = service | {
            "llm": f"{service['llm']} of leader {self._number}",
            "folder": Path(service["folder"]),
            "time": IterationTime(**service["time"]),
        }
        from foreserve.runtime.paged.worker import Service

        known = replace(Service(**stated), kept=True)
        self._resident = self._worker.begin(known, Part(rank=rank, size=size))
        self._resident.leader = Leader(
            name=leader,
            come=partial(self._tell, "come"),
            give_way=partial(self._tell, "give_way"),
        )
        return {"number": self._number}

    def _tell(self, what: str, request: int) -> None:
        assert self.news is not None
        with suppress(OSError):  # He is gone.
            self.news.send_bytes(json.dumps([what, request]).encode())

    def _meet(self, host: str, port: int) -> None:
        resident = self._known()
        resident.peers = Ranks.join_at(resident.part, host, port)

    def _fetch(self, urgent: bool) -> None:
        """Cancelled when the leader is gone; all that it may say meanwhile is that it is
        urgent."""
        resident, done = self._known(), threading.Event()
        if urgent:
            resident.urgent.set()

        def watch() -> None:
            try:
                while not done.wait(0.01):
                    if self._link.poll(0):
                        self._link.recv_bytes()
                        resident.urgent.set()
            except (EOFError, OSError):
                resident.leaving.set()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            self._worker.bring(resident)
        finally:
            done.set()
            watcher.join()

    def _wake(self) -> None:
        self._worker.wake(self._known())

    def _sleep(self) -> None:
        self._worker.sleep(self._known())

    def _step(self, shares: list[Share], largest: int) -> str:
        """In the loop's thread; what failed. No traceback may keep weights in view."""
        try:
            mirror = self._mirror()
            mirror.largest = largest
            ready = [mirror.ready(share) for share in shares]
            room = self._worker.group.leading.room_for(mirror.leader.name)
            self._say({"ready": ready, "room": room})
            if not self._link.poll(WITHIN_S):
                return "the leader said nothing"
            chosen = json.loads(self._link.recv_bytes())["chosen"]
            if chosen:
                mirror.compute([shares[i] for i in chosen])
        except Exception as error:
            return f"an iteration that was followed failed: {error}"
        return ""

    def _mirror(self) -> Mirror:
        number = self._known().number
        assert number is not None
        return self._worker.group.mirrors[number]

    def _known(self) -> Resident:
        assert self._resident is not None
        return self._resident

    def _say(self, told: dict[str, Any]) -> None:
        self._link.send_bytes(json.dumps(told).encode())


class Door:
    """Where leaders knock: two threads for each of their LLMs, of which one soon ends."""

    def __init__(self, worker: Worker, host: str, key: bytes) -> None:
        self._worker = worker
        self._listener = Listener((host, 0), authkey=SALT + key, backlog=64)
        self.port: int = self._listener.address[1]
        self.follows: dict[int, Following] = {}
        self._numbers = count()
        threading.Thread(target=self._accept, daemon=True).start()

    def add(self, follow: Following) -> int:
        number = next(self._numbers)
        self.follows[number] = follow
        return number

    def listen(self, number: int, news: Connection) -> None:
        follow = self.follows.get(number)
        if follow is None:
            news.close()
        else:
            follow.news = news

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except Exception:  # Who has no key, or left at once.
                continue
            follow = Following(self._worker, link, self)
            threading.Thread(target=follow.run, daemon=True).start()
