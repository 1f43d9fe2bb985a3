"""A released checkpoint can be calibrated anew, with the data of its training and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.checkpoint import CLASS_MEANS, build_model, load_checkpoint, save_checkpoint
from tests.training.conftest import CIFAR10, TINY
from training.augment import normalization
from training.calibrate import recalibrate
from training.config import TrainConfig
from training.data import ImageSet, load_images, split_validation
from training.errors import ConfigError, DataError
from training.evaluate import compute_logits


def test_class_means_are_those_of_the_training_slice(trained: Path, photos: ImageSet) -> None:
    checkpoint = load_checkpoint(trained)
    training, _ = split_validation(photos, TINY.val_fraction)
    with torch.inference_mode():
        features = build_model(checkpoint).forward_features(normalization(TINY)(training.images)).mean((2, 3))
    expected = torch.stack([features[training.labels == number].mean(0) for number in range(10)])
    torch.testing.assert_close(checkpoint.tensors[CLASS_MEANS], expected, atol=1e-4, rtol=1e-3)


def test_calibrating_again_restores_what_training_fitted(trained: Path, tmp_path: Path) -> None:
    fitted = load_checkpoint(trained)
    path = tmp_path / "model.safetensors"
    without = {name: tensor for name, tensor in fitted.tensors.items() if name != CLASS_MEANS}
    save_checkpoint(path, without, {**fitted.description, "calibration": {"temperature": 9.0, "thresholds": {}}})
    recalibrate(path, CIFAR10, "cpu")
    found = load_checkpoint(path)
    torch.testing.assert_close(found.tensors, fitted.tensors)
    assert found.description["calibration"]["thresholds"] == pytest.approx(fitted.description["calibration"]["thresholds"])
    assert found.description["training"] == fitted.description["training"]


def test_served_at_another_size_than_trained(trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained, tmp_path))
    figures = recalibrate(path, CIFAR10, "cpu", 40)
    found = load_checkpoint(path).description
    config = TrainConfig.from_dict(found["training"]["config"])
    assert (found["image_size"], config.image_size, config.train_size) == (40, 40, 32)
    _, validation = split_validation(load_images(CIFAR10, "train", 40), TINY.val_fraction)
    logits = compute_logits(build_model(load_checkpoint(path)), validation, config, torch.device("cpu"))
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == validation.labels).float().mean()))
    recalibrate(path, CIFAR10, "cpu")  # at the size it has now
    assert recalibrate(path, CIFAR10, "cpu", 32) == load_checkpoint(path).description["calibration"]
    again = load_checkpoint(path)
    torch.testing.assert_close(again.tensors, load_checkpoint(trained).tensors)
    assert again.description["training"]["data_sha256"] == load_checkpoint(trained).description["training"]["data_sha256"]
    with pytest.raises(ConfigError, match="train_size must be between 0 and image_size"):
        recalibrate(path, CIFAR10, "cpu", 28)


def test_other_data_are_refused(trained: Path, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(trained, tmp_path))
    with pytest.raises(DataError, match=r"is not what .* was trained with"):
        recalibrate(path, folder_of("cat", "dog"), "cpu")
    assert path.read_bytes() == trained.read_bytes()
