"""Reads the logs of a folder again and says what in them cannot be.

``python -m foreserve.runtime.live.check FOLDER``; exit code 1 if there is anything. Knows
nothing of the project but the legal moves: it adds up the bytes itself. At every line of
every agent's log:

* no GPU holds more than its capacity;
* what is held was booked by an intent before the phase that needs it, and nothing is
  held for a replica that is gone;
* no weights leave host memory while a load copies from there, and they stay within it;
* moves are legal, and each ordered one is preceded by its intent;
* generations only grow; no order of an older one is obeyed, none twice;
* every order that was obeyed is an intent of the controller's log, written before it was
  sent.

And of the journal, where there is one: every request that was accepted has one end, those
that a killed gateway took with it too. What was accepted since the last start may be open.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foreserve.models.observed import Phase
from foreserve.runtime.states import LEGAL

Line = Mapping[str, Any]
Key = tuple[str, tuple[str, ...]]

CONTROLLER = "controller.log"
JOURNAL = "journal.jsonl"
ORDERED: Mapping[Phase | None, str] = {
    "LOADING": "load",
    "ACTIVATING": "activate",
    "DRAINING": "demote",
}
"""Phases that only an order leads to, and which."""


@dataclass(slots=True)
class Found:
    """What a folder's logs say."""

    faults: list[str] = field(default_factory=list)
    lines: int = 0
    orders: int = 0
    peak: dict[str, float] = field(default_factory=dict)
    """Largest share of its capacity that was ever held, by GPU."""
    requests: int = 0
    """That were accepted."""
    unfinished: int = 0
    """Of these, since the last start, without an end."""
    ends: Counter[str] = field(default_factory=Counter)
    """Why the others ended: ``finished``, or the reason."""


def check(folder: Path) -> Found:
    """Read every log of ``folder``: the controller's, and ``<node>.log`` of its agents."""
    found = Found()
    sent = None
    if (folder / CONTROLLER).exists():
        sent = _sent(_lines(folder / CONTROLLER, found), found)
    for path in sorted(folder.glob("*.log")):
        if path.name != CONTROLLER:
            _Agent(path.name, sent, found).read(_lines(path, found))
    if (folder / JOURNAL).exists():
        _requests(_lines(folder / JOURNAL, found), found)
    return found


def _requests(lines: Iterable[Line], found: Found) -> None:
    """Accepted requests and their ends; each run numbers its own."""
    accepted: set[int] = set()
    under_way: set[int] = set()
    for line in lines:
        number: int = line.get("request", -1)
        if line["event"] == "started":
            for left in sorted(under_way):
                found.faults.append(f"{JOURNAL}: request {left} has no end")
            accepted, under_way = set(), set()
        elif line["event"] == "accepted":
            if number in accepted:
                found.faults.append(f"{JOURNAL}: request {number} is accepted again")
            accepted.add(number)
            under_way.add(number)
            found.requests += 1
        elif line["event"] == "request":
            if number not in under_way:
                how = "ends again" if number in accepted else "was never accepted"
                found.faults.append(f"{JOURNAL}: request {number} {how}")
            under_way.discard(number)
            finished = line["result"] == "finished"
            found.ends["finished" if finished else str(line["reason"])] += 1
    found.unfinished = len(under_way)


