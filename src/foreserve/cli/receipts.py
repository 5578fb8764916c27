"""What has become of the changes that an operator asked for."""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from foreserve.models.codec import read_text
from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.problem import Fleet
from foreserve.runtime.ledger import phase_bytes

KEPT = 256

Touches = Callable[[ObservedReplica], bool]
Ending = Literal["done", "superseded", "unknown"]


@dataclass(slots=True, kw_only=True)
class Receipt:
    """One action; as it is kept in a file."""

    id: str
    what: str
    subject: str
    start_s: float
    generation: int
    """Of the plan that was carried out when it was asked for."""
    before_bytes: int
    state: Literal["running"] | Ending = "running"
    """unknown: the cluster was started anew before it was seen to be done."""
    end_s: float | None = None
    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _Under:
    """What an action that is under way looks at."""

    touches: Touches
    is_done: Callable[[Observed], bool]


def read_receipts(path: Path) -> list[Receipt]:
    """What `Receipts` had its owner keep; `InvalidInput` or `ValueError` if it is not."""
    found: list[Receipt] = TypeAdapter(list[Receipt]).validate_json(read_text(path))
    return found


class Receipts:
    """Actions by id: the latest `KEPT`. An action is done when it shows in what is true;
    one that another takes the place of is superseded."""

    def __init__(
        self,
        fleet: Fleet,
        now_s: Callable[[], float],
        before: Sequence[Receipt] = (),
        keep: Callable[[str], object] = lambda text: None,
    ) -> None:
        """``before``: of earlier starts. ``keep`` is given the text of all of them
        whenever one begins or ends."""
        self._fleet, self._now_s, self._keep = fleet, now_s, keep
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Receipt] = OrderedDict()
        self._under: dict[str, _Under] = {}
        for receipt in before[-KEPT:]:
            if receipt.state == "running":
                receipt.state = "unknown"
            self._known[receipt.id] = receipt

    def begin(
        self,
        what: str,
        subject: str,
        observed: Observed,
        *,
        generation: int = 0,
        is_done: Callable[[Observed], bool] = lambda observed: True,
        touches: Touches = lambda replica: False,
    ) -> Mapping[str, Any]:
        """A new one; ``touches``: whose bytes on the GPUs are of interest."""
        receipt = Receipt(
            id=secrets.token_hex(8),
            what=what,
            subject=subject,
            start_s=self._now_s(),
            generation=generation,
            before_bytes=self._bytes(observed, touches),
        )
        with self._lock:
            for known in self._known.values():
                if known.state == "running" and known.subject == subject:
                    self._end(known, observed, "superseded")
            self._known[receipt.id] = receipt
            self._under[receipt.id] = _Under(touches, is_done)
            if len(self._known) > KEPT:
                gone, _ = self._known.popitem(last=False)
                self._under.pop(gone, None)
            self._write()
        return {"action": receipt.id, "what": what, "subject": subject}

    def saw(self, observed: Observed) -> None:
        """Look which ones are done."""
        with self._lock:
            running = [self._known[key] for key in self._under]
            # What was seen before it began says nothing.
            done = [
                receipt
                for receipt in running
                if observed.now_s >= receipt.start_s
                and self._under[receipt.id].is_done(observed)
            ]
            for receipt in done:
                self._end(receipt, observed, "done")
            if done:
                self._write()

    def find(self, action_id: str, observed: Observed) -> Mapping[str, Any] | None:
        with self._lock:
            receipt = self._known.get(action_id)
            if receipt is None:
                return None
            under = self._under.get(action_id)
            end_s, after_bytes = receipt.end_s, receipt.after_bytes
            if under is not None:
                end_s, after_bytes = self._now_s(), self._bytes(observed, under.touches)
            return {
                "action": receipt.id,
                "what": receipt.what,
                "subject": receipt.subject,
                "state": receipt.state,
                "generation": receipt.generation,
                "start_s": receipt.start_s,
                "end_s": receipt.end_s,
                "took_s": None if end_s is None else end_s - receipt.start_s,
                "in_flight": sum(
                    r.in_flight
                    for r in observed.replicas
                    if under is not None and under.touches(r)
                ),
                "gpu_bytes_before": receipt.before_bytes,
                "gpu_bytes": after_bytes,
            }

    def _end(
        self,
        receipt: Receipt,
        observed: Observed,
        state: Ending,
    ) -> None:
        receipt.state, receipt.end_s = state, self._now_s()
        under = self._under.pop(receipt.id)
        receipt.after_bytes = self._bytes(observed, under.touches)

    def _write(self) -> None:
        self._keep(json.dumps([asdict(receipt) for receipt in self._known.values()]))

    def _bytes(self, observed: Observed, touches: Touches) -> int:
        return sum(
            len(r.gpus) * phase_bytes(self._fleet.option_of(r.llm, r.gpus), r.phase)
            for r in observed.replicas
            if touches(r)
        )
