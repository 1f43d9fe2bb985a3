"""Slow clients starve nobody: slowhttptest's slow headers, slow bodies and slow reading, while a client wants its answers."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor

from benchmarks.server import ServerProcess
from torture.target import Finding, now, percentile, pictures, post, target_apart
from torture.traffic import Probe, seen_by

CONNECTIONS = 1000
RATE = 200
RECEIVE_TIMEOUT_S = 10
LAST_CUT_S = CONNECTIONS / RATE + RECEIVE_TIMEOUT_S
"""Seconds after the begin at which the last connection reaches its deadline."""
FEW = 20
"""Files that the server opens without an attack, and some more: the customer's connection, a probe's."""
_MODES = {
    "headers": ["-H", "-i", "2"],
    "bodies": ["-B", "-i", "2", "-s", "8192", "-t", "POST", "-f", "image/png"],
    "reading": ["-X", "-w", "1", "-y", "8", "-n", "5", "-z", "1", "-k", "3"],
}


def ask(port: int, seconds: float) -> tuple[list[float], int]:
    """A customer: sends an image twenty times a second, each on a new connection.

    Returns:
        Seconds from connecting to the whole answer, and how many were not answered with 200.
    """
    wire = post(pictures()[0], "image/webp", close=True)
    latencies, failed, end = [], 0, now() + seconds
    while (begin := now()) < end:
        answer = b""
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(wire)
                while piece := connection.recv(65536):
                    answer += piece
        except OSError:
            answer = b""
        failed += not answer.startswith(b"HTTP/1.1 200")
        latencies.append(now() - begin)
        time.sleep(max(0.0, 0.05 - latencies[-1]))
    return latencies, failed


class Watch:
    """A customer, probes, and how many connections the server has meanwhile; the same with the attack and without.

    The customer is a process of its own, or what probes and counts would slow what it measures.
    """

    def __init__(self, server: ServerProcess, seconds: float, at_rest: int) -> None:
        self.most_open, self.crowded_s, begin = 0, 0.0, now()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            customer = pool.submit(ask, server.port, seconds)
            self.probe = Probe(server.port)
            while not customer.done():
                count = _open_files(server.process.pid) - at_rest
                self.most_open = max(self.most_open, count)
                if count > FEW:
                    self.crowded_s = now() - begin
                time.sleep(0.5)
            self.probe.stop()
        self.latencies, self.failed = customer.result()
        self.p99_ms = percentile(self.latencies, 0.99) * 1000


def slow_clients(seconds: int) -> list[Finding]:
    """A thousand connections in each mode; skipped, as not kept, where slowhttptest is not installed."""
    if not shutil.which("slowhttptest"):
        return [Finding("Slow clients starve nobody", "slowhttptest is not installed (Debian: apt install slowhttptest)", False)]
    findings = []
    for mode, options in _MODES.items():
        with target_apart(receive_timeout_s=RECEIVE_TIMEOUT_S) as server:
            at_rest = _open_files(server.process.pid)
            usual = Watch(server, seconds, at_rest)
            # the customer would have a machine of its own, too: attackers get only what it leaves of the cores they share
            command = ["chrt", "--idle", "0", "slowhttptest", *options]
            command += ["-c", str(CONNECTIONS), "-r", str(RATE), "-l", str(seconds), "-p", "5"]
            path = "/openapi.json" if mode == "reading" else "/classify"
            attack = subprocess.Popen(
                [*command, "-u", f"http://127.0.0.1:{server.port}{path}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            watch = Watch(server, seconds, at_rest)
            attack.terminate()
            attack.wait()
            share = 1 - watch.failed / len(watch.latencies)
            findings += [
                Finding(
                    f"Slow {mode}: nobody starves",
                    f"{CONNECTIONS} connections for {seconds} s (at most {watch.most_open} open at once): {share:.2%} of "
                    f"{len(watch.latencies)} requests answered, p99 {watch.p99_ms:.0f} ms ({usual.p99_ms:.0f} without the "
                    f"attack); the last cut off after {watch.crowded_s:.0f} s (its deadline: {LAST_CUT_S:.0f})",
                    watch.most_open > 0.8 * CONNECTIONS
                    and share >= 0.999
                    and watch.p99_ms <= 1.5 * usual.p99_ms
                    and watch.crowded_s <= LAST_CUT_S + 3,
                ),
                seen_by([watch.probe], f"under slow {mode}"),
            ]
    return findings


def _open_files(pid: int) -> int:
    """Sockets and the few others; telling them apart costs a call each, which the customer would notice."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - a Path for each of a thousand
