"""What Ray costs and what a lost node costs, on this machine: `python -m benchmarks.ray [--images 8000] [--seconds 4]`.

Two nodes of half the cores each, as daemons on loopback. The job runs three times over the same images (as they come,
again, and with one node killed in the middle), with the in-process limit measured before and after each. Then Serve and
`convmixer serve` answer the same 8 clients in turn. Everything shares the cores with the clients and with Ray's daemons.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from app.cores import available_cores
from app.load import prepare
from benchmarks.clients import closed_loop
from benchmarks.serve import PHOTOS, Limit, processor, start_timed
from benchmarks.server import REPOSITORY

SHARD = 250
CLIENTS = 8
SERVE_PORT = 8765


@contextmanager
def cluster() -> Iterator[Any]:
    """Two nodes; RAY_ADDRESS names them."""
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "benchmark" * 4}
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    cores = max(1, available_cores() // 2)
    head = {"num_cpus": cores, "include_dashboard": False, "no_monitor": True, "node_ip_address": "127.0.0.1"}
    started = Cluster(initialize_head=True, head_node_args=head)
    started.add_node(num_cpus=cores, node_ip_address="127.0.0.1")
    os.environ["RAY_ADDRESS"] = started.address
    yield started
    started.shutdown()


def run_job(source: Path, output: Path, victim: Any = None) -> dict[str, float]:
    """One run; kills `victim` when half of the shards are there."""
    command = [sys.executable, "-m", "app.ray.classify_dataset", "--input", str(source), "--output", str(output)]
    command += ["--format", "parquet", "--shard-size", str(SHARD)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY)
    shards = -(-parquet.read_metadata(source / "images.parquet").num_rows // SHARD)
    killed = None
    while driver.poll() is None:
        time.sleep(0.05)
        if victim and killed is None and len(list(output.glob("classified/*.parquet"))) >= shards / 2:
            killed = time.time()
            raylet = victim.all_processes["raylet"][0].process.pid
            workers = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
            for pid in [raylet, *map(int, workers)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    assert driver.stdout
    summary = json.loads(driver.stdout.read())
    assert summary["classified"] == summary["images"]
    times = sorted(path.stat().st_mtime for path in output.glob("classified/*.parquet"))
    longest = max(later - earlier for earlier, later in itertools.pairwise(times))
    steady = SHARD * (len(times) - 2) / (times[-1] - times[1])
    return {"seconds": summary["this_run"]["seconds"], "images_s": round(steady, 1), "longest_pause_s": round(longest, 2)}


def compare_servers(limit: Limit, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Requests a second at 8 clients, in turn."""
    requests = [prepare(body, "image/webp", [limit.label(body)]) for body in limit.bodies]
    config = (REPOSITORY / "deploy" / "ray" / "serve_config.yaml").read_text().replace("port: 8000", f"port: {SERVE_PORT}")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(
            config.replace("num_cpus: 2", f"num_cpus: {max(1, limit.cores // 2)}")
            .replace("max_replicas: 8", "max_replicas: 2")
            .replace("min_replicas: 1", "min_replicas: 2")
        )
        file.flush()
        serve = subprocess.Popen([sys.executable, "-m", "ray.serve.scripts", "run", file.name], cwd=REPOSITORY, stdout=sys.stderr)
        plain, _ = start_timed(requests[0])
        rates: dict[str, list[float]] = {"convmixer serve": [], "Ray Serve": []}
        try:
            while True:
                with suppress(OSError):
                    if urllib.request.urlopen(f"http://127.0.0.1:{SERVE_PORT}/readyz").status == 200:
                        break
                time.sleep(0.5)
            for _ in range(rounds):
                for name, port in (("convmixer serve", plain.port), ("Ray Serve", SERVE_PORT)):
                    tally = closed_loop(port, requests, CLIENTS, seconds)
                    assert not tally.wrong, tally.wrong
                    rates[name].append(len(tally.right) / tally.seconds)
        finally:
            plain.stop()
            serve.send_signal(signal.SIGINT)
            serve.wait()
    return rates


def main() -> None:
    """Measures and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--seconds", type=float, default=4, help="length of each measurement over HTTP and of the limit")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bodies = [path.read_bytes() for path in sorted(PHOTOS.glob("*/*.webp"))]
    limit = Limit(bodies, available_cores())
    limits: list[float] = []
    results: dict[str, Any] = {"processor": processor(), "cores": limit.cores, "images": options.images, "limit_images_s": limits}
    with tempfile.TemporaryDirectory() as name, cluster() as nodes:
        folder = Path(name)
        (folder / "in").mkdir()
        data = list(itertools.islice(itertools.cycle(bodies), options.images))
        parquet.write_table(pa.table({"image": data}), folder / "in" / "images.parquet", row_group_size=SHARD)
        for run in ("first", "second"):
            limits.append(limit.rate(limit.cores, options.seconds))
            results[run] = run_job(folder / "in", folder / run)
        results["serve"] = compare_servers(limit, options.seconds, options.rounds)
        limits.append(limit.rate(limit.cores, options.seconds))
        results["node killed"] = run_job(folder / "in", folder / "killed", next(iter(nodes.worker_nodes)))
        limits.append(limit.rate(limit.cores, options.seconds))
    print(json.dumps(results, indent=2))
    print({name: statistics.median(rates) for name, rates in results["serve"].items()})


if __name__ == "__main__":
    main()
