"""The artifact answers as PyTorch does, describes itself, and does not exist when it would not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from model import export as export_module
from model.architectures import count_macs
from model.checkpoint import SIMILARITY, Checkpoint, CheckpointError, build_model, build_similarity
from model.convmixer import ConvMixer
from model.errors import ExportError
from model.export import CONTRACT, METADATA_KEY, ParityReport, Servable, check_parity, export
from model.similarity import FeatureSimilarity

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
Pixels = NDArray[np.uint8]
Photos = Callable[[int, int], Pixels]


class Exported(NamedTuple):
    path: Path
    checkpoint: Checkpoint
    parity: ParityReport
    images: Pixels

    def session(self) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])


@pytest.fixture(
    scope="module",
    params=[(CLASSES, 32, {"kernel_size": 5}), (CLASSES[:3], 48, {"kernel_size": 3, "patch_size": 3, "depth": 1})],
    ids=["10 classes of 32 px", "3 classes of 48 px"],
)
def exported(
    request: pytest.FixtureRequest,
    released: Callable[..., Checkpoint],
    photos: Photos,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    classes, side, settings = request.param
    checkpoint = released(classes, side, **settings)
    path = tmp_path_factory.mktemp("artifact") / "net.onnx"
    images = photos(50, side)
    parity = export(checkpoint, images, path, {"name": "tiny", "version": "1.2.3", "resize": {"mode": "crop"}})
    return Exported(path, checkpoint, parity, images)


def explicit_logits(checkpoint: Checkpoint, images: Pixels) -> torch.Tensor:
    """What the network answers to pixels normalised by hand."""
    mean, std = (np.array(checkpoint.description[key], dtype=np.float32) for key in ("normalize_mean", "normalize_std"))
    normalized = (images.astype(np.float32) / 255 - mean) / std
    with torch.inference_mode():
        logits: torch.Tensor = build_model(checkpoint)(torch.from_numpy(normalized).permute(0, 3, 1, 2))
    return logits


@pytest.mark.parametrize("batch", [1, 2, 7, 33])
def test_any_batch_of_raw_pixels_gets_pytorchs_logits(exported: Exported, batch: int) -> None:
    images = exported.images[:batch]
    (logits,) = exported.session().run(["logits"], {"images": images})
    assert logits.dtype == np.float32
    assert logits.shape == (batch, len(exported.checkpoint.description["classes"]))
    np.testing.assert_allclose(logits, explicit_logits(exported.checkpoint, images), atol=1e-3)


def test_inputs_and_outputs_are_the_contracts(exported: Exported) -> None:
    session = exported.session()
    side, patch = (exported.checkpoint.description[k] for k in ("image_size", "model"))
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(uint8)")
    assert isinstance(images.shape[0], str)
    assert images.shape[1:] == [side, side, 3]
    logits, maps, similarity = session.get_outputs()
    count, cells = len(exported.checkpoint.description["classes"]), side // patch["patch_size"]
    assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [count])
    assert (maps.name, maps.type, maps.shape[1:]) == ("class_maps", "tensor(float)", [count, cells, cells])
    assert (similarity.name, similarity.type, len(similarity.shape)) == ("similarity", "tensor(float)", 1)


def test_logits_are_the_mean_of_the_class_maps_plus_the_bias(exported: Exported) -> None:
    logits, maps = exported.session().run(["logits", "class_maps"], {"images": exported.images[:7]})
    bias = exported.checkpoint.tensors["head.bias"].numpy()
    np.testing.assert_allclose(maps.mean((2, 3)) + bias, logits, atol=1e-4)


def test_similarity_is_the_cosine_of_whitened_features_to_the_nearest_class_mean(exported: Exported) -> None:
    (similarity,) = exported.session().run(["similarity"], {"images": exported.images[:7]})
    description = exported.checkpoint.description
    mean, std = (np.array(description[key], dtype=np.float32) for key in ("normalize_mean", "normalize_std"))
    pixels = torch.from_numpy((exported.images[:7].astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        features = build_model(exported.checkpoint).forward_features(pixels).mean((2, 3)).numpy()
    mean, whitening, means = (
        exported.checkpoint.tensors[SIMILARITY + name].numpy() for name in ("mean", "whitening", "class_means")
    )
    features, means = (features - mean) @ whitening, (means - mean) @ whitening
    cosines = [[f @ m / np.linalg.norm(f) / np.linalg.norm(m) for m in means] for f in features]
    np.testing.assert_allclose(similarity, np.max(cosines, axis=1), atol=1e-4)


@pytest.mark.parametrize(("resample", "method"), [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)])
def test_a_network_enlarges_pictures_as_pillow_does(
    released: Callable[..., Checkpoint], photos: Photos, tmp_path: Path, resample: str, method: Image.Resampling
) -> None:
    checkpoint = released(CLASSES, 32)
    checkpoint.description.update(view_size=38, resample=resample)
    images = photos(20, 32)
    export(checkpoint, images, tmp_path / "net.onnx", {})
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [32, 32, 3]
    (logits,) = session.run(["logits"], {"images": images})
    enlarged = np.stack([np.asarray(Image.fromarray(image).resize((38, 38), method)) for image in images])
    expected = explicit_logits(checkpoint, enlarged)  # Pillow rounds to whole numbers, so not quite
    np.testing.assert_allclose(logits, expected, atol=0.02 * float(expected.std()))
    metadata = json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert metadata["macs"] == count_macs(build_model(checkpoint).config, 38)


def test_one_calibrated_as_up_to_1_9_0_has_to_be_calibrated_again(
    released: Callable[..., Checkpoint], photos: Photos, tmp_path: Path
) -> None:
    checkpoint = released(CLASSES, 32)
    means = checkpoint.tensors[SIMILARITY + "class_means"]
    for name in ("mean", "whitening", "class_means"):
        del checkpoint.tensors[SIMILARITY + name]
    checkpoint.tensors["class_means"] = means
    with pytest.raises(CheckpointError, match="convmixer-train calibrate"):
        export(checkpoint, photos(3, 32), tmp_path / "net.onnx", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["mean", "whitening", "class_means"])
def test_another_similarity_is_found(exported: Exported, part: str) -> None:
    reference, similarity = build_model(exported.checkpoint), build_similarity(exported.checkpoint)
    buffer = similarity.get_buffer(part)
    buffer.mul_(torch.linspace(1, 2, buffer.shape[-1]))
    with pytest.raises(ExportError, match="the similarity differs"):
        check_parity(exported.path, reference, similarity, exported.checkpoint.description, exported.images)


def test_metadata_says_everything(exported: Exported) -> None:
    description = exported.checkpoint.description
    metadata = json.loads(exported.session().get_modelmeta().custom_metadata_map[METADATA_KEY])
    assert metadata == {
        "contract": CONTRACT,
        "name": "tiny",
        "version": "1.2.3",
        "resize": {"mode": "crop"},
        "classes": description["classes"],
        "input_size": description["image_size"],
        "view_size": description["image_size"],
        "temperature": 1.25,
        "out_of_distribution": {"score": "feature_similarity", "threshold": 0.7},
        "architecture": description["name"],
        "parameters": description["parameters"],
        "macs": count_macs(build_model(exported.checkpoint).config, description["image_size"]),
        "code_version": "0.0.test",
        "parity": asdict(exported.parity),
    }


def test_parity_is_reported(exported: Exported) -> None:
    assert exported.parity.images == exported.parity.top1_equal == 50
    assert 0 <= exported.parity.max_logit_difference <= 1e-3


def test_sha256_beside_it_is_of_the_file(exported: Exported) -> None:
    digest = hashlib.sha256(exported.path.read_bytes()).hexdigest()
    assert exported.path.with_name("net.onnx.sha256").read_text() == f"{digest}  net.onnx\n"
    assert sorted(p.name for p in exported.path.parent.iterdir()) == ["net.onnx", "net.onnx.sha256"]


def test_graph_is_plain_self_contained_onnx(exported: Exported) -> None:
    graph = onnx.load(exported.path, load_external_data=False)
    onnx.checker.check_model(graph, full_check=True)
    assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx"}
    assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer)
    assert not graph.functions


def test_nothing_is_written_when_answers_differ(
    released: Callable[..., Checkpoint], photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "LOGIT_TOLERANCE", -1.0)  # no answer is that equal
    output = tmp_path / "net.onnx"
    output.write_bytes(b"the artifact of last week")
    with pytest.raises(ExportError, match="not the mean of the class maps plus the bias"):
        export(released(CLASSES, 8, depth=1, hidden_dim=8, kernel_size=3), photos(8, 8), output, {})
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert output.read_bytes() == b"the artifact of last week"


def damaged_copy(exported: Exported, folder: Path, change: Callable[[Any], Any]) -> Path:
    """The artifact with the initializer that holds the head's bias changed."""
    bias = exported.checkpoint.tensors["head.bias"].numpy()
    copy = Path(shutil.copy(exported.path, folder))
    proto = onnx.load(copy)
    for tensor in proto.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.shape == bias.shape and np.array_equal(values, bias):
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(values), tensor.name))
            onnx.save(proto, copy)
            return copy
    raise AssertionError("the graph has no initializer like the head's bias")


