"""Which graph of the same network is fast: artifacts side by side, where their time goes, and what int8 would do.

    python -m benchmarks.graph app/artifacts/fast.onnx [OTHER.onnx ...] [--int8 --data CIFAR10]

Times are medians of alternating runs. `--int8` adds the first artifact quantised by onnxruntime's own tool (static, one scale
a channel, calibrated on training images), once with its pointwise convolutions alone, which have most of the multiplications,
once as a whole; and the accuracy of all of them on the test set. An earlier artifact:
`git show COMMIT:app/artifacts/fast.onnx > OTHER.onnx`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.serve import processor
from model.export import METADATA_KEY
from training.data import ImageSet, load_images

ROUNDS = 20
CALIBRATION_IMAGES = 512
OPERATORS = 6
Pixels = NDArray[np.uint8]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--int8", action="store_true", help="add the first one in int8, twice, and the accuracy of all")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as folders; downloaded without")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{processor()}, onnxruntime {onnxruntime.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        graphs: dict[str, Path] = {str(path): path for path in options.artifacts}
        first = options.artifacts[0]
        if options.int8:
            graphs |= {path.stem: path for path in quantize(first, options.data, Path(folder))}
        for threads, batch in dict.fromkeys([(1, 1), (1, 8), (cores, 1)]):
            print(f"\nms an image, {threads} threads, batches of {batch}; ratio to the first")
            times = side_by_side(list(graphs.values()), threads, batch)
            for name, milliseconds in zip(graphs, times, strict=True):
                print(f"  {milliseconds:6.2f}  {times[0] / milliseconds:.2f}  {name}")
        for name, path in graphs.items():
            shares = operator_shares(path, Path(folder))
            print(f"\n{name}: " + ", ".join(f"{operator} {share:.0%}" for operator, share in shares))
        if options.int8:
            images, labels = test_images(first, options.data)
            print()
            for name, path in graphs.items():
                print(f"accuracy {accuracy(path, images, labels):.4f}  {name}")


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


def load(path: Path, data: Path | None, split: Literal["train", "test"]) -> ImageSet:
    """Images as the artifact's training and its evaluation saw them."""
    running = session(path, 1)
    metadata = json.loads(running.get_modelmeta().custom_metadata_map[METADATA_KEY])
    return load_images(data, split, side(running), metadata["resize"]["filter"])


def quantize(path: Path, data: Path | None, folder: Path) -> list[Path]:
    """The graph in int8: its pointwise convolutions between feature maps alone, and all of it."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    image_set = load(path, data, "train")
    chosen = np.random.default_rng(0).choice(len(image_set), CALIBRATION_IMAGES, replace=False)
    pixels = image_set.images[chosen].permute(0, 2, 3, 1).contiguous().numpy()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(np.split(pixels, len(pixels) // 32))

        def get_next(self) -> dict[str, Pixels] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    prepared = folder / "prepared.onnx"
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    convolutions = {node.name: shapes[node.input[1]] for node in graph.node if node.op_type == "Conv"}
    pointwise = [name for name, (out, channels, *kernel) in convolutions.items() if kernel == [1, 1] and out == channels]
    outputs = [folder / "int8-pointwise.onnx", folder / "int8.onnx"]
    for output, nodes in zip(outputs, (pointwise, None), strict=True):
        # without VNNI the products of two 8-bit numbers are added in 16 bits: 7-bit weights cannot overflow
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, output, Reader(), nodes_to_quantize=nodes, per_channel=True, reduce_range=True, **kinds)
    return outputs


def test_images(path: Path, data: Path | None) -> tuple[Pixels, NDArray[np.int64]]:
    """Test set: uint8 [N, S, S, 3] and labels [N]."""
    image_set = load(path, data, "test")
    return image_set.images.permute(0, 2, 3, 1).contiguous().numpy(), image_set.labels.numpy()


def accuracy(path: Path, images: Pixels, labels: NDArray[np.int64]) -> float:
    """Share of right answers."""
    running = session(path, len(os.sched_getaffinity(0)))
    answers = [
        running.run(["logits"], {"images": part})[0].argmax(1) for part in np.array_split(images, max(1, len(images) // 32))
    ]
    return float((np.concatenate(answers) == labels).mean())


if __name__ == "__main__":
    main()
