"""The server against the same work without HTTP, in one run: `make bench`.

    python -m benchmarks.serve [--seconds 3] [--rounds 3] [--output FILE.json] [--plot FILE.png]

Two limits, measured in this process, decoding included: one image after another on every core (what a lone client could
get), and as many threads as cores, each with its own image (what many clients could share). Rounds alternate limits and
server, so a noisy neighbour hits both; medians and ranges are printed, of images a second and of the ratio in each round. Then
requests of many images, overload (requests at a steady rate of 2 and 10 times the capacity right before, each with a deadline of
250 ms; what is answered in time, as a share of the capacity right before and after), start, and memory.

Clients run in a process of their own on the same cores, so the server's figures are a lower bound. Every answer's label
is compared with the one given in process.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from app.cores import available_cores
from app.engine.artifact import read_verified
from app.engine.session import Session
from app.images import DecodeLimits, decode_image
from app.load import Request, Tally, prepare
from app.settings import Settings
from benchmarks.clients import closed_loop, open_loop
from benchmarks.server import REPOSITORY, ServerProcess, on_cores

CLIENTS = (1, 8, 32, 128)
MANY_IMAGES = 64
OVERLOADS = (2, 10)
DEADLINE_MS = 250
IDLE_S = 8
"""By then workers have given back what load has left."""
PHOTOS = REPOSITORY / "tests" / "data" / "cifar10"


class Limit:
    """The service's work without HTTP."""

    def __init__(self, bodies: list[bytes], cores: int) -> None:
        settings = Settings.load()
        self.bodies, self.cores = bodies, cores
        self.session = Session(read_verified(settings.artifact_path()), "cpu", cores=cores)
        self.decode_limits = DecodeLimits(settings.max_pixels, settings.max_side)

    def label(self, body: bytes, *, alone: bool = False) -> str:
        """Top class of one encoded image."""
        pixels = decode_image(body, self.session.metadata.resize, self.decode_limits).pixels
        return self.session.metadata.classes[int(self.session.infer(pixels[np.newaxis], alone=alone).logits.argmax())]

    def rate(self, threads: int, seconds: float) -> float:
        """Images a second: one thread uses every core for each image, several one each."""
        counts = [0] * threads
        begin = time.perf_counter()

        def work(index: int) -> None:
            while time.perf_counter() - begin < seconds:
                body = self.bodies[(counts[index] * threads + index) % len(self.bodies)]
                self.label(body, alone=threads == 1)
                counts[index] += 1

        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return sum(counts) / (time.perf_counter() - begin)


def start_timed(first: Request, cores: Iterable[int] = ()) -> tuple[ServerProcess, float]:
    """A server with the caller's settings, on these cores alone if any, and how long it took up to its first right answer."""
    begin = time.perf_counter()
    under = ["env", "--unset=PYTHONDONTWRITEBYTECODE"]  # an installed package is compiled once, not at every start
    if cores:
        under += on_cores(cores)
    server = ServerProcess(under, keep_settings=True, coalesce="false")  # the same few images come again and again
    try:
        port, ready = server.port, time.perf_counter() - begin
        tally = closed_loop(port, [first], 1, 0.01)
        if not tally.right:
            raise RuntimeError("the first answer was wrong")
    except BaseException:
        server.stop()
        raise
    return server, ready + tally.right[0]


