"""The server under attack, with cores of its own, and raw HTTP over sockets: no client library would send this."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.server import REPOSITORY, ServerProcess, on_cores

IMAGES = REPOSITORY / "tests" / "data" / "cifar10"
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) .*?\r\n\r\n", re.DOTALL)
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """What became of a promise.

    Attributes:
        promise: what is promised.
        figure: what was measured.
        kept: whether the promise was kept.
    """

    promise: str
    figure: str
    kept: bool


@contextlib.contextmanager
def target_apart(**settings: Any) -> Iterator[ServerProcess]:
    """A running server with half of the cores, and this process and what it starts meanwhile with the others.

    So it is where clients are other machines: what they cost must not be counted as lost by the server.
    """
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    own, others = set(cores[: len(cores) // 2]), set(cores[len(cores) // 2 :])
    os.sched_setaffinity(0, others)
    try:
        with ServerProcess(on_cores(own) if own else (), **settings) as server:
            server.wait_until_ready()
            yield server
    finally:
        os.sched_setaffinity(0, before)


def post(body: bytes, content_type: str, *headers: str, path: str = "/classify", close: bool = False) -> bytes:
    """A POST as bytes.

    Args:
        body: of the request.
        content_type: of the body.
        *headers: more header lines.
        path: with the query.
        close: whether the server shall close afterwards.
    """
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {content_type}", *headers]
    lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Status, head and body of one answer; status 0 if the server closed without one."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, b"", b""
    found, length = _HEAD.match(head), _LENGTH.search(head)
    if not found:
        raise RuntimeError(f"no HTTP: {head[:100]!r}")
    body = await reader.readexactly(int(length[1])) if length else b""
    return int(found[1]), head, body


def is_whole(answer: bytes) -> bool:
    """Whether a status line, headers and as many bytes as they announce are there."""
    head, found, body = answer.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return bool(found and length and len(body) == int(length[1]))


def top_class(body: bytes) -> Any:
    """Label of the first prediction."""
    return json.loads(body)["predictions"][0].get("label")


def metrics(port: int) -> dict[str, float]:
    """The server's own counts."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def pictures() -> list[bytes]:
    """Real test images."""
    return [path.read_bytes() for path in sorted(IMAGES.glob("*/*.webp"))]


def percentile(values: list[float], share: float) -> float:
    """The value that so many are at or below; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def now() -> float:
    """Seconds."""
    return time.monotonic()
