"""Thousands of images at once: the command line and the Python client against the same work without either.

    python -m benchmarks.bulk FOLDER [--images 10000] [--rounds 3]

FOLDER holds image files (the CIFAR-10 test set, say; fewer than asked for are repeated). In each round, in turn: the
in-process limit of `benchmarks.serve` (a thread a core, decoding included), `convmixer classify`, the same with `--url`, and
`app.client.Client.classify_many`. The commands' figures include their start. Server and clients share the machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from app.cli_images import find_images
from app.client import Client, Prediction
from app.cores import available_cores
from app.load import prepare
from benchmarks.serve import Limit, processor, start_timed
from benchmarks.server import REPOSITORY

_LIMIT_S = 5.0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="images")
    parser.add_argument("--images", type=int, default=10_000, help="in each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind; the median counts")
    options = parser.parse_args()
    found = list(find_images([options.folder]))
    paths = list(itertools.islice(itertools.cycle(found), options.images))
    bodies = [Path(path).read_bytes() for path in found[:1000]]
    limit = Limit(bodies, available_cores())
    server, _ = start_timed(prepare(bodies[0], "application/octet-stream", [limit.label(bodies[0])]))
    url = f"http://127.0.0.1:{server.port}"
    rates: dict[str, list[float]] = {}
    memory_mib: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "list"
        listed.write_text("".join(f"{path}\n" for path in paths))
        try:
            for _ in range(options.rounds):
                rates.setdefault("in process", []).append(limit.rate(limit.cores, _LIMIT_S))
                for name, more in (("convmixer classify", []), ("convmixer classify --url", ["--url", url])):
                    seconds, mib = _run(["classify", "--files-from", str(listed), *more, "--output", f"{folder}/rows.csv"])
                    if len(Path(folder, "rows.csv").read_text().splitlines()) != len(paths) + 1:
                        raise RuntimeError(f"{name} did not write a row for each image")
                    rates.setdefault(name, []).append(len(paths) / seconds)
                    memory_mib[name] = max(mib, memory_mib.get(name, 0))
                begin = time.perf_counter()
                with Client(url) as client:
                    right = sum(isinstance(result, Prediction) for result in client.classify_many(iter(paths)))
                if right != len(paths):
                    raise RuntimeError(f"{len(paths) - right} images were not classified")
                rates.setdefault("Client.classify_many", []).append(len(paths) / (time.perf_counter() - begin))
        finally:
            server.stop()
    print(f"{processor()}, {limit.cores} cores, {len(paths):,} images, {options.rounds} rounds")
    best = statistics.median(rates["in process"])
    for name, values in rates.items():
        median = statistics.median(values)
        memory = f", at most {memory_mib[name]:.0f} MiB" if name in memory_mib else ""
        print(f"{name:26} {median:7.0f} images/s ({min(values):.0f}-{max(values):.0f}), {median / best:.2f} of the limit{memory}")


def _run(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "app.cli", *arguments], cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"convmixer {' '.join(arguments)} ended with {process.returncode}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
