"""Overload, probes under it, and restarts under load."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.load import Tally, prepare
from benchmarks.clients import closed_loop, open_loop
from benchmarks.server import ServerProcess
from torture.target import (
    Finding,
    is_whole,
    metrics,
    now,
    percentile,
    pictures,
    post,
    read_answer,
    target_apart,
    top_class,
)

DEADLINE_MS = 250
ROUNDS, MOST_ROUNDS, MOST_STOLEN = 3, 7, 0.015
REQUESTS = "convmixer_requests_total"
FACTORS = {2: 0.95, 5: 0.90, 10: 0.85}


class Probe(threading.Thread):
    """Asks `/livez` and `/readyz`, each five times a second, from another thread, until stopped."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.seconds, self.wrong = port, list[float](), 0
        self._end = threading.Event()
        self.start()

    def run(self) -> None:
        """Asks."""
        while not self._end.wait(0.2):
            for path in ("livez", "readyz"):
                begin = now()
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=10) as answer:
                        self.wrong += answer.status != 200
                except OSError:
                    self.wrong += 1
                self.seconds.append(now() - begin)

    def stop(self) -> None:
        """Ends it."""
        self._end.set()
        self.join()


def seen_by(probes: list[Probe], when: str) -> Finding:
    """Whether all answers were right and 99 % came within 100 ms."""
    seconds = [latency for probe in probes for latency in probe.seconds]
    slow, wrong = percentile(seconds, 0.99), sum(probe.wrong for probe in probes)
    figure = f"{len(seconds)} probes, p99 {slow * 1000:.0f} ms, {wrong} wrong"
    return Finding(f"Health tells the truth {when}", figure, not wrong and slow < 0.1)


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


@dataclass(frozen=True)
class Attack:
    """One overload.

    Attributes:
        tally: what became of its requests.
        share: of the capacity right before and after it, answered in time.
        stolen: share of the machine's time that its hypervisor gave to others meanwhile.
        probe: who asked for the server's health meanwhile.
    """

    tally: Tally
    share: float
    stolen: float
    probe: Probe


def overload(seconds: float) -> list[Finding]:
    """Requests at 2, 5 and 10 times the capacity, each with a deadline; probes meanwhile.

    Server and attackers have cores of their own (`target_apart`). Capacity is measured right before and after each overload
    and in several rounds, since the speed of a shared machine drifts; rounds in which others had the machine are repeated, a
    few times.
    """
    attacks = {factor: list[Attack]() for factor in FACTORS}
    cores = len(os.sched_getaffinity(0))
    with target_apart(max_connections=8192, coalesce="false") as server:
        on = f"{len(os.sched_getaffinity(server.process.pid))} of {cores} cores"
        bodies = pictures()
        labels = expected_labels(server.port, bodies)
        images = list(zip(bodies, labels, strict=True))
        requests = [prepare(body, "image/webp", [label]) for body, label in images]
        hurried = [prepare(body, "image/webp", [label], deadline_ms=DEADLINE_MS) for body, label in images]

        def capacity() -> float:
            tally = closed_loop(server.port, requests, 32, seconds / 2)
            return len(tally.right) / tally.seconds

        before = capacity()
        first = before
        for _ in range(MOST_ROUNDS):
            for factor, done in attacks.items():
                if sum(attack.stolen <= MOST_STOLEN for attack in done) >= ROUNDS:
                    continue
                probe, stolen, total = Probe(server.port), *_stolen_and_total()
                tally = open_loop(server.port, hurried, factor * first, seconds)
                stolen, total = (end - begin for end, begin in zip(_stolen_and_total(), (stolen, total), strict=True))
                probe.stop()
                after = capacity()
                goodput = sum(latency <= DEADLINE_MS / 1000 for latency in tally.right) / tally.answered_s
                done.append(Attack(tally, goodput / ((before + after) / 2), stolen / total, probe))
                before = after
    return [finding for factor, done in attacks.items() for finding in _judge(factor, factor * first, on, done)]


def _judge(factor: int, rate: float, on: str, done: list[Attack]) -> list[Finding]:
    goal, slowest = FACTORS[factor], 20 if factor == 2 else 50
    calmest = sorted(done, key=lambda attack: attack.stolen)[:ROUNDS]
    shares = [attack.share for attack in calmest]
    share = statistics.median(shares)
    tallies = [attack.tally for attack in done]
    sent, wrong = sum(tally.sent for tally in tallies), sum(tally.wrong + tally.unanswered for tally in tallies)
    accounted = sum(len(tally.right) + len(tally.refused) + tally.late for tally in tallies)
    refusal = percentile([latency for attack in calmest for latency in attack.tally.refused], 0.99) * 1000
    return [
        Finding(
            f"{factor} x capacity does not collapse",
            f"sent {rate:.0f}/s to {on}: answered in time {share:.2f} of capacity (goal {goal}; {min(shares):.2f} to "
            f"{max(shares):.2f} in the {len(calmest)} of {len(done)} rounds with the least time taken by other machines, up to "
            f"{calmest[-1].stolen:.1%}; {min(a.share for a in done):.2f} to {max(a.share for a in done):.2f} in all); refused "
            f"p99 {refusal:.0f} ms (goal {slowest}); {sum(tally.late for tally in tallies)} late, {wrong} wrong, "
            f"{sent} sent = {accounted} accounted for",
            share >= goal and refusal < slowest and accounted == sent and not wrong,
        ),
        seen_by([attack.probe for attack in done], f"at {factor} x capacity"),
    ]


