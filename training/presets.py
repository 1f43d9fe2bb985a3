"""Named training runs with their source, cost and result; `convmixer-train presets` prints them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from model.convmixer import ConvMixerConfig
from model.resnet import ResNetConfig
from training.config import AugmentConfig, TrainConfig
from training.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """A complete, reproducible description of a run, with its evidence.

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
    randaugment_ops=1,  # the paper's two are applied with a probability of a half each (timm's `auto_augment.py`)
    randaugment_magnitude=27,  # its m9 is of timm's scale of 10
    erase=0.25,
    mixup=0.5,
    cutmix=0.5,
)
"""The paper's augmentation for CIFAR-10."""

_MIXED = AugmentConfig(
    crop_scale=0.75,
    flip=0.5,
    randaugment_ops=2,
    randaugment_magnitude=10,
    mixup=0.2,
    cutmix=0.5,
    mix_until=0.8,
)
"""Ours, of the long cycles on a CPU."""

_CYCLE = TrainConfig(
    model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=7, patch_size=2),
    augment=_MIXED,
    start_size=24,
    batch_size=64,
    optimizer="muon",
    warmup=0.05,
    weight_decay=0.02,
    ema_decay=0.999,
)
"""What the cycles of 256 channels have in common; each preset says what it has otherwise."""

_KERNELS_OF_9 = ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=9, patch_size=2)
"""The network of `accurate`."""

_TAUGHT = replace(_CYCLE, label_smoothing=0.0, distill_weight=0.8, distill_temperature=2.0)
"""Those that learn from `--teacher`, too."""

_TAUGHT_TO_THE_END = replace(_TAUGHT, augment=replace(_MIXED, mix_until=1.0), view_size=38, train_size=36, resample="bicubic")
"""Those of `fast` that learn at 36 px, look at 38, and mix pictures to the end."""

_TAUGHT_BY_THREE = replace(_TAUGHT_TO_THE_END, epochs=15, lr=0.003, muon_lr=0.003)
"""Those of `fast` that learn from three teachers."""

_TAUGHT_ACCURATE = replace(
    _TAUGHT_TO_THE_END,
    model=_KERNELS_OF_9,
    view_size=52,
    train_size=48,
    start_size=28,
    lr=0.003,
    muon_lr=0.003,
)
"""Those of `accurate` that learn at 48 px and look at 52."""

