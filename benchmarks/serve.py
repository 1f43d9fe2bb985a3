"""The server against the in-process limit: the same model, images and cores, with and without HTTP.

    python benchmarks/serve.py [--seconds 3] [--rounds 3]

The limit is everything but HTTP: as many threads as cores, each decoding and classifying one image after another with one
shared session. Rounds alternate limit and server, so a noisy neighbour hits both. The clients are a second process that
writes prepared requests to sockets and checks every answer's status; they share the cores with the server, so its figures
are a lower bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from app.engine.artifact import read_verified
from app.engine.session import Session, available_cores
from app.images import DecodeLimits, decode_image
from app.settings import Settings

CONCURRENCIES = (1, 8, 32)
REPOSITORY = Path(__file__).parent.parent


def measure_limit(bodies: list[bytes], seconds: float, threads: int) -> float:
    """Images a second without HTTP."""
    settings = Settings.load()
    session = Session(read_verified(settings.artifact_path()), "cpu")
    limits = DecodeLimits(settings.max_pixels, settings.max_side)
    counts = [0] * threads
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        while time.perf_counter() < end:
            body = bodies[(counts[index] * threads + index) % len(bodies)]
            session.infer(decode_image(body, session.metadata.resize, limits).pixels[np.newaxis])
            counts[index] += 1

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(counts) / (time.perf_counter() - begin)


def measure_server(port: int, bodies: list[bytes], seconds: float, clients: int) -> tuple[float, float]:
    """(images a second, 99th percentile of latency in ms) over HTTP, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[float, float]] = context.Queue()
    process = context.Process(target=_run_clients, args=(port, bodies, seconds, clients, results))
    process.start()
    result = results.get(timeout=seconds + 60)
    process.join()
    return result


def _run_clients(
    port: int, bodies: list[bytes], seconds: float, clients: int, results: multiprocessing.Queue[tuple[float, float]]
) -> None:
    import uvloop

    head = "POST /classify HTTP/1.1\r\nHost: bench\r\nContent-Type: image/webp\r\nContent-Length: {}\r\n\r\n"
    requests = [head.format(len(body)).encode() + body for body in bodies]
    latencies: list[float] = []

    async def one_client(number: int, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        turn = number
        while (begin := time.perf_counter()) < end:
            writer.write(requests[turn % len(requests)])
            header = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", header)
            if not header.startswith(b"HTTP/1.1 200") or not length:
                raise RuntimeError(f"the server answered {header.decode()}")
            await reader.readexactly(int(length[1]))
            latencies.append(time.perf_counter() - begin)
            turn += clients
        writer.close()

    async def all_clients() -> float:
        begin = time.perf_counter()
        await asyncio.gather(*(one_client(i, begin + seconds) for i in range(clients)))
        return time.perf_counter() - begin

    elapsed = uvloop.run(all_clients())
    results.put((len(latencies) / elapsed, float(np.percentile(latencies, 99)) * 1000))


def start_server() -> tuple[subprocess.Popen[str], int]:
    """The real server on a free port: (process, port)."""
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"running on http://[\d.]+:(\d+)", line):
            return process, int(found[1])
    raise RuntimeError("the server did not start")


def main() -> None:
    """Prints a table and, with --output, writes the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind; the median counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    bodies = [path.read_bytes() for path in sorted((REPOSITORY / "tests" / "data" / "cifar10").glob("*/*.webp"))]
    cores = available_cores()
    process, port = start_server()
    rows: dict[str, list[float]] = {}
    p99: dict[int, list[float]] = {}

    def record(name: str, measure: Callable[[], float]) -> None:
        rows.setdefault(name, []).append(measure())

    try:
        measure_server(port, bodies, 1, 8)
        for _ in range(options.rounds):
            record("in process", lambda: measure_limit(bodies, options.seconds, cores))
            for clients in CONCURRENCIES:
                rate, latency = measure_server(port, bodies, options.seconds, clients)
                rows.setdefault(f"HTTP, {clients} clients", []).append(rate)
                p99.setdefault(clients, []).append(latency)
    finally:
        process.terminate()
        process.communicate()

    print(f"{_processor()}, {cores} cores, Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}")
    limit = statistics.median(rows["in process"])
    for name, rates in rows.items():
        rate = statistics.median(rates)
        print(f"{name:18} {rate:8.0f} images/s ({min(rates):.0f}-{max(rates):.0f})   {rate / limit:5.2f} of the limit")
    for clients, values in p99.items():
        print(f"p99 at {clients:3} clients {statistics.median(values):8.1f} ms")
    if options.output:
        options.output.write_text(json.dumps({"images_per_second": rows, "p99_ms": p99}, indent=2) + "\n")


def _processor() -> str:
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    return models[0] if models else platform.processor()


if __name__ == "__main__":
    main()