def _stolen_and_total() -> tuple[int, int]:
    """Clock ticks of all cores since boot: given to others by the hypervisor, and all (proc_stat(5))."""
    with Path("/proc/stat").open() as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    return ticks[7], sum(ticks)


def mixed(requests: int) -> Finding:
    """Half of the traffic is malformed; every good answer must be what it is alone."""
    with ServerProcess() as server:
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


async def _send_one(port: int, body: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post(body, "image/webp", close=True))
    await read_answer(reader)
    writer.close()


def leavers() -> Finding:
    """Clients that leave at once: their images must not be decoded or inferred, beyond the batch in work."""
    with ServerProcess(workers=1, max_batch=8, coalesce="false") as server:
        before = metrics(server.port)["convmixer_images_total"]
        body = pictures()[0]
        parts = (b'--b\r\nContent-Disposition: form-data; name="i"; filename="x"\r\n\r\n' + body + b"\r\n") * 100
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(post(parts + b"--b--\r\n", "multipart/form-data; boundary=b"))
        while sum(count for name, count in metrics(server.port).items() if name.startswith(REQUESTS)) < 10:
            pass
        # whoever waits behind them is answered when what is left of them has been done or dropped
        asyncio.run(_send_one(server.port, pictures()[1]))
        done = metrics(server.port)["convmixer_images_total"] - before - 1
    figure = f"1,000 images of 10 clients that left after sending: {done:.0f} were inferred, in batches of up to 8"
    return Finding("Work of clients that left is dropped", figure, done <= 80)


def restarts(times: int) -> Finding:
    """SIGTERM under load with an upload half sent: every accepted request is answered, and the exit code is 0."""
    lost, answered, unheard, codes, halves = 0, 0, 0, list[int](), 0
    body = pictures()[0]
    for _ in range(times):
        with ServerProcess() as server:
            ending, stop = threading.Event(), threading.Event()

            def client(
                port: int = server.port, ending: threading.Event = ending, stop: threading.Event = stop
            ) -> tuple[int, int, int]:
                good = silent = bad = 0
                while not stop.is_set():
                    try:
                        connection = socket.create_connection(("127.0.0.1", port), timeout=30)
                    except OSError:
                        break  # no longer listening: a load balancer would ask another replica
                    in_time = not ending.is_set()
                    with connection:
                        try:
                            connection.sendall(post(body, "image/webp", close=True))
                            answer = b""
                            while piece := connection.recv(65536):
                                answer += piece
                        except OSError:
                            answer = b""
                        whole = is_whole(answer)
                        good += whole and answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 503"))
                        bad += bool(answer) and not whole
                        # the kernel takes connections that the server then does not: they are closed with its door
                        silent += in_time and not answer
                return good, silent, bad

            with ThreadPoolExecutor(8) as pool, socket.create_connection(("127.0.0.1", server.port), timeout=30) as half:
                running = [pool.submit(client) for _ in range(8)]
                wire = post(body, "image/webp", close=True)
                half.sendall(wire[:-20])
                while metrics(server.port).get("convmixer_images_total", 0) < 20:
                    pass
                ending.set()
                server.process.terminate()
                while "Shutting down" not in server.log and server.process.poll() is None:
                    pass
                half.sendall(wire[-20:])
                halves += half.recv(12) == b"HTTP/1.1 200"
                stop.set()
                results = [future.result() for future in running]
            codes.append(server.stop())
        good, silent, bad = (sum(counts) for counts in zip(*results, strict=True))
        answered, unheard, lost = answered + good, unheard + silent, lost + bad
    figure = (
        f"{times} times: {answered:,} answered, {lost} cut off in the middle, {unheard} that had connected before SIGTERM "
        f"closed without a byte, {halves} of {times} half-sent uploads finished after SIGTERM and answered; "
        f"exit codes {sorted(set(codes))}"
    )
    kept = not lost and unheard <= times and halves == times and set(codes) == {0}
    return Finding("Restarts lose nothing", figure, kept)
