"""What the report's own pictures consist of, and the simpler one: the memory ledger.

Plain numbers in SVG user units; the template only writes them down. A style is a letter
(``a`` ACTIVE or weights, ``w`` WARM or KV cache, ``l`` loading, ``d`` draining) followed
by the LLM's colour index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foreserve.models.memory import ledger
from foreserve.models.placement import Placement
from foreserve.models.problem import Fleet
from foreserve.models.specs import GpuId
from foreserve.planner.display import LLM_COLORS, gib, is_dark, shorten

WIDTH = 1200.0
NODE_GAP = 14.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One rectangle; ``tip`` shows under the pointer."""

    x: float
    y: float
    width: float
    height: float
    style: str
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    x: float
    y: float
    text: str
    style: str
    tip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """Rows or columns (``lines``, without tips), boxes in layers, texts on top."""

    height: float
    lines: tuple[Box, ...]
    layers: tuple[Layer, ...]
    texts: tuple[Text, ...]
    ticks: tuple[Text, ...]
    rules: tuple[float, ...] = ()
    """Where grid lines run: x in the map, y in the ledger."""
    width: float = WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Strokes:
    """Boxes of one style and height, drawn by one path (see `strokes`)."""

    style: str
    height: float
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Boxes with a tip, and the rest merged to save bytes."""

    boxes: tuple[Box, ...]
    merged: tuple[Strokes, ...] = ()


def strokes(boxes: Iterable[Box]) -> str:
    """Path data that draws boxes of one height as strokes of that width.

    In tenths of a unit and relative, which takes some eleven bytes a box.
    """
    places = sorted(
        (round(10 * b.y + 5 * b.height), round(10 * b.x), round(10 * b.width))
        for b in boxes
    )
    parts, pen_x, pen_y = [], 0, 0
    for y, x, width in places:
        # A gap between neighbours, where there is room for one.
        width -= 5 if width > 15 else 0
        parts.append(f"m{_tenths(x - pen_x)} {_tenths(y - pen_y)}h{_tenths(width)}")
        pen_x, pen_y = x + width, y
    return "".join(parts)


def _tenths(count: int) -> str:
    whole, tenth = divmod(abs(count), 10)
    text = f"{whole}.{tenth}" if tenth else f"{whole}"
    return f"-{text}" if count < 0 else text


def colours(fleet: Fleet) -> dict[str, int]:
    """LLM -> index into `LLM_COLORS`."""
    return {llm.name: i % len(LLM_COLORS) for i, llm in enumerate(fleet.llms)}


def text_on(colour: int) -> str:
    """Style of a text on the full colour of an LLM."""
    return "light" if is_dark(LLM_COLORS[colour]) else "dark"


LEDGER_HEIGHT = 270.0
LEDGER_STYLES = {
    "weights": "a{}",
    "kv": "w{}",
    "residue": "engine",
    "activation": "engine",
    "free": "free",
    "reserve": "reserve",
}
"""Style of each kind of row, with the LLM's colour; from the bottom up."""


def ledger_bars(fleet: Fleet, placement: Placement) -> Picture:
    """One column per GPU, from the bottom: weights, KV cache, engines, free, reserve."""
    colour, cluster, left, top = colours(fleet), fleet.cluster, 56.0, 8.0
    most = max(cluster.type_of(gpu).memory_bytes for gpu in cluster.gpus)
    scale = LEDGER_HEIGHT / most
    gaps = NODE_GAP * (len(cluster.nodes) - 1)
    pitch = min(138.0, (WIDTH - left - gaps) / len(cluster.gpus))
    width = pitch * (0.94 if pitch > 40 else 0.86)
    floor, x = top + LEDGER_HEIGHT, left + 4
    x_of: dict[GpuId, float] = {}
    texts: list[Text] = []
    for node in cluster.nodes:
        name = shorten(node.name, max(1, int(node.gpus * pitch / 7.5)))
        texts.append(Text(x=x, y=floor + 32, text=name, style="node", tip=node.name))
        for gpu in node.gpu_ids():
            x_of[gpu] = x
            if pitch > 12 or gpu.index % 2 == 0:
                label = Text(
                    x=x + width / 2, y=floor + 16, text=str(gpu.index), style="tick"
                )
                texts.append(label)
            x += pitch
        x += NODE_GAP
    y_of = dict.fromkeys(cluster.gpus, floor)
    order = {kind: i for i, kind in enumerate(LEDGER_STYLES)}
    rows = sorted(ledger(fleet, placement), key=lambda r: (r.gpu, order[r.kind]))
    boxes: list[Box] = []
    lines: list[Box] = []
    for row in rows:
        height = max(0.0, row.num_bytes * scale)
        y_of[row.gpu] -= height
        tip = f"{row.gpu}: {row.kind} {gib(row.num_bytes)}"
        style = LEDGER_STYLES[row.kind]
        if row.llm is not None:
            tip = f"{row.gpu}: {row.llm}, {row.kind} {gib(row.num_bytes)}"
            style = style.format(colour[row.llm])
        one = Box(
            x=x_of[row.gpu],
            y=y_of[row.gpu],
            width=width,
            height=height,
            style=style,
            tip=tip,
        )
        (boxes if row.llm is not None else lines).append(one)
        letters = int((width - 8) / 7.6)
        if row.kind in ("weights", "kv") and letters >= 8 and height >= 13:
            assert row.llm is not None
            kv = " KV" if row.kind == "kv" else ""
            texts.append(
                Text(
                    x=one.x + 4,
                    y=one.y + height / 2 + 4,
                    text=shorten(row.llm, letters - len(kv)) + kv,
                    style="ink" if kv else text_on(colour[row.llm]),
                )
            )
    step = next(s for s in (5, 10, 20, 40, 80, 160, 10**6) if most / 2**30 / s <= 8)
    marks = [i * step for i in range(int(most / 2**30 // step) + 1)]
    return Picture(
        height=floor + 38,
        lines=tuple(lines),
        layers=(Layer(boxes=tuple(boxes)),),
        texts=tuple(texts),
        ticks=tuple(
            Text(x=left - 6, y=floor - m * 2**30 * scale + 4, text=str(m), style="gpu")
            for m in marks
        ),
        rules=tuple(floor - m * 2**30 * scale for m in marks),
    )
