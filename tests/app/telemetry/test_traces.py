"""When OpenTelemetry is asked for, by its own variables."""

from __future__ import annotations

import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from app.telemetry.exchange import Exchange
from app.telemetry.traces import Traces, asked_for, open_traces

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "false"}, True),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, True),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, True),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc"}, False),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": " "}, True),
    ],
)
def test_the_standard_variables_decide(environment, expected):
    assert asked_for(environment) is expected


@pytest.mark.parametrize("unknown", [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}])
def test_what_cannot_be_done_is_said(caplog, unknown):
    assert open_traces({**ENDPOINT, **unknown}) is None
    ((name, value),) = unknown.items()
    assert f"{name}={value}" in caplog.text


def test_without_the_extra_the_service_runs_and_says_what_to_install(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    assert open_traces(ENDPOINT) is None
    assert "install the extra [otel]" in caplog.text


def test_nobody_who_does_not_ask_pays():
    """The API comes with FastAPI; what costs time and memory are the SDK, the exporter and what they need."""
    code = (
        "import sys, app.main, app.server; from app.telemetry.traces import open_traces; open_traces({});"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter', 'requests'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_defect_is_recorded_with_its_trace():
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    traces = Traces(provider, exporter)
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError as error:
        traces(Exchange("POST", "/classify", None, (), "id", 1.0, 500, code="internal_error", error=error, route="/classify"))
    traces(Exchange("GET", "/readyz", None, (), "id", 1.0, 200))
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes
    assert span.attributes["error.type"] == "internal_error"
    (event,) = span.events
    assert event.attributes
    assert "test_traces.py" in str(event.attributes["exception.stacktrace"])
    traces.close()
