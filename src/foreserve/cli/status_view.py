"""`plan status` on a terminal: one picture of the cluster, from the admin port's view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

STYLE: Mapping[str, str] = {
    "ACTIVE": "bold green",
    "WARM": "yellow",
    "LOADING": "cyan",
    "ACTIVATING": "cyan",
    "DRAINING": "magenta",
}
BAR = 16
EVENTS = 5
COLUMNS = (
    *("LLM", "state", "wait", "at work", "peak", "expected"),
    *("TTFT p50", "p99", "failed", "note"),
)
GIB = 2.0**30

View = Mapping[str, Any]


def render(view: View) -> RenderableType:
    """All of it. ``view`` is what the admin port answers to GET view."""
    return Group(_head(view), "", _gpus(view), "", _llms(view), "", *_foot(view))


def _head(view: View) -> Text:
    epoch_s = view["epoch_s"]
    index, passed_s = divmod(view["now_s"], epoch_s)
    text = Text()
    text.append("plan ", "dim").append(view["plan_id"] or "none yet", "bold")
    text.append("  generation ", "dim").append(str(view["generation"]))
    text.append("  mode ", "dim").append(view["mode"], "bold")
    text.append("  epoch ", "dim").append(f"{index:.0f}")
    text.append(f" ({_time(epoch_s - passed_s)} left)", "dim")
    text.append("  up ", "dim").append(_time(view["now_s"]))
    if view["failed"]:
        text.append(f"\nthe controller ended: {view['failed']}", "bold red")
    for line in view.get("amiss", ()):
        text.append(f"\namiss: {line}", "red")
    for fault in view["refused"] or ():
        text.append(f"\nrefused: {fault}", "red")
    return text


def _gpus(view: View) -> Table:
    table = Table("GPU", "memory", "", "holds", box=None, padding=(0, 2, 0, 0))
    nodes = {row["node"]: row for row in view["nodes"]}
    wanted: dict[str, list[str]] = {}
    seen = {row["replica"] for row in view["observed"]}
    for row in view["wanted"]:
        if row["replica"] not in seen:
            for gpu in row["gpus"]:
                wanted.setdefault(gpu, []).append(row["llm"])
    work = {
        (row["llm"], gpu): row["in_flight"]
        for row in view["observed"]
        for gpu in row["gpus"]
    }
    last = None
    for row in view["gpus"]:
        node = nodes[row["node"]]
        held = sum(part["bytes"] for part in row["held"])
        full = held / row["usable_bytes"]
        filled = min(BAR, round(full * BAR))
        bar = Text("█" * filled, "blue").append("░" * (BAR - filled), "dim")
        name = Text(row["gpu"])
        if row["node"] != last:
            last = row["node"]
            if node["error"]:
                name.append(" lost", "bold red")
            elif node["drained"]:
                name.append(" drained", "magenta")
        what = Text()
        for part in row["held"]:
            llm, phase = part["llm"], part["phase"]
            what.append(f"{llm} ", STYLE.get(phase, ""))
            count = work.get((llm, row["gpu"]), 0)
            note = f"{phase.lower()} {count}  " if count else f"{phase.lower()}  "
            what.append(note, "dim")
        for llm in wanted.get(row["gpu"], ()):
            what.append(f"→ {llm}  ", "dim italic")
        usage = f"{held / GIB:.0f}/{row['usable_bytes'] / GIB:.0f} GiB"
        table.add_row(name, bar, usage, what)
    return table


def _llms(view: View) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(COLUMNS):
        right = 2 <= index < len(COLUMNS) - 1
        table.add_column(column, justify="right" if right else "left")
    for row in view["models"]:
        forecast, recent = row["forecast"], row["recent"]
        over = forecast is not None and row["peak"] > forecast["peak_high"]
        late = recent is not None and (recent["ttft_p99_s"] or 0) > row["slo_ttft_s"]
        state = row["state"]
        style = STYLE.get(state.upper(), "red" if state == "failed" else "dim")
        table.add_row(
            row["llm"],
            Text(state, style),
            Text(str(row["waiting"] or ""), "bold red"),
            f"{row['in_flight']}/{row['places']}" if row["places"] else "",
            Text(str(row["peak"]), "bold red" if over else ""),
            ""
            if forecast is None
            else f"{forecast['peak_load']:.1f} ≤{forecast['peak_high']:.1f}",
            _delay(recent, "ttft_p50_s"),
            Text(_delay(recent, "ttft_p99_s"), "bold red" if late else ""),
            str(recent["failed"] or "") if recent else "",
            ", ".join(_flags(row)),
        )
    return table


def _flags(row: View) -> Iterable[str]:
    if row["pinned"]:
        yield "pinned"
    if row["waking"]:
        yield "waking"
    if row["hold"]:
        until = " until asked for" if row["hold"]["until_need"] else ""
        yield f"{row['hold']['level']}{until}"
    if row["eta_s"] and row["waiting"]:
        yield f"serves in {row['eta_s']:.1f} s"


def _foot(view: View) -> Iterable[Text]:
    pending = view["pending"]
    if pending is not None:
        yield Text.assemble(
            ("proposed: ", "bold yellow"),
            f"{pending['id']}, {pending['count']} replicas, "
            f"plan approve {pending['id']}",
        )
    for proposal in view["proposals"][-3:]:
        what = proposal["failed"] or proposal["fate"]
        cost = ""
        if proposal["objective"] is not None:
            cost = (
                f", objective {proposal['objective']:.3g} s, bound "
                f"{proposal['bound']:.3g} s"
            )
        yield Text.assemble(
            (f"epoch {proposal['epoch']}: ", "dim"),
            f"planned in {proposal['took_s']:.1f} s{cost}: {what}",
        )
    for trouble in view["troubles"]:
        yield Text(f"{trouble['replica']} failed: {trouble['reason']}", "red")
    for node in view["nodes"]:
        if node["error"]:
            yield Text(f"node {node['node']}: {node['error']}", "red")
    for note in view["notes"][:EVENTS]:
        style = {"fault": "red", "refusal": "red"}.get(note["kind"], "dim")
        yield Text(f"{_time(note['at_s']):>9}  {note['text']}", style)


def _delay(recent: View | None, name: str) -> str:
    value = None if recent is None else recent[name]
    return "" if value is None else f"{value:.2f} s"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
