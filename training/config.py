"""Every choice of a training run in one typed place.

The command line may override any field (`--set lr=0.005`, `--set normalize_mean=0.5,0.5,0.5`); an unknown field or a value of
the wrong type stops the run. The number of classes alone is not chosen: the data have it.
Complete, named descriptions of runs are in `training.presets`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

from model.architectures import ModelConfig, config_class, config_from_dict
from model.convmixer import ConvMixerConfig
from model.resnet import ResNetConfig
from training.errors import ConfigError

RGB: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image (training/augment.py).

    Attributes:
        pad_crop: pixels of zero padding before a random crop; 0 switches it off.
        crop_scale: smallest share of the area a random-resized-crop keeps (side ratio 1:1); 1.0 switches it off.
        flip: probability of a horizontal flip.
        randaugment_ops: operations drawn per image (arXiv 1909.13719); 0 switches it off.
        randaugment_magnitude: their strength, 0 to 30 (timm's `m9` is 27 on this scale).
        trivialaugment: 1 adds one operation of random, wider strength per image (arXiv 2103.10158); 0 switches it off.
        erase: probability of erasing a rectangle (arXiv 1708.04896).
        mixup: alpha of the Beta distribution (arXiv 1710.09412); 0 switches it off.
        cutmix: alpha of the Beta distribution (arXiv 1905.04899); 0 switches it off. With both, each batch draws one.
        mix_until: share of the run with mixup and cutmix; the rest is learnt from pictures as they are (arXiv 1909.09148).
    """

    pad_crop: int = 0
    crop_scale: float = 0.75
    flip: float = 0.5
    randaugment_ops: int = 0
    randaugment_magnitude: int = 8
    trivialaugment: int = 0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_until: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: the network, of any architecture; `num_classes` is taken from the data.
        augment: see AugmentConfig.
        image_size: side in pixels that pictures are brought to, in training and by the service.
        view_size: side in pixels at which the network looks at whole pictures, enlarged by itself; 0 means `image_size`.
        train_size: side in pixels of the largest pictures of the training; 0 means `view_size`. A little less makes up for random
            crops, in which things look larger than in whole pictures (arXiv 1906.06423).
        start_size: side at the first step; grows linearly to `train_size` over the first 70 % of the run, in steps of
            4 pixels. Smaller images cost less: a way to more epochs on a CPU. 0 means `train_size` from the start.
        resample: `bilinear` or `bicubic`: how pictures are brought to size, warped and enlarged, in training and in service.
        epochs: passes over the training slice.
        batch_size: images per optimizer step.
        optimizer: `adamw`, `adam`, or `muon`: AdamW with Muon for the hidden matrices (training/muon.py).
        lr: peak learning rate.
        muon_lr: peak learning rate of Muon's matrices; it follows the same schedule.
        muon_momentum: of Muon.
        schedule: `one-cycle` (linear from 0 to lr, then a half cosine to 0) or `constant`.
        warmup: share of the steps that the rise of `one-cycle` takes.
        weight_decay: of AdamW, on every parameter, as in the paper.
        adam_eps: epsilon of Adam; the paper's 1e-3 keeps updates small where gradients are small.
        clip_norm: largest gradient norm; 0 switches clipping off.
        label_smoothing: share of probability mass spread over all classes.
        distill_weight: share of the loss that is distillation from the run's teacher (`--teacher`), which sees the same
            pictures (arXiv 2106.05237); the rest is cross-entropy with the labels. Without a teacher it has no effect.
        distill_temperature: softens both distributions in that share (arXiv 1503.02531).
        ema_decay: decay per step of the averaged weights that are validated and released; 0 switches it off.
        normalize_mean: per-channel mean of pixels in [0, 1].
        normalize_std: per-channel standard deviation of pixels in [0, 1].
        val_fraction: share of the training images held out for validation, the same for each class.
        seed: of initialisation, order and augmentation.
    """

    model: ModelConfig = field(default_factory=ConvMixerConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    image_size: int = 32
    view_size: int = 0
    train_size: int = 0
    start_size: int = 0
    resample: str = "bilinear"
    epochs: int = 25
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 0.01
    muon_lr: float = 0.01
    muon_momentum: float = 0.9
    schedule: str = "one-cycle"
    warmup: float = 0.3
    weight_decay: float = 0.01
    adam_eps: float = 1e-3
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    ema_decay: float = 0.998
    normalize_mean: RGB = (0.4914, 0.4822, 0.4465)
    normalize_std: RGB = (0.2470, 0.2435, 0.2616)
    val_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for part in (self, self.augment):
            for name, value in vars(part).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ConfigError(f"{name} must be finite")
        require = {
            "seed must be between 0 and 999,999,999": 0 <= self.seed < 1_000_000_000,
            "model.in_channels must be 3: images are read as RGB": getattr(self.model, "in_channels", 3) == 3,
            "optimizer must be 'adamw', 'adam' or 'muon'": self.optimizer in ("adamw", "adam", "muon"),
            "schedule must be 'one-cycle' or 'constant'": self.schedule in ("one-cycle", "constant"),
            "epochs, batch_size and image_size must be at least 1": min(self.epochs, self.batch_size, self.image_size) >= 1,
            "view_size and train_size must not be negative": min(self.view_size, self.train_size) >= 0,
            f"image_size, view_size and train_size must be at most {_MOST_PIXELS}": max(
                self.image_size, self.view_size, self.train_size
            )
            <= _MOST_PIXELS,
            f"view_size={self.view_size} is less than image_size={self.image_size}, so the network would see less than it is "
            "given; set view_size and train_size, too (0: as image_size)": self.view_size == 0
            or self.view_size >= self.image_size,
            "start_size must be between 0 and train_size": 0 <= self.start_size <= self.largest_size,
            "resample must be 'bilinear' or 'bicubic'": self.resample in ("bilinear", "bicubic"),
            "lr and muon_lr must be positive": min(self.lr, self.muon_lr) > 0,
            "muon_momentum must be in [0, 1)": 0 <= self.muon_momentum < 1,
            "normalize_mean must be three numbers": len(self.normalize_mean) == 3
            and all(map(math.isfinite, self.normalize_mean)),
            "normalize_std must be three positive numbers": len(self.normalize_std) == 3
            and all(0 < std < math.inf for std in self.normalize_std),
            "val_fraction must be in (0, 0.5]": 0 < self.val_fraction <= 0.5,
            "warmup must be in [0, 1)": 0 <= self.warmup < 1,
            "ema_decay must be in [0, 1)": 0 <= self.ema_decay < 1,
            "patch_size must not exceed the image": self.model.patch_size
            <= min(self.seen_size, self.start_size or self.largest_size),
            "an MLP-Mixer or a ViT takes one size of images: set start_size, view_size and train_size to 0, and "
            "model.image_size to image_size": (
                isinstance(self.model, ConvMixerConfig | ResNetConfig)
                or {self.seen_size, self.largest_size, self.start_size or self.largest_size} == {self.model.image_size}
            ),
            "crop_scale must be in (0, 1]": 0 < self.augment.crop_scale <= 1,
            "flip, erase and mix_until must be in [0, 1]": all(
                0 <= p <= 1 for p in (self.augment.flip, self.augment.erase, self.augment.mix_until)
            ),
            "pad_crop, randaugment_ops, mixup and cutmix must not be negative": min(
                self.augment.pad_crop, self.augment.randaugment_ops, self.augment.mixup, self.augment.cutmix
            )
            >= 0,
            "trivialaugment must be 0 or 1": self.augment.trivialaugment in (0, 1),
            "distill_weight must be in [0, 1] and distill_temperature positive": 0 <= self.distill_weight <= 1
            and self.distill_temperature > 0,
            "randaugment_magnitude must be in 0..30": 0 <= self.augment.randaugment_magnitude <= 30,
            "weight_decay, adam_eps and clip_norm must not be negative": min(self.weight_decay, self.adam_eps, self.clip_norm)
            >= 0,
            "label_smoothing must be in [0, 1)": 0 <= self.label_smoothing < 1,
        }
        for message, holds in require.items():
            if not holds:
                raise ConfigError(message)

    @property
    def seen_size(self) -> int:
        """Side in pixels of whole pictures as the network looks at them."""
        return self.view_size or self.image_size

    @property
    def largest_size(self) -> int:
        """Side in pixels of the largest pictures of the training."""
        return self.train_size or self.seen_size

    def described_input(self) -> dict[str, Any]:
        """What a released checkpoint says of the pictures it takes."""
        return {
            "image_size": self.image_size,
            "view_size": self.seen_size,
            "resample": self.resample,
            "normalize_mean": list(self.normalize_mean),
            "normalize_std": list(self.normalize_std),
        }

    def check_normalized_alike(self, path: Path, description: dict[str, Any]) -> None:
        """Refuses a network that this run would begin with, or learn from, if it knows pixels of other means and deviations.

        Args:
            path: of its checkpoint.
            description: the checkpoint's.

        Raises:
            ConfigError: it was trained so.
        """
        theirs = [description["normalize_mean"], description["normalize_std"]]
        if theirs != [list(self.normalize_mean), list(self.normalize_std)]:
            mean, std = (",".join(map(str, values)) for values in theirs)
            raise ConfigError(
                f"{path} was trained on pixels normalised differently; give --set normalize_mean={mean} --set normalize_std={std}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a field is unknown or a value does not fit.
        """
        values = dict(values)
        try:
            values["model"] = config_from_dict(values.get("model", {}))
            values["augment"] = AugmentConfig(**values.get("augment", {}))
            for name in ("normalize_mean", "normalize_std"):
                if name in values:
                    values[name] = tuple(values[name])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error

    def override(self, settings: dict[str, str]) -> TrainConfig:
        """A copy with text values parsed into the fields they name; `model.` and `augment.` prefixes reach inside.

        With another `model.architecture`, what the two networks have in common is kept and the rest begins with its defaults.

        Args:
            settings: e.g. `{"epochs": "5", "model.hidden_dim": "64"}`.

        Raises:
            ConfigError: a field is unknown or a text does not parse as its type.
        """
        values, model = self.to_dict(), type(self.model)
        if "model.architecture" in settings:
            settings = dict(settings)
            architecture = settings.pop("model.architecture")
            try:
                model = config_class(architecture)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            kept = {name: value for name, value in values["model"].items() if name in model.__dataclass_fields__}
            values["model"] = {**kept, "architecture": architecture}
        for path, text in settings.items():
            group, _, name = path.rpartition(".")
            owner = {"": TrainConfig, "model": model, "augment": AugmentConfig}.get(group)
            hints = get_type_hints(owner) if owner else {}
            kind = hints.get(name)
            if path == _NUM_CLASSES:
                raise ConfigError(f"{path} cannot be set: it is the number of classes in the data")
            if kind not in _KINDS:
                raise ConfigError(f"unknown setting {path!r}; known: {', '.join(settable_fields(model))}")
            parse, what = _KINDS[kind]
            try:
                (values[group] if group else values)[name] = parse(text)
            except ValueError as error:
                raise ConfigError(f"{path}={text!r} is not {what}") from error
        return TrainConfig.from_dict(values)


def settable_fields(model: type[ModelConfig] = ConvMixerConfig) -> list[str]:
    """Names that `TrainConfig.override` understands when the network is of that kind."""
    owners = {"": TrainConfig, "model.": model, "augment.": AugmentConfig}
    hints = {prefix: get_type_hints(owner) for prefix, owner in owners.items()}
    names = [prefix + name for prefix, kinds in hints.items() for name, kind in kinds.items() if kind in _KINDS]
    return [*(name for name in names if name != _NUM_CLASSES), "model.architecture"]


def _parse_rgb(text: str) -> RGB:
    red, green, blue = map(float, text.split(","))
    return red, green, blue


_MOST_PIXELS = 2048
_NUM_CLASSES = "model.num_classes"
_KINDS: dict[Any, tuple[Callable[[str], Any], str]] = {
    int: (int, "an integer"),
    float: (float, "a number"),
    str: (str, "a text"),
    RGB: (_parse_rgb, "three numbers with commas between them, e.g. 0.5,0.5,0.5"),
}
"""What a text is parsed with by the type of the field, and what it then is."""
