"""Overload, probes under it, and restarts under load."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from app.load import prepare
from benchmarks.clients import closed_loop, open_loop
from torture.target import Finding, Target, metrics, now, percentile, pictures, post, read_answer, target, top_class

DEADLINE_MS = 250
REQUESTS = "convmixer_requests_total"
FACTORS = {2: 0.95, 5: 0.90, 10: 0.85}


class Probe(threading.Thread):
    """Asks `/livez` and `/readyz` in turn, twenty times a second, from another thread, until stopped."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.seconds, self.wrong = port, list[float](), 0
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        """Asks."""
        while not self._end.wait(0.05):
            for path in ("livez", "readyz"):
                begin = now()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=10) as answer:
                        self.wrong += answer.status != 200
                except OSError:
                    self.wrong += 1
                self.seconds.append(now() - begin)

    def stop(self) -> str:
        """What it saw."""
        self._end.set()
        self.join()
        return f"{len(self.seconds)} probes, p99 {percentile(self.seconds, 0.99) * 1000:.0f} ms, {self.wrong} wrong"

    def kept(self) -> bool:
        """Whether all were right and 99 % within 100 ms."""
        return not self.wrong and percentile(self.seconds, 0.99) < 0.1


def expected_labels(port: int, bodies: list[bytes]) -> list[Any]:
    """Each picture's answer when it is alone."""

    async def ask() -> list[Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        found = []
        for body in bodies:
            writer.write(post(body, "image/webp"))
            found.append(top_class((await read_answer(reader))[2]))
        writer.close()
        return found

    return asyncio.run(ask())


def overload(seconds: float) -> list[Finding]:
    """Requests at 2, 5 and 10 times the measured capacity, each with a deadline; probes meanwhile."""
    findings = []
    with target(max_connections=8192, coalesce="false") as server:
        bodies = pictures()
        labels = expected_labels(server.port, bodies)
        requests = [prepare(body, "image/webp", label) for body, label in zip(bodies, labels, strict=True)]
        hurried = [
            prepare(body, "image/webp", label, deadline_ms=DEADLINE_MS) for body, label in zip(bodies, labels, strict=True)
        ]
        rounds = [closed_loop(server.port, requests, clients, seconds) for clients in (8, 32)]
        capacity = max(len(tally.right) / tally.seconds for tally in rounds)
        for factor, goal in FACTORS.items():
            probe = Probe(server.port)
            tally = open_loop(server.port, hurried, factor * capacity, seconds)
            seen = probe.stop()
            goodput = sum(latency <= DEADLINE_MS / 1000 for latency in tally.right) / tally.seconds / capacity
            accounted = len(tally.right) + len(tally.refused) + tally.late
            refusal = percentile(tally.refused, 0.99) * 1000
            slowest = 20 if factor == 2 else 50
            findings += [
                Finding(
                    f"{factor} x capacity does not collapse",
                    f"capacity {capacity:.0f}/s, sent {tally.sent / tally.seconds:.0f}/s: answered in time {goodput:.2f} of "
                    f"capacity (goal {goal}); refused p99 {refusal:.0f} ms (goal {slowest}); {tally.late} late, {tally.wrong} "
                    f"wrong, {tally.sent} sent = {accounted} accounted for",
                    goodput >= goal and refusal < slowest and accounted == tally.sent and not tally.wrong,
                ),
                Finding(f"Health tells the truth at {factor} x capacity", seen, probe.kept()),
            ]
    return findings


def mixed(requests: int) -> Finding:
    """Half of the traffic is malformed; every good answer must be what it is alone."""
    with target() as server:
        bodies = pictures()
        labels = expected_labels(server.port, bodies)
        bad = [b"x" * 500, bodies[0][:60], b"\x89PNG\r\n\x1a\n" + b"\0" * 300, b"GIF89a" + b"\xff" * 100]
        left, different, refused, good = iter(range(requests)), 0, 0, 0

        async def client() -> None:
            nonlocal different, refused, good
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            for number in left:
                is_bad = number % 2
                index = number // 2 % len(bodies)
                writer.write(post(bad[number // 2 % len(bad)] if is_bad else bodies[index], "image/webp"))
                status, _, body = await read_answer(reader)
                if is_bad:
                    refused += status in {415, 422}
                else:
                    good += 1
                    different += status != 200 or top_class(body) != labels[index]
            writer.close()

        async def run() -> None:
            await asyncio.gather(*(client() for _ in range(16)))

        asyncio.run(run())
    figure = f"{good:,} good among {requests:,}: {different} not as alone; {refused:,} bad ones refused with 415 or 422"
    return Finding("One bad request harms only itself", figure, not different and refused == requests // 2)


def leavers() -> Finding:
    """Clients that leave at once: their images must not be decoded or inferred, beyond the batch in work."""
    with target(workers=1, max_batch=8, coalesce="false") as server:
        before = metrics(server.port)["convmixer_images_total"]
        body = pictures()[0]
        parts = (b'--b\r\nContent-Disposition: form-data; name="i"; filename="x"\r\n\r\n' + body + b"\r\n") * 100
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(post(parts + b"--b--\r\n", "multipart/form-data; boundary=b"))
        seen = metrics(server.port)
        while sum(count for name, count in seen.items() if name.startswith(REQUESTS)) < 10:
            seen = metrics(server.port)
        done = seen["convmixer_images_total"] - before
    figure = f"1,000 images of 10 clients that left after sending: {done:.0f} were inferred, in batches of up to 8"
    return Finding("Work of clients that left is dropped", figure, done <= 80)


def restarts(times: int) -> Finding:
    """SIGTERM under load with an upload half sent: every accepted request is answered, and the exit code is 0."""
    lost, answered, codes, halves = 0, 0, list[int](), 0
    body = pictures()[0]
    for _ in range(times):
        server = Target()
        stop = threading.Event()

        def client(port: int = server.port, stop: threading.Event = stop) -> tuple[int, int]:
            good = bad = 0
            while not stop.is_set():
                try:
                    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
                except OSError:
                    break  # no longer listening: a load balancer would ask another replica
                with connection:
                    try:
                        connection.sendall(post(body, "image/webp", close=True))
                        answer = b""
                        while piece := connection.recv(65536):
                            answer += piece
                    except OSError:
                        answer = b""
                    complete = answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503"))
                    # a connection the kernel accepted and the server never did is closed without a byte: not accepted
                    good, bad = good + complete, bad + bool(answer and not complete)
            return good, bad

        with ThreadPoolExecutor(8) as pool, socket.create_connection(("127.0.0.1", server.port), timeout=30) as half:
            running = [pool.submit(client) for _ in range(8)]
            wire = post(body, "image/webp", close=True)
            half.sendall(wire[:-20])
            while metrics(server.port).get("convmixer_images_total", 0) < 20:
                pass
            server.process.terminate()
            while "Shutting down" not in server.log and server.process.poll() is None:
                pass
            half.sendall(wire[-20:])
            halves += half.recv(12) == b"HTTP/1.1 200"
            stop.set()
            results = [future.result() for future in running]
        codes.append(server.stop())
        answered += sum(good for good, _ in results)
        lost += sum(bad for _, bad in results)
    figure = (
        f"{times} times: {answered:,} answered, {lost} cut off in the middle, {halves} of {times} half-sent uploads finished "
        f"after SIGTERM and answered; exit codes {sorted(set(codes))}"
    )
    return Finding("Restarts lose nothing", figure, not lost and halves == times and set(codes) == {0})