def test_a_graph_with_one_changed_weight_is_found(exported: Exported, tmp_path: Path) -> None:
    path = damaged_copy(exported, tmp_path, lambda bias: bias + np.float32(0.01))
    similarity = build_similarity(exported.checkpoint)
    with pytest.raises(ExportError, match="not the mean of the class maps plus the bias"):
        check_parity(path, build_model(exported.checkpoint), similarity, exported.checkpoint.description, exported.images)


def test_a_graph_of_other_weights_is_found(exported: Exported) -> None:
    reference = build_model(exported.checkpoint)
    reference.stem.conv.weight.data.mul_(1.2)
    with pytest.raises(ExportError, match="onnxruntime differs from PyTorch: logits by up to"):
        check_parity(
            exported.path, reference, build_similarity(exported.checkpoint), exported.checkpoint.description, exported.images
        )


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_folded_normalisation_equals_explicit_normalisation(
    random_net: Callable[..., ConvMixer], photos: Photos, patch_size: int
) -> None:
    mean, std = [0.1, 0.5, 0.9], [0.5, 0.2, 0.3]
    net = random_net(patch_size=patch_size)
    images = torch.from_numpy(photos(5, 32))
    normalized = (images.double().permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.inference_mode():
        expected = net(normalized.float())
        logits, maps, _ = Servable(net, FeatureSimilarity(16, 10), mean, std, nn.Identity())(images)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(maps.mean((2, 3)) + net.head.bias, expected, atol=1e-4, rtol=1e-4)


def test_black_and_white_pixels_are_the_ends_of_the_range(random_net: Callable[..., ConvMixer]) -> None:
    """Golden: with mean 0.5 and std 0.5 the network sees -1 for black and +1 for white."""
    net = random_net(patch_size=2)
    with torch.inference_mode():
        black, white = (net(torch.full((1, 3, 8, 8), value)) for value in (-1.0, 1.0))
        logits, *_ = Servable(net, FeatureSimilarity(16, 10), [0.5] * 3, [0.5] * 3, nn.Identity())(
            torch.stack([torch.full((8, 8, 3), value, dtype=torch.uint8) for value in (0, 255)])
        )
    torch.testing.assert_close(logits, torch.cat([black, white]), atol=1e-5, rtol=1e-5)
