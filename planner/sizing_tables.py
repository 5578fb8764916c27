"""Sizings as tables, as plain data, and as a picture of what drives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from foreserve.planner.figures import COLORS, MUTED, new_figure, save_figure
from foreserve.planner.sizing import FEW_REQUESTS, Sizing, Trial
from foreserve.planner.tables import Part


def parts(sizings: Sequence[Sizing], target: float) -> list[Part]:
    """The answer, what was tried, and what binds."""
    answers = [s.answer for s in sizings if s.answer is not None]
    best = min(answers, key=lambda t: t.usd_per_h, default=None)
    rows = [
        [
            s.gpu,
            _size(s.answer) if s.answer else "-",
            f"{s.bound_gpus:.1f}",
            f"${s.bound_usd_per_h:,.2f}",
            f"{s.answer.usd_per_h / s.bound_usd_per_h:.1f}x" if s.answer else "-",
            f"${s.answer.usd_per_h:,.2f}" if s.answer else "-",
            f"${s.answer.usd_per_month:,.0f}" if s.answer else "-",
            "least price" if s.answer is best and best and len(answers) > 1 else "",
        ]
        for s in sizings
    ]
    note = (
        f"every LLM (of at least {FEW_REQUESTS} requests) and the total within the SLO "
        f"for {target:.1%} of the requests, in simulation"
    )
    undecided = sum(s.undecided for s in sizings)
    if undecided:
        note += f"; {undecided} cheaper mixtures were not tried: raise --attempts"
    found = [
        Part(
            "Least cluster",
            [
                "GPU type",
                "GPUs",
                "perfect",
                "per hour",
                "ratio",
                "per hour",
                "per month",
                "",
            ],
            rows,
            note,
        ),
        Part(
            "Tried",
            ["GPU type", "GPUs", "", "worst LLM", "all", "P99 TTFT", "GPUs in use"],
            [_tried(trial) for s in sizings for trial in s.trials],
        ),
    ]
    binding = [
        [s.gpu, _size(below), b.llm, str(b.epoch), str(b.missed), str(b.requests)]
        for s in sizings
        if (below := short_of(s)) is not None
        for b in below.binding
    ]
    if binding:
        found.append(
            Part(
                "What binds, in the dearest that was not enough",
                ["GPU type", "GPUs", "LLM", "epoch", "requests missed", "of"],
                binding,
            )
        )
    if best is not None:
        held = next(s for s in sizings if s.answer is best).drivers
        found.append(
            Part(
                "What drives it: GPUs by LLM, busiest epoch",
                ["LLM", "GPUs"],
                [[name, f"{gpus:.1f}"] for name, gpus in held],
            )
        )
    return found


def _size(trial: Trial) -> str:
    return " + ".join(map(str, trial.counts.values())) or str(trial.gpus)


def _tried(trial: Trial) -> list[str]:
    where = [trial.gpu, _size(trial), "enough" if trial.passed else "not enough"]
    if trial.why_not:
        return [*where, trial.why_not, "-", "-", "-"]
    return [
        *where,
        f"{trial.attainment:.2%} ({trial.worst_llm})",
        f"{trial.total_attainment:.2%}",
        f"{trial.ttft_p99_s:.2f} s",
        f"{trial.busy_gpus:.1f}",
    ]


def short_of(sizing: Sizing) -> Trial | None:
    """The dearest that was tried below the answer and was not enough."""
    most = float("inf") if sizing.answer is None else sizing.answer.usd_per_h
    below = (t for t in sizing.trials if not t.passed and t.usd_per_h < most)
    return max(below, key=lambda t: t.usd_per_h, default=None)


def plain(sizing: Sizing) -> Mapping[str, object]:
    """For ``--json``."""

    def row(trial: Trial) -> dict[str, object]:
        return asdict(trial) | {"usd_per_month": trial.usd_per_month}

    return {
        "gpu": sizing.gpu,
        "answer": None if sizing.answer is None else row(sizing.answer),
        "bound_gpus": sizing.bound_gpus,
        "bound_usd_per_h": sizing.bound_usd_per_h,
        "mean_gpus": sizing.mean_gpus,
        "drivers": dict(sizing.drivers),
        "trials": [row(trial) for trial in sizing.trials],
        "undecided": sizing.undecided,
    }


def draw(sizings: Sequence[Sizing], target: float, path: str) -> None:
    """Attainment of each LLM over the price of what was tried; one panel per GPU type."""
    llms = sorted({llm for s in sizings for t in s.trials for llm in t.by_llm})
    figure = new_figure(len(sizings), height=3.6)
    for column, sizing in enumerate(sizings):
        axes = figure.add_subplot(1, len(sizings), column + 1)
        tried = sorted(
            (t for t in sizing.trials if t.by_llm), key=lambda t: t.usd_per_h
        )
        # Mixtures of one price differ, so there is no line through them.
        style = "o" if any(len(t.counts) > 1 for t in tried) else "o-"
        for llm, color in zip(llms, COLORS * len(llms), strict=False):
            points = [(t.usd_per_h, t.by_llm[llm]) for t in tried if llm in t.by_llm]
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(
                    x, [100 * v for v in y], style, ms=4, lw=1.2, color=color, label=llm
                )
        axes.axhline(100 * target, color=MUTED, linewidth=0.8, linestyle="--")
        axes.axvline(sizing.bound_usd_per_h, color=MUTED, linewidth=0.8, linestyle=":")
        title = sizing.gpu
        if sizing.answer is not None:
            axes.axvline(sizing.answer.usd_per_h, color=MUTED, linewidth=0.8)
            title += f": {_size(sizing.answer)} GPUs"
        axes.set(title=title, xlabel="dollars per hour", xlim=(0, None))
        if column == 0:
            axes.set_ylabel("within SLO, % of the requests")
            axes.legend(loc="lower right", fontsize=8)
    save_figure(figure, path)
