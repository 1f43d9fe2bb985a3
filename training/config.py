"""Every choice of a training run in one typed place, and the named presets with their source, cost and result.

A preset is a complete, reproducible description of a run. The command line may override any field
(`--set lr=0.005`); an unknown field or a value of the wrong type stops the run.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from model.architectures import ModelConfig, config_class, config_from_dict
from model.convmixer import ConvMixerConfig
from training.errors import ConfigError


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


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        model: the network, of any architecture; `num_classes` is taken from the data.
        augment: see AugmentConfig.
        image_size: side in pixels of what the network sees, in training and in service.
        start_size: side at the first step; grows linearly to `image_size` over the first 70 % of the run, in steps of
            4 pixels. Smaller images cost less: a way to more epochs on a CPU. 0 means `image_size` from the start.
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
    start_size: int = 0
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
    normalize_mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)
    normalize_std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616)
    val_fraction: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        require = {
            "seed must be between 0 and 999,999,999": 0 <= self.seed < 1_000_000_000,
            "model.in_channels must be 3: images are read as RGB": getattr(self.model, "in_channels", 3) == 3,
            "optimizer must be 'adamw', 'adam' or 'muon'": self.optimizer in ("adamw", "adam", "muon"),
            "schedule must be 'one-cycle' or 'constant'": self.schedule in ("one-cycle", "constant"),
            "epochs, batch_size and image_size must be at least 1": min(self.epochs, self.batch_size, self.image_size) >= 1,
            "start_size must be between 0 and image_size": 0 <= self.start_size <= self.image_size,
            "lr and muon_lr must be positive": min(self.lr, self.muon_lr) > 0,
            "muon_momentum must be in [0, 1)": 0 <= self.muon_momentum < 1,
            "val_fraction must be in (0, 0.5]": 0 < self.val_fraction <= 0.5,
            "warmup must be in [0, 1)": 0 <= self.warmup < 1,
            "ema_decay must be in [0, 1)": 0 <= self.ema_decay < 1,
            "patch_size must not exceed the image": self.model.patch_size <= (self.start_size or self.image_size),
            "an MLP-Mixer or a ViT takes one size of images: model.image_size must be image_size, and start_size 0": isinstance(
                self.model, ConvMixerConfig
            )
            or (self.model.image_size == self.image_size and self.start_size in (0, self.image_size)),
            "crop_scale must be in (0, 1]": 0 < self.augment.crop_scale <= 1,
            "flip and erase must be in [0, 1]": all(0 <= p <= 1 for p in (self.augment.flip, self.augment.erase)),
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
            if kind not in (int, float, str):
                raise ConfigError(f"unknown setting {path!r}; known: {', '.join(settable_fields(model))}")
            try:
                (values[group] if group else values)[name] = kind(text)
            except ValueError as error:
                raise ConfigError(f"{path}={text!r} is not {'an integer' if kind is int else 'a number'}") from error
        return TrainConfig.from_dict(values)


def settable_fields(model: type[ModelConfig] = ConvMixerConfig) -> list[str]:
    """Names that `TrainConfig.override` understands when the network is of that kind."""
    owners = {"": TrainConfig, "model.": model, "augment.": AugmentConfig}
    hints = {prefix: get_type_hints(owner) for prefix, owner in owners.items()}
    names = [prefix + name for prefix, kinds in hints.items() for name, kind in kinds.items() if kind in (int, float, str)]
    return [*names, "model.architecture"]


@dataclass(frozen=True)
class Preset:
    """A named run with its evidence.

    Attributes:
        config: all settings.
        source: where the settings come from.
        cost: what the run takes, on which hardware.
        result: the accuracy reached by us or reported by the source, and which of the two.
    """

    config: TrainConfig
    source: str
    cost: str
    result: str


_STRONG = AugmentConfig(
    crop_scale=0.75,
    flip=0.5,
    randaugment_ops=2,
    randaugment_magnitude=27,  # the paper's m9 is of timm's scale of 10
    erase=0.25,
    mixup=0.5,
    cutmix=0.5,
)
"""The paper's augmentation for CIFAR-10."""

PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=192, depth=8, kernel_size=5, patch_size=2),
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, erase=0.25),
            start_size=20,
            epochs=10,
            batch_size=32,
            lr=0.006,
            warmup=0.2,
            weight_decay=0.02,
        ),
        source="ours: the authors' small script, narrowed and with growing image size for a machine without AVX-512",
        cost="114 minutes on two threads of one Zen 3 core, float32, beside other work",
        result="88.25 % on the test set, one run; `cpu-2` goes on from there",
    ),
    "cpu-2": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=192, depth=8, kernel_size=5, patch_size=2),
            augment=AugmentConfig(crop_scale=0.75, flip=0.5),
            start_size=24,
            epochs=12,
            batch_size=32,
            lr=0.004,
            warmup=0.05,
            weight_decay=0.02,
        ),
        source="ours: a second cycle (arXiv 1608.03983) that begins with what `cpu` ended with (--init), without erasing",
        cost="123 minutes on two threads of one Zen 3 core, float32, beside light work (`cpu` before it: 114)",
        result="91.09 % on the test set, one run; `cpu-3` goes on from there",
    ),
    "cpu-3": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=192, depth=8, kernel_size=5, patch_size=2),
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=1, randaugment_magnitude=12, erase=0.25),
            start_size=24,
            epochs=7,
            batch_size=32,
            optimizer="muon",
            lr=0.004,
            muon_lr=0.004,
            warmup=0.05,
            weight_decay=0.02,
        ),
        source="ours: a third cycle, begun with what `cpu-2` ended with (--init), with stronger augmentation and Muon",
        cost="95 minutes on two threads of one Zen 3 core, float32, beside light work (before it: 114 and 123)",
        result="91.00 % on the test set, one run; the mean of its weights and those of `cpu-2`: 91.94 % (docs/training.md)",
    ),
    "cpu-4": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=5, patch_size=2),
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=1, randaugment_magnitude=8, erase=0.25),
            start_size=24,
            epochs=8,
            batch_size=64,
            optimizer="muon",
            lr=0.006,
            muon_lr=0.006,
            warmup=0.05,
            weight_decay=0.02,
            ema_decay=0.999,
        ),
        source="ours: a fourth cycle, begun with the mean of `cpu-2` and `cpu-3`, grown from 192 to 256 channels (--init)",
        cost="86 minutes on two Zen 3 cores, float32, beside other work (74 images a second)",
        result="91.47 % on the test set, one run; the mean of its weights and those it grew from: 92.07 % (docs/training.md)",
    ),
    "cpu-5": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=7, patch_size=2),
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=2, randaugment_magnitude=10, erase=0.25),
            start_size=24,
            epochs=38,
            batch_size=64,
            optimizer="muon",
            lr=0.006,
            muon_lr=0.006,
            warmup=0.05,
            weight_decay=0.02,
            ema_decay=0.999,
        ),
        source="ours: a fifth, long cycle on a CPU with bf16, begun with the mean of `cpu-4` and of what that grew from, its "
        "kernels grown from 5 to 7 (--init)",
        cost="98 minutes on two Zen 5 cores, bf16, beside other work (307 images a second)",
        result="93.65 % on the test set, one run: the model that ships (docs/model-card.md)",
    ),
    "small": Preset(
        TrainConfig(
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=1, randaugment_magnitude=8, erase=0.25),
            epochs=25,
            batch_size=512,
            lr=0.01,
            label_smoothing=0.0,
            ema_decay=0.0,
        ),
        source="authors' CIFAR-10 script (locuslab/convmixer-cifar10), without its colour jitter of 0.1 and with a cosine fall",
        cost="0.15 GMAC x 3 x 50,000 x 25: minutes on a GPU, hours on a CPU",
        result="92.6 % reported by the authors; not run by us yet",
    ),
    "paper": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=9, patch_size=1),
            augment=_STRONG,
            epochs=200,
            batch_size=128,
            lr=0.01,
            ema_decay=0.0,
        ),
        source="paper, section 3 'CIFAR-10' and appendix (256/8 k9 p1, 706,570 parameters)",
        cost="0.71 GMAC x 3 x 50,000 x 200: hours on a data-centre GPU",
        result="95.9-96.0 % reported by the authors; not run by us yet",
    ),
    "teacher": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=512, depth=12, kernel_size=9, patch_size=2),
            augment=_STRONG,
            epochs=150,
            batch_size=512,
            weight_decay=0.02,
            ema_decay=0.9995,
        ),
        source="ours: the paper's augmentation on a net of 3.7 M parameters, to teach `fast` and `accurate`",
        cost="0.94 GMAC x 3 x 50,000 x 150: for a data-centre GPU",
        result="not run yet",
    ),
    "fast": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=9, patch_size=2),
            augment=_STRONG,
            epochs=400,
            batch_size=512,
            weight_decay=0.02,
            ema_decay=0.9995,
        ),
        source="ours: the paper's widths and kernel at patch 2, long, with --teacher (arXiv 2106.05237)",
        cost="0.18 GMAC x 3 x 50,000 x 400, and the teacher's forward passes: for a data-centre GPU",
        result="not run yet; goal 96.0 %",
    ),
    "accurate": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=11, kernel_size=9, patch_size=1),
            augment=_STRONG,
            epochs=200,
            batch_size=512,
            weight_decay=0.02,
            ema_decay=0.9995,
        ),
        source="ours: the paper's recipe on the largest net below 1 M parameters (969,994), with --teacher",
        cost="0.97 GMAC x 3 x 50,000 x 200, and the teacher's forward passes: for a data-centre GPU",
        result="not run yet; goal 97.0 %",
    ),
    "reference": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=7, patch_size=2),
            augment=AugmentConfig(pad_crop=4, crop_scale=1.0, flip=0.5),
            epochs=150,
            batch_size=64,
            optimizer="adam",
            lr=2.5e-4,
            schedule="constant",
            weight_decay=0.0,
            adam_eps=1e-8,
            clip_norm=0.0,
            label_smoothing=0.0,
            ema_decay=0.0,
            normalize_mean=(0.5, 0.5, 0.5),
            normalize_std=(0.5, 0.5, 0.5),
        ),
        source="annotated implementation (labml.ai), conv_mixer/experiment.py (643,338 parameters)",
        cost="0.16 GMAC x 3 x 50,000 x 150: hours on a GPU",
        result="no accuracy was ever reported; not run by us yet",
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
