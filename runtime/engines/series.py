"""Metrics of one engine under vLLM's names, with its bucket edges."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
EDGES = {
    "time_to_first_token_seconds": TTFT,
    "inter_token_latency_seconds": TOKEN,
    "request_time_per_output_token_seconds": TOKEN,
    "e2e_request_latency_seconds": REQUEST,
    "request_queue_time_seconds": REQUEST,
    "request_prefill_time_seconds": REQUEST,
    "request_decode_time_seconds": REQUEST,
    "request_inference_time_seconds": REQUEST,
}
SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")


@dataclass(slots=True)
class Histogram:
    edges: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.edges) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.edges, value)] += times
        self.total += value * times


class Series:
    """Counters, gauges and histograms; written as Prometheus reads them."""

    def __init__(self, served_name: str) -> None:
        self._labels = f'engine="0",model_name="{served_name}"'
        self.histograms = {name: Histogram(edges) for name, edges in EDGES.items()}
        self.finished: Counter[str] = Counter()
        """Requests by reason: stop, length, abort."""

    def finish(
        self, queue_s: float, prefill_s: float, decode_s: float, tokens: int
    ) -> None:
        """A request has ended with so many tokens after these three times in turn."""
        seen = self.histograms
        seen["request_queue_time_seconds"].observe(queue_s)
        seen["request_prefill_time_seconds"].observe(prefill_s)
        seen["request_decode_time_seconds"].observe(decode_s)
        seen["request_inference_time_seconds"].observe(prefill_s + decode_s)
        seen["e2e_request_latency_seconds"].observe(queue_s + prefill_s + decode_s)
        if tokens > 1:
            per_token_s = decode_s / (tokens - 1)
            seen["request_time_per_output_token_seconds"].observe(per_token_s)

    def text(
        self, gauges: dict[str, float], counters: dict[str, int], asleep: bool
    ) -> str:
        """All of it; ``gauges`` and ``counters`` are what only the engine knows."""
        lines: list[str] = []

        def write(name: str, kind: str, rows: list[tuple[str, str, float]]) -> None:
            lines.append(f"# TYPE vllm:{name} {kind}")
            for suffix, more, value in rows:
                labels = self._labels + (f",{more}" if more else "")
                lines.append(f"vllm:{name}{suffix}{{{labels}}} {value!r}")

        for name, value in gauges.items():
            write(name, "gauge", [("", "", value)])
        state = SLEEP_STATES[1 if asleep else 0]
        rows = [("", f'sleep_state="{s}"', float(s == state)) for s in SLEEP_STATES]
        write("engine_sleep_state", "gauge", rows)
        for name, count in counters.items():
            write(name, "counter", [("_total", "", count)])
        write(
            "request_success",
            "counter",
            [
                ("_total", f'finished_reason="{reason}"', self.finished[reason])
                for reason in ("stop", "length", "abort")
            ],
        )
        for name, histogram in self.histograms.items():
            rows, below = [], 0
            for edge, count in zip(
                (*histogram.edges, float("inf")), histogram.counts, strict=True
            ):
                below += count
                text = "+Inf" if edge == float("inf") else f"{edge:g}"
                rows.append(("_bucket", f'le="{text}"', below))
            rows += [("_sum", "", histogram.total), ("_count", "", below)]
            write(name, "histogram", rows)
        return "\n".join(lines) + "\n"
