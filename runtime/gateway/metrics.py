"""What passes through, in numbers: vLLM's names where it has them, ours beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from foreserve.models.drift import BLAMES, LlmDrift, Step

# The edges that vLLM uses, so that dashboards and quantiles agree.
TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5),
    *(7.5, 10, 20, 40, 80, 160, 640, 2560),
)
PER_TOKEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5),
    *(7.5, 10, 20, 40, 80),
)
REQUEST = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
    *(960, 1920, 7680),
)

ENGINE = "gateway"
"""The ``engine`` label of vLLM's series: not to be added to those of the engines."""


class _Counts(Collector):
    """Gauges whose values are asked for when they are read."""

    def __init__(
        self,
        running: Callable[[], Mapping[str, int]],
        held: Callable[[], Mapping[str, int]],
    ) -> None:
        self._running, self._held = running, held

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, counts, engine in (
            ("vllm:num_requests_running", "Requests at engines.", self._running, True),
            ("vllm:num_requests_waiting", "Requests held here.", self._held, True),
            ("foreserve_held_requests", "Requests held here.", self._held, False),
        ):
            labels = ["model_name", "engine"] if engine else ["model_name"]
            family = GaugeMetricFamily(name, text, labels=labels)
            for llm, count in sorted(counts().items()):
                family.add_metric([llm, ENGINE] if engine else [llm], count)
            yield family

    def describe(self) -> list[GaugeMetricFamily]:
        return []


class LlmMetrics:
    """The series of one LLM and class, looked up once."""

    def __init__(self, metrics: Metrics, llm: str, slo_class: str) -> None:
        self.llm, self.slo_class = llm, slo_class
        self._metrics = metrics
        vllm, ours = (llm, ENGINE), (llm, slo_class)
        self.ttft = metrics.ttft.labels(*vllm)
        self.itl = metrics.itl.labels(*vllm)
        self.tpot = metrics.tpot.labels(*vllm)
        self.e2e = metrics.e2e.labels(*vllm)
        self.queued = metrics.queued.labels(*vllm)
        self.our_ttft = metrics.our_ttft.labels(*ours)
        self.our_tpot = metrics.our_tpot.labels(*ours)
        self.wait = metrics.wait.labels(*ours)
        self.attained = metrics.attained.labels(*ours)

    def answered(self, code: int) -> None:
        self._metrics.requests.labels(self.llm, self.slo_class, str(code)).inc()

    def tokens(self, prompt: int, generated: int) -> None:
        for count, counter, kind in (
            (prompt, self._metrics.prompt, "prompt"),
            (generated, self._metrics.generated, "generation"),
        ):
            if count > 0:
                counter.labels(self.llm, ENGINE).inc(count)
                ours = self._metrics.tokens.labels(self.llm, self.slo_class, kind)
                ours.inc(count)

    def success(self, finish_reason: str) -> None:
        self._metrics.success.labels(self.llm, ENGINE, finish_reason).inc()


