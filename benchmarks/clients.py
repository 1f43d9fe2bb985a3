"""Clients that cost little, in a process of their own: prepared requests, one protocol object a connection.

They share the machine with the server, so every microsecond spent here is missing there.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_SUCCESS = b"HTTP/1.1 200"
_REFUSED = b"HTTP/1.1 503"
_LATE = b"HTTP/1.1 504"


@dataclass(frozen=True)
class Request:
    """A request ready to be written, and what a right answer contains.

    Attributes:
        wire: head and body.
        expected: a part of every right answer, e.g. the label that the model gives in process.
        images: images in it.
    """

    wire: bytes
    expected: bytes
    images: int = 1


@dataclass
class Tally:
    """What came back.

    Attributes:
        sent: requests written.
        right: seconds from writing to the answer, of right answers.
        refused: the same, of 503s.
        late: 504s, accepted and then dropped because their deadline passed.
        wrong: anything else, and answers that do not contain what was expected.
        unanswered: requests without an answer when the measurement ended.
        seconds: length of the measurement.
    """

    sent: int = 0
    right: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    late: int = 0
    wrong: int = 0
    unanswered: int = 0
    seconds: float = 0.0


def prepare(body: bytes, content_type: str, expected: str, *, images: int = 1, deadline_ms: int | None = None) -> Request:
    """A `POST /classify`."""
    deadline = f"X-Deadline-Ms: {deadline_ms}\r\n" if deadline_ms else ""
    head = (
        f"POST /classify HTTP/1.1\r\nHost: bench\r\nContent-Type: {content_type}\r\n{deadline}Content-Length: {len(body)}\r\n\r\n"
    )
    return Request(head.encode() + body, f'"label":"{expected}"'.encode(), images)


def closed_loop(port: int, requests: list[Request], clients: int, seconds: float) -> Tally:
    """So many clients, each with one connection, that send a request when the last was answered."""
    return _in_process(_closed_loop, port, requests, clients, seconds)


def open_loop(port: int, requests: list[Request], rate: float, seconds: float) -> Tally:
    """Requests at a steady rate, whether or not earlier ones were answered; as many connections as that takes."""
    return _in_process(_open_loop, port, requests, rate, seconds)


class _Connection(asyncio.Protocol):
    """Writes a request, reads its answer, tells `answered`."""

    def __init__(self, tally: Tally, answered: Callable[[_Connection], None]) -> None:
        self.tally, self.answered = tally, answered
        self.transport: asyncio.WriteTransport | None = None
        self.buffer = b""
        self.request: Request | None = None
        self.begin = 0.0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)  # uvloop's says it is none

    def send(self, request: Request) -> None:
        assert self.transport
        self.request, self.begin = request, time.perf_counter()
        self.tally.sent += 1
        self.transport.write(request.wire)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = _LENGTH.search(head)
        if length and len(body) < int(length[1]):
            return
        elapsed = time.perf_counter() - self.begin
        if head.startswith(_SUCCESS) and self.request and self.request.expected in body:
            self.tally.right.append(elapsed)
        elif head.startswith(_REFUSED):
            self.tally.refused.append(elapsed)
        elif head.startswith(_LATE):
            self.tally.late += 1
        else:
            self.tally.wrong += 1
        self.buffer, self.request = b"", None
        self.answered(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.request:
            self.tally.wrong += 1
            self.request = None


async def _closed_loop(port: int, requests: list[Request], clients: int, seconds: float) -> Tally:
    loop, tally, turn = asyncio.get_running_loop(), Tally(), 0
    end = time.perf_counter() + seconds

    def next_request(connection: _Connection) -> None:
        nonlocal turn
        if time.perf_counter() < end:
            turn += 1
            connection.send(requests[turn % len(requests)])

    connections = [
        (await loop.create_connection(lambda: _Connection(tally, next_request), "127.0.0.1", port))[1] for _ in range(clients)
    ]
    begin = time.perf_counter()
    for connection in connections:
        next_request(connection)
    await asyncio.sleep(seconds)
    while any(connection.request for connection in connections) and time.perf_counter() < end + 30:
        await asyncio.sleep(0.01)
    tally.seconds = time.perf_counter() - begin
    tally.unanswered = sum(connection.request is not None for connection in connections)
    return tally


async def _open_loop(port: int, requests: list[Request], rate: float, seconds: float) -> Tally:
    loop, tally = asyncio.get_running_loop(), Tally()
    idle: list[_Connection] = []
    everyone: list[_Connection] = []
    pending: set[asyncio.Task[None]] = set()

    async def send_on_new_connection(request: Request) -> None:
        connection = (await loop.create_connection(lambda: _Connection(tally, idle.append), "127.0.0.1", port))[1]
        everyone.append(connection)
        connection.send(request)

    begin = time.perf_counter()
    due = 0
    while (now := time.perf_counter() - begin) < seconds:
        for _ in range(min(int(now * rate) - due, 1000)):
            request = requests[due % len(requests)]
            due += 1
            while idle and idle[-1].lost:  # the server closes what idles when it has too many
                idle.pop()
            if idle:
                idle.pop().send(request)
            else:
                task = loop.create_task(send_on_new_connection(request))
                pending.add(task)
                task.add_done_callback(pending.discard)
        await asyncio.sleep(0.001)
    tally.seconds = time.perf_counter() - begin
    give_up = time.perf_counter() + 15
    while (pending or any(connection.request for connection in everyone)) and time.perf_counter() < give_up:
        await asyncio.sleep(0.01)
    tally.unanswered = sum(connection.request is not None for connection in everyone) + len(pending)
    return tally


def _in_process(measure: Callable[..., object], *arguments: object) -> Tally:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Tally] = context.Queue()
    process = context.Process(target=_run, args=(measure, arguments, results))
    process.start()
    tally = results.get(timeout=300)
    process.join()
    return tally


def _run(measure: Callable[..., object], arguments: tuple[object, ...], results: multiprocessing.Queue[object]) -> None:
    import uvloop

    results.put(uvloop.run(measure(*arguments)))  # type: ignore[arg-type]
