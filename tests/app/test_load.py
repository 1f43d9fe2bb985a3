"""The load generator: what it counts when a server misbehaves."""

from __future__ import annotations

import asyncio
import itertools
import resource
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import StartupError
from app.load import Server, closed_loop, open_loop, prepare, steady
from tests.server import ScriptedServer

RIGHT = (200, {}, b'{"label":"cat","confidence":0.9}')
RANKED_SECOND = (200, {}, b'{"label":"dog","confidence":0.9,"top_k":[{"label":"dog"},{"label":"cat"}]}')
REQUESTS = [prepare(b"image", "image/png", ["cat"], deadline_ms=7, prefix="/vision")]


def address(url: str) -> Server:
    return Server("127.0.0.1", int(url.rpartition(":")[2]))


def test_a_closed_loop_connects_again_and_counts_by_status():
    """Each answer of the scripted server ends its connection; in the end it is gone altogether."""
    server = ScriptedServer(RIGHT, RANKED_SECOND, (503, {}, b""), (504, {}, b""), None, RIGHT)
    tally = asyncio.run(closed_loop(address(server.url), REQUESTS, 1, 2.5))
    head, *rest = server.finish()
    assert len(rest) == 5
    assert head.startswith("post /vision/classify")
    assert "x-deadline-ms: 7\r\n" in head
    assert len(tally.right) == 2
    assert {status: len(times) for status, times in tally.failed.items()} == {200: 1, 503: 1, 504: 1}
    assert (len(tally.refused), tally.late, tally.unanswered) == (1, 1, 0)
    assert tally.lost >= 2  # the one without an answer, and the connections refused after the end
    assert tally.wrong == tally.lost + 1


class AnswersAndCloses(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        received = b""
        while not received.endswith(b"image"):
            received += self.request.recv(1000) or b"image"
        self.request.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(RIGHT[2]), RIGHT[2]))


@pytest.mark.parametrize("loop", ["closed", "open"])
def test_a_server_that_says_it_closes_loses_no_request(loop):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), AnswersAndCloses) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        server = Server("127.0.0.1", listening.server_address[1])
        measuring = closed_loop(server, REQUESTS, 2, 0.3) if loop == "closed" else open_loop(server, REQUESTS, steady(500), 0.3)
        tally = asyncio.run(measuring)
        listening.shutdown()
    assert (tally.lost, tally.unanswered) == (0, 0)
    assert len(tally.right) > 2


def test_more_clients_than_open_files_are_one_clear_line():
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    message = r"^connection \d+ of 1,000 cannot be opened: Too many open files \(`ulimit -n`\)$"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def few_files() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 10, limits[1]))
        await closed_loop(Server("127.0.0.1", listening.getsockname()[1]), REQUESTS, 1000, 0.1)

    try:
        with pytest.raises(StartupError, match=message):
            asyncio.run(few_files())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        listening.close()


def test_an_open_loop_counts_refused_connections():
    server = ScriptedServer(RIGHT)
    tally = asyncio.run(open_loop(address(server.url), REQUESTS, steady(20), 0.5))
    server.finish()
    assert len(tally.right) == 1
    assert tally.sent == len(tally.right) + tally.lost
    assert tally.sent > 1


def test_an_open_loop_that_is_late_itself_counts_from_when_a_request_was_due():
    """Coordinated omission: what waited in the client has waited, too."""

    def due() -> Iterator[float]:
        yield 0.1
        time.sleep(0.5)  # the client's loop stands still when its request is due
        yield from itertools.repeat(9)

    server = ScriptedServer(RIGHT)
    (seconds,) = asyncio.run(open_loop(address(server.url), REQUESTS, due(), 1)).right
    server.finish()
    assert seconds >= 0.5


def test_steady_times():
    assert list(itertools.islice(steady(4), 3)) == [0.25, 0.5, 0.75]


def test_every_image_of_a_request_must_have_its_label():
    request = prepare(b"images", "application/json", ["cat", "dog", "cat"])
    entries = [f'{{"label":"{label}","confidence":0.9,"top_k":[{{"label":"cat"}}]}}' for label in ("cat", "dog", "cat")]
    assert request.is_answered_by(",".join(entries).encode())
    assert not request.is_answered_by(",".join(entries[:2]).encode())
    assert not request.is_answered_by(",".join([entries[1], entries[0], entries[2]]).encode())
    assert not request.is_answered_by(",".join([entries[0], '{"error":{}}', entries[2]]).encode())
