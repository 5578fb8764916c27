"""The residency map: which LLM is where, when, and doing what; planned or simulated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise

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
    Text,
    colours,
    text_on,
)

LEFT = 104.0
"""Space for node and GPU names."""
RIGHT = 16.0
ROW_HEIGHTS = ((8, 42.0), (16, 34.0), (32, 24.0), (64, 17.0), (10**9, 13.0))
"""(up to so many GPUs, row height)."""
ROW_GAP = 2.0
TOUCH_S = 1e-6
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
) -> Picture:
    """GPUs down, time across: what holds a KV cache fills its GPUs' rows, what holds
    weights only is a thin lane at the bottom of each.

    The largest ``max_tips`` boxes keep a tip of their own. A replica that serves alone on
    several GPUs is one box over their rows.
    """
    rows, lines, labels, bottom = _rows(fleet)
    colour = colours(fleet)
    scale = (WIDTH - LEFT - RIGHT) / (end_s - start_s)
    row_height = next(iter(rows.values())).height
    pitch = row_height + ROW_GAP
    stays = _merged(residency, start_s, end_s)
    wide = [stay for stay in stays if stay.phase in ("ACTIVE", "DRAINING")]
    thin = [stay for stay in stays if stay.phase in ("WARM", "LOADING")]
    lane_of = _lanes(thin)
    lanes = 1 + max(lane_of.values(), default=0)
    lane_height = min(10.0, 0.85 * row_height / lanes)
    occupied: dict[GpuId, list[tuple[Residency, int]]] = {gpu: [] for gpu in rows}
    for (index, gpu), lane in lane_of.items():
        occupied[gpu].append((thin[index], lane))

    def box(stay: Residency, y: float, height: float) -> Box:
        x = LEFT + (stay.start_s - start_s) * scale
        width = (stay.end_s - stay.start_s) * scale
        return Box(
            x=x,
            y=y,
            # A load takes seconds on a map of hours: keep it visible.
            width=max(width, 2.0) if stay.phase == "LOADING" else width,
            height=height,
            style=f"{STYLE[stay.phase]}{colour[stay.llm]}",
            tip=_tip(stay),
        )

    def free_height(gpu: GpuId, stay: Residency) -> float:
        held = [lane for other, lane in occupied[gpu] if _meet(other, stay)]
        return row_height - lane_height * (1 + max(held, default=-1))

    texts: list[Text] = []
    big: list[Box] = []
    small: list[Box] = []
    for stay, slot, slots in _pieces(wide):
        tops = [rows[gpu].y for gpu in stay.gpus]
        if slots == 1 and math.isclose(tops[-1] - tops[0], pitch * (len(tops) - 1)):
            whole = [box(stay, tops[0], pitch * len(tops) - ROW_GAP)]
            free = [free_height(gpu, stay) for gpu in stay.gpus]
            if min(free) == row_height:
                room = (whole[0].y, whole[0].height)
            else:
                best = free.index(max(free))
                room = (tops[best], free[best])
        else:
            height = row_height / slots
            whole = [box(stay, top + slot * height, height) for top in tops]
            room = (
                whole[0].y,
                height if slots > 1 else free_height(stay.gpus[0], stay),
            )
        big += whole
        texts += _label(whole[0], stay, room, 11.5, 8.0, colour[stay.llm])
    for (index, gpu), lane in lane_of.items():
        stay = thin[index]
        y = rows[gpu].y + row_height - (lane + 1) * lane_height
        small.append(box(stay, y, lane_height))
        if stay.phase == "WARM":
            texts += _label(small[-1], stay, (y, lane_height), 8.5, 5.6, None)
    by_area = sorted((*big, *small), key=lambda b: b.width * b.height, reverse=True)
    tipped = {id(one) for one in by_area[:max_tips]}
    times = time_ticks(start_s, end_s, 13)
    xs = [LEFT + (t - start_s) * scale for t in times]
    return Picture(
        height=bottom + 24,
        lines=tuple(lines),
        layers=(_layer(big, tipped), _layer(small, tipped)),
        texts=(*labels, *texts),
        ticks=tuple(
            Text(x=x, y=bottom + 16, text=clock(t), style="tick")
            for x, t in zip(xs, times, strict=True)
        ),
        rules=tuple(xs),
    )


def _rows(fleet: Fleet) -> tuple[dict[GpuId, Box], list[Box], list[Text], float]:
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
    return rows, list(rows.values()), texts, y - NODE_GAP


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
    """(stretch, GPU) -> the lowest lane free there; what follows on keeps its lane."""
    lanes: dict[tuple[int, GpuId], int] = {}
    free_s: dict[tuple[GpuId, int], float] = {}
    latest: dict[tuple[str, GpuId], tuple[int, int]] = {}
    order = sorted(range(len(thin)), key=lambda i: (thin[i].start_s, thin[i].end_s))
    for index in order:
        stay = thin[index]
        for gpu in stay.gpus:
            before, lane = latest.get((stay.llm, gpu), (-1, 0))
            follows = before >= 0 and _touch(thin[before], stay)
            if not follows:
                lane = 0
                while free_s.get((gpu, lane), -math.inf) > stay.start_s + TOUCH_S:
                    lane += 1
            lanes[index, gpu] = lane
            latest[stay.llm, gpu] = index, lane
            free_s[gpu, lane] = stay.end_s
    return lanes


def _touch(before: Residency, after: Residency) -> bool:
    return before.gpus == after.gpus and after.start_s <= before.end_s + TOUCH_S


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


def _label(
    box: Box,
    stay: Residency,
    room: tuple[float, float],
    size: float,
    advance: float,
    colour: int | None,
) -> Iterator[Text]:
    """The LLM's name (and TP size) in its box, if it fits; on ``colour`` if one."""
    letters = int((box.width - 8) / advance)
    tp = f" TP{len(stay.gpus)}" if len(stay.gpus) > 1 else ""
    y, height = room
    if height < size - 0.5 or letters < min(7, len(stay.llm)):
        return
    if letters < len(tp) + min(7, len(stay.llm)):
        tp = ""
    yield Text(
        x=box.x + 4,
        y=y + height / 2 + size * 0.34,
        text=shorten(stay.llm, letters - len(tp)) + tp,
        style="lane" if colour is None else text_on(colour),
    )


def _layer(boxes: Sequence[Box], tipped: set[int]) -> Layer:
    merged: dict[str, list[str]] = {}
    for one in boxes:
        if id(one) not in tipped:
            merged.setdefault(one.style, []).append(one.path)
    return Layer(
        boxes=tuple(one for one in boxes if id(one) in tipped),
        merged={style: "".join(paths) for style, paths in sorted(merged.items())},
    )
