"""A released artifact with its pointwise convolutions in 8-bit numbers: more images a second where a CPU has 8-bit dot products.

Those have most of a ConvMixer's multiplications. The depthwise ones and GELU become no faster, and lose accuracy
(docs/performance.md).
onnxruntime's own tool does it: static, weights with a scale for each channel, activations with one. Which ranges those have is
measured here, after channels were made more alike.
"""

from __future__ import annotations

import datetime
import hashlib
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from torch import Tensor
from tqdm import tqdm

from model.errors import ExportError
from model.export import ParityReport, publish, read_metadata
from training.data import ImageSet, load_images
from training.errors import DataError
from training.metrics import score
from training.release import check_addressable

MOST_LOST = 0.001
"""Share of the test images, 0.1 points of accuracy; of few images two."""

_RANGE_IMAGES = 512
"""Training images whose activations say what the 8 bits must reach."""

_BATCH = 32

_LEAST = {"Gelu": -4.0, "Relu": 0.0}
"""What is less is next to nothing behind these: GELU(-4) = -0.0001."""

Ranges = dict[str, NDArray[np.float32]]
"""By tensor float32 [2, channels]: least and largest value."""


@dataclass(frozen=True)
class Quantized:
    """What 8 bits cost.

    Attributes:
        images: test images.
        top1: share of right answers in 8 bits.
        float32_top1: the same before.
        top1_equal: images with the same answer.
    """

    images: int
    top1: float
    float32_top1: float
    top1_equal: int


def quantize(artifact: Path, output: Path, data_path: Path | None, *, name: str) -> Quantized:
    """Writes the artifact with 8-bit pointwise convolutions.

    Its test figures are its own, measured here; what else its description says is as before.

    Args:
        artifact: one in float32.
        output: the .onnx file to write, and its `.sha256`.
        data_path: what the network was trained and evaluated with, see `training.data.load_images`.
        name: of the new one, for clients.

    Raises:
        DataError: the data cannot be read, or have other classes.
        ExportError: `artifact` is none or `output` itself, `name` fits in no address, or the artifact has no pointwise
            convolutions in float32, or loses more than `MOST_LOST`; nothing is written.
    """
    if output.resolve() == artifact.resolve():
        raise ExportError(f"{output} is to be read, and would be overwritten; write to another file")
    check_addressable(name=name)
    metadata, proto = read_metadata(artifact), onnx.load(artifact)
    convolutions = pointwise_convolutions(proto.graph)
    if not convolutions:
        raise ExportError(f"{artifact} has no pointwise convolutions in float32")
    training, test = _load(metadata, data_path, "train"), _load(metadata, data_path, "test")
    if training.classes != metadata["classes"] or test.classes != metadata["classes"]:
        raise DataError(f"{data_path or 'CIFAR-10'} has other classes than {artifact}; give the --data that it was made with")
    chosen = np.random.default_rng(0).choice(len(training), min(_RANGE_IMAGES, len(training)), replace=False)
    batches = [_pixels(batch) for batch in training.images[chosen].split(_BATCH)]
    equalize(proto.graph, convolutions, measure_ranges(proto, convolutions, batches))
    ranges = measure_ranges(proto, convolutions, batches)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        equalized, draft = Path(folder) / "equalized.onnx", Path(folder) / output.name
        add_pre_process_metadata(proto)  # what it would fold is folded; without the mark there is a warning
        onnx.save(proto, equalized)
        quantize_static(
            equalized,
            draft,
            _Reader(batches[0]),
            nodes_to_quantize=[convolution.name for convolution in convolutions],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,  # weights of 7 bits: AVX2 adds two products in 16, where those of 8 overflow
            extra_options={"TensorQuantOverrides": _overrides(proto.graph, convolutions, ranges)},
        )
        before, after = artifact_logits(artifact, test), artifact_logits(draft, test)
        found = score(after, test.labels, test.classes, metadata["temperature"])
        float32_top1 = float((before.argmax(1) == test.labels).double().mean())
        result = Quantized(len(test), found["top1"], float32_top1, int((before.argmax(1) == after.argmax(1)).sum()))
        if (float32_top1 - found["top1"]) * len(test) > max(2, MOST_LOST * len(test)):
            raise ExportError(
                f"in 8 bits {found['top1']:.2%} of the test images are right, in float32 {float32_top1:.2%}; at most "
                f"{MOST_LOST:.1%} may be lost, so no artifact was written"
            )
        parity = ParityReport(float((before - after).abs().max()), result.images, result.top1_equal)
        described = {
            "name": name,
            "command": f"{metadata['command']} && convmixer-train quantize {artifact.name} {output.name}",
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "test": metadata["test"] | {key: found[key] for key in metadata["test"] if key in found},
            "parity": asdict(parity),
            "quantized": {
                "artifact_sha256": hashlib.sha256(artifact.read_bytes()).hexdigest(),
                "float32_top1": float32_top1,
            },
        }
        publish(draft, metadata | described, output)
    return result