def main() -> None:
    """Measures, prints, and on request writes JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind; the median counts")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="PNG file")
    options = parser.parse_args()

    bodies = [path.read_bytes() for path in sorted(PHOTOS.glob("*/*.webp"))]
    cores = available_cores()
    limit = Limit(bodies, cores)
    labels = [limit.label(body) for body in bodies]
    single = [prepare(body, "image/webp", [label]) for body, label in zip(bodies, labels, strict=True)]
    server, start_s = start_timed(single[0])
    print(f"{processor()}, {cores} cores; Python {platform.python_version()}, onnxruntime {onnxruntime.__version__}")
    rates: dict[str, list[float]] = {}
    p99_ms: dict[int, list[float]] = {}
    overload: list[dict[str, Any]] = []

    def record(name: str, measure: Callable[[], float]) -> None:
        rates.setdefault(name, []).append(measure())

    def over_http(requests: list[Request], clients: int) -> float:
        tally = closed_loop(server.port, requests, clients, options.seconds)
        _require_right(tally)
        if requests is single:
            p99_ms.setdefault(clients, []).append(float(np.percentile(tally.right, 99)) * 1000)
        return len(tally.right) * len(requests[0].expected) / tally.seconds

    try:
        closed_loop(server.port, single, 8, 1)
        for _ in range(options.rounds):
            record("in process, one by one on every core", lambda: limit.rate(1, options.seconds))
            record("in process, one a core", lambda: limit.rate(cores, options.seconds))
            for clients in CLIENTS:
                record(_name(clients), lambda clients=clients: over_http(single, clients))  # type: ignore[misc]
            for kind, many in _requests_of_many(bodies, labels).items():
                record(f"HTTP, {MANY_IMAGES} images a request, {kind}", lambda many=many: over_http(many, 2))  # type: ignore[misc]
        overload = [
            _measure_overload(server.port, bodies, labels, factor, options.seconds)
            for _ in range(options.rounds)
            for factor in OVERLOADS
        ]
        memory_mib = server.memory_mib()
        time.sleep(IDLE_S)
        idle_memory_mib = server.memory_mib()
    finally:
        server.stop()
    starts_s = [start_s]
    for _ in range(options.rounds - 1):
        again, start_s = start_timed(single[0])
        again.stop()
        starts_s.append(start_s)

    results = {
        "processor": processor(),
        "cores": cores,
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "images_s": rates,
        "p99_ms": p99_ms,
        "overload": overload,
        "memory_mib": memory_mib,
        "idle_memory_mib": idle_memory_mib,
        "start_s": starts_s,
    }
    _print(results)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    if options.plot:
        _draw(results, options.plot)


def _requests_of_many(bodies: list[bytes], labels: list[str]) -> dict[str, list[Request]]:
    chosen = bodies[:MANY_IMAGES]
    parts = b"".join(
        b'--bench\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n' + body + b"\r\n" for body in chosen
    )
    encoded = json.dumps({"images": [base64.b64encode(body).decode() for body in chosen]}).encode()
    return {
        "multipart": [prepare(parts + b"--bench--\r\n", "multipart/form-data; boundary=bench", labels[:MANY_IMAGES])],
        "JSON": [prepare(encoded, "application/json", labels[:MANY_IMAGES])],
    }


def _measure_overload(port: int, bodies: list[bytes], labels: list[str], factor: float, seconds: float) -> dict[str, Any]:
    patient = [prepare(body, "image/webp", [label]) for body, label in zip(bodies, labels, strict=True)]

    def capacity() -> float:
        tally = closed_loop(port, patient, 32, seconds / 2)
        return len(tally.right) / tally.seconds

    requests = [prepare(body, "image/webp", [label], deadline_ms=DEADLINE_MS) for body, label in zip(bodies, labels, strict=True)]
    before = capacity()
    tally = open_loop(port, requests, factor * before, max(seconds, 5))
    after = capacity()
    _require_right(tally)
    in_time = sum(latency <= DEADLINE_MS / 1000 for latency in tally.right)
    return {
        "factor": factor,
        "sent_s": tally.sent / tally.seconds,
        "goodput": in_time / tally.answered_s / ((before + after) / 2),
        "refused": len(tally.refused),
        "late": tally.late,
        "refusal_p50_ms": float(np.median(tally.refused)) * 1000 if tally.refused else None,
        "refusal_p99_ms": float(np.percentile(tally.refused, 99)) * 1000 if tally.refused else None,
        "accounted": len(tally.right) + len(tally.refused) + tally.late == tally.sent,
    }


def _require_right(tally: Tally) -> None:
    if tally.wrong or tally.unanswered:
        raise RuntimeError(f"{tally.wrong} wrong answers, {tally.unanswered} requests without one, of {tally.sent}")


def _name(clients: int) -> str:
    return f"HTTP, {clients} client{'s' if clients > 1 else ''}"


def _ratios(name: str, rates: dict[str, list[float]]) -> list[float]:
    """Of the limit, in each round."""
    limit = rates["in process, one by one on every core" if name == _name(1) else "in process, one a core"]
    return [rate / most for rate, most in zip(rates[name], limit, strict=True)]


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def _print(results: dict[str, Any]) -> None:
    rates = results["images_s"]
    for name, values in rates.items():
        share = "" if name.startswith("in process") else f"{_spread(_ratios(name, rates), 2)} of the limit"
        print(f"{name:40} {_spread(values, 0):>16} images/s   {share}")
    for clients, values in results["p99_ms"].items():
        print(f"p99 at {clients:3} clients {statistics.median(values):8.1f} ms")
    for factor in OVERLOADS:
        rows = [row for row in results["overload"] if row["factor"] == factor]
        refused = [row for row in rows if row["refused"]]
        median, p99 = (
            statistics.median(row[name] for row in refused) if refused else 0.0 for name in ("refusal_p50_ms", "refusal_p99_ms")
        )
        print(
            f"{factor:2} x capacity: {_spread([row['goodput'] for row in rows], 2)} of it answered within {DEADLINE_MS} ms, "
            f"{sum(row['refused'] for row in rows)} refused in {median:.1f} ms (p99 {p99:.1f}), "
            f"{sum(row['late'] for row in rows)} late"
        )
    print(
        f"memory {results['memory_mib']:.0f} MiB, idle for {IDLE_S} s {results['idle_memory_mib']:.0f} MiB; "
        f"start to first right answer {statistics.median(results['start_s']):.2f} s"
    )


def _draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    medians = {name: statistics.median(values) for name, values in results["images_s"].items()}
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    names = list(reversed(medians))
    colours = ["#94a3b8" if name.startswith("in process") else "#2563eb" for name in names]
    axes.barh(names, [medians[name] for name in names], color=colours)
    for position, name in enumerate(names):
        axes.text(medians[name], position, f" {medians[name]:.0f}", va="center", fontsize=8)
    axes.set(xlabel="images a second", title=f"{results['processor']}, {results['cores']} cores")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def processor() -> str:
    """Its name, as the system gives it."""
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    return models[0] if models else platform.processor()


if __name__ == "__main__":
    main()
