"""A run's settings: presets hold, overrides reach every field, nonsense is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.architectures import config_from_dict
from model.checkpoint import load_checkpoint
from model.convmixer import ConvMixer, ConvMixerConfig, count_parameters
from model.grow import can_grow
from model.vit import ViTConfig
from training.config import AugmentConfig, TrainConfig, settable_fields
from training.errors import ConfigError
from training.presets import PRESETS, get_preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_survives_json(name: str) -> None:
    preset = get_preset(name)
    assert all((preset.source, preset.cost, preset.result))
    assert TrainConfig.from_dict(json.loads(json.dumps(preset.config.to_dict()))) == preset.config


def test_reference_is_the_reference_experiment() -> None:
    config = get_preset("reference").config
    assert count_parameters(ConvMixer(config.model)) == 643_338
    assert (config.optimizer, config.lr, config.batch_size, config.epochs) == ("adam", 2.5e-4, 64, 150)
    assert (config.schedule, config.weight_decay, config.clip_norm, config.ema_decay) == ("constant", 0, 0, 0)
    assert (config.augment.pad_crop, config.augment.crop_scale, config.augment.flip) == (4, 1.0, 0.5)
    assert config.normalize_mean == config.normalize_std == (0.5, 0.5, 0.5)


def test_paper_is_the_papers_network() -> None:
    config = get_preset("paper").config
    assert count_parameters(ConvMixer(config.model)) == 706_570
    assert (config.epochs, config.lr, config.adam_eps, config.clip_norm) == (200, 0.01, 1e-3, 1.0)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.erase) == (0.5, 0.5, 0.25)


def test_the_gpus_record_is_grown_from_what_is_released(repository: Path) -> None:
    config, released = get_preset("gpu-record").config, load_checkpoint(repository / "releases/accurate/model.safetensors")
    assert count_parameters(ConvMixer(config.model)) == 958_522
    small = config_from_dict(released.description["model"])
    assert isinstance(small, ConvMixerConfig)
    assert isinstance(config.model, ConvMixerConfig)
    assert can_grow(small, config.model)


def test_unknown_preset() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown preset 'tiny'; known: cpu, cpu-2, .*, cpu-accurate, cpu-accurate-2, .*, cpu-teacher, .*, small, ",
    ):
        get_preset("tiny")


@pytest.mark.parametrize("name", PRESETS)
def test_overrides_reach_every_level_and_change_nothing_else(name: str) -> None:
    before = get_preset(name).config
    after = before.override(
        {"epochs": "3", "lr": "5e-3", "optimizer": "adam", "model.hidden_dim": "64", "augment.flip": "0", "start_size": "0"}
    )
    assert (after.epochs, after.lr, after.optimizer) == (3, 0.005, "adam")
    assert (after.model.hidden_dim, after.augment.flip) == (64, 0.0)
    assert before == get_preset(name).config
    undone = {"epochs": before.epochs, "lr": before.lr, "optimizer": before.optimizer, "start_size": before.start_size}
    nested = {"model.hidden_dim": before.model.hidden_dim, "augment.flip": before.augment.flip}
    assert after.override({key: str(value) for key, value in {**undone, **nested}.items()}) == before


def test_every_field_it_names_can_be_set() -> None:
    config = TrainConfig()
    for name in settable_fields():
        group, _, key = name.rpartition(".")
        value = getattr(getattr(config, group) if group else config, key)
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert config.override({name: text}) == config


def test_only_the_number_of_classes_is_not_chosen() -> None:
    fields = {f"model.{name}" for name in vars(ConvMixerConfig())} | {f"augment.{name}" for name in vars(AugmentConfig())}
    fields |= vars(TrainConfig()).keys() - {"model", "augment"}
    assert fields - set(settable_fields()) == {"model.num_classes"}
    for architecture in ("convmixer", "vit", "mlp-mixer", "resnet"):
        with pytest.raises(ConfigError, match=r"model\.num_classes cannot be set: it is the number of classes in the data"):
            TrainConfig().override({"model.architecture": architecture, "model.num_classes": "10"})


def test_colours_are_three_numbers() -> None:
    config = TrainConfig().override({"normalize_mean": "0.5,0.25, 0", "normalize_std": "1,1,2"})
    assert (config.normalize_mean, config.normalize_std) == ((0.5, 0.25, 0), (1, 1, 2))
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_another_architecture_keeps_what_the_networks_have_in_common() -> None:
    config = TrainConfig().override({"model.heads": "2", "model.architecture": "vit", "model.hidden_dim": "64"})
    assert config.model == ViTConfig(hidden_dim=64, depth=8, heads=2, patch_size=2)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.override({"model.architecture": "convmixer"}).model == ConvMixerConfig(hidden_dim=64, depth=8, patch_size=2)
    with pytest.raises(ConfigError, match=r"unknown setting 'model\.kernel_size'; known: .*model\.heads"):
        config.override({"model.kernel_size": "3"})
    with pytest.raises(ConfigError, match="unknown architecture 'swin'; known: convmixer, mlp-mixer, resnet, vit"):
        config.override({"model.architecture": "swin"})
    for name, value in (("start_size", "16"), ("image_size", "64")):
        with pytest.raises(ConfigError, match=r"takes one size of images: set start_size, .*model\.image_size to image_size"):
            config.override({name: value})


@pytest.mark.parametrize(
    "name", ["lrate", "model.width", "augment.epochs", "optimizer.lr", "", "model", "normalize_mean.0", "a.b.c"]
)
def test_unknown_setting_is_refused_and_the_known_ones_are_listed(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown setting '{name}'; known: image_size, .*model\.depth.*augment\.flip"):
        TrainConfig().override({name: "1"})


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("epochs", "1.5", "an integer"),
        ("epochs", "", "an integer"),
        ("model.depth", "eight", "an integer"),
        ("lr", "fast", "a number"),
        ("augment.flip", "yes", "a number"),
        ("normalize_mean", "0.5", "three numbers with commas between them, e.g. 0.5,0.5,0.5"),
        ("normalize_mean", "0.5,0.5,0.5,0.5", "three numbers"),
        ("normalize_std", "0.5;0.5;0.5", "three numbers"),
        ("normalize_std", "a,b,c", "three numbers"),
        ("normalize_std", "", "three numbers"),
    ],
)
def test_text_of_the_wrong_type(name: str, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{text}' is not {kind}"):
        TrainConfig().override({name: text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("optimizer", "sgd"),
        ("seed", "20000000000"),
        ("model.in_channels", "1"),
        ("schedule", "step"),
        ("epochs", "0"),
        ("batch_size", "-1"),
        ("image_size", "0"),
        ("start_size", "33"),
        ("lr", "0"),
        ("lr", "nan"),
        ("val_fraction", "0"),
        ("val_fraction", "0.6"),
        ("val_fraction", "nan"),
        ("normalize_mean", "0,0,nan"),
        ("normalize_std", "1,1,0"),
        ("normalize_std", "1,1,inf"),
        ("warmup", "1"),
        ("ema_decay", "1"),
        ("weight_decay", "-0.1"),
        ("adam_eps", "-1"),
        ("clip_norm", "-1"),
        ("label_smoothing", "1"),
        ("model.patch_size", "33"),
        ("lr", "inf"),
        ("clip_norm", "nan"),
        ("adam_eps", "nan"),
        ("augment.mixup", "nan"),
        ("model.depth", "0"),
        ("view_size", "31"),
        ("view_size", "4096"),
        ("image_size", "4096"),
        ("augment.crop_scale", "0"),
        ("augment.crop_scale", "1.1"),
        ("augment.flip", "1.5"),
        ("augment.erase", "-0.1"),
        ("augment.mix_until", "1.1"),
        ("augment.mixup", "-1"),
        ("augment.cutmix", "-1"),
        ("augment.pad_crop", "-4"),
        ("augment.randaugment_ops", "-1"),
        ("augment.randaugment_magnitude", "31"),
    ],
)
def test_values_without_sense_are_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=name.rpartition(".")[2]):
        TrainConfig().override({name: text})


def test_a_patch_must_fit_into_what_whole_pictures_are_shown_at() -> None:
    with pytest.raises(ConfigError, match="patch_size must not exceed the image"):
        TrainConfig().override({"image_size": "1", "view_size": "1", "train_size": "32"})


def test_a_size_of_ones_own_is_not_undone_by_a_presets_view() -> None:
    """Pictures of 64 pixels would else be looked at with 48, and nobody would know."""
    with pytest.raises(ConfigError, match=r"view_size=48 is less than image_size=64.*set view_size and train_size"):
        PRESETS["cpu-tiny"].config.override({"image_size": "64"})
    assert PRESETS["cpu-tiny"].config.override({"image_size": "64", "view_size": "0", "train_size": "0"}).largest_size == 64


@pytest.mark.parametrize(
    "values",
    [
        {"epoch": 3},
        {"model": {"width": 3}},
        {"augment": {"blur": 1}},
        {"epochs": "three"},
        {"model": {"depth": 1.5}},
        {"normalize_mean": [0.5]},
    ],
)
def test_a_stored_description_that_does_not_fit(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainConfig.from_dict(values)