def _lines(path: Path, found: Found) -> Iterable[Line]:
    """Lines of a log; its last one may be cut off, where a crash has left it so."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        found.lines += 1
        try:
            yield json.loads(line)
        except ValueError:
            found.faults.append(f"{path.name}:{number}: not a JSON line")


def _sent(lines: Iterable[Line], found: Found) -> set[tuple[Any, ...]]:
    """Orders of the controllers: (generation, step, kind, replica)."""
    sent: set[tuple[Any, ...]] = set()
    generation = 0
    for line in lines:
        if line["event"] == "generation":
            if line["generation"] <= generation:
                found.faults.append(f"{CONTROLLER}: generation {generation} again")
            generation = line["generation"]
        elif line["event"] == "intent":
            if line["generation"] != generation:
                found.faults.append(f"{CONTROLLER}: an intent of another generation")
            sent.add(_order(line))
    return sent


class _Agent:
    def __init__(self, name: str, sent: set[tuple[Any, ...]] | None, found: Found):
        self.name, self.sent, self.found = name, sent, found
        self.number = 0

    def read(self, lines: Iterable[Line]) -> None:
        self.capacity: dict[str, int] = {}
        self.host: int | None = None
        self._forget()
        for self.number, line in enumerate(lines, start=1):
            obey = getattr(self, f"_{line.get('event')}", None)
            if obey is None:
                self._fault(f"no event of an agent: {line.get('event')!r}")
            else:
                obey(line)

    def _forget(self) -> None:
        self.held: dict[Key, int] = {}
        self.phase: dict[Key, Phase] = {}
        self.asked: dict[Key, str] = {}
        self.generation = self.step = 0
        self.hosted: dict[str, tuple[int, int]] = {}

    def _fault(self, message: str) -> None:
        self.found.faults.append(f"{self.name}:{self.number}: {message}")

    def _start(self, line: Line) -> None:
        """An agent starts with nothing: what an earlier one had was ended before."""
        self._forget()
        self.capacity, self.host = line["capacity"], line.get("host")

    def _fence(self, line: Line) -> None:
        if line["generation"] <= self.generation:
            self._fault(f"generation {line['generation']} after {self.generation}")
        self.generation, self.step = line["generation"], 0

    def _refused(self, line: Line) -> None:
        """Nothing was done."""

    def _intent(self, line: Line) -> None:
        self.found.orders += 1
        key = _key(line)
        if line["generation"] != self.generation:
            self._fault(f"obeys generation {line['generation']}")
        if line["step"] <= self.step:
            self._fault(f"obeys step {line['step']} after {self.step}")
        self.step = line["step"]
        if self.sent is not None and _order(line) not in self.sent:
            self._fault("obeys what no controller has written down")
        if line["held"] < self.held.get(key, 0):
            self._fault("releases bytes before anything is gone")
        loads = line["kind"] == "load" and self.host is not None
        if loads and not self.hosted.get(line["llm"], (0, 0))[1]:
            self._fault("loads without a look at host memory")
        self.asked[key] = line["kind"]
        self._hold(key, line["held"])

    def _host(self, line: Line) -> None:
        """Weights in host memory: within its size, and none go that a load copies from."""
        llm, held, readers = line["llm"], line["held"], line["readers"]
        before, copying = self.hosted.get(llm, (0, 0))
        if held < before and (readers if line["why"] == "end" else copying):
            self._fault(f"weights of {llm} go while a load copies from them")
        if readers < 0:
            self._fault(f"{readers} loads copy the weights of {llm}")
        self.hosted[llm] = held, readers
        booked = sum(num_bytes for num_bytes, _ in self.hosted.values())
        if self.host is None or booked > self.host:
            self._fault(f"host memory holds {booked} of {self.host} bytes")

    def _phase(self, line: Line) -> None:
        key, after = _key(line), line["phase"]
        before = self.phase.get(key)
        if (before, after) not in LEGAL:
            self._fault(f"{before} -> {after} is no legal move")
        wanted = ORDERED.get(after)
        if wanted is not None and self.asked.get(key) != wanted:
            self._fault(f"{after} without an order")
        if after is None:
            if line["held"]:
                self._fault("holds bytes although it is gone")
            self.phase.pop(key, None)
            self.asked.pop(key, None)
        else:
            self.phase[key] = after
            if not line["held"]:
                self._fault(f"{after} without bytes")
        if wanted is not None and line["held"] != self.held.get(key):
            self._fault(f"{after} with other bytes than booked")
        self._hold(key, line["held"])

    def _shrink(self, line: Line) -> None:
        """It gives up memory before it is gone: while it drains, ever more."""
        key = _key(line)
        if self.phase.get(key) != "DRAINING":
            self._fault(f"shrinks while {self.phase.get(key)}")
        if not 0 < line["held"] < self.held.get(key, 0):
            self._fault("does not shrink")
        self._hold(key, line["held"])

    def _hold(self, key: Key, num_bytes: int) -> None:
        self.held[key] = num_bytes
        if not num_bytes:
            del self.held[key]
        for gpu in key[1]:
            held = sum(n for other, n in self.held.items() if gpu in other[1])
            capacity = self.capacity.get(gpu, 0)
            if held > capacity:
                self._fault(f"GPU {gpu} holds {held} of {capacity} bytes")
            share = held / capacity if capacity else 0.0
            self.found.peak[gpu] = max(self.found.peak.get(gpu, 0.0), share)


def _key(line: Line) -> Key:
    return line["llm"], tuple(line["gpus"])


def _order(line: Line) -> tuple[Any, ...]:
    return line["generation"], line["step"], line["kind"], _key(line)


def main() -> int:
    found = check(Path(sys.argv[1]))
    for fault in found.faults:
        sys.stderr.write(f"{fault}\n")
    peak = max(found.peak.values(), default=0.0)
    sys.stdout.write(
        f"{found.lines} lines, {found.orders} orders, peak {peak:.1%} of a GPU, "
        f"{found.requests} requests ({found.unfinished} under way), "
        f"{len(found.faults)} faults\n"
    )
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
