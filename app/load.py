"""Load for a running server, from a client that costs little: prepared requests, one protocol object a connection.

It may share the machine with the server, so every microsecond spent here is missing there. `convmixer bench` and the
benchmarks use it.
"""

from __future__ import annotations

import asyncio
import errno
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from app.errors import StartupError

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_STATUS = slice(9, 12)
"""Where it stands in `HTTP/1.1 200 OK`."""

_RECONNECT_S = 0.1
_ANSWERS_WITHIN_S = 30.0
"""After the end, for the last answers."""


@dataclass(frozen=True)
class Server:
    """Where requests go.

    Attributes:
        host: name or address.
        port: of TCP.
        tls: for https.
        prefix: path before `/classify`, if it stands behind a proxy.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    prefix: str = ""


@dataclass(frozen=True)
class Request:
    """A request ready to be written, and what a right answer contains.

    Attributes:
        wire: head and body.
        expected: parts of every right answer, in their order: of each image the label that the model gives in process.
    """

    wire: bytes
    expected: list[bytes]

    def is_answered_by(self, body: bytes) -> bool:
        """Whether an answer has all that is expected."""
        at = 0
        for part in self.expected:
            at = body.find(part, at) + 1
            if not at:
                return False
        return True


@dataclass
class Tally:
    """What came back.

    Attributes:
        sent: requests written.
        right: seconds from writing (in an open loop: from when it was due) to the answer, of right answers.
        failed: the same of other statuses, by status; 200 if the answer is not the expected one.
        lost: connections that were refused, or ended without the answer.
        unanswered: requests without an answer when the measurement ended.
        seconds: length of the measurement.
        answered_s: the same until the last answer: longer if more was sent than the server can answer.
    """

    sent: int = 0
    right: list[float] = field(default_factory=list)
    failed: dict[int, list[float]] = field(default_factory=dict)
    lost: int = 0
    unanswered: int = 0
    seconds: float = 0.0
    answered_s: float = 0.0

    @property
    def refused(self) -> list[float]:
        """Seconds from writing to the answer, of 503s."""
        return self.failed.get(503, [])

    @property
    def late(self) -> int:
        """504s: accepted and then dropped because their deadline passed."""
        return len(self.failed.get(504, []))

    @property
    def wrong(self) -> int:
        """What should never be: neither right nor refused nor late."""
        return self.lost + sum(len(times) for status, times in self.failed.items() if status not in {503, 504})


def prepare(
    body: bytes,
    content_type: str,
    labels: list[str],
    *,
    deadline_ms: int | None = None,
    api_key: str | None = None,
    host: str = "bench",
    prefix: str = "",
) -> Request:
    """A `POST /classify`.

    Args:
        body: as sent.
        content_type: of it.
        labels: of a right answer, one an image; empty: any.
        deadline_ms: for `X-Deadline-Ms`.
        api_key: if the service asks for one.
        host: for the header.
        prefix: path before `/classify`.
    """
    optional = f"X-Deadline-Ms: {deadline_ms}\r\n" if deadline_ms else ""
    optional += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST {prefix}/classify HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
        f"{optional}Content-Length: {len(body)}\r\n\r\n"
    )
    # the classes that are ranked behind it have labels, too, but no confidence
    expected = [f'"label":"{label}","confidence":'.encode() for label in labels] or [b'"confidence":']
    return Request(head.encode() + body, expected)


class _Connection(asyncio.Protocol):
    """Writes a request, reads its answer, tells `answered`; tells `closed` when the server has closed it."""

    def __init__(self, tally: Tally, answered: Callable[[_Connection], None], closed: Callable[[_Connection], None]) -> None:
        self.tally, self.answered, self.closed = tally, answered, closed
        self.transport: asyncio.WriteTransport | None = None
        self.buffer = b""
        self.request: Request | None = None
        self.begin = 0.0
        self.lost = self.dismissed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.WriteTransport", transport)  # uvloop's says it is none

    def send(self, request: Request, begin: float) -> None:
        assert self.transport  # noqa: S101 (for mypy)
        self.request, self.begin = request, begin
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
        status = int(head[_STATUS]) if head[_STATUS].isdigit() else 0
        if status == 200 and self.request and self.request.is_answered_by(body):
            self.tally.right.append(elapsed)
        else:
            self.tally.failed.setdefault(status, []).append(elapsed)
        self.buffer, self.request = b"", None
        if _CLOSES.search(head) and self.transport:
            self.dismissed = True
            self.transport.close()  # as the server is about to; `closed` is told
        else:
            self.answered(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.request:
            self.tally.lost += 1
            self.request = None
        self.closed(self)


async def _connect(
    server: Server, tally: Tally, answered: Callable[[_Connection], None], closed: Callable[[_Connection], None]
) -> _Connection:
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: _Connection(tally, answered, closed), server.host, server.port, ssl=server.tls
    )
    return connection


async def closed_loop(server: Server, requests: list[Request], clients: int, seconds: float) -> Tally:
    """So many clients, each with one connection, that send a request when the last was answered.

    Args:
        server: where to.
        requests: in turn.
        clients: connections.
        seconds: to measure.

    Raises:
        StartupError: one of the connections cannot be opened, as when more files would be open than may be.
    """
    tally, turn = Tally(), 0
    end = time.perf_counter() + seconds
    connections: set[_Connection] = set()
    again: set[asyncio.Task[None]] = set()

    def next_request(connection: _Connection) -> None:
        nonlocal turn
        if (now := time.perf_counter()) < end and not connection.lost:
            turn += 1
            connection.send(requests[turn % len(requests)], now)

    def closed(connection: _Connection) -> None:
        if time.perf_counter() < end:
            task = asyncio.get_running_loop().create_task(reconnect(connection))
            again.add(task)
            task.add_done_callback(again.discard)

    async def reconnect(old: _Connection) -> None:
        connections.discard(old)
        pause_s = 0.0 if old.dismissed else _RECONNECT_S
        while time.perf_counter() < end:
            await asyncio.sleep(pause_s)
            pause_s = _RECONNECT_S
            try:
                new = await _connect(server, tally, next_request, closed)
            except OSError:
                tally.lost += 1
            else:
                connections.add(new)
                next_request(new)
                return

    for number in range(1, clients + 1):
        try:
            connections.add(await _connect(server, tally, next_request, closed))
        except OSError as error:
            end = 0.0
            _finish(tally, connections)
            reason = f"{error.strerror} (`ulimit -n`)" if error.errno == errno.EMFILE else error
            raise StartupError(f"connection {number:,} of {clients:,} cannot be opened: {reason}") from error
    begin = time.perf_counter()
    end = begin + seconds
    for connection in list(connections):
        next_request(connection)
    await asyncio.sleep(seconds)
    await _last_answers(connections, again)
    tally.seconds = tally.answered_s = time.perf_counter() - begin
    _finish(tally, connections)
    return tally


async def open_loop(server: Server, requests: list[Request], due: Iterator[float], seconds: float) -> Tally:
    """Requests at given times, whether or not earlier ones were answered; as many connections as that takes.

    A request's time begins when it was due, so a slow connection counts, and a client that is late itself.

    Args:
        server: where to.
        requests: in turn.
        due: seconds after the begin at which each is sent, ascending, without end.
        seconds: to measure.
    """
    tally = Tally()
    idle: list[_Connection] = []
    everyone: set[_Connection] = set()
    pending: set[asyncio.Task[None]] = set()

    async def send_on_new_connection(request: Request, begin: float) -> None:
        try:
            connection = await _connect(server, tally, idle.append, everyone.discard)
        except OSError:
            tally.sent += 1
            tally.lost += 1
            return
        everyone.add(connection)
        connection.send(request, begin)

    begin = time.perf_counter()
    sent, next_due = 0, next(due)
    while (now := time.perf_counter()) - begin < seconds:
        burst = 0
        while next_due <= now - begin and burst < 1000:  # answers must be read, too
            request, due_at = requests[sent % len(requests)], begin + next_due
            sent, burst, next_due = sent + 1, burst + 1, next(due)
            while idle and idle[-1].lost:  # the server closes what idles when it has too many
                idle.pop()
            if idle:
                idle.pop().send(request, due_at)
            else:
                task = asyncio.get_running_loop().create_task(send_on_new_connection(request, due_at))
                pending.add(task)
                task.add_done_callback(pending.discard)
        await asyncio.sleep(0.001)
    tally.seconds = time.perf_counter() - begin
    await _last_answers(everyone, pending)
    tally.answered_s = time.perf_counter() - begin
    tally.unanswered = len(pending)
    _finish(tally, everyone)
    return tally


def steady(rate: float) -> Iterator[float]:
    """Times for `open_loop`, evenly spaced.

    Args:
        rate: requests a second.
    """
    count = 0
    while True:
        count += 1
        yield count / rate


def poisson(rate: float, seed: int | None = None) -> Iterator[float]:
    """Times for `open_loop` as those of many independent clients: exponential intervals.

    Args:
        rate: requests a second, on average.
        seed: of the intervals; None: others each time.
    """
    generator, due = random.Random(seed), 0.0  # noqa: S311 - no secret
    while True:
        due += generator.expovariate(rate)
        yield due


async def _last_answers(connections: set[_Connection], tasks: set[asyncio.Task[None]]) -> None:
    give_up = time.perf_counter() + _ANSWERS_WITHIN_S
    while (tasks or any(connection.request for connection in connections)) and time.perf_counter() < give_up:
        await asyncio.sleep(0.01)


def _finish(tally: Tally, connections: set[_Connection]) -> None:
    tally.unanswered += sum(connection.request is not None for connection in connections)
    for connection in list(connections):
        if connection.transport:
            connection.transport.abort()
