"""Traces, sent to a collector by OTLP over HTTP: a span for each call, below the caller's, and one for each step of it.

A span has the method, the outcome and the request id, and nothing of what was asked or answered. Spans are sent by a thread of
their own from a bounded queue: a collector that is slow or away costs spans, never time of a call.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, cast

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kms import __version__
from kms.config import TracingConfig
from kms.telemetry import Metadata, Spans

_QUEUE_MAX: Final = 2048
_BATCH_MAX: Final = 512
_SEND_MILLISECONDS: Final = 1000
_PATIENCE_SECONDS: Final = 2.0
_NAMES: Final = ("traceparent", "tracestate")
_OK: Final = trace.Status(trace.StatusCode.OK)


class _OtlpSpans:
    """`Spans` of OpenTelemetry."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    def call(self, method: str, metadata: Metadata) -> AbstractContextManager[None]:
        carrier = {name: str(value) for name, value in metadata if name in _NAMES}
        parent = self._propagator.extract(carrier) if carrier else None
        service, _, name = method.rpartition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": f"kms.v1.{service}", "rpc.method": name}
        return self._open(f"kms.v1.{method}", parent, trace.SpanKind.SERVER, attributes)

    def step(self, name: str) -> AbstractContextManager[None]:
        # Upkeep and streams have no span, and a step of theirs is no trace of its own.
        if not trace.get_current_span().is_recording():
            return nullcontext()
        return self._open(name, None, trace.SpanKind.INTERNAL, None)

    def end(self, outcome: str, code: str, request_id: str) -> None:
        span = trace.get_current_span()
        span.set_attributes({"kms.outcome": outcome, "rpc.grpc.status": code, "kms.request_id": request_id})
        span.set_status(_OK if outcome == "OK" else trace.Status(trace.StatusCode.ERROR, outcome))

    def _open(
        self, name: str, parent: Context | None, kind: trace.SpanKind, attributes: dict[str, str] | None
    ) -> AbstractContextManager[None]:
        # An exception's text may quote the request, so exceptions are not recorded.
        opened = self._tracer.start_as_current_span(
            name, parent, kind, attributes, record_exception=False, set_status_on_exception=False
        )
        return cast(AbstractContextManager[None], opened)


@contextmanager
def tracing(config: TracingConfig, deployment: str) -> Iterator[Spans]:
    """Yield what makes spans within the block and sends them to the collector."""
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
        resource=Resource({"service.name": "neo-kms", "service.version": __version__, "service.namespace": deployment}),
        span_limits=SpanLimits(max_span_attributes=8, max_events=0, max_links=0),
        shutdown_on_exit=False,
    )
    exporter = OTLPSpanExporter(endpoint=config.endpoint, timeout=_PATIENCE_SECONDS)
    sender = BatchSpanProcessor(
        exporter,
        max_queue_size=_QUEUE_MAX,
        max_export_batch_size=_BATCH_MAX,
        schedule_delay_millis=_SEND_MILLISECONDS,
    )
    provider.add_span_processor(sender)
    try:
        yield _OtlpSpans(provider.get_tracer("kms", __version__))
    finally:
        # By itself it would try for as long as there are spans, and the service is to end.
        ending = threading.Thread(target=provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        ending.join(_PATIENCE_SECONDS)
