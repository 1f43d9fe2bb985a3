"""How many replicas for so many requests a second: the measured capacity of this machine, and a queueing model of it.

    python -m benchmarks.capacity --rate 1000 --p99 100 [--seconds 10] [--output FILE.json]

A replica is c workers in front of one queue, requests come at random (Poisson) and each takes a worker the same time: M/D/c.
That time is what the real server, saturated by 32 clients, needs: c / capacity. The model is simulated, request by request,
and compared with the real server under the same kind of load at three utilisations. The server has half of the cores and the
client the others, so that the client's work is no part of the server's. Then replicas are added until the model's p99 is below
the one asked for, each with its even share of the requests.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from app.engine.session import available_cores
from app.load import poisson, prepare
from benchmarks.clients import closed_loop, open_loop
from benchmarks.serve import PHOTOS, Limit, Server, processor

UTILISATIONS = (0.5, 0.7, 0.85)
_SIMULATED = 50_000
_SATURATING_CLIENTS = 32


def simulate(rate: float, workers: int, service_s: float, requests: int = _SIMULATED) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Time from arrival to answer of each request, in seconds: M/D/c, first come first served.

    Args:
        rate: requests a second; at or beyond workers / service_s the queue grows without end.
        workers: c.
        service_s: seconds of a worker a request.
        requests: simulated.
    """
    free = [0.0] * workers
    took = np.empty(requests)
    for number, arrival in enumerate(islice(poisson(rate, seed=0), requests)):
        end = max(arrival, heapq.heappop(free)) + service_s
        heapq.heappush(free, end)
        took[number] = end - arrival
    return took


def replicas_for(rate: float, p99_s: float, workers: int, service_s: float) -> int | None:
    """Fewest replicas whose p99 is within the limit; None if one request alone takes longer.

    Args:
        rate: requests a second, of all replicas.
        p99_s: limit.
        workers: of a replica.
        service_s: seconds of a worker a request.
    """
    if service_s > p99_s:
        return None
    replicas = max(1, int(rate * service_s / workers))
    while rate / replicas >= workers / service_s or np.quantile(simulate(rate / replicas, workers, service_s), 0.99) > p99_s:
        replicas += 1
    return replicas


def main() -> None:
    """Measures, compares, answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=1000, help="requests a second, one image each")
    parser.add_argument("--p99", type=float, default=100, help="milliseconds within which 99 %% shall be answered")
    parser.add_argument("--seconds", type=float, default=10, help="length of each measurement")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    bodies = [path.read_bytes() for path in sorted(PHOTOS.glob("*/*.webp"))]
    ours = sorted(os.sched_getaffinity(0))
    workers = max(1, available_cores() // 2)
    limit = Limit(bodies, workers)
    requests = [prepare(body, "image/webp", limit.label(body)) for body in bodies]
    server = Server.start(requests[0], set(ours[:workers]))
    os.sched_setaffinity(0, ours[workers:] or ours)  # for the clients' processes
    try:
        saturated = closed_loop(server.port, requests, _SATURATING_CLIENTS, options.seconds)
        capacity = len(saturated.right) / saturated.seconds
        service_s = workers / capacity
        metadata = limit.session.metadata
        print(f"{processor()}, server on {workers} of {len(ours)} cores; {metadata.name} {metadata.version}")
        print(f"{capacity:.0f} requests/s over HTTP:", end=" ")
        print(f"{capacity / workers:.0f} a core, {service_s * 1000:.1f} ms of a core each\n")
        print("utilisation      requests/s   p50, ms: model  measured   p99, ms: model  measured")
        rows = []
        for utilisation in UTILISATIONS:
            rate = utilisation * capacity
            modelled = simulate(rate, workers, service_s)
            tally = open_loop(server.port, requests, rate, options.seconds, at_random=True)
            row = {"utilisation": utilisation, "rate": rate}
            for share in (0.5, 0.99):
                row[f"model_p{share * 100:.0f}_ms"] = float(np.quantile(modelled, share)) * 1000
                row[f"measured_p{share * 100:.0f}_ms"] = float(np.quantile(tally.right, share)) * 1000
            rows.append(row)
            print(
                f"{utilisation:11.0%} {rate:15.0f} {row['model_p50_ms']:16.1f} {row['measured_p50_ms']:9.1f} "
                f"{row['model_p99_ms']:16.1f} {row['measured_p99_ms']:9.1f}"
            )
    finally:
        server.stop()
    replicas = replicas_for(options.rate, options.p99 / 1000, workers, service_s)
    print(f"\n{options.rate:.0f} requests/s with p99 within {options.p99:.0f} ms: ", end="")
    print("not on such cores, one image alone takes longer" if replicas is None else f"{replicas} replicas of {workers} workers")
    if options.output:
        found = {"processor": processor(), "cores": workers, "capacity": capacity, "check": rows, "replicas": replicas}
        options.output.write_text(json.dumps(found | {"rate": options.rate, "p99_ms": options.p99}, indent=2) + "\n")


if __name__ == "__main__":
    main()
