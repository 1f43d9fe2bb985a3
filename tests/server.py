"""The real server as a process on a free port, for any test that wants one; and a socket with prepared answers."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx

READY_TIMEOUT_S = 60


class ServerProcess:
    """`convmixer serve` with the given settings; `log` grows while it runs.

    Args:
        under: a command that starts it, e.g. `prlimit`.
        program: what Python runs.
        **settings: `CONVMIXER_*` without the prefix, in lower case.
    """

    def __init__(self, under: Sequence[str] = (), program: Sequence[str] = ("-m", "app.cli", "serve"), **settings: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CONVMIXER_")}
        environment |= {"CONVMIXER_PORT": "0", **{f"CONVMIXER_{k.upper()}": v for k, v in settings.items()}}
        self.process = subprocess.Popen([*under, sys.executable, *program], env=environment, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log += line
            if "Uvicorn running on" in line:
                self._listening.set()
        self._listening.set()

    def wait_until_ready(self) -> str:
        """The base URL, once `/readyz` says yes."""
        self._listening.wait(READY_TIMEOUT_S)
        address = re.search(r"Uvicorn running on (http://[\d.:]+)", self.log)
        assert address, f"the server did not start:\n{self.log}"
        give_up = time.monotonic() + READY_TIMEOUT_S
        while True:
            with suppress(httpx.TransportError):  # a machine may be too busy to answer within 5 s
                if httpx.get(f"{address[1]}/readyz").status_code == 200:
                    return address[1]
            assert time.monotonic() < give_up, self.log
            time.sleep(0.02)

    def wait(self) -> int:
        """Exit code, once the process has ended."""
        code = self.process.wait(READY_TIMEOUT_S)
        self._reader.join(READY_TIMEOUT_S)
        assert self.process.stderr
        self.process.stderr.close()
        return code

    def stop(self) -> int:
        """Exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()


def free_port() -> int:
    """A port that nobody listens on now, below those that Linux gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def resident_mib(server: ServerProcess) -> float:
    """Memory that the process has now, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


class ScriptedServer:
    """Answers each connection's one request with the next of the given answers; `None` closes without one.

    Attributes:
        received: time.monotonic() and head of each request.
    """

    def __init__(self, *answers: tuple[int, dict[str, str], object] | None) -> None:
        self.received: list[tuple[float, str]] = []
        self._answers = answers
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for answer in self._answers:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rb") as stream:
                head = "".join(iter(lambda: stream.readline().decode(), "\r\n")).lower()
                stream.read(int(head.partition("content-length: ")[2].partition("\r\n")[0] or 0))
                self.received.append((time.monotonic(), head))
                if answer:
                    status, headers, body = answer
                    content = json.dumps(body).encode() if not isinstance(body, bytes) else body
                    headers = headers | {"Content-Length": str(len(content)), "Connection": "close"}
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    connection.sendall(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + content)
        self._socket.close()

    def finish(self) -> list[tuple[float, str]]:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.received
