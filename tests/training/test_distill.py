"""A student comes closer to its teacher's answers, and a teacher that does not fit is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.architectures import build_network
from model.checkpoint import CheckpointError, build_model, load_checkpoint, save_checkpoint
from model.vit import ViTConfig
from tests.training.conftest import CIFAR10, QUIET, TINY
from training.config import AugmentConfig
from training.data import ImageSet, load_images
from training.distill import Distillation
from training.errors import ConfigError, DataError, ResumeError, Stopped
from training.evaluate import compute_logits
from training.train import train

CPU = torch.device("cpu")


def test_distance_is_zero_for_the_teachers_own_answers_and_positive_for_others(trained: Path, photos: ImageSet) -> None:
    distill = Distillation([trained], replace(TINY, distill_temperature=2.0), photos, CPU)
    pictures = torch.randn(8, 3, 32, 32)
    with torch.inference_mode():
        own = build_model(load_checkpoint(trained))(pictures)
    torch.testing.assert_close(distill(pictures, own), torch.tensor(0.0), atol=1e-5, rtol=0)
    other = torch.randn(8, 10)
    p, q = F.softmax(own / 2, 1), F.softmax(other / 2, 1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distill(pictures, other), expected, rtol=1e-3, atol=1e-5)


def test_a_teacher_of_larger_pictures_sees_them_enlarged(trained: Path, photos: ImageSet) -> None:
    distill = Distillation([trained], replace(TINY, image_size=16), photos, CPU)
    pictures = torch.randn(8, 3, 16, 16)
    with torch.inference_mode():
        own = build_model(load_checkpoint(trained))(F.interpolate(pictures, scale_factor=2, mode="bilinear"))
    torch.testing.assert_close(distill(pictures, own), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_of_several_teachers_the_mean_of_the_probabilities_is_learnt(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained)
    other = tmp_path / "other.safetensors"
    head = torch.randn(checkpoint.tensors["head.weight"].shape, generator=torch.Generator().manual_seed(0))
    save_checkpoint(other, {**checkpoint.tensors, "head.weight": head}, checkpoint.description)
    distill = Distillation([trained, other], replace(TINY, distill_temperature=2.0), photos, CPU)
    pictures, logits = torch.randn(8, 3, 32, 32), torch.randn(8, 10)
    with torch.inference_mode():
        p = sum(F.softmax(build_model(load_checkpoint(path))(pictures) / 2, 1) for path in (trained, other)) / 2
    expected = 4 * (p * (p / F.softmax(logits / 2, 1)).log()).sum(1).mean()
    torch.testing.assert_close(distill(pictures, logits), expected, rtol=1e-3, atol=1e-5)
    assert [teacher["sha256"] for teacher in distill.teachers] == [
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (trained, other)
    ]


def test_pictures_are_brought_to_the_size_a_teacher_learnt_at(trained: Path, photos: ImageSet) -> None:
    """Not to that which it is served at: the student's pictures, too, are those of a training."""
    distill = Distillation([trained], replace(TINY, image_size=48, train_size=40, resample="bicubic"), photos, CPU)
    pictures = torch.randn(8, 3, 40, 40)
    with torch.inference_mode():
        seen = F.interpolate(pictures, (32, 32), mode="bicubic", antialias=True)
        own = build_model(load_checkpoint(trained))(seen)
    torch.testing.assert_close(distill(pictures, own), torch.tensor(0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [23, 24, 28, 32, 36, 40])
def test_a_teacher_sees_whole_patches(trained: Path, photos: ImageSet, side: int) -> None:
    """At every size of the student: of a picture of 37 pixels one with patches of 2 would not see the last row and column."""
    distill = Distillation([trained], replace(TINY, image_size=40), photos, CPU)
    ((teacher, _),) = distill._networks
    seen: list[tuple[int, ...]] = []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    distill(torch.randn(2, 3, side, side), torch.randn(2, 10))
    ((height, width),) = seen
    assert height == width
    assert height % TINY.model.patch_size == 0
    assert abs(height - 32 / 40 * side) <= TINY.model.patch_size / 2


@pytest.mark.usefixtures("no_compiler")
def test_a_student_learns_its_teachers_answers_without_labels(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    config = replace(
        TINY, seed=5, epochs=12, lr=0.02, ema_decay=0.0, distill_weight=1.0, augment=AugmentConfig(crop_scale=1.0, flip=0.0)
    )
    shuffled = ImageSet(
        photos.images, photos.labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))], photos.classes
    )
    path = train(config, shuffled, tmp_path, QUIET, teachers=[trained])
    teacher, student = (
        compute_logits(build_model(load_checkpoint(p)), photos, config, CPU).log_softmax(1) for p in (trained, path)
    )
    uniform = torch.full_like(teacher, 0.1).log()
    distance, ignorance = (F.kl_div(q, teacher, reduction="batchmean", log_target=True) for q in (student, uniform))
    assert distance < 0.5 * ignorance
    training = load_checkpoint(path).description["training"]
    assert [teacher["name"] for teacher in training["teachers"]] == [load_checkpoint(trained).description["name"]]


