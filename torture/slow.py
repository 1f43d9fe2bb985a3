"""Slow clients starve nobody: slowhttptest's slow headers, slow bodies and slow reading, while a client wants its answers."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx

from torture.target import Finding, now, percentile, pictures, target
from torture.traffic import Probe

CONNECTIONS = 1000
RECEIVE_TIMEOUT_S = 10
_MODES = {
    "headers": ["-H", "-i", "2"],
    "bodies": ["-B", "-i", "2", "-s", "8192", "-t", "POST", "-f", "image/png"],
    "reading": ["-X", "-w", "1", "-y", "8", "-n", "5", "-z", "1", "-k", "3"],
}


class Customer(threading.Thread):
    """Sends an image ten times a second, each on a new connection, and looks at the answers."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.url, self.seconds, self.failed = f"http://127.0.0.1:{port}/classify", list[float](), 0
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        """Asks."""
        body = pictures()[0]
        with httpx.Client(timeout=10, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while not self._end.wait(0.1):
                begin = now()
                try:
                    answer = client.post(self.url, content=body, headers={"Content-Type": "image/webp"})
                    self.failed += answer.status_code != 200
                except httpx.HTTPError:
                    self.failed += 1
                self.seconds.append(now() - begin)

    def stop(self) -> None:
        """Ends it."""
        self._end.set()
        self.join()


def slow_clients(seconds: int) -> list[Finding]:
    """A thousand connections in each mode; skipped, as not kept, where slowhttptest is not installed."""
    if not shutil.which("slowhttptest"):
        return [Finding("Slow clients starve nobody", "slowhttptest is not installed (Debian: apt install slowhttptest)", False)]
    findings = []
    for mode, options in _MODES.items():
        with target(receive_timeout_s=RECEIVE_TIMEOUT_S) as server:
            usual = Customer(server.port)
            time.sleep(seconds / 2)  # the length of the measurement, not a wait for something
            usual.stop()
            customer, probe = Customer(server.port), Probe(server.port)
            command = ["slowhttptest", *options, "-c", str(CONNECTIONS), "-r", "200", "-l", str(seconds), "-p", "5"]
            path = "/openapi.json" if mode == "reading" else "/classify"
            attack = subprocess.Popen(
                [*command, "-u", f"http://127.0.0.1:{server.port}{path}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            most = 0
            while attack.poll() is None:
                most = max(most, _open_connections(server.process.pid))
                time.sleep(0.5)
            customer.stop()
            seen = probe.stop()
            before, under = (percentile(who.seconds, 0.99) * 1000 for who in (usual, customer))
            share = 1 - customer.failed / len(customer.seconds)
            findings += [
                Finding(
                    f"Slow {mode} starve nobody",
                    f"{CONNECTIONS} connections for {seconds} s (at most {most} open at once): {share:.2%} of "
                    f"{len(customer.seconds)} requests answered, p99 {under:.0f} ms ({before:.0f} without the attack); cut off "
                    f"after {RECEIVE_TIMEOUT_S} s",
                    share >= 0.999 and under <= max(1.5 * before, before + 20),
                ),
                Finding(f"Health tells the truth under slow {mode}", seen, probe.kept()),
            ]
    return findings


def _open_connections(pid: int) -> int:
    count = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            count += link.readlink().name.startswith("socket:")
        except OSError:
            continue
    return count