def artifact_logits(artifact: Path, data: ImageSet) -> Tensor:
    """What onnxruntime answers: float32 [N, C].

    Args:
        artifact: an .onnx file.
        data: N images of its input size.
    """
    session = onnxruntime.InferenceSession(artifact, providers=["CPUExecutionProvider"])
    batches = tqdm(data.images.split(_BATCH), desc=f"{artifact.name} on the test set", unit="batch", leave=False, disable=None)
    return torch.from_numpy(np.concatenate([session.run(["logits"], {"images": _pixels(batch)})[0] for batch in batches]))


def pointwise_convolutions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that mix the channels of feature maps, and nothing else."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    convolutions = [(node, shapes.get(node.input[1], [])) for node in graph.node if node.op_type == "Conv"]
    return [node for node, shape in convolutions if shape[2:] == [1, 1] and shape[0] == shape[1]]


def equalize(graph: onnx.GraphProto, convolutions: list[onnx.NodeProto], ranges: Ranges) -> None:
    """Makes the channels that a convolution reads more alike in range, which its one scale must fit; answers stay equal.

    Cross-layer equalization (arXiv 1906.04721), by the square root of what would make them equal: the rest is the weights'. A
    ConvMixer's pointwise convolution reads x + BN(...depthwise(x)), and nobody else reads either, so a channel's factor goes
    into both batch normalisations, and its inverse into both convolutions. Where a graph has it otherwise, nothing is done.

    Args:
        graph: is changed.
        convolutions: of `pointwise_convolutions`.
        ranges: of what they read.
    """
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    def scale(name: str, factors: NDArray[np.float32], axis: int) -> None:
        values = onnx.numpy_helper.to_array(weights[name])
        shape = [-1 if number == axis else 1 for number in range(values.ndim)]
        weights[name].CopyFrom(onnx.numpy_helper.from_array(values * factors.reshape(shape), name))

    for convolution in convolutions:
        total = producers[convolution.input[0]]
        norms = [producers[name] for name in total.input] if total.op_type == "Add" else []
        if [norm.op_type for norm in norms] != ["BatchNormalization"] * 2 or len(readers[total.output[0]]) != 1:
            continue
        depthwise = [node for node in readers[total.input[0]] if node.op_type == "Conv"]
        if len(readers[total.input[0]]) != 2 or len(depthwise) != 1 or len(readers[total.input[1]]) != 1:
            continue
        reach = np.maximum(np.abs(ranges[convolution.input[0]]).max(0), 1e-6)
        factors = np.sqrt(1 / reach).astype(np.float32)
        factors /= np.exp(np.log(factors).mean())
        for norm in norms:
            scale(norm.input[1], factors, 0)
            scale(norm.input[2], factors, 0)
        scale(depthwise[0].input[1], 1 / factors, 0)
        scale(convolution.input[1], 1 / factors, 1)


def measure_ranges(proto: onnx.ModelProto, convolutions: list[onnx.NodeProto], batches: list[NDArray[np.uint8]]) -> Ranges:
    """Least and largest value of each channel of what the convolutions read and write."""
    names = [name for node in convolutions for name in (node.input[0], node.output[0])]
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    found = [
        [(values.min((0, 2, 3)), values.max((0, 2, 3))) for values in session.run(names, {"images": batch})]
        for batch in tqdm(batches, desc="ranges", unit="batch", leave=False, disable=None)
    ]
    return {
        name: np.stack([np.min([low for low, _ in of_one], 0), np.max([high for _, high in of_one], 0)])
        for name, of_one in zip(names, zip(*found, strict=True), strict=True)
    }


def _overrides(
    graph: onnx.GraphProto, convolutions: list[onnx.NodeProto], ranges: Ranges
) -> dict[str, list[dict[str, np.float32]]]:
    """The ranges that 8 bits must reach, by tensor; of what an activation makes 0, nothing."""
    activations = {name: node.op_type for node in graph.node for name in node.input if node.op_type in _LEAST}
    overrides = {}
    for name in [name for node in convolutions for name in (node.input[0], node.output[0])]:
        least = max(ranges[name].min(), _LEAST.get(activations.get(name, ""), -np.inf))
        overrides[name] = [{"rmin": np.float32(least), "rmax": np.float32(ranges[name].max())}]
    return overrides


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """One batch: the ranges are known, but `quantize_static` wants to see something."""

    def __init__(self, batch: NDArray[np.uint8]) -> None:
        self._batches = iter([{"images": batch}])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next one, or None behind the last."""
        return next(self._batches, None)


def _load(metadata: dict[str, Any], data_path: Path | None, split: Literal["train", "test"]) -> ImageSet:
    return load_images(data_path, split, metadata["input_size"], metadata["resize"]["filter"])


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """As the artifact takes them: uint8 [N, 3, S, S] → [N, S, S, 3]."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()
