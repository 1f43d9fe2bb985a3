"""A run learns, repeats itself bit by bit, survives being stopped and killed, and says what is wrong when it cannot go on."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model.architectures import build_network
from model.checkpoint import SIMILARITY, CheckpointError, build_model, load_checkpoint, network_weights, save_checkpoint
from model.convmixer import count_parameters
from tests.disk import files_of_at_most
from tests.training.conftest import CIFAR10, QUIET, TINY, signal_at
from training import state as state_module
from training import train as train_module
from training.augment import preprocessing
from training.calibrate import calibrate, recalibrate
from training.config import AugmentConfig, TrainConfig
from training.data import ImageSet, load_images, split_validation
from training.errors import ConfigError, DataError, DivergenceError, ResumeError, Stopped, StorageError
from training.evaluate import compute_logits
from training.presets import get_preset
from training.runtime import LAYOUTS, Runtime, hardware
from training.train import image_size_at, learning_rate, train

FolderOf = Callable[..., Path]
ANIMALS = ("cat", "frog", "horse")


def few(photos: ImageSet, *classes: int) -> ImageSet:
    chosen = torch.isin(photos.labels, torch.tensor(classes))
    labels = torch.searchsorted(torch.tensor(classes), photos.labels[chosen])
    return ImageSet(photos.images[chosen], labels, [photos.classes[i] for i in classes])


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = load_checkpoint(first).tensors, load_checkpoint(second).tensors
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.fixture(scope="module")
def animals(photos: ImageSet) -> ImageSet:
    return few(photos, 3, 6, 7)


@pytest.mark.usefixtures("no_compiler")
def test_a_run_is_the_steps_that_its_settings_say(photos: ImageSet, tmp_path: Path) -> None:
    """The same by hand, with PyTorch's parts alone: learning rate, smoothing, clipping and weight decay of every step."""
    config = replace(
        TINY,
        batch_size=95,
        lr=0.02,
        ema_decay=0.0,
        label_smoothing=0.2,
        clip_norm=0.3,
        weight_decay=0.5,
        augment=AugmentConfig(crop_scale=1.0, flip=0.0),
    )
    found = network_weights(load_checkpoint(train(config, photos, tmp_path, QUIET)))

    training, _ = split_validation(photos, config.val_fraction)
    torch.manual_seed(config.seed)
    net = build_network(config.model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), eps=config.adam_eps, weight_decay=0.5)
    for epoch in range(2):
        order = torch.randperm(190, generator=torch.Generator().manual_seed(config.seed * 1_000_000_007 + epoch))
        for half in range(2):
            optimizer.param_groups[0]["lr"] = learning_rate(config, 2 * epoch + half, 4)
            batch = order[95 * half : 95 * half + 95]
            pictures = preprocessing(config)(training.images[batch]).contiguous(memory_format=torch.channels_last)
            F.cross_entropy(net.train()(pictures), training.labels[batch], label_smoothing=0.2).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


# Schedules


def test_one_cycle_rises_to_the_peak_and_falls_to_zero() -> None:
    config = TrainConfig(lr=0.01, warmup=0.3)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.01 / 30)
    assert rates[29] == max(rates) == pytest.approx(0.01)
    assert rates[14] == pytest.approx(0.005)
    assert rates[64] == pytest.approx(0.005)
    assert rates[99] == pytest.approx(0, abs=1e-12)
    assert rates[:30] == sorted(rates[:30])
    assert rates[29:] == sorted(rates[29:], reverse=True)


