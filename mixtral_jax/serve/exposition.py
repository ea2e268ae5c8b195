"""What /metrics shows: TGI's names, and what a mixture of experts and its cache add."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client import exposition
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from mixtral_jax.serve.request import EngineProtocol, EngineStats, Histogram

if TYPE_CHECKING:
    from mixtral_jax.serve.asking import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
# TGI's counters have no _total, which this library always writes.
_TOTAL = re.compile(rb"\b(tgi_(?:request|batch)_\w+?)_total\b")

# The engine's figures that TGI has under names of its own; others are called mixtral_<name>.
# TGI counts batches by method; the engine counts a call once it has succeeded.
_NAMES: dict[tuple[str, str], tuple[tuple[str, str | None], ...]] = {
    ("gauge", "queue_size"): (("tgi_queue_size", None),),
    ("gauge", "batch_size"): (("tgi_batch_current_size", None),),
    ("gauge", "batch_tokens"): (("tgi_batch_current_max_tokens", None),),
    ("histogram", "next_batch_size"): (("tgi_batch_next_size", None),),
    ("histogram", "text_seconds"): (("tgi_batch_decode_duration", "decode"),),
    ("histogram", "decode_step_seconds"): (("tgi_batch_forward_duration", "decode"),),
    **{
        ("counter", f"{method}_calls"): (
            ("tgi_batch_inference_count", method),
            ("tgi_batch_inference_success", method),
        )
        for method in ("prefill", "decode")
    },
    **{
        ("histogram", f"{method}_call_seconds"): (("tgi_batch_inference_duration", method),)
        for method in ("prefill", "decode")
    },
}
_FAMILIES = {
    "gauge": GaugeMetricFamily,
    "counter": CounterMetricFamily,
    "histogram": HistogramMetricFamily,
}


class Metrics:
    """Counts of this server's requests, in a registry of its own.

    Args:
        engine: whose figures are read at every scrape.
    """

    def __init__(self, engine: EngineProtocol):
        # The time of a metric's birth would be one more series for each.
        prometheus.disable_created_metrics()
        self._registry = registry = prometheus.CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> prometheus.Histogram:
            return prometheus.Histogram(name, text, registry=registry, buckets=buckets)

        self.count = prometheus.Counter(
            "tgi_request_count", "Requests for an answer", registry=registry
        )
        self.success = prometheus.Counter(
            "tgi_request_success", "Requests with an answer", registry=registry
        )
        self.failure = prometheus.Counter(
            "tgi_request_failure", "Requests without one", ["err"], registry=registry
        )
        self.duration = histogram("tgi_request_duration", "Seconds of a request", _SECONDS)
        self.validation = histogram(
            "tgi_request_validation_duration", "Seconds before submission", _SECONDS
        )
        self.queue = histogram("tgi_request_queue_duration", "Seconds in the queue", _SECONDS)
        self.inference = histogram(
            "tgi_request_inference_duration", "Seconds of prefill and decoding", _SECONDS
        )
        self.per_token = histogram(
            "tgi_request_mean_time_per_token_duration", "Seconds per token", _SECONDS
        )
        self.input_length = histogram("tgi_request_input_length", "Tokens of a prompt", _TOKENS)
        self.max_new_tokens = histogram(
            "tgi_request_max_new_tokens", "Tokens asked for at most", _TOKENS
        )
        self.generated = histogram("tgi_request_generated_tokens", "Tokens of an answer", _TOKENS)
        self.skipped = histogram(
            "tgi_request_skipped_tokens", "Tokens of a prompt found in the prefix cache", _TOKENS
        )
        self.responses = prometheus.Counter(
            "mixtral_http_responses",
            "Responses",
            ["method", "route", "status"],
            registry=registry,
        )
        self.disconnects = prometheus.Counter(
            "mixtral_disconnects", "Clients that left before their answer", registry=registry
        )
        registry.register(_EngineFigures(engine))

    def finished(self, answers: Iterable[Answer]) -> None:
        """Counts whole answers."""
        for answer in answers:
            end = answer.end
            seconds = end.prefill_seconds + end.decode_seconds
            self.queue.observe(end.queue_seconds)
            self.inference.observe(seconds)
            self.per_token.observe(seconds / max(len(end.token_ids), 1))
            self.input_length.observe(end.prompt_tokens)
            self.max_new_tokens.observe(answer.request.sampling.max_new_tokens)
            self.generated.observe(len(end.token_ids))
            self.skipped.observe(end.cached_tokens)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return _TOTAL.sub(rb"\1", exposition.generate_latest(self._registry))


class _EngineFigures(Collector):
    """The engine's snapshot as metrics, made anew at each scrape."""

    def __init__(self, engine: EngineProtocol):
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # else the registry would ask for figures before the model is loaded

    def collect(self) -> Iterator[Metric]:
        state = self._engine.state()
        yield GaugeMetricFamily(
            "mixtral_ready", "Whether requests are taken", value=float(state == "ready")
        )
        if state == "loading":
            return
        stats = self._engine.stats()
        families: dict[str, Any] = {}
        for kind, figures in (
            ("gauge", stats.gauges),
            ("counter", stats.counters),
            ("histogram", stats.histograms),
        ):
            for name, value in figures.items():
                for shown, method in _NAMES.get((kind, name), ((f"mixtral_{name}", None),)):
                    labels = [] if method is None else ["method"]
                    family = _FAMILIES[kind](shown, _words(shown), labels=labels)
                    family = families.setdefault(shown, family)
                    family.add_metric([] if method is None else [method], *_values(value))
        yield from families.values()
        yield from _experts(stats)


def _experts(stats: EngineStats) -> Iterator[Metric]:
    load = CounterMetricFamily(
        "mixtral_expert_assignments",
        "Tokens given to each expert of each layer",
        labels=["layer", "expert"],
    )
    for layer, counts in enumerate(stats.expert_load):
        for expert, count in enumerate(counts):
            load.add_metric([str(layer), str(expert)], count)
    yield load
    dropped = CounterMetricFamily(
        "mixtral_dropped_assignments", "Assignments left out", labels=["layer"]
    )
    for layer, count in enumerate(stats.dropped):
        dropped.add_metric([str(layer)], count)
    yield dropped


def _values(figure: float | Histogram) -> tuple[Any, ...]:
    """A figure as the families take it."""
    if not isinstance(figure, Histogram):
        return (figure,)
    bounds = zip(figure.bounds, figure.counts, strict=True)
    buckets = [(floatToGoString(bound), count) for bound, count in bounds]
    return [*buckets, ("+Inf", figure.count)], figure.sum


def _words(name: str) -> str:
    return name.partition("_")[2].replace("_", " ").capitalize()
