"""How many replicas for so many requests a second: the measured capacity of this machine, and a queueing model of it.

    python -m benchmarks.capacity --rate 1000 --p99 100 [--seconds 4] [--output FILE.json]

A replica is c workers in front of one queue; requests come at random (Poisson), a free worker takes its share of what waits,
up to the largest batch, and a batch takes it some time for itself and the same for each image: M/D/c with batches. The two
times follow from the real server's rates with c clients, whose requests never wait for each other, and saturated by 32. The
model is simulated and compared with the real server under random load at three utilisations. The server has half of the cores
and the clients the others, so that their work is no part of the server's. Then replicas are added until the model's p99 is below
the one asked for, each with its even share of the requests.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import statistics
import urllib.request
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from app.cores import available_cores
from app.load import Request, poisson, prepare
from benchmarks.clients import closed_loop, open_loop
from benchmarks.serve import PHOTOS, Limit, processor, start_timed
from benchmarks.server import ServerProcess

UTILISATIONS = (0.5, 0.7, 0.85)
_SIMULATED = 50_000
_SATURATING_CLIENTS = 32
_QUANTILES = (0.5, 0.99)


@dataclass(frozen=True)
class Replica:
    """What answers requests.

    Attributes:
        workers: c.
        image_s: seconds of a worker an image.
        batch_s: seconds of a worker a batch, besides.
        max_batch: a free worker takes its share of what waits, at most so many, and answers them together.
    """

    workers: int
    image_s: float
    batch_s: float = 0.0
    max_batch: int = 1

    @property
    def capacity(self) -> float:
        """Requests a second when batches are full."""
        return self.workers * self.max_batch / (self.batch_s + self.max_batch * self.image_s)


def simulate(rate: float, replica: Replica, requests: int = _SIMULATED) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Time from arrival to answer of each request, in seconds, first come first served; with batches of 1: M/D/c.

    Args:
        rate: requests a second; at or beyond the capacity the queue grows without end.
        replica: that gets them.
        requests: simulated.
    """
    arrivals = np.fromiter(islice(poisson(rate, seed=0), requests), float)
    took = np.empty(requests)
    free = [0.0] * replica.workers
    first = 0
    while first < requests:
        begin = max(float(arrivals[first]), heapq.heappop(free))
        waiting = int(np.searchsorted(arrivals, begin, "right")) - first
        batch = slice(first, first + min(math.ceil(waiting / replica.workers), replica.max_batch))
        end = begin + replica.batch_s + len(arrivals[batch]) * replica.image_s
        heapq.heappush(free, end)
        took[batch] = end - arrivals[batch]
        first = batch.stop
    return took


def replicas_for(rate: float, p99_s: float, replica: Replica) -> int | None:
    """Fewest replicas whose p99 is within the limit; None if one request alone takes longer.

    Args:
        rate: requests a second, of all replicas.
        p99_s: limit.
        replica: each of them.
    """
    if replica.batch_s + replica.image_s > p99_s:
        return None
    count = max(1, int(rate / replica.capacity))
    while rate / count >= replica.capacity or np.quantile(simulate(rate / count, replica), 0.99) > p99_s:
        count += 1
    return count


def _measure(server: ServerProcess, requests: list[Request], workers: int, seconds: float) -> Replica:
    """The replica as the model sees it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/model") as answer:
        max_batch: int = json.load(answer)["max_batch"]
    few, many = (closed_loop(server.port, requests, clients, seconds) for clients in (workers, _SATURATING_CLIENTS))
    lone_s, capacity = workers * few.seconds / len(few.right), len(many.right) / many.seconds
    if max_batch == 1:
        return Replica(workers, workers / capacity)
    full_s = workers * max_batch / capacity
    image_s = min((full_s - lone_s) / (max_batch - 1), full_s / max_batch)
    return Replica(workers, image_s, full_s - max_batch * image_s, max_batch)


def main() -> None:
    """Measures, compares, answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000, help="requests a second, one image each")
    parser.add_argument("--p99", type=float, default=100, help="milliseconds within which 99 %% shall be answered")
    parser.add_argument("--seconds", type=float, default=4, help="length of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all measurements; medians count")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    bodies = [path.read_bytes() for path in sorted(PHOTOS.glob("*/*.webp"))]
    ours = sorted(os.sched_getaffinity(0))
    workers = max(1, available_cores() // 2)
    limit = Limit(bodies, workers)
    requests = [prepare(body, "image/webp", [limit.label(body)]) for body in bodies]
    server, _ = start_timed(requests[0], ours[:workers])
    os.sched_setaffinity(0, ours[workers:] or ours)  # for the clients' processes
    metadata = limit.session.metadata
    print(f"{processor()}, server on {workers} of {len(ours)} cores; {metadata.name} {metadata.version}")
    found: list[Replica] = []
    times: dict[float, list[list[float]]] = {utilisation: [] for utilisation in UTILISATIONS}
    try:
        for _ in range(options.rounds):  # each with the speed that the machine has in it
            found.append(_measure(server, requests, workers, options.seconds))
            for utilisation, rows in times.items():
                rate = utilisation * found[-1].capacity
                tally = open_loop(server.port, requests, rate, options.seconds, at_random=True)
                if len(tally.right) < tally.sent or tally.unanswered:
                    raise RuntimeError(
                        f"{len(tally.right)} of {tally.sent} requests were answered; run it when nothing else runs"
                    )
                rows.append(
                    [float(np.quantile(took, q)) for q in _QUANTILES for took in (simulate(rate, found[-1]), tally.right)]
                )
    finally:
        server.stop()
    batch_s, image_s = (statistics.median(getattr(replica, name) for replica in found) for name in ("batch_s", "image_s"))
    replica = Replica(workers, image_s, batch_s, found[0].max_batch)
    print(
        f"{replica.capacity:.0f} requests/s over HTTP, {replica.capacity / workers:.0f} a core; batches of up to "
        f"{replica.max_batch} take a worker {batch_s * 1000:.1f} ms and {image_s * 1000:.1f} ms an image\n"
    )
    print("utilisation      requests/s   p50, ms: model  measured   p99, ms: model  measured")
    check = {utilisation: (1000 * np.median(rows, axis=0)).round(1).tolist() for utilisation, rows in times.items()}
    for utilisation, (model_p50, p50, model_p99, p99) in check.items():
        rate = utilisation * replica.capacity
        print(f"{utilisation:11.0%} {rate:15.0f} {model_p50:16.1f} {p50:9.1f} {model_p99:16.1f} {p99:9.1f}")
    replicas = replicas_for(options.rate, options.p99 / 1000, replica)
    print(f"\n{options.rate:.0f} requests/s with p99 within {options.p99:.0f} ms: ", end="")
    print("not on such cores, one image alone takes longer" if replicas is None else f"{replicas} replicas of {workers} workers")
    if options.output:
        result = {
            "processor": processor(),
            "replica": asdict(replica),
            "columns_ms": ["model p50", "measured p50", "model p99", "measured p99"],
            "check": check,
            "rate": options.rate,
            "p99_ms": options.p99,
            "replicas": replicas,
        }
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