def test_one_cycle_without_warm_up_starts_near_the_peak() -> None:
    rates = [learning_rate(TrainConfig(lr=0.01, warmup=0), step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_constant_stays() -> None:
    assert {learning_rate(TrainConfig(lr=0.02, schedule="constant"), step, 10) for step in range(10)} == {0.02}


def test_images_grow_in_steps_of_four_and_reach_the_full_size_at_70_percent() -> None:
    config = TrainConfig(start_size=20)
    sizes = [image_size_at(config, step, 100) for step in range(100)]
    assert sizes[0] == 20
    assert set(sizes) == {20, 24, 28, 32}
    assert sizes == sorted(sizes)
    assert set(sizes[70:]) == {32}
    assert {image_size_at(TrainConfig(start_size=0), step, 100) for step in range(100)} == {32}
    smaller = TrainConfig(image_size=38, train_size=30, start_size=24)
    assert {image_size_at(smaller, step, 100) for step in range(100)} == {24, 28, 30}
    assert {image_size_at(replace(smaller, start_size=0), step, 100) for step in range(100)} == {30}


@pytest.mark.parametrize(("start", "end"), [(2, 32), (3, 5), (18, 30), (33, 33)])
def test_images_are_never_smaller_than_the_start_or_larger_than_the_end(start: int, end: int) -> None:
    config = TrainConfig(start_size=start, image_size=end)
    sizes = [image_size_at(config, step, 50) for step in range(50)]
    assert min(sizes) >= start
    assert max(sizes) == sizes[-1] == end


# Learning


@pytest.mark.usefixtures("no_compiler")
def test_learns_two_classes_by_heart(photos: ImageSet, tmp_path: Path) -> None:
    data = few(photos, 6, 8)
    config = replace(
        TINY, epochs=30, batch_size=12, lr=0.02, augment=AugmentConfig(crop_scale=1.0, flip=0.0), label_smoothing=0.0
    )
    checkpoint = load_checkpoint(train(config, data, tmp_path, QUIET))
    losses = [row["train_loss"] for row in checkpoint.description["training"]["history"]]
    assert losses[0] > 0.5
    assert losses[-1] < 0.2 * losses[0]
    answers = compute_logits(build_model(checkpoint), data, config, torch.device("cpu")).argmax(1)
    assert (answers == data.labels).float().mean() >= 0.9


def test_releases_all_that_evaluation_and_export_need(trained: Path, photos: ImageSet) -> None:
    checkpoint = load_checkpoint(trained)
    net, description = build_model(checkpoint), checkpoint.description
    assert description["name"] == "convmixer-16-2-k3-p2"
    assert description["parameters"] == count_parameters(net)
    assert description["classes"] == photos.classes
    assert description["image_size"] == 32
    assert description["normalize_mean"] == list(TINY.normalize_mean)
    training = description["training"]
    assert TrainConfig.from_dict(training["config"]) == TINY
    assert (training["images"], training["validation_images"]) == (190, 10)
    assert training["data_sha256"] == photos.fingerprint()
    assert training["source_sha256"] == photos.source_sha256
    assert training["torch"] == torch.__version__
    assert [row["epoch"] for row in training["history"]] == [1, 2]
    assert all(row["image_size"] == 32 and row["seconds"] > 0 for row in training["history"])
    assert sorted(p.name for p in trained.parent.iterdir()) == [
        f"{kind}.{suffix}" for kind in ("last", "model") for suffix in ("json", "safetensors")
    ]


def test_calibration_is_of_the_held_out_images(trained: Path, photos: ImageSet) -> None:
    checkpoint = load_checkpoint(trained)
    training, validation = split_validation(photos, TINY.val_fraction)
    expected = calibrate(build_model(checkpoint), training, validation, TINY, torch.device("cpu"))
    found = checkpoint.description["calibration"]
    assert found["temperature"] == pytest.approx(expected.figures["temperature"], rel=1e-3)
    assert found["thresholds"] == pytest.approx(expected.figures["thresholds"], rel=1e-3)
    assert found["after"]["nll"] <= found["before"]["nll"] + 1e-9


def test_the_same_run_twice_is_the_same_to_the_bit(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # what the process did before must not matter
    again = train(TINY, photos, tmp_path, QUIET)
    assert_same_weights(trained, again)
    histories = [load_checkpoint(path).description["training"]["history"] for path in (trained, again)]
    for rows in histories:
        for row in rows:
            del row["seconds"]
    assert histories[0] == histories[1]


@pytest.mark.usefixtures("no_compiler")
def test_mixing_ends_at_its_share_of_the_run(animals: ImageSet, tmp_path: Path) -> None:
    """Before it a run is as if it mixed to its end, and then it is not."""
    whole = TINY.override({"augment.mixup": "1", "epochs": "4"})
    histories = []
    for share in ("1", "0.5"):
        config = whole.override({"augment.mix_until": share})
        path = train(config, animals, tmp_path / share, QUIET)
        histories.append([row["train_loss"] for row in load_checkpoint(path).description["training"]["history"]])
    assert histories[0][:2] == histories[1][:2]
    assert all(plain < mixed for mixed, plain in zip(histories[0][2:], histories[1][2:], strict=True))


@pytest.mark.usefixtures("no_compiler")
def test_another_seed_is_another_run(animals: ImageSet, tmp_path: Path) -> None:
    weights = [load_checkpoint(train(replace(TINY, seed=s), animals, tmp_path / str(s), QUIET)).tensors for s in (1, 2)]
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("settings", "runtime"),
    [
        ({"augment.mixup": "0.5", "augment.cutmix": "0.5", "augment.randaugment_ops": "1"}, QUIET),
        ({"augment.cutmix": "0.5", "augment.mix_until": "0.5"}, QUIET),
        ({"optimizer": "adam", "schedule": "constant", "clip_norm": "0", "ema_decay": "0"}, QUIET),
        ({"optimizer": "muon", "muon_lr": "0.02"}, QUIET),
        ({"start_size": "24", "augment.pad_crop": "2", "epochs": "4"}, QUIET),
        ({"start_size": "28", "train_size": "36", "view_size": "38", "resample": "bicubic", "epochs": "4"}, QUIET),
        ({"model.patch_size": "1", "model.kernel_size": "5", "label_smoothing": "0"}, QUIET),
        ({}, replace(QUIET, precision="bf16")),
        ({"model.residual": "none", "model.norm": "layernorm", "model.activation": "relu"}, QUIET),
        ({"model.kernel_size": "1", "ema_decay": "0"}, QUIET),
        ({"model.architecture": "vit", "model.patch_size": "4"}, QUIET),
        ({"model.architecture": "mlp-mixer", "ema_decay": "0"}, QUIET),
    ],
    ids=[
        "mixed targets",
        "mixing ends",
        "Adam",
        "Muon",
        "growing images",
        "a larger view",
        "other network",
        "bf16",
        "variant",
        "kernels of one",
        "ViT",
        "MLP-Mixer",
    ],
)
def test_every_kind_of_run_releases_a_network(
    animals: ImageSet, tmp_path: Path, settings: dict[str, str], runtime: Runtime
) -> None:
    config = TINY.override(settings)
    checkpoint = load_checkpoint(train(config, animals, tmp_path, runtime))
    history = checkpoint.description["training"]["history"]
    assert len(history) == config.epochs
    assert checkpoint.description["training"]["precision"] == runtime.precision
    if config.start_size:
        assert [row["image_size"] for row in history] == sorted(row["image_size"] for row in history)
        assert history[-1]["image_size"] == config.largest_size
    assert checkpoint.description["view_size"] == config.seen_size
    logits = build_model(checkpoint)(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()


# Starting from a checkpoint


@pytest.mark.usefixtures("no_compiler")
def test_starts_with_the_weights_of_another_run_and_says_so(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    frozen = replace(TINY, lr=1e-12, weight_decay=0.0, epochs=1)
    checkpoint = load_checkpoint(train(frozen, photos, tmp_path, QUIET, init=trained))
    before = load_checkpoint(trained)
    for name, weight in before.tensors.items():
        if not name.startswith(SIMILARITY) and not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.allclose(checkpoint.tensors[name], weight, atol=1e-6), name
    origin = checkpoint.description["training"]["init"]
    assert origin["name"] == before.description["name"]
    assert origin["sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()
    assert origin["epochs"] == TINY.epochs
    again = load_checkpoint(train(frozen, photos, tmp_path / "third", QUIET, init=tmp_path / "model.safetensors"))
    assert again.description["training"]["init"]["epochs"] == TINY.epochs + 1
    assert again.description["training"]["init"]["seconds"] > origin["seconds"]


@pytest.mark.usefixtures("no_compiler")
def test_other_classes_get_a_new_head_on_the_old_body(trained: Path, animals: ImageSet, tmp_path: Path) -> None:
    frozen = replace(TINY, lr=1e-12, weight_decay=0.0, epochs=1)
    checkpoint = load_checkpoint(train(frozen, animals, tmp_path, QUIET, init=trained))
    assert checkpoint.tensors["head.weight"].shape == (3, 16)
    body = "blocks.1.pointwise.weight"
    assert torch.allclose(checkpoint.tensors[body], load_checkpoint(trained).tensors[body], atol=1e-6)


@pytest.mark.usefixtures("no_compiler")
def test_a_wider_network_begins_with_what_the_narrower_one_has_learnt(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    wider = replace(TINY.override({"model.hidden_dim": "24", "model.kernel_size": "5"}), lr=1e-12, weight_decay=0.0, epochs=1)
    checkpoint, before = load_checkpoint(train(wider, photos, tmp_path, QUIET, init=trained)), load_checkpoint(trained)
    assert checkpoint.description["training"]["init"]["name"] == before.description["name"]
    for network in (grown := build_model(checkpoint), small := build_model(before)):
        network.train()  # the run measured other batches than the one it began with, so its statistics are others
    with torch.no_grad():
        images = preprocessing(TINY)(photos.images)
        torch.testing.assert_close(grown(images), small(images), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_from_before_there_were_other_networks_can_be_started_from(
    trained: Path, photos: ImageSet, tmp_path: Path, no_compiler: None
) -> None:
    checkpoint = load_checkpoint(trained)
    for name in ("architecture", "residual", "norm", "activation"):
        del checkpoint.description["model"][name]
    save_checkpoint(tmp_path / "old.safetensors", checkpoint.tensors, checkpoint.description)
    train(replace(TINY, epochs=1), photos, tmp_path, QUIET, init=tmp_path / "old.safetensors")
    with pytest.raises(ConfigError, match=r"architecture is convmixer, here vit"):
        train(TINY.override({"model.architecture": "vit"}), photos, tmp_path / "vit", QUIET, init=tmp_path / "old.safetensors")


def test_another_network_cannot_start_from_it(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    narrower = TINY.override({"model.hidden_dim": "8"})
    with pytest.raises(ConfigError, match="hidden_dim is 16, here 8"):
        train(narrower, photos, tmp_path, QUIET, init=trained)
    with pytest.raises(DataError, match=r"give --set val_fraction=0\.\d+"):
        train(replace(TINY, val_fraction=0.5), photos, tmp_path, QUIET, init=trained)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        train(TINY, photos, tmp_path, QUIET, init=tmp_path / "none.safetensors")


@pytest.mark.usefixtures("no_compiler")
def test_the_gpus_record_begins_with_what_is_released(photos: ImageSet, tmp_path: Path, repository: Path) -> None:
    """And learns from it, of a few pictures and in two steps."""
    few = ImageSet(photos.images[::10], photos.labels[::10], photos.classes)
    released = [repository / "releases" / name / "model.safetensors" for name in ("accurate", "fast", "teacher")]
    config = replace(get_preset("gpu-record").config, epochs=1, batch_size=5)
    description = load_checkpoint(train(config, few, tmp_path, QUIET, init=released[0], teachers=released)).description
    assert description["parameters"] == 958_522
    assert description["training"]["steps"] == 2
    assert description["training"]["init"]["name"] == load_checkpoint(released[0]).description["name"]
    assert len(description["training"]["teachers"]) == 3


@pytest.mark.usefixtures("no_compiler")
def test_the_layout_in_memory_changes_nothing(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    """But for rounding."""
    first, last = (
        load_checkpoint(train(TINY, photos, tmp_path / layout, replace(QUIET, layout=layout), teachers=[trained]))
        for layout in LAYOUTS
    )
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(last.tensors[name], tensor, rtol=0.01, atol=0.01)


@pytest.mark.usefixtures("no_compiler")
def test_a_run_begins_with_weights_of_pixels_normalised_as_its_own(trained: Path, photos: ImageSet, tmp_path: Path) -> None:
    config = replace(TINY, normalize_std=(0.1, 0.1, 0.1))
    with pytest.raises(
        ConfigError, match=r"normalised differently; give --set normalize_mean=0.4914,.* --set normalize_std=0.247,"
    ):
        train(config, photos, tmp_path, QUIET, init=trained)


@pytest.mark.usefixtures("no_compiler")
def test_a_run_is_not_overwritten_by_another(animals: ImageSet, tmp_path: Path) -> None:
    path = train(TINY, animals, tmp_path, QUIET)
    with pytest.raises(ResumeError, match="holds a run already"):
        train(TINY, animals, tmp_path, QUIET)
    shutil.copytree(tmp_path, tmp_path / "released", ignore=shutil.ignore_patterns("last.*"))
    with pytest.raises(ResumeError, match="holds a model already"):
        train(TINY, animals, tmp_path / "released", QUIET)
    with pytest.raises(CheckpointError):  # of a run, not of a network
        train(TINY, animals, tmp_path / "next", QUIET, init=path.with_name("last.safetensors"))


@pytest.mark.usefixtures("no_compiler")
def test_averaged_weights_are_released_when_averaging_is_on(animals: ImageSet, tmp_path: Path) -> None:
    for decay, group in ((0.9, "ema."), (0.0, "model.")):
        path = train(replace(TINY, ema_decay=decay), animals, tmp_path / str(decay), QUIET)
        last = load_checkpoint(path.with_name("last.safetensors")).tensors
        released = network_weights(load_checkpoint(path))
        assert all(torch.equal(tensor, last[group + name]) for name, tensor in released.items())


@pytest.mark.usefixtures("no_compiler")
def test_event_files_hold_the_history(animals: ImageSet, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = train(TINY, animals, tmp_path, replace(QUIET, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    history = load_checkpoint(path).description["training"]["history"]
    for name in ("train_loss", "val_accuracy", "lr"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([row[name] for row in history])


def test_runtime_suits_the_machine() -> None:
    runtime = Runtime.detect(tensorboard=False)
    assert runtime.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert runtime.precision in ("bf16", "fp16" if runtime.device == "cuda" else "float32")
    assert not runtime.tensorboard
    assert hardware(QUIET).endswith("1 threads")


@pytest.mark.usefixtures("no_compiler")
def test_too_few_images_for_one_batch(animals: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="57 training images do not fill one batch of 64; give --set batch_size=57 or less"):
        train(replace(TINY, batch_size=64), animals, tmp_path, QUIET)


@pytest.mark.usefixtures("no_compiler")
def test_a_run_that_would_learn_nothing_is_refused(animals: ImageSet, tmp_path: Path) -> None:
    config = replace(TINY, epochs=1, batch_size=57)
    with pytest.raises(ConfigError, match=r"the run has one step, .* it would learn nothing; give more --epochs or a smaller"):
        train(config, animals, tmp_path, QUIET)
    assert not list(tmp_path.iterdir())
    train(replace(config, epochs=2), animals, tmp_path / "two", QUIET)
    train(replace(config, schedule="constant"), animals, tmp_path / "constant", QUIET)


# Stopping, killing, resuming

LONG = {"epochs": 40, "lr": 0.01, "ema_decay": 0.9, "batch_size": 16, "augment.erase": 0.25}
LONG |= {"model.hidden_dim": 16, "model.depth": 2, "model.kernel_size": 3, "model.patch_size": 2, "start_size": 0}
LONG_CONFIG = TrainConfig(augment=replace(AugmentConfig(), randaugment_ops=1)).override({k: str(v) for k, v in LONG.items()})


@pytest.fixture(scope="module")
def animal_folder(folder_of: FolderOf) -> Path:
    return folder_of(*ANIMALS)


@pytest.fixture(scope="module")
def uninterrupted(animal_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = load_images(animal_folder, "train", 32)
    return train(LONG_CONFIG, data, tmp_path_factory.mktemp("whole"), QUIET)


def start(data: Path, output: Path, repository: Path) -> subprocess.Popen[str]:
    """`python -m training train` with LONG_CONFIG as a process of its own."""
    settings = [f"--set={name}={value}" for name, value in {**LONG, "label_smoothing": 0.1}.items()]
    options = ["--preset=small", "--set=augment.randaugment_ops=1", "--device=cpu", "--precision=float32"]
    return subprocess.Popen(
        [sys.executable, "-m", "training", "train", "--data", str(data), "--output", str(output), *options, *settings],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(run: subprocess.Popen[str], text: str) -> None:
    assert run.stderr is not None
    seen = []
    for line in run.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"the run ended with {run.wait()} before {text!r}:\n{''.join(seen)}")


def test_sigterm_saves_and_the_resumed_run_ends_the_same(
    animal_folder: Path, uninterrupted: Path, tmp_path: Path, repository: Path
) -> None:
    with start(animal_folder, tmp_path, repository) as run:
        read_until(run, "epoch   2 ")
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, errors
    assert "by a signal; continue with --resume" in errors
    assert "Traceback" not in errors
    saved = load_checkpoint(tmp_path / "last.safetensors").description
    assert 6 <= saved["step"] < 120
    assert not (tmp_path / "model.safetensors").exists()
    resumed = train(LONG_CONFIG, load_images(animal_folder, "train", 32), tmp_path, QUIET, resume=True)
    assert_same_weights(resumed, uninterrupted)
    assert load_checkpoint(resumed).description["training"]["seconds"] > saved["seconds"]


@pytest.fixture(scope="module")
def whole_run(animals: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY for three epochs of three steps, without a compiler."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PATH", "")
        return train(replace(TINY, epochs=3), animals, tmp_path_factory.mktemp("whole"), QUIET)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("stops", [[1], [5], [6], [9], [2, 4, 8]], ids=str)
def test_a_run_stopped_in_any_step_ends_the_same(animals: ImageSet, whole_run: Path, tmp_path: Path, stops: list[int]) -> None:
    config = replace(TINY, epochs=3)
    with signal_at(stops) as taken:
        for step in stops:
            with pytest.raises(Stopped) as end:
                train(config, animals, tmp_path, QUIET, resume=step != stops[0])
            assert end.value.signal_number == signal.SIGTERM
            assert load_checkpoint(tmp_path / "last.safetensors").description["step"] == step
        resumed = train(config, animals, tmp_path, QUIET, resume=True)
    assert len(taken) == 9, "no step is done twice"
    assert_same_weights(resumed, whole_run)
    histories = [load_checkpoint(path).description["training"]["history"] for path in (resumed, whole_run)]
    assert [row["train_loss"] for row in histories[0]] == [row["train_loss"] for row in histories[1]]


@pytest.mark.usefixtures("no_compiler")
def test_a_run_stopped_by_its_deadline_goes_on(animals: ImageSet, whole_run: Path, tmp_path: Path) -> None:
    config = replace(TINY, epochs=3)
    with pytest.raises(Stopped):
        train(config, animals, tmp_path, QUIET, deadline=0.0)
    assert load_checkpoint(tmp_path / "last.safetensors").description["step"] == 1
    assert_same_weights(train(config, animals, tmp_path, QUIET, resume=True), whole_run)


@pytest.mark.usefixtures("no_compiler")
def test_what_muon_remembers_is_resumed_too(animals: ImageSet, tmp_path: Path) -> None:
    config = replace(TINY, optimizer="muon")
    whole = train(config, animals, tmp_path / "whole", QUIET)
    with pytest.raises(Stopped):
        train(config, animals, tmp_path, QUIET, deadline=0.0)
    assert_same_weights(train(config, animals, tmp_path, QUIET, resume=True), whole)


@pytest.fixture
def interrupted_at(animals: ImageSet, tmp_path: Path, no_compiler: None) -> Callable[[int], Path]:
    """Output folder of TINY, stopped by Ctrl-C in the given step of six."""

    def run(step: int) -> Path:
        with signal_at([step], signal.SIGINT), pytest.raises(Stopped):
            train(TINY, animals, tmp_path / "run", QUIET)
        return tmp_path / "run"

    return run


def test_finish_releases_what_a_stopped_run_has_come_to(animals: ImageSet, interrupted_at: Callable[[int], Path]) -> None:
    output = interrupted_at(4)
    last = (output / "last.safetensors").read_bytes()
    released = load_checkpoint(train(TINY, animals, output, QUIET, resume=True, finish=True))
    averaged = load_checkpoint(output / "last.safetensors").tensors
    assert all(torch.equal(tensor, averaged["ema." + name]) for name, tensor in network_weights(released).items())
    training = released.description["training"]
    assert (training["steps"], training["total_steps"], len(training["history"])) == (4, 6, 1)
    assert (output / "last.safetensors").read_bytes() == last, "the run can still be resumed"


def test_finish_before_the_first_epoch_has_ended(animals: ImageSet, interrupted_at: Callable[[int], Path]) -> None:
    output = interrupted_at(2)
    with pytest.raises(ResumeError, match="there is nothing to release yet"):
        train(TINY, animals, output, QUIET, resume=True, finish=True)
    assert not (output / "model.safetensors").exists()


@pytest.mark.usefixtures("no_compiler")
def test_ctrl_c_saves_the_step_it_is_in(animals: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "CHECKPOINT_INTERVAL_S", 0.0)  # a checkpoint after every step
    before = signal.getsignal(signal.SIGINT)
    last = tmp_path / "last.safetensors"

    ended = threading.Event()

    def interrupt_once_it_runs() -> None:
        while not last.exists():
            if ended.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt_once_it_runs)
    watcher.start()
    try:
        with pytest.raises(Stopped) as end:
            train(replace(TINY, epochs=10**6), animals, tmp_path, QUIET)  # only the signal ends it
    finally:
        ended.set()
        watcher.join()
    assert end.value.signal_number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    description = load_checkpoint(last).description
    assert description["step"] >= 1
    assert len(description["history"]) == description["step"] // 3


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> Path:
    """Output folder with the checkpoint after TINY's last epoch."""
    return Path(shutil.copytree(trained.parent, tmp_path / "stopped"))


def test_a_finished_run_resumes_to_the_same_release(stopped: Path, photos: ImageSet, trained: Path) -> None:
    (stopped / "model.safetensors").unlink()
    assert_same_weights(train(TINY, photos, stopped, QUIET, resume=True), trained)


def test_a_finished_run_keeps_what_was_released_and_calibrated_since(
    stopped: Path, photos: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    recalibrate(stopped / "model.safetensors", CIFAR10, "cpu", 40)
    path = train(TINY, photos, stopped, QUIET, resume=True)
    assert load_checkpoint(path).description["view_size"] == 40
    assert "holds a finished run" in capsys.readouterr().err


def test_what_another_run_has_left_is_not_taken_for_its_own_release(
    stopped: Path, photos: ImageSet, trained: Path, tmp_path: Path
) -> None:
    """As when only last.safetensors was removed, and the new run was stopped just before its release."""
    other = train(replace(TINY, seed=1), photos, tmp_path / "other", QUIET)
    shutil.copy(other, stopped)
    assert_same_weights(train(TINY, photos, stopped, QUIET, resume=True), trained)


def test_a_run_goes_on_with_what_it_began_with(trained: Path, photos: ImageSet, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="began without --init"):
        train(TINY, photos, stopped, QUIET, init=trained, resume=True)
    next_run = tmp_path / "next"
    train(TINY, photos, next_run, QUIET, init=trained)
    assert train(TINY, photos, next_run, QUIET, init=trained, resume=True) == next_run / "model.safetensors"
    with pytest.raises(ResumeError, match=r"began with convmixer-\S+ SHA-256"):
        train(TINY, photos, next_run, QUIET, init=next_run / "model.safetensors", resume=True)
    with pytest.raises(CheckpointError):
        train(TINY, photos, next_run, QUIET, init=tmp_path / "none.safetensors", resume=True)


def test_modules_that_do_not_count_as_the_code_of_a_run_exist(repository: Path) -> None:
    names = {path.name for folder in ("training", "model") for path in (repository / folder).glob("*.py")}
    assert names > state_module._NOT_IN_A_RUN


def test_nothing_to_resume(photos: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"no checkpoint at .*last\.safetensors; start without --resume"):
        train(TINY, photos, tmp_path, QUIET, resume=True)


def test_a_damaged_checkpoint_is_not_resumed(stopped: Path, photos: ImageSet) -> None:
    last = stopped / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    with pytest.raises(ResumeError, match=r"is damaged .*; remove it, or give another --output"):
        train(TINY, photos, stopped, QUIET, resume=True)


def test_changed_settings_are_named(stopped: Path, photos: ImageSet) -> None:
    config = TINY.override({"lr": "0.5", "augment.flip": "0.25", "model.depth": "3"})
    with pytest.raises(
        ResumeError, match=r"settings differ from .*: model\.depth was 2, now 3; augment\.flip was 0\.5, now 0\.25; lr was"
    ):
        train(config, photos, stopped, QUIET, resume=True)


def test_changed_data_is_noticed(stopped: Path, photos: ImageSet) -> None:
    changed = photos.images.clone()
    changed[0, 0, 0, 0] ^= 1
    with pytest.raises(ResumeError, match="was trained on other data"):
        train(TINY, replace(photos, images=changed), stopped, QUIET, resume=True)


def rewrite(last: Path, **changes: Any) -> None:
    checkpoint = load_checkpoint(last)
    save_checkpoint(last, checkpoint.tensors, {**checkpoint.description, **changes})


def test_a_checkpoint_of_other_code_is_not_resumed(stopped: Path, photos: ImageSet) -> None:
    rewrite(stopped / "last.safetensors", code_version="0.0.0")
    with pytest.raises(ResumeError, match=r"is from version 0\.0\.0, this is .*; remove it to start anew"):
        train(TINY, photos, stopped, QUIET, resume=True)


def test_a_run_that_goes_on_with_changed_code_says_so(
    stopped: Path, photos: ImageSet, capsys: pytest.CaptureFixture[str]
) -> None:
    def resume() -> dict[str, Any]:
        found: dict[str, Any] = load_checkpoint(train(TINY, photos, stopped, QUIET, resume=True)).description["training"]
        return found

    (stopped / "model.safetensors").unlink()
    assert not resume()["code_changed"]
    assert "is not that which wrote" not in capsys.readouterr().err
    (stopped / "model.safetensors").unlink()
    rewrite(stopped / "last.safetensors", code_sha256="0" * 64)
    assert resume()["code_changed"]
    assert "is not that which wrote" in capsys.readouterr().err


# What else can go wrong

WILD = replace(TINY, lr=1e30, clip_norm=0.0, schedule="constant")


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("batch_size", [16, 57], ids=["within an epoch", "at the end of an epoch"])
def test_divergence_stops_the_run(animals: ImageSet, tmp_path: Path, batch_size: int) -> None:
    with pytest.raises(
        DivergenceError,
        match=r"loss is .* at step \d \(epoch 1\); nothing was saved before it\. Start anew in another .*lr=5e\+29",
    ):
        train(replace(WILD, batch_size=batch_size), animals, tmp_path, QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_compiler")
def test_divergence_keeps_the_last_good_checkpoint(stopped: Path, photos: ImageSet) -> None:
    last = stopped / "last.safetensors"
    config = replace(WILD, epochs=4)
    rewrite(last, config=config.to_dict())
    good = last.read_bytes()
    with pytest.raises(DivergenceError, match=r"loss is .* \(epoch 3\); .*last\.safetensors is from before it"):
        train(config, photos, stopped, QUIET, resume=True)
    assert last.read_bytes() == good


@pytest.mark.usefixtures("no_compiler")
def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(stopped: Path, photos: ImageSet) -> None:
    config = replace(TINY, epochs=TINY.epochs + 1)
    rewrite(stopped / "last.safetensors", config=config.to_dict())
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    message = r"last\.safetensors could not be written: .*; an earlier checkpoint there is untouched"
    with files_of_at_most(8_000), pytest.raises(StorageError, match=message):
        train(config, photos, stopped, QUIET, resume=True)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("runtime", [QUIET, replace(QUIET, tensorboard=True)], ids=["checkpoint", "event file"])
def test_an_output_that_is_no_folder(animals: ImageSet, tmp_path: Path, runtime: Runtime) -> None:
    output = tmp_path / "file"
    output.write_text("in the way")
    with pytest.raises(StorageError, match=r"/file.* written"):
        train(TINY, animals, output, runtime)
    assert output.read_text() == "in the way"


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_compiler_means_fast_gradients_of_the_same_kind(
    animals: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a compiler a run differs only by rounding."""
    fast = load_checkpoint(train(TINY, animals, tmp_path / "fast", QUIET)).tensors
    monkeypatch.setenv("PATH", "")
    plain = load_checkpoint(train(TINY, animals, tmp_path / "plain", QUIET)).tensors
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, plain[name], atol=2e-3, rtol=2e-3)
