"""The arena as one HTML page: what each solver knew when, and the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from foreserve.planner.arena import Entry, Instance
from foreserve.planner.figures import COLORS

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 10, 34
STYLE = """
:root{--ink:#1c2128;--muted:#59636e;--line:#d8dee4;--page:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--muted:#9198a1;--line:#3d444d;
--page:#0d1117}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);
margin:2rem auto;max-width:1000px;padding:0 1rem}
main{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0}
figcaption,p,th{color:var(--muted)}figcaption{max-width:460px;font-size:13px}
figcaption b{color:var(--ink)}svg{display:block}text{font-size:11px;fill:var(--muted)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;
font-variant-numeric:tabular-nums}th,td{padding:.2rem .6rem;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap}
th:nth-child(-n+2),td:nth-child(-n+2){text-align:left}
"""


def page(
    instances: Sequence[Instance],
    entries: Sequence[Entry],
    rows: Sequence[Mapping[str, object]],
    limits: str,
    mux_rows: Sequence[Mapping[str, object]] = (),
) -> str:
    """The whole page, without anything to fetch; ``mux_rows`` have MuxServe's objective."""
    others = ""
    if mux_rows:
        others = (
            f"<h2>MuxServe's instances: score, higher is better</h2>{_table(mux_rows)}"
        )
    solvers = list(dict.fromkeys(entry.solver for entry in entries))
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(solvers)}
    legend = " ".join(
        f'<b style="color:{colors[name]}">■</b> {escape(name)}' for name in solvers
    )
    figures = "".join(
        _figure(instance, [e for e in entries if e.instance == instance.name], colors)
        for instance in instances
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Solver arena</title><style>{STYLE}</style><h1>Solver arena</h1>"
        f"<p>{escape(limits)}</p><p>{legend} &nbsp; line: best plan so far, dashed: bound,"
        " dotted: best value known. Weighted seconds of delay over seconds since the solve "
        f"began.</p><main>{figures}</main><h2>All runs</h2>{_table(rows)}{others}</html>\n"
    )


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(column))}" for column in columns)
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}{body}</table></div>'


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else escape(str(value))


def _figure(
    instance: Instance, entries: Sequence[Entry], colors: Mapping[str, str]
) -> str:
    """Step curves of all solves of one instance on a logarithmic axis of time."""
    known = [p for e in entries for p in e.report.progress]
    values = [v for p in known for v in (p.objective, p.bound) if v is not None]
    if instance.best is not None:
        values.append(instance.best.value)
    about = f"<figcaption><b>{escape(instance.name)}</b> {escape(instance.about)}"
    if not values:
        return f"<figure><p>nothing was found</p>{about}</figcaption></figure>"
    end_s = max([e.report.wall_s for e in entries] + [0.02])
    begin_s = min([p.elapsed_s for p in known] + [end_s / 2])
    begin_s = max(1e-3, min(begin_s, end_s / 2))
    objectives = [p.objective for p in known if p.objective is not None]
    low = min(values)
    # A bound of nothing at all would press every curve against the upper edge.
    if objectives and low < 0.5 * min(objectives):
        low = 0.5 * min(objectives)
    high = max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 1.0, high + 1.0

    def x(at_s: float) -> float:
        share = math.log(max(at_s, begin_s) / begin_s) / math.log(end_s / begin_s)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (max(value, low) - low) / (high - low)
        return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM)

    marks = _axes(x, y, begin_s, end_s, low, high)
    if instance.best is not None:
        at = y(instance.best.value)
        marks += (
            f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="var(--muted)" '
            'stroke-dasharray="1 3"/>'
        )
    for entry in entries:
        for which, dash in (("objective", ""), ("bound", "4 3")):
            points = [
                (x(p.elapsed_s), y(value))
                for p in entry.report.progress
                if (value := getattr(p, which)) is not None
            ]
            marks += _steps(points, x(entry.report.wall_s), colors[entry.solver], dash)
    label = escape(f"Best plan and bound over time: {instance.name}", quote=True)
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{label}" fill="none">{marks}</svg>{about}</figcaption></figure>'
    )


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    begin_s: float,
    end_s: float,
    low: float,
    high: float,
) -> str:
    marks = ""
    for i in range(5):
        value = low + (high - low) * i / 4
        at = y(value)
        marks += (
            f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.5g}</text>'
        )
    first, last = math.ceil(math.log10(begin_s)), math.floor(math.log10(end_s))
    ticks: Iterable[float] = [10.0**k for k in range(first, last + 1)] or [end_s]
    for at_s in ticks:
        marks += (
            f'<text x="{x(at_s):.1f}" y="{HEIGHT - 14}" text-anchor="middle">'
            f"{at_s:g} s</text>"
        )
    return marks


def _steps(
    points: Sequence[tuple[float, float]], end: float, color: str, dash: str
) -> str:
    if not points:
        return ""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    path += "".join(f"H{at:.1f}V{value:.1f}" for at, value in points[1:])
    return (
        f'<path d="{path}H{max(end, points[-1][0]):.1f}" stroke="{color}" '
        f'stroke-width="1.5" stroke-dasharray="{dash}"/>'
    )
