"""Which graph of the same network is fast: artifacts side by side, where their time goes, how many answers are right.

    python -m benchmarks.graph app/artifacts/fast.onnx [OTHER.onnx ...] [--data CIFAR10]

Times are medians of alternating runs. An earlier artifact: `git show COMMIT:app/artifacts/fast.onnx > OTHER.onnx`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.serve import processor
from model.export import read_metadata
from training.data import load_images
from training.quantize import artifact_logits

ROUNDS = 20
OPERATORS = 6
Pixels = NDArray[np.uint8]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as folders: the accuracy of all on its test set, too")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{processor()}, onnxruntime {onnxruntime.__version__}")
    paths: list[Path] = options.artifacts
    for threads, batch in dict.fromkeys([(1, 1), (1, 8), (cores, 1)]):
        print(f"\nms an image, {threads} threads, batches of {batch}; ratio to the first")
        times = side_by_side(paths, threads, batch)
        for path, milliseconds in zip(paths, times, strict=True):
            print(f"  {milliseconds:6.2f}  {times[0] / milliseconds:.2f}  {path}")
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            shares = operator_shares(path, Path(folder))
        print(f"\n{path}: " + ", ".join(f"{operator} {share:.0%}" for operator, share in shares))
    if options.data:
        print()
        for path in paths:
            print(f"accuracy {accuracy(path, options.data):.4f}  {path}")


def session(path: Path, threads: int, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session as the service has it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def noise(batch: int, side: int) -> Pixels:
    """Images that take as long as any: uint8 [batch, side, side, 3]."""
    return np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)


def side(of: onnxruntime.InferenceSession) -> int:
    """Of the images it takes."""
    return int(of.get_inputs()[0].shape[1])


def side_by_side(paths: list[Path], threads: int, batch: int) -> list[float]:
    """Milliseconds an image of each graph, run in turn."""
    sessions = [session(path, threads) for path in paths]
    images = [noise(batch, side(running)) for running in sessions]
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for running, given, done in zip(sessions, images, seconds, strict=True):
            begin = time.perf_counter()
            running.run(["logits"], {"images": given})
            done.append(time.perf_counter() - begin)
    return [float(np.median(done[1:])) / batch * 1000 for done in seconds]


def operator_shares(path: Path, folder: Path) -> list[tuple[str, float]]:
    """Kinds of operators and their shares of the time, after onnxruntime's optimisation, one thread, batches of 8."""
    running = session(path, 1, folder / "profile")
    images = noise(8, side(running))
    for _ in range(ROUNDS):
        running.run(["logits"], {"images": images})
    spent: Counter[str] = Counter()
    for event in json.loads(Path(running.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return [(operator, time / spent.total()) for operator, time in spent.most_common(OPERATORS)]


def accuracy(path: Path, data: Path) -> float:
    """Share of right answers on the test set, as the artifact's training and evaluation saw that."""
    metadata = read_metadata(path)
    images = load_images(data, "test", metadata["input_size"], metadata["resize"]["filter"])
    return float((artifact_logits(path, images).argmax(1) == images.labels).double().mean())


if __name__ == "__main__":
    main()
