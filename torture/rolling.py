"""Replicas behind the real HAProxy with the real configuration (deploy/haproxy/haproxy.cfg), restarted one by one under load.

Each replica has an address of its own on the loopback (127.0.0.1, 127.0.0.2, …) and all the same port, as containers have.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from app.load import Request, prepare
from benchmarks.clients import closed_loop
from benchmarks.server import READY_TIMEOUT_S, REPOSITORY, ServerProcess, free_port
from deploy.rolling_update import replicas_up
from torture.target import Finding, now, pictures
from torture.traffic import expected_labels

CONFIGURATION = REPOSITORY / "deploy" / "haproxy" / "haproxy.cfg"
CLIENTS = 8
_PROMISE = "Replicas behind HAProxy restarted one by one lose nothing"


class _Question(socketserver.BaseRequestHandler):
    """Answers any question for an A record with the replicas' addresses, as Docker's name server does (RFC 1035, 4.1)."""

    def handle(self) -> None:
        query, connection = self.request
        end = query.index(b"\0", 12) + 5  # header, name, type, class
        (kind,) = struct.unpack_from(">H", query, end - 4)
        found: list[str] = self.server.addresses if kind == 1 else []  # type: ignore[attr-defined]
        records = (struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(address) for address in found)
        header = query[:2] + struct.pack(">5H", 0x8180, 1, len(found), 0, 0)
        connection.sendto(header + query[12:end] + b"".join(records), self.client_address)


class Cluster:
    """So many replicas and HAProxy before them.

    Args:
        count: of replicas.
        **settings: of each, `CONVMIXER_*` without the prefix, in lower case.
    """

    def __init__(self, count: int, **settings: Any) -> None:
        self.addresses = [f"127.0.0.{1 + number}" for number in range(count)]
        self.settings: dict[str, Any] = {"port": free_port(), "shutdown_delay_s": 3, **settings}
        self.port, self.operators = free_port(), f"127.0.0.1:{free_port()}"
        self._names = socketserver.UDPServer(("127.0.0.1", 0), _Question)
        self._names.addresses = self.addresses  # type: ignore[attr-defined]
        threading.Thread(target=self._names.serve_forever, daemon=True).start()
        environment = os.environ | {
            "BIND": f"127.0.0.1:{self.port}",
            "BIND_OPERATORS": self.operators,
            "DNS": f"127.0.0.1:{self._names.server_address[1]}",
            "REPLICA_PORT": str(self.settings["port"]),
        }
        self.replicas = [self._start(address) for address in self.addresses]
        self._proxy = subprocess.Popen(
            ["haproxy", "-db", "-f", str(CONFIGURATION)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.wait_until_up()

    def restart(self, index: int) -> int:
        """Exit code of the replica that was replaced, once HAProxy uses the new one."""
        code = self.replicas[index].stop()
        self.replicas[index] = self._start(self.addresses[index])
        self.wait_until_up()
        return code

    def wait_until_up(self) -> None:
        """Until HAProxy's statistics say that it uses every replica."""
        give_up = now() + READY_TIMEOUT_S
        found = -1  # it does not listen yet
        while found < len(self.replicas):
            if now() > give_up or self._proxy.poll() is not None:
                raise RuntimeError(f"HAProxy uses {found} of {len(self.replicas)} replicas")
            time.sleep(0.05)
            with contextlib.suppress(OSError):  # it has not yet begun to listen
                found = replicas_up(self.operators)

    def _start(self, address: str) -> ServerProcess:
        return ServerProcess(host=address, **self.settings)

    def stop(self) -> None:
        """Ends all of it."""
        self._proxy.kill()
        self._proxy.wait()
        self._names.shutdown()
        self._names.server_close()
        for replica in self.replicas:
            replica.process.kill()
            replica.stop()


def rolling(seconds: float, replicas: int = 2) -> Finding:
    """Restarts replica after replica while clients send; every request must be answered with 200."""
    if not shutil.which("haproxy"):
        return Finding(_PROMISE, "haproxy is not installed (Debian: apt install haproxy)", False)
    cluster = Cluster(replicas)
    try:
        bodies = [*pictures(), *(_large(body) for body in pictures()[::20])]
        labels = expected_labels(cluster.port, bodies)
        requests = [prepare(body, "application/octet-stream", [label]) for body, label in zip(bodies, labels, strict=True)]
        codes = list[int]()
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(closed_loop, cluster.port, requests, CLIENTS, seconds)
            while not load.done():
                codes.append(cluster.restart(len(codes) % replicas))
        tally = load.result()
    finally:
        cluster.stop()
    lost = tally.sent - len(tally.right)
    figure = (
        f"{len(codes)} restarts of {replicas} replicas in {tally.seconds:.0f} s under {CLIENTS} clients: {tally.sent:,} sent "
        f"({_share_of_large(requests):.0%} too large for HAProxy to repeat), {len(tally.right):,} answered 200, {lost} lost; "
        f"exit codes {sorted(set(codes))}"
    )
    return Finding(_PROMISE, figure, not lost and not tally.lost and len(codes) >= replicas and set(codes) == {0})


def _large(body: bytes) -> bytes:
    """The picture as a PNG of about 400 kB: larger than HAProxy's buffer."""
    with Image.open(io.BytesIO(body)) as image:
        pixels = np.asarray(image.convert("RGB").resize((512, 512), Image.Resampling.BICUBIC))
    noise = np.random.default_rng(0).integers(0, 4, pixels.shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray((pixels & 0xFC) | noise).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _share_of_large(requests: list[Request]) -> float:
    return sum(len(request.wire) > 131_072 for request in requests) / len(requests)
