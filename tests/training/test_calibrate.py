"""A released checkpoint can be calibrated anew, with the data of its training and no other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import build_model, build_similarity, load_checkpoint, network_weights, save_checkpoint
from tests.training.conftest import CIFAR10, QUIET, TINY
from training.augment import preprocessing
from training.calibrate import recalibrate
from training.config import TrainConfig
from training.data import ImageSet, load_images, split_validation
from training.errors import DataError
from training.train import train


def test_features_are_whitened_as_those_of_the_training_slice_are_spread(trained: Path, photos: ImageSet) -> None:
    checkpoint = load_checkpoint(trained)
    training, _ = split_validation(photos, TINY.val_fraction)
    with torch.inference_mode():
        features = build_model(checkpoint).forward_features(preprocessing(TINY)(training.images)).mean((2, 3))
    found = build_similarity(checkpoint)
    expected = torch.stack([features[training.labels == number].mean(0) for number in range(10)])
    torch.testing.assert_close(found.class_means, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.mean, features.mean(0), atol=1e-4, rtol=1e-3)
    spread = features.T.cov(correction=0) + 0.1 * features.var(0, correction=0).mean() * torch.eye(features.shape[1])
    torch.testing.assert_close(found.whitening @ spread @ found.whitening, torch.eye(features.shape[1]), atol=1e-3, rtol=0)


def test_calibrating_again_restores_what_training_fitted(trained: Path, tmp_path: Path) -> None:
    fitted = load_checkpoint(trained)
    path = tmp_path / "model.safetensors"
    means = fitted.tensors["similarity.class_means"]
    as_up_to_1_9_0 = {**network_weights(fitted), "class_means": means}
    save_checkpoint(path, as_up_to_1_9_0, {**fitted.description, "calibration": {"temperature": 9.0, "thresholds": {}}})
    recalibrate(path, CIFAR10, "cpu")
    found = load_checkpoint(path)
    torch.testing.assert_close(found.tensors, fitted.tensors)
    assert found.description["calibration"]["thresholds"] == pytest.approx(fitted.description["calibration"]["thresholds"])
    assert found.description["training"] == fitted.description["training"]


def test_a_network_looks_at_pictures_at_another_size_than_it_was_trained_at(trained: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(trained, tmp_path))
    figures = recalibrate(path, CIFAR10, "cpu", 40)
    found = load_checkpoint(path)
    config = TrainConfig.from_dict(found.description["training"]["config"])
    assert (config.image_size, config.view_size, config.train_size) == (32, 40, 32)
    _, validation = split_validation(load_images(CIFAR10, "train", 32), TINY.val_fraction)
    pixels = torch.nn.functional.interpolate(validation.images.float(), (40, 40), mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.normalize_mean, config.normalize_std))
    with torch.inference_mode():
        right = build_model(found)((pixels - mean) / std).argmax(1) == validation.labels
    assert figures["accuracy"] == pytest.approx(float(right.float().mean()))
    assert recalibrate(path, CIFAR10, "cpu") == figures, "it stays so"
    recalibrate(path, CIFAR10, "cpu", 32)
    torch.testing.assert_close(load_checkpoint(path).tensors, load_checkpoint(trained).tensors)


@pytest.mark.usefixtures("no_compiler")
def test_a_network_of_enlarged_pictures_takes_them_as_they_were(tmp_path: Path) -> None:
    """And enlarges them as they were enlarged for its training, but for rounding to whole numbers."""
    config = replace(TINY, image_size=38, train_size=36, resample="bicubic", epochs=1)
    path = train(config, load_images(CIFAR10, "train", 38, "bicubic"), tmp_path, QUIET)
    before = load_checkpoint(path)
    recalibrate(path, CIFAR10, "cpu", 38)
    after = load_checkpoint(path)
    config = TrainConfig.from_dict(after.description["training"]["config"])
    assert (config.image_size, config.view_size, config.train_size) == (32, 38, 36)
    native = load_images(CIFAR10, "train", 32)
    assert after.description["training"]["data_sha256"] == native.fingerprint()
    means = [build_similarity(checkpoint).class_means for checkpoint in (after, before)]
    torch.testing.assert_close(*means, atol=0.02, rtol=0.02)
    for key in ("temperature", "accuracy"):
        assert after.description["calibration"][key] == pytest.approx(before.description["calibration"][key], rel=0.05)


def test_other_data_are_refused(trained: Path, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(trained, tmp_path))
    with pytest.raises(DataError, match=r"is not what .* was trained with"):
        recalibrate(path, folder_of("cat", "dog"), "cpu")
    assert path.read_bytes() == trained.read_bytes()
