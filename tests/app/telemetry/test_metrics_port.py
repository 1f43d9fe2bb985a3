"""The metrics' own port. Its bounds: tests/system/test_processes.py."""

import socket

import httpx
from prometheus_client import CollectorRegistry, Gauge

from app.settings import Settings
from app.telemetry.metrics_port import metrics_server
from benchmarks.server import free_port


def test_it_opens_without_a_name_server(monkeypatch):
    def fail(*arguments: object) -> str:
        raise AssertionError(f"a name server was asked: {arguments}")

    for name in ("getfqdn", "gethostbyaddr", "gethostname"):
        monkeypatch.setattr(socket, name, fail)
    registry = CollectorRegistry()
    Gauge("answer", "", registry=registry).set(42)
    port = free_port()
    with metrics_server(Settings(host="0.0.0.0", metrics_port=port), registry):  # noqa: S104
        assert "answer 42.0" in httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60, trust_env=False).text
