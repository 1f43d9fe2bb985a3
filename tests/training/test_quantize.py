"""An artifact in 8 bits: what becomes of its answers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from model.checkpoint import load_checkpoint
from model.errors import ExportError
from model.export import export, read_metadata
from tests.training.conftest import CIFAR10
from training.data import load_images
from training.errors import DataError
from training.quantize import artifact_logits, equalize, measure_ranges, pointwise_convolutions, quantize
from training.release import write_card_for

RELEASED = Path(__file__).parents[2] / "app" / "artifacts" / "fast.onnx"


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "small.onnx"
    quantize(RELEASED, path, CIFAR10, name="small")
    return path


def test_it_answers_nearly_as_before_and_says_how_nearly(eight_bits: Path) -> None:
    images = load_images(CIFAR10, "test", 32, "bicubic")
    before, after = artifact_logits(RELEASED, images), artifact_logits(eight_bits, images)
    assert 0 < float((before - after).square().mean().sqrt()) < 0.1
    found, original = read_metadata(eight_bits), read_metadata(RELEASED)
    assert found["name"] == "small"
    assert found["parity"]["images"] == found["test"]["images"] == len(images)
    assert found["parity"]["top1_equal"] == int((before.argmax(1) == after.argmax(1)).sum()) >= 0.98 * len(images)
    assert found["parity"]["max_logit_difference"] == pytest.approx(float((before - after).abs().max()))
    right = {"float32": before, "int8": after}
    shares = {name: float((logits.argmax(1) == images.labels).double().mean()) for name, logits in right.items()}
    assert (found["quantized"]["float32_top1"], found["test"]["top1"]) == (shares["float32"], shares["int8"])
    assert found["test"].keys() == original["test"].keys()
    assert found["command"] == f"{original['command']} && convmixer-train quantize fast.onnx small.onnx"
    for key in ("version", "classes", "temperature", "out_of_distribution", "checkpoint_sha256", "resize"):
        assert found[key] == original[key]


def test_the_pointwise_convolutions_alone_are_in_8_bits(eight_bits: Path) -> None:
    graph, original = onnx.load(eight_bits).graph, onnx.load(RELEASED).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.dims[2:] == [1, 1]}
    assert list(stored.values()).count(onnx.TensorProto.INT8) == len(pointwise_convolutions(original)) == 8
    assert eight_bits.stat().st_size < 0.5 * RELEASED.stat().st_size
    weights = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert max(np.abs(w.astype(int)).max() for w in weights) == 64, "of 7 bits: sums of 16 bits overflow without VNNI else"


def test_its_heat_maps_sum_up_to_its_answers(eight_bits: Path, repository: Path) -> None:
    session = onnxruntime.InferenceSession(eight_bits, providers=["CPUExecutionProvider"])
    pixels = load_images(CIFAR10, "test", 32, "bicubic").images[:8].permute(0, 2, 3, 1).contiguous().numpy()
    logits, maps = session.run(["logits", "class_maps"], {"images": pixels})
    bias = load_checkpoint(repository / "releases" / "fast" / "model.safetensors").tensors["head.bias"].numpy()
    assert np.allclose(logits, maps.mean((2, 3)) + bias, atol=1e-4)


def test_equalizing_makes_channels_alike_and_changes_no_answer(tmp_path: Path) -> None:
    images = load_images(CIFAR10, "test", 32, "bicubic")
    batches = [images.images[:64].permute(0, 2, 3, 1).contiguous().numpy()]
    proto = onnx.load(RELEASED)
    convolutions = pointwise_convolutions(proto.graph)
    before = measure_ranges(proto, convolutions, batches)
    equalize(proto.graph, convolutions, before)
    after = measure_ranges(proto, convolutions, batches)
    for name in (convolution.input[0] for convolution in convolutions):
        spread_before, spread_after = (np.log(np.abs(ranges[name]).max(0)).std() for ranges in (before, after))
        assert spread_after == pytest.approx(spread_before / 2, rel=0.01)
    onnx.save(proto, tmp_path / "equal.onnx")
    assert float((artifact_logits(tmp_path / "equal.onnx", images) - artifact_logits(RELEASED, images)).abs().max()) < 1e-3


def test_the_card_has_its_own_figures(eight_bits: Path, tmp_path: Path, repository: Path) -> None:
    """Of the checkpoint's evaluation on 10,000 images nothing may remain; these are 200."""
    checkpoint = Path(shutil.copy(repository / "releases" / "fast" / "model.safetensors", tmp_path))
    evaluation = json.loads((repository / "releases" / "fast" / "evaluation.json").read_text())
    evaluation["data_sha256"] = load_images(CIFAR10, "test", 32, "bicubic").fingerprint()
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    write_card_for(checkpoint, eight_bits, CIFAR10, tmp_path / "card.md")
    card, found = (tmp_path / "card.md").read_text(), read_metadata(eight_bits)
    assert f"**{found['test']['top1']:.2%}**" in card
    assert "200 images" in card
    assert f"against float32 (test accuracy {found['quantized']['float32_top1']:.2%}): top-1 equal on" in card


def test_what_is_none_or_is_done_already_is_refused(eight_bits: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no pointwise convolutions in float32"):
        quantize(eight_bits, tmp_path / "again.onnx", CIFAR10, name="again")
    noise = tmp_path / "noise.onnx"
    noise.write_bytes(b"no model")
    with pytest.raises(ExportError, match="not an artifact"):
        quantize(noise, tmp_path / "again.onnx", CIFAR10, name="again")
    with pytest.raises(ExportError, match="would be overwritten"):
        quantize(noise, tmp_path / "noise.onnx", CIFAR10, name="again")
    assert list(tmp_path.iterdir()) == [noise]


def test_images_of_other_classes_are_refused(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has other classes"):
        quantize(RELEASED, tmp_path / "output.onnx", folder_of("cat", "dog"), name="output")
    assert not list(tmp_path.iterdir())


def test_what_8_bits_harm_is_not_written(tmp_path: Path, repository: Path) -> None:
    """In float32 this network answers as the released one, but one channel has ten thousand times the range of the others."""
    checkpoint = load_checkpoint(repository / "releases" / "fast" / "model.safetensors")
    tensors = dict(checkpoint.tensors)
    for name, factor in {
        "blocks.1.pointwise_norm.weight": 1e4,
        "blocks.1.pointwise_norm.bias": 1e4,
        "blocks.2.depthwise.weight": 1e-4,
        "blocks.2.depthwise_norm.weight": 1e4,
        "blocks.2.depthwise_norm.bias": 1e4,
        "blocks.2.pointwise.weight": 1e-4,
    }.items():
        tensors[name] = tensors[name].clone()
        channel = (slice(None), 0) if name.endswith("pointwise.weight") else 0
        tensors[name][channel] *= factor
    pixels = load_images(CIFAR10, "test", 32).images.permute(0, 2, 3, 1).contiguous().numpy()
    resize = {"mode": "crop", "filter": "bicubic"}
    metadata = {"resize": resize, "test": dict.fromkeys(("top1", "images")), "command": "by hand"}
    export(replace(checkpoint, tensors=tensors), pixels, tmp_path / "coarse.onnx", metadata)
    with pytest.raises(ExportError, match=r"at most 0\.1% may be lost, so no artifact was written"):
        quantize(tmp_path / "coarse.onnx", tmp_path / "output.onnx", CIFAR10, name="output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coarse.onnx", "coarse.onnx.sha256"]
