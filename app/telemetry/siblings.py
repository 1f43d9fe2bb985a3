"""Metrics of several processes behind one address: each tells its own on a Unix socket, whoever is scraped gathers all."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_GATHER_TIMEOUT_S = 2.0
_GATHERED_FOR_S = 1.0


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


class GatheredMetrics:
    """The metrics of all processes as text, gathered at most once a second: all of them have to be asked.

    Args:
        folder: of the Unix sockets.
    """

    def __init__(self, folder: Path) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Siblings(folder))
        self._gathering = asyncio.Lock()
        self._gathered, self._text = -math.inf, b""

    async def text(self) -> bytes:
        """Prometheus text format."""
        async with self._gathering:
            if time.monotonic() > self._gathered + _GATHERED_FOR_S:
                self._text = await asyncio.to_thread(generate_latest, self._registry)
                self._gathered = time.monotonic()
            return self._text
