"""Metrics of several processes behind one address.

Each tells its own on a Unix socket, their parent leaves its few in a file beside them, and whoever is scraped gathers all.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_GATHER_TIMEOUT_S = 2.0
_ASKED_AT_ONCE = 64
_GATHERED_FOR_S = 1.0
_PARENTS = "parent.prom"


@asynccontextmanager
async def tell_metrics(folder: Path, registry: CollectorRegistry) -> AsyncIterator[None]:
    """Answers siblings that gather metrics, while it is entered.

    Args:
        folder: of the Unix sockets.
        registry: this process's metrics.
    """

    async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(generate_latest(registry))
            with suppress(ConnectionError):
                await writer.drain()
        finally:
            writer.close()  # or whoever asks would wait for what failed here

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


class ParentMetrics(Collector):
    """What only the parent knows, which answers no request; its samples have no label `process`.

    Args:
        processes: how many there are to be.

    Attributes:
        replacements: how many times one had to be started in another's place.
    """

    def __init__(self, processes: int) -> None:
        self.replacements = 0
        self._processes, self._begin = processes, time.time()
        self._left: int | None = None
        self._failed = False

    def collect(self) -> Iterator[Metric]:
        """All three (prometheus_client's Collector)."""
        yield GaugeMetricFamily("convmixer_processes", "Processes that there should be (CONVMIXER_PROCESSES).", self._processes)
        yield CounterMetricFamily("convmixer_process_replacements", "Processes that had to be replaced.", self.replacements)
        # the others' begin with each replacement; of a container that is started anew they may even have the same ids
        yield GaugeMetricFamily(
            "process_start_time_seconds", "Start time of the process since unix epoch in seconds.", self._begin
        )

    def leave(self, folder: Path) -> None:
        """Writes them down where `Siblings` finds them, if they are not there yet."""
        if self._left == self.replacements:
            return
        registry = CollectorRegistry()
        registry.register(self)
        new = folder / f"{_PARENTS}.new"
        try:
            new.write_bytes(generate_latest(registry))
            new.replace(folder / _PARENTS)
        except OSError as error:  # a full disk is no reason to end, and may pass
            if not self._failed:
                logger.warning("the number of replaced processes cannot be told: %s", error)
            self._failed = True
        else:
            self._left, self._failed = self.replacements, False


class Siblings(Collector):
    """The metrics of all processes and of their parent.

    Args:
        folder: of the Unix sockets.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        """Every process's samples with a label `process`, its id, and the parent's (prometheus_client's Collector)."""
        families: dict[str, Metric] = {}

        def add(text: bytes, **labels: str) -> None:
            for family in text_string_to_metric_families(text.decode()):
                known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    known.add_sample(sample.name, {**sample.labels, **labels}, sample.value)

        paths = sorted(self.folder.glob("*.sock"))
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:  # each has its time: those that hang must not take that of the others
            for path, text in zip(paths, pool.map(_read, paths), strict=True):
                add(text, process=path.stem)
        with suppress(FileNotFoundError):  # it could not be written
            add((self.folder / _PARENTS).read_bytes())
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
