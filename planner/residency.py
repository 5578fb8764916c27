"""The residency map: which LLM is where, when, and doing what; planned or simulated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

from foreserve.models.faults import Fault
from foreserve.models.observed import Phase
from foreserve.models.outcome import Residency
from foreserve.models.placement import ReplicaId, State
from foreserve.models.plan import Plan
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.planner.display import clock, gpu_span, seconds, shorten, time_ticks
from foreserve.planner.picture import (
    NODE_GAP,
    WIDTH,
    Box,
    Layer,
    Picture,
    Strokes,
    Text,
    colours,
    strokes,
    text_on,
)

LEFT = 104.0
"""Space for node and GPU names."""
RIGHT = 16.0
ROW_HEIGHTS = ((8, 42.0), (16, 34.0), (32, 24.0), (64, 17.0), (10**9, 13.0))
"""(up to so many GPUs, row height)."""
ROW_GAP = 2.0
NARROW = " narrow"
"""Added to the style of boxes that a border would hide."""
TOUCH_S = 1e-6
FAULT_WIDTH = 3.0
"""At least."""
STYLE: Mapping[Phase, str] = {
    "ACTIVE": "a",
    "WARM": "w",
    "LOADING": "l",
    "DRAINING": "d",
}


def planned_residency(plan: Plan) -> tuple[Residency, ...]:
    """The plan as stretches: consecutive epochs with an unchanged replica are one."""
    stays: list[Residency] = []
    latest: dict[tuple[ReplicaId, State], int] = {}
    for epoch in plan.epochs:
        for replica in epoch.placement.replicas:
            key = (replica.id, replica.state)
            index = latest.get(key)
            if index is not None and stays[index].end_s == epoch.start_s:
                stays[index] = replace(stays[index], end_s=epoch.end_s)
                continue
            latest[key] = len(stays)
            stays.append(
                Residency(
                    llm=replica.llm,
                    gpus=replica.gpus,
                    phase=replica.state,
                    start_s=epoch.start_s,
                    end_s=epoch.end_s,
                )
            )
    return tuple(stays)


def residency_map(
    fleet: Fleet,
    residency: Sequence[Residency],
    start_s: float,
    end_s: float,
    max_tips: int,
    faults: Sequence[Fault] = (),
) -> Picture:
    """GPUs down, time across: what holds a KV cache fills its GPUs' rows, what holds
    weights only is a thin lane at the bottom of each. Faults that last lie under both,
    others are marks above.

    The largest ``max_tips`` boxes keep a tip of their own. A replica that serves alone on
    several GPUs is one box over their rows.
    """
    rows, labels, bottom = _rows(fleet)
    stays = _merged(residency, start_s, end_s)
    wide = [stay for stay in stays if stay.phase in ("ACTIVE", "DRAINING")]
    thin = [stay for stay in stays if stay.phase in ("WARM", "LOADING")]
    lane_of = _lanes(thin)
    row_height = next(iter(rows.values())).height
    lanes = 1 + max(lane_of.values(), default=0)
    frame = _Frame(
        rows=rows,
        row_height=row_height,
        lane_height=min(10.0, 0.85 * row_height / lanes),
        start_s=start_s,
        scale=(WIDTH - LEFT - RIGHT) / (end_s - start_s),
        colour=colours(fleet),
        # A load takes seconds on a map of hours: keep it visible, if there are few.
        least_load=min(2.0, 800 / max(1, sum(s.phase == "LOADING" for s in thin))),
    )
    for (index, gpu), lane in lane_of.items():
        frame.lanes.setdefault(gpu, []).append((thin[index], lane))
    texts: list[Text] = []
    big: list[Box] = []
    small: list[Box] = []
    for stay, slot, slots in _pieces(wide):
        boxes = frame.served(stay, slot, slots)
        big += boxes
        if letters := _letters(boxes[0], stay, 8.0):
            room, ink = frame.room(stay, boxes[0], slots), frame.colour[stay.llm]
            texts += _label(boxes[0], stay, letters, room, 11.5, text_on(ink))
    for (index, gpu), lane in lane_of.items():
        stay = thin[index]
        y = rows[gpu].y + row_height - (lane + 1) * frame.lane_height
        small.append(one := frame.box(stay, y, frame.lane_height))
        if stay.phase == "WARM" and (letters := _letters(one, stay, 5.6)):
            room = (y, frame.lane_height)
            texts += _label(one, stay, letters, room, 8.5, "lane")
    by_area = sorted((*big, *small), key=lambda b: b.width * b.height, reverse=True)
    tipped = {id(one) for one in by_area[:max_tips]}
    times = time_ticks(start_s, end_s, 13)
    xs = [frame.x(t) for t in times]
    return Picture(
        height=bottom + 24,
        lines=tuple(rows.values()),
        layers=(
            *frame.faults(faults, end_s, lasting=True),
            _layer(big, tipped),
            _layer(small, tipped),
            *frame.faults(faults, end_s, lasting=False),
        ),
        texts=(*labels, *texts),
        ticks=tuple(
            Text(x=x, y=bottom + 16, text=clock(t), style="tick")
            for x, t in zip(xs, times, strict=True)
        ),
        rules=tuple(xs),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """Scales of one map, and who is in which lane."""

    rows: Mapping[GpuId, Box]
    row_height: float
    lane_height: float
    start_s: float
    scale: float
    """Units per second."""
    colour: Mapping[str, int]
    least_load: float
    """Width that every load is drawn with at least."""
    lanes: dict[GpuId, list[tuple[Residency, int]]] = field(default_factory=dict)

    def x(self, time_s: float) -> float:
        return LEFT + (time_s - self.start_s) * self.scale

    def box(self, stay: Residency, y: float, height: float) -> Box:
        width = (stay.end_s - stay.start_s) * self.scale
        if stay.phase == "LOADING":
            width = max(width, self.least_load)
        return Box(
            x=self.x(stay.start_s),
            y=y,
            width=width,
            height=height,
            style=f"{STYLE[stay.phase]}{self.colour[stay.llm]}" + NARROW * (width < 3),
            tip=_tip(stay),
        )

    def faults(
        self, faults: Sequence[Fault], end_s: float, *, lasting: bool
    ) -> Iterator[Layer]:
        """A box in the row of each GPU that a fault hits, if there are any."""
        boxes = []
        for fault in faults:
            lasts = fault.kind in ("gpu-loss", "node-loss", "slow-node")
            if lasts is not lasting or not self.start_s <= fault.at < end_s:
                continue
            until_s = end_s if fault.until_s is None else min(fault.until_s, end_s)
            lasted_s = until_s - fault.at if lasts else 0.0
            boxes += [
                Box(
                    x=self.x(fault.at),
                    y=row.y,
                    width=max(FAULT_WIDTH, lasted_s * self.scale),
                    height=row.height,
                    style="slow" if fault.kind == "slow-node" else "fault",
                    tip=_fault_tip(fault),
                )
                for gpu, row in self.rows.items()
                if fault.where.covers(gpu)
            ]
        if boxes:
            yield Layer(boxes=tuple(boxes))

    def served(self, stay: Residency, slot: int, slots: int) -> list[Box]:
        """One box over all its rows where it is alone, else its part of each row."""
        tops = [self.rows[gpu].y for gpu in stay.gpus]
        whole = (self.row_height + ROW_GAP) * len(tops) - ROW_GAP
        if slots == 1 and math.isclose(tops[-1] + self.row_height - tops[0], whole):
            return [self.box(stay, tops[0], whole)]
        height = self.row_height / slots
        return [self.box(stay, top + slot * height, height) for top in tops]

    def room(self, stay: Residency, box: Box, slots: int) -> tuple[float, float]:
        """(y, height) of the part of ``box`` that no lane covers, for its label."""
        if slots > 1:
            return box.y, box.height
        free = [self._free_height(gpu, stay) for gpu in stay.gpus]
        if min(free) == self.row_height:
            return box.y, box.height
        best = free.index(max(free))
        return self.rows[stay.gpus[best]].y, free[best]

    def _free_height(self, gpu: GpuId, stay: Residency) -> float:
        held = [lane for other, lane in self.lanes.get(gpu, ()) if _meet(other, stay)]
        return self.row_height - self.lane_height * (1 + max(held, default=-1))


def _rows(fleet: Fleet) -> tuple[dict[GpuId, Box], list[Text], float]:
    """A row box per GPU, their labels, and where the last row ends."""
    count = len(fleet.cluster.gpus)
    height = next(h for most, h in ROW_HEIGHTS if count <= most)
    rows: dict[GpuId, Box] = {}
    texts: list[Text] = []
    y = 4.0
    for node in fleet.cluster.nodes:
        texts.append(
            Text(
                x=0,
                y=y + min(height, 22) / 2 + 4,
                text=shorten(node.name, 9),
                style="node",
                tip=f"{node.name}: {node.gpus} × {node.gpu}",
            )
        )
        for gpu in node.gpu_ids():
            rows[gpu] = Box(
                x=LEFT,
                y=y,
                width=WIDTH - LEFT - RIGHT,
                height=height,
                style="row",
                tip="",
            )
            texts.append(
                Text(x=LEFT - 8, y=y + height / 2 + 4, text=str(gpu.index), style="gpu")
            )
            y += height + ROW_GAP
        y += NODE_GAP
    return rows, texts, y - NODE_GAP


def _merged(
    residency: Iterable[Residency], start_s: float, end_s: float
) -> list[Residency]:
    """Stretches within the span, ACTIVATING counted as ACTIVE, touching ones joined."""
    stays: list[Residency] = []
    for stay in sorted(residency, key=lambda s: (s.llm, s.gpus, s.start_s)):
        phase: Phase = "ACTIVE" if stay.phase == "ACTIVATING" else stay.phase
        first_s, last_s = max(stay.start_s, start_s), min(stay.end_s, end_s)
        if first_s >= last_s:
            continue
        before = stays[-1] if stays else None
        same = before is not None and (before.llm, before.gpus, before.phase) == (
            stay.llm,
            stay.gpus,
            phase,
        )
        if before is not None and same and first_s <= before.end_s + TOUCH_S:
            stays[-1] = replace(before, end_s=max(before.end_s, last_s))
        else:
            stays.append(replace(stay, phase=phase, start_s=first_s, end_s=last_s))
    return stays


def _meet(one: Residency, other: Residency) -> bool:
    early = min(one.end_s, other.end_s) - TOUCH_S
    return max(one.start_s, other.start_s) < early


def _lanes(thin: Sequence[Residency]) -> dict[tuple[int, GpuId], int]:
    """(stretch, GPU) -> the lowest lane free there; what follows on keeps its lane.

    ``thin`` is in the order of `_merged`. Of those that begin together the one that
    stays longest lies lowest.
    """
    until_s = [stay.end_s for stay in thin]
    for index in reversed(range(len(thin) - 1)):
        if _follows(thin[index], thin[index + 1]):
            until_s[index] = until_s[index + 1]
    lanes: dict[tuple[int, GpuId], int] = {}
    free_s: dict[tuple[GpuId, int], float] = {}
    order = sorted(range(len(thin)), key=lambda i: (thin[i].start_s, -until_s[i]))
    for index in order:
        stay = thin[index]
        for gpu in stay.gpus:
            if index and _follows(thin[index - 1], stay):
                lane = lanes[index - 1, gpu]
            else:
                lane = 0
                while free_s.get((gpu, lane), -math.inf) > stay.start_s + TOUCH_S:
                    lane += 1
            lanes[index, gpu] = lane
            free_s[gpu, lane] = until_s[index]
    return lanes


def _follows(before: Residency, after: Residency) -> bool:
    same = (before.llm, before.gpus) == (after.llm, after.gpus)
    return same and after.start_s <= before.end_s + TOUCH_S


def _pieces(wide: Sequence[Residency]) -> Iterator[tuple[Residency, int, int]]:
    """(piece, its slot, slots): stretches cut where the number that share changes."""
    rivals: list[set[int]] = [set() for _ in wide]
    on_gpu: dict[GpuId, list[int]] = {}
    for index in sorted(range(len(wide)), key=lambda i: wide[i].start_s):
        for gpu in wide[index].gpus:
            still = [i for i in on_gpu.get(gpu, ()) if _meet(wide[i], wide[index])]
            for other in still:
                rivals[other].add(index)
                rivals[index].add(other)
            on_gpu[gpu] = [
                i for i in on_gpu.get(gpu, ()) if wide[i].end_s > wide[index].start_s
            ] + [index]
    for index, stay in enumerate(wide):
        cuts = {stay.start_s, stay.end_s}
        for other in rivals[index]:
            cuts |= {wide[other].start_s, wide[other].end_s}
        inside = sorted(t for t in cuts if stay.start_s <= t <= stay.end_s)
        parts = []
        for first_s, last_s in pairwise(inside):
            part = replace(stay, start_s=first_s, end_s=last_s)
            here = sorted([index, *(i for i in rivals[index] if _meet(wide[i], part))])
            parts.append((here.index(index), len(here), part))
        for (slot, slots), same in groupby(parts, key=lambda p: p[:2]):
            run = [part for _, _, part in same]
            yield replace(run[0], end_s=run[-1].end_s), slot, slots


def _tip(stay: Residency) -> str:
    word = {"LOADING": "loading", "DRAINING": "draining"}.get(stay.phase, stay.phase)
    lasted = seconds(stay.end_s - stay.start_s)
    return (
        f"{stay.llm}: {word} on {gpu_span(stay.gpus)} (TP {len(stay.gpus)})\n"
        f"{clock(stay.start_s)} to {clock(stay.end_s)} ({lasted})"
    )


def _fault_tip(fault: Fault) -> str:
    lasts = "" if fault.for_ is None else f" for {seconds(fault.for_)}"
    times = "" if fault.factor is None else f", {fault.factor:g} times as slow"
    return f"{fault.kind} of {fault.target}{times}\nfrom {clock(fault.at)}{lasts}"


def _letters(box: Box, stay: Residency, advance: float) -> int:
    """Letters that fit in ``box``; 0 where they would not tell the LLM."""
    letters = int((box.width - 8) / advance)
    return letters if letters >= min(7, len(stay.llm)) else 0


def _label(
    box: Box,
    stay: Residency,
    letters: int,
    room: tuple[float, float],
    size: float,
    style: str,
) -> Iterator[Text]:
    """The LLM's name, and its TP size where there is space, in the middle of ``room``."""
    y, height = room
    if height < size - 0.5:
        return
    tp = f" TP{len(stay.gpus)}" if len(stay.gpus) > 1 else ""
    if letters < len(tp) + min(7, len(stay.llm)):
        tp = ""
    yield Text(
        x=box.x + 4,
        y=y + height / 2 + size * 0.34,
        text=shorten(stay.llm, letters - len(tp)) + tp,
        style=style,
    )


def _layer(boxes: Sequence[Box], tipped: set[int]) -> Layer:
    merged: dict[tuple[str, float], list[Box]] = {}
    for one in boxes:
        if id(one) not in tipped:
            merged.setdefault((one.style, one.height), []).append(one)
    return Layer(
        boxes=tuple(one for one in boxes if id(one) in tipped),
        merged=tuple(
            Strokes(style=style, height=height, path=strokes(same))
            for (style, height), same in sorted(merged.items())
        ),
    )