@pytest.mark.usefixtures("no_compiler")
def test_a_run_is_resumed_with_its_own_teacher_only(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    train(TINY, photos, tmp_path, QUIET, teachers=[trained])
    train(TINY, photos, tmp_path, QUIET, teachers=[trained], resume=True)
    with pytest.raises(ResumeError, match=r"another teacher \(convmixer-16-2-k3-p2, SHA-256 \w{12}…\) than this run \(none\)"):
        train(TINY, photos, tmp_path, QUIET, resume=True)


def test_a_stopped_run_with_a_teacher_ends_the_same_in_bf16(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    """With the kernels of `training/kernels.cpp`, where there is a compiler."""
    runtime = replace(QUIET, precision="bf16")
    whole = train(TINY, photos, tmp_path / "whole", runtime, teachers=[trained])
    with pytest.raises(Stopped):
        train(TINY, photos, tmp_path, runtime, teachers=[trained], deadline=0.0)
    resumed = train(TINY, photos, tmp_path, runtime, teachers=[trained], resume=True)
    expected, found = load_checkpoint(whole).tensors, load_checkpoint(resumed).tensors
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_a_teacher_that_has_learnt_what_is_held_out(trained: Path, photos: ImageSet, capsys: pytest.CaptureFixture[str]) -> None:
    """At another size the same pictures are held out; of others nothing is known."""
    larger = load_images(CIFAR10, "train", 40)
    Distillation([trained], replace(TINY, image_size=40), larger, CPU)
    assert capsys.readouterr().err == ""
    with pytest.raises(DataError, match=r"has learnt some of the 0\.5"):
        Distillation([trained], replace(TINY, image_size=40, val_fraction=0.5), larger, CPU)
    fewer = ImageSet(photos.images[1:], photos.labels[1:], photos.classes)
    Distillation([trained], TINY, fewer, CPU)
    assert "was trained with other images of classes that are here, too" in capsys.readouterr().err


def test_other_pictures_of_the_same_classes_are_not_the_teachers(
    trained: Path, photos: ImageSet, folder_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """However many there are of each class, they may be held out."""
    folder = folder_of(*photos.classes)
    (folder / "cat").rename(folder / "old")
    (folder / "dog").rename(folder / "cat")
    (folder / "old").rename(folder / "dog")
    half = replace(TINY, val_fraction=0.5)
    for others, told in (
        (load_images(folder, "train", 32), "was trained with these very pictures"),
        (
            ImageSet(255 - photos.images, photos.labels, photos.classes),
            "was trained with other images of classes that are here, too",
        ),
    ):
        assert torch.equal(others.labels, photos.labels)
        Distillation([trained], half, others, CPU)
        assert told in capsys.readouterr().err


def test_of_an_older_teacher_only_the_pixels_are_known(
    trained: Path, photos: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, older = load_checkpoint(trained), tmp_path / "older.safetensors"
    hashes = {"source_sha256", "pictures_sha256"}
    training = {name: value for name, value in checkpoint.description["training"].items() if name not in hashes}
    save_checkpoint(older, checkpoint.tensors, {**checkpoint.description, "training": training})
    with pytest.raises(DataError, match=r"has learnt some of the 0\.5"):
        Distillation([older], replace(TINY, val_fraction=0.5), photos, CPU)
    assert capsys.readouterr().err == ""
    Distillation([older], replace(TINY, image_size=40, val_fraction=0.5), load_images(CIFAR10, "train", 40), CPU)
    assert "in another order or size" in capsys.readouterr().err


def test_a_teacher_that_does_not_fit_is_refused(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows classes"):
        Distillation([trained], TINY, replace(photos, classes=["cat", "dog"]), CPU)
    with pytest.raises(ConfigError, match="normalised differently"):
        Distillation([trained], replace(TINY, normalize_mean=(0.5, 0.5, 0.5)), photos, CPU)
    with pytest.raises(DataError, match=r"has learnt some of the 0\.5"):
        Distillation([trained], replace(TINY, val_fraction=0.5), photos, CPU)
    vit = tmp_path / "vit.safetensors"
    network = ViTConfig(hidden_dim=8, depth=1, heads=2, mlp_dim=8, patch_size=8)
    found = load_checkpoint(trained)
    save_checkpoint(vit, build_network(network).state_dict(), {**found.description, "model": asdict(network)})
    Distillation([vit], replace(TINY, view_size=38, train_size=36), photos, CPU)(torch.randn(2, 3, 36, 36), torch.randn(2, 10))
    with pytest.raises(ConfigError, match="takes images of 32 pixels only, those of this run grow; set start_size to 0"):
        Distillation([vit], replace(TINY, start_size=24), photos, CPU)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Distillation([tmp_path / "none.safetensors"], TINY, photos, CPU)
