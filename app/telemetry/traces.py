"""OpenTelemetry traces of the requests to the model, if the environment asks for them and `[otel]` is installed.

The variables are OpenTelemetry's own (https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/).
Spans are made when the answer is ready, from the times that were taken anyway: one for the request, under it `queue`,
`decode` and `infer` for each image. Names and attributes follow the semantic conventions for HTTP. The SDK is not
imported where nobody asks for it. FastAPI's own tracing stays off: a raw image never gets to FastAPI.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

from app import __version__
from app.errors import CLIENT_LEFT
from app.request import classifies
from app.telemetry.exchange import Exchange

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from app.engine.outcome import Timing

logger = logging.getLogger(__name__)

SERVICE_NAME = "convmixer-serve"
"""Unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` has another."""

_LAST_SEND_S = 2.0
_LONGEST = 256
"""Bytes of what a client chooses, as in the access log: the SDK keeps thousands of spans."""


def asked_for(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables ask for traces over OTLP/HTTP; what cannot be done is logged."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if exporters not in {"", "none", "otlp"}:
        logger.warning("OTEL_TRACES_EXPORTER=%s is not known here, nothing is traced; set otlp or none", exporters)
        return False
    if exporters == "none" or not (exporters or any(environment.get(name) for name in endpoints)):
        return False
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):  # the first that says something wins
        protocol = environment.get(name, "").strip()
        if protocol == "http/protobuf":
            break
        if protocol:
            logger.warning("%s=%s is not known here, nothing is traced; set http/protobuf", name, protocol)
            return False
    return True


def open_traces(environment: Mapping[str, str] = os.environ) -> Traces | None:
    """The traces, or None if nobody asked for them or `[otel]` is not installed."""
    if not asked_for(environment):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        logger.warning("OTEL_* variables ask for traces, but %s is missing; install the extra [otel]", error.name)
        return None
    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    logger.info("traces go to OpenTelemetry as %s", resource.attributes["service.name"])
    return Traces(provider, exporter)


class Traces:
    """Makes spans of what was answered.

    Args:
        provider: the SDK, with its sampler.
        exporter: what it sends with.
    """

    def __init__(self, provider: TracerProvider, exporter: SpanExporter) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider, self._exporter = provider, exporter
        self._tracer = provider.get_tracer("app", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._nothing = Context()
        self._inside = set_span_in_context
        self._of_server = SpanKind.SERVER
        self._failed = Status(StatusCode.ERROR)

    def wants(self, status: int, seconds: float) -> bool:
        """Every answer: whether it is sampled is not for us to say."""
        return True

    def __call__(self, exchange: Exchange) -> None:
        """Traces a request to the model; others, probes above all, are not worth it."""
        if not classifies(exchange.route or exchange.path):
            return
        to_ns = time.time_ns() - time.monotonic_ns()  # from the steady clock to the world's, as that stands now
        begin_ns = int(exchange.begin * 1e9) + to_ns
        end_ns = begin_ns + int(exchange.seconds * 1e9)
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}" if exchange.route else exchange.method,
            self._propagator.extract(_sent_context(exchange), self._nothing),
            self._of_server,
            _attributes(exchange),
            start_time=begin_ns,
        )
        exchange.trace_id = f"{span.get_span_context().trace_id:032x}"
        if not span.is_recording():
            return
        if exchange.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            span.set_status(self._failed)
            if exchange.status == HTTPStatus.INTERNAL_SERVER_ERROR and exchange.error:
                span.record_exception(exchange.error, timestamp=end_ns)
        context = self._inside(span, self._nothing)
        for index, timing in enumerate(exchange.timings):
            self._trace_image(index, timing, context, to_ns)
        span.end(end_ns)

    def close(self) -> None:
        """Sends what waits; a collector that does not answer is given up after two seconds instead of ten."""
        give_up = threading.Timer(_LAST_SEND_S, self._exporter.shutdown)
        give_up.start()
        self._provider.shutdown()
        give_up.cancel()

    def _trace_image(self, index: int, timing: Timing, context: Context, to_ns: int) -> None:
        decoding = timing.submitted + timing.queue_s
        stages = [("queue", timing.submitted, timing.queue_s), ("decode", decoding, timing.decode_s)]
        stages.append(("infer", timing.infer_begin, timing.infer_s))
        reached = [stage for stage in stages if stage[2]]
        for name, begin, seconds in reached:
            attributes: dict[str, AttributeValue] = {"convmixer.image.index": index}
            if name == "infer":
                attributes["convmixer.batch.size"] = timing.batch_size
            begin_ns = int(begin * 1e9) + to_ns
            span: Span = self._tracer.start_span(name, context, attributes=attributes, start_time=begin_ns)
            if not timing.batch_size and name == reached[-1][0]:  # here the image's way ended
                span.set_status(self._failed)
            span.end(begin_ns + int(seconds * 1e9))


def _sent_context(exchange: Exchange) -> dict[str, str]:
    """What the client says of the trace that it is part of (W3C Trace Context, 3.2.1 and 3.3.1.1)."""
    parents = [value for name, value in exchange.headers if name == b"traceparent"]
    if len(parents) != 1:  # of several none can be trusted
        return {}
    states = [value for name, value in exchange.headers if name == b"tracestate"]
    return {"traceparent": parents[0].decode("latin-1"), "tracestate": b",".join(states).decode("latin-1")}


def _attributes(exchange: Exchange) -> dict[str, AttributeValue]:
    """As https://opentelemetry.io/docs/specs/semconv/http/http-spans/ has them, and this service's own."""
    attributes: dict[str, AttributeValue] = {
        "http.request.method": exchange.method,
        "url.path": exchange.path[:_LONGEST],
        "url.scheme": "http",
        "convmixer.request_id": exchange.request_id,
        "convmixer.images": len(exchange.timings),
    }
    if exchange.route:
        attributes["http.route"] = exchange.route
    if exchange.client:
        attributes["client.address"], attributes["client.port"] = exchange.client
    if agent := next((value for name, value in exchange.headers if name == b"user-agent"), None):
        attributes["user_agent.original"] = agent[:_LONGEST].decode("latin-1")
    if exchange.status != CLIENT_LEFT:
        attributes["http.response.status_code"] = exchange.status
        attributes["http.response.body.size"] = exchange.sent_bytes
    if exchange.code:
        attributes["convmixer.code"] = exchange.code
        if exchange.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            attributes["error.type"] = exchange.code
    return attributes
