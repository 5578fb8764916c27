"""What has become of the changes that an operator asked for."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from foreserve.models.observed import Observed, ObservedReplica
from foreserve.models.problem import Fleet
from foreserve.runtime.ledger import phase_bytes

KEPT = 256

Touches = Callable[[ObservedReplica], bool]


@dataclass(slots=True, kw_only=True)
class _Receipt:
    id: str
    what: str
    subject: str
    start_s: float
    touches: Touches
    is_done: Callable[[Observed], bool]
    before_bytes: int
    state: Literal["running", "done", "superseded"] = "running"
    end_s: float | None = None
    after_bytes: int | None = None


class Receipts:
    """Actions by id: the latest `KEPT`. An action is done when it shows in what is true;
    one that another takes the place of is superseded."""

    def __init__(self, fleet: Fleet, now_s: Callable[[], float]) -> None:
        self._fleet, self._now_s = fleet, now_s
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Receipt] = OrderedDict()

    def begin(
        self,
        what: str,
        subject: str,
        observed: Observed,
        *,
        is_done: Callable[[Observed], bool] = lambda observed: True,
        touches: Touches = lambda replica: False,
    ) -> Mapping[str, Any]:
        """A new one; ``touches``: whose bytes on the GPUs are of interest."""
        receipt = _Receipt(
            id=secrets.token_hex(8),
            what=what,
            subject=subject,
            start_s=self._now_s(),
            touches=touches,
            is_done=is_done,
            before_bytes=self._bytes(observed, touches),
        )
        with self._lock:
            for known in self._known.values():
                if known.state == "running" and known.subject == subject:
                    self._end(known, observed, "superseded")
            self._known[receipt.id] = receipt
            if len(self._known) > KEPT:
                self._known.popitem(last=False)
        return {"action": receipt.id, "what": what, "subject": subject}

    def saw(self, observed: Observed) -> None:
        """Look which ones are done."""
        with self._lock:
            for receipt in self._known.values():
                # What was seen before it began says nothing.
                if (
                    receipt.state == "running"
                    and observed.now_s >= receipt.start_s
                    and receipt.is_done(observed)
                ):
                    self._end(receipt, observed, "done")

    def find(self, action_id: str, observed: Observed) -> Mapping[str, Any] | None:
        with self._lock:
            receipt = self._known.get(action_id)
            if receipt is None:
                return None
            end_s = self._now_s() if receipt.end_s is None else receipt.end_s
            after_bytes = receipt.after_bytes
            if after_bytes is None:
                after_bytes = self._bytes(observed, receipt.touches)
            return {
                "action": receipt.id,
                "what": receipt.what,
                "subject": receipt.subject,
                "state": receipt.state,
                "start_s": receipt.start_s,
                "end_s": receipt.end_s,
                "took_s": end_s - receipt.start_s,
                "in_flight": sum(
                    r.in_flight for r in observed.replicas if receipt.touches(r)
                ),
                "gpu_bytes_before": receipt.before_bytes,
                "gpu_bytes": after_bytes,
            }

    def _end(
        self,
        receipt: _Receipt,
        observed: Observed,
        state: Literal["done", "superseded"],
    ) -> None:
        receipt.state, receipt.end_s = state, self._now_s()
        receipt.after_bytes = self._bytes(observed, receipt.touches)

    def _bytes(self, observed: Observed, touches: Touches) -> int:
        return sum(
            len(r.gpus) * phase_bytes(self._fleet.option_of(r.llm, r.gpus), r.phase)
            for r in observed.replicas
            if touches(r)
        )
