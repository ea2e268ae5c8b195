"""OpenTelemetry spans of answers: queue, prefill and decode, sent by OTLP over HTTP."""

from __future__ import annotations

import logging
import urllib.parse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mixtral_jax

if TYPE_CHECKING:
    from mixtral_jax.serve.asking import Answer

_NANOSECONDS = 1e9
_GRPC_PORT = 4317

logger = logging.getLogger(__name__)


class Tracing:
    """Where spans go; nowhere without an endpoint.

    Args:
        endpoint: such as ``http://localhost:4318``; ``/v1/traces`` is added where it has no path.
        service_name: as the spans name this server.
        exporter: takes the spans instead of OTLP, in tests.
    """

    def __init__(self, endpoint: str | None, service_name: str, exporter: Any = None):
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        attributes = {
            "service.name": service_name,
            "service.version": mixtral_jax.__version__,
        }
        self._provider = TracerProvider(resource=Resource.create(attributes))
        if exporter is not None:
            self._provider.add_span_processor(SimpleSpanProcessor(exporter))
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        url = _traces_url(endpoint or "")
        if urllib.parse.urlsplit(url).port == _GRPC_PORT:
            message = "--otlp-endpoint %s: port %d takes gRPC, and spans are sent over HTTP (4318)"
            logger.warning(message, endpoint, _GRPC_PORT)
        exporter = OTLPSpanExporter(endpoint=url)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))

    def finished(
        self, answers: Iterable[Answer], started_at: float, traceparent: str | None = None
    ) -> None:
        """Sends the spans of whole answers.

        Args:
            answers: whose times are known by now.
            started_at: when they were submitted, in seconds since the epoch.
            traceparent: the caller's own span, as the W3C's header has it.
        """
        if self._provider is None:
            return
        for answer in answers:
            self._record(answer, started_at, traceparent)

    def _record(self, answer: Answer, started_at: float, traceparent: str | None) -> None:
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        end, sampling = answer.end, answer.request.sampling
        tracer = self._provider.get_tracer("mixtral_jax.serve")
        carrier = {} if traceparent is None else {"traceparent": traceparent}
        parent = TraceContextTextMapPropagator().extract(carrier)
        parts = {
            "queue": end.queue_seconds,
            "prefill": end.prefill_seconds,
            "decode": end.decode_seconds,
        }
        begin = int(started_at * _NANOSECONDS)
        span = tracer.start_span(
            "generate",
            context=parent,
            start_time=begin,
            attributes={
                "gen_ai.operation.name": "text_completion",
                "gen_ai.request.max_tokens": sampling.max_new_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.usage.input_tokens": end.prompt_tokens,
                "gen_ai.usage.output_tokens": len(end.token_ids),
                "gen_ai.response.finish_reasons": [end.reason],
                "mixtral.cached_tokens": end.cached_tokens,
                "mixtral.request_id": answer.request.request_id,
            },
        )
        inside = set_span_in_context(span, parent)
        for name, seconds in parts.items():
            part = tracer.start_span(name, context=inside, start_time=begin)
            begin += int(seconds * _NANOSECONDS)
            part.end(end_time=begin)
        span.end(end_time=begin)

    def close(self) -> None:
        """Sends what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _traces_url(endpoint: str) -> str:
    url = urllib.parse.urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    path = url.path if url.path not in ("", "/") else "/v1/traces"
    return urllib.parse.urlunsplit(url._replace(path=path))
