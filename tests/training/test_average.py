"""The mean of checkpoints is a released checkpoint, and only equals are averaged."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import CheckpointError, build_model, load_checkpoint, network_weights, save_checkpoint
from tests.training.conftest import CIFAR10, QUIET, TINY
from training.average import average
from training.data import ImageSet, load_images, split_validation
from training.errors import ConfigError, DataError
from training.evaluate import compute_logits, evaluate
from training.release import export_artifact, write_card_for
from training.train import train


@pytest.fixture(scope="module")
def further(trained: Path, photos: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One more cycle, from where the first run ended."""
    return train(TINY, photos, tmp_path_factory.mktemp("further"), QUIET, init=trained)


def test_weights_are_averaged_and_the_rest_is_measured_anew(
    trained: Path, further: Path, photos: ImageSet, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "model.safetensors"
    accuracy = average([trained, further], output, CIFAR10, "cpu")
    first, last, found = (load_checkpoint(path) for path in (trained, further, output))
    weights = [name for name in network_weights(found) if name.endswith(("weight", "bias"))]
    assert len(weights) > 10
    for name in weights:
        torch.testing.assert_close(found.tensors[name], (first.tensors[name] + last.tensors[name]) / 2)
    measured = [name for name in found.tensors if name.endswith("running_mean")] + ["similarity.class_means"]
    for name in measured:
        assert not torch.allclose(found.tensors[name], (first.tensors[name] + last.tensors[name]) / 2, rtol=1e-4, atol=1e-6), name

    _, validation = split_validation(photos, TINY.val_fraction)
    answers = compute_logits(build_model(found), validation, TINY, torch.device("cpu")).argmax(1)
    assert accuracy == pytest.approx(float((answers == validation.labels).float().mean()))
    averaged = found.description["training"]["averaged"]
    assert averaged["sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (trained, further)]
    assert found.description["calibration"] != last.description["calibration"]

    evaluate(output, CIFAR10, output.with_name("evaluation.json"), "cpu")
    artifact = tmp_path / "mean.onnx"
    export_artifact(output, artifact, CIFAR10, name="mean", version="1.0.0", command="")
    card = tmp_path / "card.md"
    write_card_for(output, artifact, CIFAR10, card)
    text = card.read_text()
    assert f"| Validation accuracy | {accuracy:.2%} " in text
    assert all(f"`{sha256[:12]}…`" in text for sha256 in averaged["sha256"])


def test_batch_normalisation_sees_what_it_will_see(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    """Of one network twice the weights stay, so its first normalisation must have the statistics of its own features."""
    output = tmp_path / "model.safetensors"
    average([trained, trained], output, CIFAR10, "cpu")
    network = build_model(load_checkpoint(output))
    training, _ = split_validation(photos, TINY.val_fraction)
    seen: list[torch.Tensor] = []
    network.stem.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))  # type: ignore[union-attr]
    compute_logits(network, training, TINY, torch.device("cpu"))
    torch.testing.assert_close(torch.cat(seen).mean((0, 2, 3)), network.stem.norm.running_mean, atol=1e-2, rtol=5e-2)  # type: ignore[union-attr]


@pytest.mark.usefixtures("no_compiler")
def test_few_images_count_the_same_in_batch_normalisation(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """57 for training: batches of 50 and 7 would give those 7 half of the weight."""
    folder = folder_of("cat", "dog", "ship")
    data = load_images(folder, "train", 32)
    checkpoint = train(replace(TINY, epochs=1), data, tmp_path, QUIET)
    average([checkpoint, checkpoint], tmp_path / "mean.safetensors", folder, "cpu")
    network = build_model(load_checkpoint(tmp_path / "mean.safetensors"))
    training, _ = split_validation(data, TINY.val_fraction)
    seen: list[torch.Tensor] = []
    network.stem.norm.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))  # type: ignore[union-attr]
    compute_logits(network, training, TINY, torch.device("cpu"))
    torch.testing.assert_close(torch.cat(seen).mean((0, 2, 3)), network.stem.norm.running_mean, atol=5e-3, rtol=0)  # type: ignore[union-attr]


def test_a_network_is_averaged_with_the_one_it_grew_from(
    trained: Path, photos: ImageSet, tmp_path: Path, no_compiler: None
) -> None:
    wide = replace(TINY, model=replace(TINY.model, hidden_dim=24), lr=1e-9, muon_lr=1e-9, epochs=1)
    grown = train(wide, photos, tmp_path / "grown", QUIET, init=trained)  # at this rate nothing moves
    average([trained, grown], tmp_path / "mean.safetensors", CIFAR10, "cpu")
    found, expected = (load_checkpoint(path).tensors for path in (tmp_path / "mean.safetensors", grown))
    for name in (name for name in expected if name.endswith("weight")):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_only_equals_are_averaged(
    trained: Path, photos: ImageSet, folder_of: Callable[..., Path], tmp_path: Path, no_compiler: None
) -> None:
    output = tmp_path / "model.safetensors"
    with pytest.raises(ConfigError, match="at least two"):
        average([trained], output, CIFAR10, "cpu")
    with pytest.raises(ConfigError, match="give another ending"):
        average([trained, trained], output.with_suffix(".json"), CIFAR10, "cpu")
    copy = Path(shutil.copy(trained, tmp_path / "copy.safetensors"))
    for overwritten in (copy, trained):
        with pytest.raises(ConfigError, match="would be overwritten; give another --output"):
            average([copy, copy], overwritten, CIFAR10, "cpu")
    assert copy.read_bytes() == trained.read_bytes()
    with pytest.raises(CheckpointError, match=r"last\.safetensors describes no network"):
        average([trained.with_name("last.safetensors"), trained], output, CIFAR10, "cpu")
    with pytest.raises(DataError, match="give the same --data"):
        average([trained, trained], output, folder_of("cat", "dog"), "cpu")
    deeper = train(replace(TINY, model=replace(TINY.model, depth=3), epochs=1), photos, tmp_path / "deeper", QUIET)
    with pytest.raises(ConfigError, match="different networks"):
        average([deeper, trained], output, CIFAR10, "cpu")
    found = load_checkpoint(trained)
    training = found.description["training"]
    other = tmp_path / "other.safetensors"
    description = {**found.description, "training": {**training, "config": {**training["config"], "val_fraction": 0.4}}}
    save_checkpoint(other, found.tensors, description)
    with pytest.raises(DataError, match="held out"):
        average([other, trained], output, CIFAR10, "cpu")
    assert not output.exists()
