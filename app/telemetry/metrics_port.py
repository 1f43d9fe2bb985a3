"""A port of its own for `/metrics`, in threads of its own, for a network that clients do not reach."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from app.errors import StartupError
from app.settings import Settings

_SCRAPES = 4
"""Connections at once, each with a thread and up to 6 MB of headers."""

_SCRAPE_TIMEOUT_S = 5.0
_NO_FILE_PAUSE_S = 0.1


@contextmanager
def metrics_server(settings: Settings, registry: CollectorRegistry) -> Iterator[None]:
    """Answers on the metrics' own port (`CONVMIXER_METRICS_PORT`), if there is one, while it is entered.

    Raises:
        StartupError: the port cannot be opened.
    """
    if settings.metrics_port is None:
        yield
        return
    server_class = _MetricsServer6 if ":" in settings.host else _MetricsServer
    try:
        server = make_server(settings.host, settings.metrics_port, make_wsgi_app(registry), server_class, _MetricsHandler)
    except OSError as error:
        raise StartupError(f"CONVMIXER_METRICS_PORT={settings.metrics_port}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _MetricsServer(ThreadingMixIn, WSGIServer):
    """As prometheus_client's, whose threads and patience have no bound."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(_SCRAPES)
        super().__init__(*arguments)

    def server_bind(self) -> None:
        """As WSGIServer's, which asks the name server what this host is called: if that is dead, for a minute."""
        TCPServer.server_bind(self)
        host, self.server_port = self.server_address[:2]
        self.server_name = str(host)
        self.setup_environ()

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:  # no file is to be had: who waits is found again at once, which would take a core
            time.sleep(_NO_FILE_PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads are to be had
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        def end() -> None:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(_SCRAPE_TIMEOUT_S, end)
        try:
            timer.start()
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing of clients that were too slow, or left."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _MetricsServer6(_MetricsServer):
    address_family = socket.AF_INET6


class _MetricsHandler(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing of every scrape."""