_DENSE = replace(
    _TAUGHT,
    model=ResNetConfig(hidden_dim=64, depth=2, stages=3, patch_size=1),
    augment=replace(_MIXED, mix_until=1.0),
    view_size=36,
    train_size=32,
    resample="bicubic",
    batch_size=128,
    weight_decay=0.03,
    distill_weight=0.5,
)
"""Those of the ResNet that teaches the others."""

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
        result="91.00 % on the test set, one run; the mean of its weights and those of `cpu-2`: 91.94 % (docs/runs.md)",
    ),
    "cpu-4": Preset(
        replace(
            _CYCLE,
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=5, patch_size=2),
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=1, randaugment_magnitude=8, erase=0.25),
            epochs=8,
            lr=0.006,
            muon_lr=0.006,
        ),
        source="ours: a fourth cycle, begun with the mean of `cpu-2` and `cpu-3`, grown from 192 to 256 channels (--init)",
        cost="86 minutes on two Zen 3 cores, float32, beside other work (74 images a second)",
        result="91.47 % on the test set, one run; the mean of its weights and those it grew from: 92.07 % (docs/runs.md)",
    ),
    "cpu-5": Preset(
        replace(
            _CYCLE,
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=2, randaugment_magnitude=10, erase=0.25),
            epochs=38,
            lr=0.006,
            muon_lr=0.006,
        ),
        source="ours: a fifth, long cycle on a CPU with bf16, begun with the mean of `cpu-4` and of what that grew from, its "
        "kernels grown from 5 to 7 (--init)",
        cost="98 minutes on two Zen 5 cores, bf16, beside other work (307 images a second)",
        result="93.65 % on the test set, one run",
    ),
    "cpu-6": Preset(
        replace(
            _CYCLE,
            augment=AugmentConfig(crop_scale=0.75, flip=0.5, randaugment_ops=2, randaugment_magnitude=10, mixup=0.2, cutmix=0.5),
            epochs=44,
            lr=0.005,
            muon_lr=0.005,
            seed=2,
        ),
        source="ours: a sixth cycle, begun with what `cpu-5` ended with (--init), with mixup and cutmix in place of erasing",
        cost="116 minutes on two Zen 5 cores, bf16, beside other work (300 images a second)",
        result="94.61 % on the test set, one run",
    ),
    "cpu-7": Preset(
        replace(_CYCLE, epochs=46, lr=0.005, muon_lr=0.005, seed=3),
        source="ours: a seventh cycle, begun with what `cpu-6` ended with (--init), its last fifth without mixing",
        cost="127 minutes on two Zen 5 cores, bf16, beside other work (285 images a second at 32 px)",
        result="94.95 % on the test set, one run (1.6.0)",
    ),
    "cpu-8": Preset(
        replace(_TAUGHT, epochs=26, lr=0.004, muon_lr=0.004, seed=5),
        source="ours: an eighth cycle, begun with what `cpu-7` ended with (--init), learning from `accurate` (--teacher)",
        cost="114 minutes on two Zen 5 cores, bf16, beside other work (180 to 220 images a second at 32 px, with the teacher)",
        result="95.55 % on the test set, one run (1.7.0)",
    ),
    "cpu-9": Preset(
        replace(
            _TAUGHT,
            image_size=38,
            train_size=36,
            resample="bicubic",
            epochs=23,
            lr=0.004,
            muon_lr=0.004,
            seed=6,
        ),
        source="ours: a ninth cycle, begun with what `cpu-8` ended with (--init), on pictures enlarged to 36 px for a view of 38 "
        "(arXiv 1906.06423), learning from the mean of `cpu-accurate` and `cpu-8` (--teacher, twice)",
        cost="105 minutes on two Zen 5 cores, bf16, beside other work (135 to 155 images a second at 36 px, with both teachers)",
        result="95.81 % on the test set, one run, looking at 38 px (1.8.0); `cpu-10` goes on from there",
    ),
    "cpu-10": Preset(
        replace(
            _TAUGHT_TO_THE_END,
            epochs=24,
            lr=0.004,
            muon_lr=0.004,
            seed=8,
        ),
        source="ours: a tenth cycle, begun with what `cpu-9` ended with (--init), learning from the mean of `cpu-accurate-2` and "
        "`cpu-9` (--teacher, twice), mixing to the end",
        cost="112 minutes on two Zen 5 cores, bf16, beside other work (135 to 155 images a second at 36 px, with both teachers)",
        result="95.88 % on the test set, one run, looking at 38 px (1.9.0, 1.10.0); `cpu-11` goes on from there",
    ),
    "cpu-11": Preset(
        replace(_TAUGHT_BY_THREE, seed=11),
        source="ours: an eleventh cycle, begun with what `cpu-10` ended with (--init), learning from the mean of "
        "`cpu-accurate-2`, `cpu-10` and `cpu-teacher` (--teacher, three times), mixing to the end",
        cost="111 minutes on two Xeon cores with AMX, bf16 (190 images a second at 24 px, 90 at 36, with all three teachers)",
        result="95.90 % on the test set, one run, looking at 38 px: `fast` (docs/models/fast.md)",
    ),
    "cpu-12": Preset(
        replace(_TAUGHT_BY_THREE, seed=13),
        source="ours: a twelfth cycle, begun with what `cpu-11` ended with (--init), learning from the mean of `accurate` 1.4.0, "
        "`cpu-11` and `cpu-teacher` (--teacher, three times), mixing to the end",
        cost="113 minutes on two Xeon cores with AMX, bf16, beside tests (190 images a second at 24 px, 75 to 110 at 36, with "
        "all three teachers)",
        result="95.85 % on the test set, one run: as good as `cpu-11` within chance, and not released",
    ),
    "cpu-13": Preset(
        replace(_TAUGHT_BY_THREE, lr=0.005, muon_lr=0.005, seed=17),
        source="ours: a thirteenth cycle, begun with what `cpu-12` ended with (--init), at a higher rate, learning from the mean "
        "of `accurate` 1.4.0, `cpu-12` and `cpu-teacher-2` (--teacher, three times), mixing to the end",
        cost="93 minutes on two Xeon cores with AMX, bf16, beside other work (235 images a second at 24 px, 105 at 36, with all "
        "three teachers)",
        result="95.81 % on the test set, one run: held out as good as `cpu-12`, and not released",
    ),
    "cpu-accurate": Preset(
        replace(
            _CYCLE,
            model=_KERNELS_OF_9,
            image_size=48,
            start_size=32,
            epochs=23,
            lr=0.004,
            muon_lr=0.004,
            label_smoothing=0.05,
            seed=4,
        ),
        source="ours: what `cpu-7` ended with (--init), its kernels grown to 9, on pictures enlarged to 48 px (arXiv 1906.06423)",
        cost="123 minutes on two Zen 5 cores, bf16, beside other work (135 images a second at 48 px)",
        result="95.38 % on the test set, one run; 95.69 % looking at 52 px; `cpu-accurate-2` goes on from there",
    ),
    "cpu-accurate-2": Preset(
        replace(_TAUGHT_ACCURATE, epochs=16, seed=7),
        source="ours: a second cycle of `cpu-accurate`, begun with what it ended with (--init), on bicubic pictures of up to "
        "48 px for a view of 52 (arXiv 1906.06423), learning from the mean of itself and `cpu-9` (--teacher, twice), mixing to "
        "the end",
        cost="112 minutes on two Zen 5 cores, bf16, beside other work (95 to 105 images a second at 48 px, with both teachers)",
        result="95.93 % on the test set, one run (1.2.0); `cpu-accurate-3` goes on from there",
    ),
    "cpu-accurate-3": Preset(
        replace(_TAUGHT_ACCURATE, epochs=12, seed=12),
        source="ours: a third cycle of `cpu-accurate`, begun with what `cpu-accurate-2` ended with (--init), learning from the "
        "mean of that, `cpu-11` and `cpu-teacher` (--teacher, three times)",
        cost="113 minutes on two Xeon cores with AMX, bf16, beside tests (180 images a second at 28 px, 70 at 48, with all three "
        "teachers)",
        result="95.76 % on the test set, one run; the mean of its weights with those of `cpu-accurate-2` 96.13 %: `accurate` "
        "(docs/models/accurate.md)",
    ),
    "cpu-teacher": Preset(
        replace(_DENSE, epochs=34, lr=0.006, muon_lr=0.006, seed=10),
        source="ours: a dense network (2.8 M parameters) from the start, to tell `fast` and `accurate` what they do not know "
        "from each other; learns half from the labels, half from `cpu-10` (--teacher)",
        cost="some 110 minutes for 29 of the 34 epochs on two Xeon cores with AMX, bf16 (190 to 330 images a second)",
        result="95.16 % on the test set, one run, stopped after 29 epochs; `cpu-teacher-2` goes on from there",
    ),
    "cpu-teacher-2": Preset(
        replace(_DENSE, epochs=20, lr=0.004, muon_lr=0.004, seed=14),
        source="ours: a second cycle of `cpu-teacher`, begun with what it ended with (--init), half from the labels, half from "
        "the mean of `accurate` 1.4.0 and `cpu-11` (--teacher, twice)",
        cost="115 minutes on two Xeon cores with AMX, bf16, beside tests (220 images a second at 24 px, 100 to 140 at 32, with "
        "both teachers)",
        result="95.76 % on the test set, one run: `releases/teacher`",
    ),
    "cpu-tiny": Preset(
        replace(
            _TAUGHT,
            model=ConvMixerConfig(hidden_dim=96, depth=8, kernel_size=5, patch_size=2),
            augment=replace(_MIXED, randaugment_ops=1),
            view_size=48,
            train_size=44,
            start_size=28,
            resample="bicubic",
            batch_size=128,
            epochs=38,
            lr=0.008,
            muon_lr=0.008,
            weight_decay=0.01,
            ema_decay=0.998,
            seed=20,
        ),
        source="ours: a network below 0.1 M parameters from the start, on pictures enlarged to 44 px for a view of 48, learning "
        "from `fast` 1.11.0 (--teacher); half as much RandAugment as the larger ones have, the last fifth without mixing",
        cost="95 minutes on two Xeon cores with AMX, bf16, beside tests (720 images a second at 28 px, 150 to 350 at 44)",
        result="92.64 % on the test set, one run; 94 % are aimed at, so not released",
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
        source="the defaults of the authors' CIFAR-10 script (locuslab/convmixer-cifar10), without its colour jitter of 0.1; a "
        "cosine fall, the epsilon of 1e-3 and the clipping are the paper's",
        cost="0.15 GMAC x 3 x 50,000 x 25: minutes on a GPU, hours on a CPU",
        result="no figure is published for these settings; not run by us yet. The 92.6 % in the authors' README are of others: "
        "--lr-max=0.05 --ra-n=2 --ra-m=12 --wd=0.005 --scale=1.0 --jitter=0 --reprob=0, AdamW's own epsilon, no clipping",
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
            model=ConvMixerConfig(hidden_dim=512, depth=12, kernel_size=7, patch_size=2),
            augment=_STRONG,
            epochs=150,
            batch_size=512,
            weight_decay=0.02,
            label_smoothing=0.0,
            ema_decay=0.9995,
        ),
        source="ours: the paper's augmentation on a net of 3.5 M parameters, to teach `fast` and `accurate`; without "
        "smoothed labels, which make worse teachers (arXiv 1906.02629); kernels of 7, because cuDNN is far slower with 9 "
        "(docs/training.md)",
        cost="0.88 GMAC x 3 x 50,000 x 150: for a data-centre GPU",
        result="not run yet",
    ),
    "fast": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=8, kernel_size=7, patch_size=2),
            augment=_STRONG,
            view_size=38,
            train_size=36,
            resample="bicubic",
            epochs=400,
            batch_size=512,
            weight_decay=0.02,
            ema_decay=0.9995,
        ),
        source="ours: the paper's width at patch 2, long, with --teacher (arXiv 2106.05237), for a view of 38 px as in `cpu-9`; "
        "with a teacher all of the loss is the distance to it, and label_smoothing has no effect",
        cost="0.20 GMAC x 3 x 50,000 x 400, and the teacher's forward passes: for a data-centre GPU",
        result="not run yet",
    ),
    "accurate": Preset(
        TrainConfig(
            model=ConvMixerConfig(hidden_dim=256, depth=12, kernel_size=7, patch_size=1),
            augment=_STRONG,
            epochs=200,
            batch_size=512,
            weight_decay=0.02,
            ema_decay=0.9995,
        ),
        source="ours: the paper's recipe on the largest net of its width below 1 M parameters (959,498), with --teacher; with "
        "one all of the loss is the distance to it, label_smoothing has no effect, and `teacher`, whose patches are of 2 pixels, "
        "knows a quarter of the positions",
        cost="0.96 GMAC x 3 x 50,000 x 200, and the teacher's forward passes: for a data-centre GPU",
        result="not run yet",
    ),
    "gpu-record": Preset(
        replace(
            _TAUGHT_ACCURATE,
            model=ConvMixerConfig(hidden_dim=304, depth=8, kernel_size=9, patch_size=2),
            epochs=20,
            batch_size=512,
            lr=0.006,
            muon_lr=0.006,
            ema_decay=0.993,  # a memory of one and a half epochs, as the cycles on a CPU have it
            seed=16,
        ),
        source="ours: a cycle of `accurate`'s recipe for some eight minutes of a GPU, begun with `accurate` 1.4.0 (--init), "
        "grown from 256 channels to the widest net below 1 M parameters (958,522), learning from the mean of the three networks "
        "in releases/ (--teacher, three times); twice the rate for eight times the batch, a guess",
        cost="0.54 GMAC x 3 x 47,500 x 20 and 1.0 GMAC a picture for its teachers, all at 48 px, three quarters of it as "
        "pictures grow: for a data-centre GPU, not run",
        result="not run",
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
