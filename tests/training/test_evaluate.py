"""The report is of the checkpoint and the images it names, and of nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import CheckpointError, build_model, load_checkpoint
from tests.training.conftest import CIFAR10, TINY
from training.data import ImageSet
from training.errors import DataError
from training.evaluate import compute_logits, evaluate


def test_report_is_what_the_network_answers(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    report = evaluate(trained, CIFAR10, tmp_path / "report.json", "cpu")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["checkpoint"] == "model.safetensors"
    assert report["checkpoint_sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert report["data_sha256"] == photos.fingerprint()
    assert report["images"] == 200

    checkpoint = load_checkpoint(trained)
    mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (TINY.normalize_mean, TINY.normalize_std))
    pixels = torch.from_numpy((photos.images.numpy().astype(np.float32) / 255 - mean) / std)
    with torch.inference_mode():
        right = build_model(checkpoint)(pixels).argmax(1) == photos.labels
    assert report["top1"] == pytest.approx(float(right.float().mean()), abs=0.0051)
    assert report["temperature"] == checkpoint.description["calibration"]["temperature"]
    assert list(report["per_class"]) == photos.classes
    assert [sum(row) for row in report["confusion"]] == [20] * 10


def test_logits_do_not_depend_on_how_images_are_batched(trained: Path, photos: ImageSet) -> None:
    net = build_model(load_checkpoint(trained)).train()
    everything = compute_logits(net, photos, TINY, torch.device("cpu"))
    assert not net.training, "evaluation mode, or the statistics would move"
    assert everything.shape == (200, 10)
    part = ImageSet(photos.images[50:53], photos.labels[50:53], photos.classes)
    torch.testing.assert_close(compute_logits(net, part, TINY, torch.device("cpu")), everything[50:53], atol=1e-5, rtol=1e-5)


def test_test_images_that_are_in_the_training_too_are_counted(
    trained: Path, photos: ImageSet, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder_of(*photos.classes).rename(folder.parent / "copy")
    for split in ("train", "test"):
        shutil.copytree(tmp_path / "copy", folder / split)
    for number, path in enumerate(sorted((folder / "train").rglob("*.webp"))):
        if number >= 7:
            path.unlink()
        elif number == 0:
            path.rename(path.parent.parent / "truck" / "renamed.webp")
    (folder / "train" / "cat" / "gone.webp").symlink_to("nowhere")  # nothing that an evaluation reads
    report = evaluate(trained, folder, tmp_path / "report.json", "cpu")
    assert (report["images"], report["learnt"], report["trained_with"]) == (200, 7, True)
    assert evaluate(trained, CIFAR10, tmp_path / "report.json", "cpu")["learnt"] == 0


def test_other_classes_are_refused(trained: Path, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data has classes \['cat', 'dog'\], the checkpoint \['airplane', "):
        evaluate(trained, folder_of("cat", "dog"), tmp_path / "report.json", "cpu")
    assert not list(tmp_path.iterdir())


def test_a_training_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="describes no network"):
        evaluate(trained.with_name("last.safetensors"), CIFAR10, tmp_path / "report.json", "cpu")