class Metrics:
    """The gateway's series, in a registry to which others may add theirs."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        vllm, ours = ("model_name", "engine"), ("model_name", "slo_class")
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", vllm, TTFT)
        self.itl = self._histogram("vllm:inter_token_latency_seconds", vllm, PER_TOKEN)
        self.tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", vllm, PER_TOKEN
        )
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", vllm, REQUEST)
        self.queued = self._histogram("vllm:request_queue_time_seconds", vllm, REQUEST)
        self.prompt = self._counter("vllm:prompt_tokens_total", vllm)
        self.generated = self._counter("vllm:generation_tokens_total", vllm)
        self.success = self._counter(
            "vllm:request_success_total", (*vllm, "finished_reason")
        )
        self.requests = self._counter("foreserve_requests_total", (*ours, "code"))
        self.attained = self._counter("foreserve_slo_attained_total", ours)
        self.tokens = self._counter("foreserve_tokens_total", (*ours, "kind"))
        self.our_ttft = self._histogram("foreserve_gateway_ttft_seconds", ours, TTFT)
        self.our_tpot = self._histogram(
            "foreserve_gateway_tpot_seconds", ours, PER_TOKEN
        )
        self.wait = self._histogram("foreserve_wait_seconds", ours, TTFT)
        self.retry_after = self._histogram(
            "foreserve_retry_after_seconds", ("model_name",), REQUEST
        )
        self.retry_error = self._histogram(
            "foreserve_retry_after_abs_error_seconds", ("model_name",), TTFT
        )
        self._of: dict[tuple[str, str], LlmMetrics] = {}

    def watch(
        self,
        running: Callable[[], Mapping[str, int]],
        held: Callable[[], Mapping[str, int]],
    ) -> None:
        """Where the counts of requests by LLM come from."""
        self.registry.register(_Counts(running, held))

    def of(self, llm: str, slo_class: str) -> LlmMetrics:
        """``llm`` is one that there is: names out of requests are no labels."""
        found = self._of.get((llm, slo_class))
        if found is None:
            found = self._of[llm, slo_class] = LlmMetrics(self, llm, slo_class)
        return found

    def refused(self, slo_class: str, code: int) -> None:
        """A request that did not get so far as to name an LLM that there is."""
        self.requests.labels("", slo_class, str(code)).inc()

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self.registry)

    def _histogram(
        self, name: str, labels: tuple[str, ...], edges: tuple[float, ...]
    ) -> Histogram:
        return Histogram(
            name, _help(name), labels, buckets=edges, registry=self.registry
        )

    def _counter(self, name: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, _help(name), labels, registry=self.registry)


class Modes(Collector):
    """The mode in which plans are made, and what has made it fall."""

    def __init__(
        self,
        modes: Sequence[str],
        mode: Callable[[], str],
        notes: Callable[[], Mapping[str, str]],
    ) -> None:
        """``notes``: what is amiss, by what it is about."""
        self._modes, self._mode, self._notes = modes, mode, notes

    def collect(self) -> Iterator[GaugeMetricFamily]:
        mode = GaugeMetricFamily(
            "foreserve_mode", "1 for the mode of planning.", labels=["mode"]
        )
        for name in self._modes:
            mode.add_metric([name], float(name == self._mode()))
        yield mode
        amiss = GaugeMetricFamily(
            "foreserve_state_amiss",
            "1 for what could not be read or written, or failed.",
            labels=["what"],
        )
        for what in sorted(self._notes()):
            amiss.add_metric([what], 1.0)
        yield amiss

    def describe(self) -> list[GaugeMetricFamily]:
        return []


class DriftMetrics:
    """The series of plan against actual: counted when an epoch's report is drawn up."""

    RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)

    def __init__(self, registry: CollectorRegistry) -> None:
        llm = ("model_name",)

        def gauge(name: str, text: str, *more: str) -> Gauge:
            return Gauge(f"foreserve_{name}", text, (*llm, *more), registry=registry)

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"foreserve_{name}", text, (*llm, *more), registry=registry)

        def histogram(
            name: str, text: str, edges: tuple[float, ...], *more: str
        ) -> Histogram:
            names = (*llm, *more)
            return Histogram(
                f"foreserve_{name}", text, names, buckets=edges, registry=registry
            )

        self.forecast = gauge(
            "demand_forecast_rps", "Last epoch, forecast.", "quantile"
        )
        self.observed = gauge("demand_observed_rps", "Last epoch, as it came.")
        self.peak_forecast = gauge(
            "peak_forecast", "Requests in flight at once, last epoch.", "quantile"
        )
        self.peak_observed = gauge("peak_observed", "The same as it came.")
        self.rate_error = histogram(
            "forecast_abs_error_rps", "Of each epoch's rate.", self.RATES
        )
        self.prewarm = counter("prewarm_total", "WARM replicas, by use.", "result")
        self.wasted = counter(
            "prewarm_wasted_bytes_total", "Weights dropped before any use."
        )
        self.missed = counter(
            "slo_missed_total", "Requests not answered within targets.", "blame"
        )
        self.switch = histogram(
            "switch_seconds", "Loads and activations.", TTFT, "kind", "result"
        )
        self.switch_error = histogram(
            "switch_abs_error_seconds",
            "Measured against predicted.",
            TTFT,
            "kind",
            "result",
        )

    def step(self, step: Step, llm: str, predicted_s: float, measured_s: float) -> None:
        """A load or an activation is done."""
        self.switch.labels(llm, step, "done").observe(measured_s)
        self.switch_error.labels(llm, step, "done").observe(
            abs(measured_s - predicted_s)
        )

    def report(self, row: LlmDrift) -> None:
        """One LLM in one epoch."""
        llm, said, real = row.llm, row.forecast, row.actual
        self.observed.labels(llm).set(real.rate_rps)
        self.peak_observed.labels(llm).set(real.peak_load)
        if said is not None:
            self.forecast.labels(llm, "mean").set(said.rate_rps)
            self.peak_forecast.labels(llm, "mean").set(said.peak_load)
            self.peak_forecast.labels(llm, "0.95").set(said.peak_high or 0.0)
            self.rate_error.labels(llm).observe(abs(real.rate_rps - said.rate_rps))
        for result, count in (
            ("hit", row.hits),
            ("miss", row.misses),
            ("unused", row.unused),
        ):
            self.prewarm.labels(llm, result).inc(count)
        self.wasted.labels(llm).inc(row.wasted_bytes)
        for blame in BLAMES:
            self.missed.labels(llm, blame).inc(row.blame[blame])


def _help(name: str) -> str:
    words = name.removeprefix("foreserve_").removeprefix("vllm:").replace("_", " ")
    return f"Seen by the gateway: {words}."
