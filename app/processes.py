"""Several processes behind one address: `CONVMIXER_PROCESSES`.

The first process opens the listening socket, starts the others on it, replaces what dies and passes SIGTERM on; it answers
nothing itself. The others share nothing but the socket, and a folder with one Unix socket each, on which they tell their
metrics: whoever is scraped gathers all of them, with a label `process`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Metric, generate_latest, make_wsgi_app
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from app.errors import StartupError
from app.settings import Settings

logger = logging.getLogger(__name__)

ENGINE_FAILURE = 70
"""Exit code of a process whose engine died or hangs (EX_SOFTWARE of sysexits.h): it is replaced."""

_CANNOT_START = (1, 2, 3)
"""Exit codes of a process that would fail in the same way again."""

_STARTED_S = 60.0
"""Whoever lives longer has started, whatever its exit code."""

_SCRAPES = 4
"""Connections of the metrics' own port at once, each with a thread and up to 6 MB of headers."""

_SCRAPE_TIMEOUT_S = 5.0
_RESPAWN_DELAY_S = 1.0
_GATHER_TIMEOUT_S = 2.0
_START_POLL_S = 0.05


def supervise(settings: Settings, command: Sequence[str]) -> int:
    """Runs `settings.processes` of them until SIGTERM or SIGINT.

    Args:
        settings: address, number of processes, the metrics' own port.
        command: what starts one; `--fd` and `--siblings` are added.

    Returns:
        Exit code: 0 after a signal, else that of the process that could not start.

    Raises:
        StartupError: the address or the metrics' port cannot be opened.
    """
    bound = _bind(settings)
    host, port = bound.getsockname()[:2]
    with tempfile.TemporaryDirectory(prefix="convmixer-") as folder, bound:
        whole = [*command, "--fd", str(bound.fileno()), "--siblings", folder]
        started: dict[int, float] = {}
        stopping = False

        def spawn() -> None:
            pid = os.posix_spawn(whole[0], whole, os.environ)
            started[pid] = time.monotonic()
            if stopping:  # the signal came when it was not known yet
                os.kill(pid, signal.SIGTERM)

        def stop(*_: object) -> None:
            nonlocal stopping
            stopping = True
            for pid in list(started):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

        everybody = CollectorRegistry()
        everybody.register(Siblings(Path(folder)))
        close_metrics = serve_metrics(settings, everybody)
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        for _ in range(settings.processes):
            spawn()
        failed = 0
        told = False
        while started:
            pid, status = os.waitpid(-1, 0 if told else os.WNOHANG)
            if not pid:  # none has ended; they are starting
                if told := any(Path(folder).iterdir()):
                    logger.info("Uvicorn running on http://%s:%d (%d processes)", host, port, settings.processes)
                else:
                    time.sleep(_START_POLL_S)
                continue
            if pid not in started:  # as process 1 this one inherits those whose parents have died
                continue
            lived_s = time.monotonic() - started.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            socket_path(Path(folder), pid).unlink(missing_ok=True)  # if it was killed
            if not stopping and code in _CANNOT_START and lived_s < _STARTED_S:
                logger.critical("process %d does not start (exit code %d); stopping", pid, code)
                failed = code
                stop()
            elif not stopping:
                logger.error("process %d ended with %d; it is replaced", pid, code)
                time.sleep(max(0.0, _RESPAWN_DELAY_S - lived_s))
                if not stopping:
                    spawn()
        close_metrics()
    return failed


@asynccontextmanager
async def tell_metrics(folder: Path, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Answers siblings that gather metrics, while it is entered.

    Args:
        folder: of the Unix sockets.
        registry: this process's metrics.
    """

    async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(generate_latest(registry))
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    path = socket_path(folder, os.getpid())
    server = await asyncio.start_unix_server(tell, path)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def socket_path(folder: Path, pid: int) -> Path:
    """Where that process tells its metrics."""
    return folder / f"{pid}.sock"


class Siblings(Collector):
    """The metrics of all processes.

    Args:
        folder: of the Unix sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        """Every process's samples with a label `process`, its id (prometheus_client's Collector)."""
        families: dict[str, Metric] = {}
        for path in sorted(self.folder.glob("*.sock")):
            for family in text_string_to_metric_families(_read(path).decode()):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    known.add_sample(sample.name, {**sample.labels, "process": path.stem}, sample.value)
        yield from families.values()


def _read(path: Path) -> bytes:
    text = b""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_GATHER_TIMEOUT_S)
            connection.connect(str(path))
            while piece := connection.recv(65536):
                text += piece
    except (ConnectionRefusedError, FileNotFoundError):  # it was killed, or has just begun
        return b""
    except OSError as error:
        logger.warning("process %s does not tell its metrics: %s", path.stem, error)
        return b""
    return text


def _bind(settings: Settings) -> socket.socket:
    """The address, taken but not listened on: clients are refused until the first process is ready."""
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise StartupError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    bound.set_inheritable(True)
    return bound


def serve_metrics(settings: Settings, registry: CollectorRegistry) -> Callable[[], None]:
    """Opens the metrics' own port (`CONVMIXER_METRICS_PORT`); returns what closes it.

    Raises:
        StartupError: the port cannot be opened.
    """
    if settings.metrics_port is None:
        return lambda: None
    server_class = _MetricsServer6 if ":" in settings.host else _MetricsServer
    try:
        server = make_server(settings.host, settings.metrics_port, make_wsgi_app(registry), server_class, _MetricsHandler)
    except OSError as error:
        raise StartupError(f"CONVMIXER_METRICS_PORT={settings.metrics_port}: {error.strerror}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close


class _MetricsServer(ThreadingMixIn, WSGIServer):
    """As prometheus_client's, whose threads and patience have no bound."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._free = threading.BoundedSemaphore(_SCRAPES)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        def end() -> None:
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(_SCRAPE_TIMEOUT_S, end)
        timer.start()
        try:
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


def command_line() -> list[str]:
    """What starts this program once more."""
    return [sys.executable, "-m", "app.cli", *sys.argv[1:]]
