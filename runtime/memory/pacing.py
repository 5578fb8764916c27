"""What copies beside serving may cost: they pause, so that the loss is seen and bounded.

While iterations run, a load that nobody waits for copies in windows of some tens of
milliseconds, with pauses in between. What an iteration takes longer in a window than in the
pauses beside it is what copying costs; since the two lie side by side, a machine whose own
pace drifts tells the same. Copies get the share of time for which loss times share stays
within the bound.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

STEP = 1.1


def next_share(
    share: float,
    surely: float,
    likely: float,
    *,
    most_loss: float,
    least: float,
    most: float,
) -> float:
    """The share of time for copies, after decode iterations were seen to lose ``surely``
    at least while there are any, and most ``likely`` more: halved if that is surely too
    much, a tenth less if it is likely so, a tenth more if that will still be allowed.
    Never below the least, or nothing would ever arrive."""
    if share * surely > most_loss:
        share /= 2
    elif share * likely > most_loss:
        share /= STEP
    elif STEP * share * likely <= most_loss:
        share *= STEP
    return min(max(share, least), most)


class Held(Protocol):
    """What a `Pacer` paces: `loading.Link`."""

    @property
    def busy(self) -> bool:
        """Whether a load is under way that nobody waits for."""
        ...

    @property
    def begun(self) -> int:
        """Pieces of work so far, of mapping or copying, for whomever."""
        ...

    @property
    def ended(self) -> int:
        """Those of them that have ended."""
        ...

    def hold(self, until_s: float) -> None:
        """Loads that nobody waits for begin nothing until then, or `resume`."""
        ...

    def resume(self) -> None: ...


Ratios = dict[int, list[float]]
"""What iterations took, as multiples of what was planned for their batch; by LLM."""

BACKSTOP_S = 1.0
"""So long a pause lasts at most if no iteration ends."""


@dataclass(slots=True)
class Pacer:
    """Holds a link to what the iterations beside it may lose. For one thread, which runs
    them: `ran` after each, `idle` when there are none. Loads that requests wait for are
    not held."""

    link: Held
    most_loss: float = 0.05
    """Of the mean time between tokens."""
    share: float = 0.5
    """Of the time, for copies."""
    least: float = 0.02
    most: float = 0.9
    """Below 1, so that there are pauses to compare with."""
    window_s: float = 0.03
    """The shorter of window and pause takes about so long, and 4 iterations at least."""
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=25))
    """Of the last windows, each beside its pauses."""
    enough: int = 8
    """Of these, before the share changes."""
    _copies: bool | None = None
    """Whether this is a window of copies, or a pause; None: nothing is paced."""
    _ticks: int = 0
    """Iterations in it so far."""
    _most_ticks: int = 0
    _beside: int = 0
    """Of them, beside some work of the link's."""
    _usual_s: float = 0.0
    """What iterations take."""
    _ended: int = 0
    """`Held.ended` after the last iteration."""
    _seen: Ratios = field(default_factory=dict)
    """In this window, or pause."""
    _copied: Ratios = field(default_factory=dict)
    """In the window before this pause."""
    _paused: Ratios = field(default_factory=dict)
    """In the pause before that window."""

    @property
    def paces(self) -> bool:
        """Whether iterations are to be told: there was one beside a load, and what that
        cost is not made up for yet."""
        return self._copies is not None

    def ran(
        self, took_s: float, now_s: float, llm: int = 0, planned_s: float = 0.0
    ) -> None:
        """An iteration ended now. ``planned_s``: what the cost model says of its batch, so
        that iterations of all sizes can be compared; 0: it is not to be compared."""
        busy = self.link.busy
        if self._copies is None and not busy:
            return
        took_s = max(took_s, 1e-6)
        usual_s = self._usual_s or took_s
        self._usual_s = usual_s + 0.1 * (took_s - usual_s)
        # What was not under way before it, and has not begun since, was not beside it.
        alone, self._ended = self.link.begun == self._ended, self.link.ended
        if self._copies is None:
            self._enter(True, now_s)
            return
        self._ticks += 1
        self._beside += not alone
        if planned_s > 0 and alone != self._copies:
            self._seen.setdefault(llm, []).append(took_s / planned_s)
        if not self._copies:
            self.link.hold(now_s + BACKSTOP_S)
        if self._ticks >= self._most_ticks or (self._copies and not busy):
            self._turn(busy, now_s)

    def idle(self) -> None:
        """Nobody is served, or nothing loads: copies go as fast as they can from now on."""
        if self._copies is not None:
            self._copies = None
            self._copied = self._paused = {}
            self.link.resume()

    def _turn(self, busy: bool, now_s: float) -> None:
        """A window or a pause is over. What a load that has ended did not pay for, the
        next one does."""
        if not self._copies:
            self._compare(_both(self._paused, self._seen))
            self._paused = self._seen
            self._enter(True, now_s)
        elif self._beside:
            self._copied = self._seen
            self._enter(False, now_s)
        elif busy:
            self._enter(True, now_s)
        else:
            self.idle()

    def _enter(self, copies: bool, now_s: float) -> None:
        # A number, not a time: whatever ends with a slow iteration looks slow.
        odds = self.share / (1 - self.share)
        unit = max(4.0, self.window_s / self._usual_s)
        if copies:
            self._most_ticks = math.ceil(unit * max(1.0, odds))
            self.link.resume()
        else:
            # One more has met copies: the first of the pause, their end.
            self._most_ticks = math.ceil(max(unit, (self._beside + 1) / odds))
            self.link.hold(now_s + BACKSTOP_S)
        self._copies, self._ticks, self._beside, self._seen = copies, 0, 0, {}

    def _compare(self, paused: Ratios) -> None:
        """What the last window lost against the pauses on both its sides."""
        lost = [
            ratio / median(paused[llm]) - 1
            for llm, ratios in self._copied.items()
            if llm in paused
            for ratio in ratios
        ]
        if not lost:
            return
        self.losses.append(median(lost))
        if len(self.losses) < self.enough:
            return
        count, ranked = len(self.losses), sorted(self.losses)
        # The true median lies below this one in 1 of 30 cases.
        surely = ranked[int((count - 1.8 * math.sqrt(count)) / 2)]
        self.share = next_share(
            self.share,
            surely,
            median(ranked),
            most_loss=self.most_loss,
            least=self.least,
            most=self.most,
        )


def _both(
    before: Mapping[int, list[float]], after: Mapping[int, list[float]]
) -> Ratios:
    return {llm: [*before.get(llm, ()), *ratios] for llm, ratios in after.items()} | {
        llm: ratios for llm, ratios in before.items() if llm not in after
    }
