"""A batch of stored images → a batch the network trains on. Every transform is torchvision.transforms.v2.

All randomness comes from torch's global generator, which the training loop seeds anew before each step: the same step
of the same run always sees the same pictures, also after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms import v2

from training.config import AugmentConfig, TrainConfig


class Augmentation:
    """The training-time pipeline of one configuration.

    Args:
        config: which transforms and how strong; normalisation constants.
        num_classes: C, for the one-hot targets that mixup and cutmix mix.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.config = config
        self.num_classes = num_classes
        self._mix = _mixing(config.augment, num_classes)
        self._normalize = normalization(config)
        self._per_image: dict[int, v2.Compose] = {}

    def __call__(self, images: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Augments one batch.

        Args:
            images: uint8 [N, 3, S, S], RGB.
            labels: int64 [N].
            size: side of the result in pixels.

        Returns:
            Normalised images, float32 [N, 3, size, size], and targets: int64 [N], or with mixup or cutmix float32
            [N, C] whose rows sum to 1.
        """
        transform = self._per_image.setdefault(size, _per_image_transforms(self.config.augment, size))
        # v2 draws one set of parameters for a whole batch, so images pass one by one
        batch = self._normalize(torch.stack([transform(image) for image in images]))
        return self._mix(batch, labels) if self._mix else (batch, labels)


def normalization(config: TrainConfig) -> v2.Transform:
    """uint8 [..., 3, H, W] in 0..255 → float32, scaled to [0, 1], then standardised per channel."""
    return v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(config.normalize_mean), list(config.normalize_std))]
    )


def _per_image_transforms(config: AugmentConfig, size: int) -> v2.Compose:
    steps: list[v2.Transform] = []
    if config.pad_crop:
        # crops keep the stored size; a different `size` is reached by the resize below
        steps.append(_PadCrop(config.pad_crop))
    if config.crop_scale < 1:
        steps.append(v2.RandomResizedCrop(size, scale=(config.crop_scale, 1.0), ratio=(1.0, 1.0), antialias=True))
    else:
        steps.append(v2.Resize((size, size), antialias=True))
    steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.randaugment_ops:
        steps.append(v2.RandAugment(config.randaugment_ops, config.randaugment_magnitude))
    if config.erase:
        steps.append(v2.RandomErasing(config.erase))
    return v2.Compose(steps)


class _PadCrop(v2.Transform):  # type: ignore[misc]
    """Zero padding on all sides and a random crop back to the input's own size, whatever it is."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, image: Tensor) -> Tensor:
        cropped: Tensor = v2.RandomCrop(image.shape[-2:], padding=self.padding)(image)
        return cropped


def _mixing(config: AugmentConfig, num_classes: int) -> v2.Transform | None:
    choices: list[v2.Transform] = []
    if config.mixup:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None
