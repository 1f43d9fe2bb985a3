"""HTTP over raw sockets, for what no client library would send; and one number of what `/metrics` says."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any


def connect(url: str, **options: int) -> socket.socket:
    """A connection to a server.

    Args:
        url: of the server.
        **options: of the socket (`SO_RCVBUF=4096`).
    """
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(60)
    connection.connect((host, int(port)))
    return connection


def classify_request(data: bytes, *headers: str, version: str = "1.1") -> bytes:
    """One raw image."""
    head = [f"POST /classify HTTP/{version}", "Host: x", "Content-Type: image/webp", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def answers(connection: socket.socket) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Status, head and JSON of each answer until the server closes."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
        while found := re.match(rb"HTTP/1\.1 (\d+) .*?content-length: (\d+)\r\n.*?\r\n\r\n", received, re.DOTALL):
            end = found.end() + int(found[2])
            if len(received) < end:
                break
            yield int(found[1]), found[0], json.loads(received[found.end() : end])
            received = received[end:]


def metric(text: str, name: str) -> float:
    """The value of one metric, with its labels in the name, in the text of `/metrics`; 0 if it is not there."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0
