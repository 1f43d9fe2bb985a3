"""A batch of stored images → a batch the network trains on, all at once and on the device the data lives on.

No loop over images: every image's random numbers are one row of a matrix that is drawn on the CPU and sent once, and
each transform works on the whole batch with a value per image. What the matrix holds comes from torch's global
generator, which the training loop seeds anew before each step: the same step of the same run always sees the same
pictures, also after a resume, and also on another device.

The operations and their ranges are those of torchvision.transforms.v2 (`RandomResizedCrop`, `RandAugment`,
`TrivialAugmentWide`, `RandomErasing`), with three differences: colours change before the geometry does and all geometry
(crop, shear, translation, rotation) is one bilinear resampling, about the middle, which makes one pass of it; and an
erased rectangle takes the mean colour, as in the authors' script.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as vision

from model.enlarge import Enlarge
from training.config import AugmentConfig, TrainConfig

_BINS = 31
"""Strengths are 0 to 30, as in torchvision."""

_ERASE_AREA = (0.02, 0.33)
_ERASE_LOG_RATIO = (math.log(0.3), math.log(3.3))


class Augmentation:
    """The training-time pipeline of one configuration.

    Args:
        config: which transforms and how strong; normalisation constants.
        num_classes: C, for the one-hot targets that mixup and cutmix mix.
        device: where images and labels are and stay.
    """

    def __init__(self, config: TrainConfig, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.config = config.augment
        self._resample = config.resample
        self.device = torch.device(device)
        self._mix = _mixing(config.augment, num_classes)
        self._mean = torch.tensor(config.normalize_mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(config.normalize_std, device=device).view(1, 3, 1, 1)

    def __call__(self, images: Tensor, labels: Tensor, size: int, *, mix: bool = True) -> tuple[Tensor, Tensor]:
        """Augments one batch.

        Args:
            images: uint8 [N, 3, S, S], RGB.
            labels: int64 [N].
            size: side of the result in pixels.
            mix: whether mixup and cutmix, if configured, are done.

        Returns:
            Normalised images, float32 [N, 3, size, size], and targets: int64 [N], or with mixup or cutmix float32
            [N, C] whose rows sum to 1.
        """
        config, side = self.config, images.shape[-1]
        # pad_crop 2, crop 3, trivialaugment 3, flip 1, erase 5; each operation of randaugment 2
        draw = _Draws(len(images), 14 + 2 * config.randaugment_ops, self.device)
        batch = vision.to_dtype(images, torch.float32, scale=True)

        warps: list[Tensor] = []  # from the result's coordinates to the stored image's, the first-applied first
        if config.pad_crop:
            shift = 2 * config.pad_crop / side
            whole_pixels = 2 * config.pad_crop + 1
            warps.append(
                _matrices(
                    tx=shift * (draw.integer(whole_pixels) / config.pad_crop - 1),
                    ty=shift * (draw.integer(whole_pixels) / config.pad_crop - 1),
                )
            )
        if config.crop_scale < 1:
            share = draw.between(config.crop_scale, 1.0).sqrt()
            warps.append(
                _matrices(sx=share, sy=share, tx=draw.between(-1, 1) * (1 - share), ty=draw.between(-1, 1) * (1 - share))
            )
        for _ in range(config.randaugment_ops):
            strength = torch.full((len(images),), float(config.randaugment_magnitude), device=self.device)
            batch, warp = _random_operation(batch, draw, strength, _RAND)
            warps.append(warp)
        if config.trivialaugment:
            batch, warp = _random_operation(batch, draw, draw.integer(_BINS), _TRIVIAL)
            warps.append(warp)

        if warps:
            batch = _warp(batch, warps, max(side, size), self._resample)
        if config.flip:
            batch = torch.where(_per_image(draw.uniform() < config.flip), batch.flip(-1), batch)
        if size != batch.shape[-1]:
            batch = F.interpolate(batch, (size, size), mode=self._resample, antialias=True).clamp(0, 1)
        batch = (batch - self._mean) / self._std
        if config.erase:
            batch = _erase(batch, draw, config.erase)
        return self._mix(batch, labels) if self._mix and mix else (batch, labels)


def preprocessing(config: TrainConfig) -> v2.Transform:
    """Whole pictures as a trained network sees them.

    Returns:
        uint8 [..., 3, S, S] in 0..255, S the `image_size` → float32 [..., 3, V, V], V the `view_size`: scaled to [0, 1],
        enlarged, then standardised per channel.
    """
    side, view = config.image_size, config.seen_size
    enlarge = [Enlarge(side, view, config.resample)] if view != side else []
    normalize = v2.Normalize(list(config.normalize_mean), list(config.normalize_std))
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), *enlarge, normalize])


class _Draws:
    """Random numbers, one an image and draw, from one matrix that crosses to the device once."""

    def __init__(self, images: int, draws: int, device: torch.device) -> None:
        matrix = torch.rand(draws, images)
        if device.type == "cuda":  # from pinned memory the copy does not wait for the work before it
            matrix = matrix.pin_memory().to(device, non_blocking=True)
        self._columns = iter(matrix)

    def uniform(self) -> Tensor:
        """float32 [N] in [0, 1)."""
        column: Tensor = next(self._columns)
        return column

    def between(self, low: float, high: float) -> Tensor:
        """float32 [N] in [low, high)."""
        return low + (high - low) * self.uniform()

    def integer(self, below: int) -> Tensor:
        """float32 [N] of whole numbers in 0..below-1."""
        return (self.uniform() * below).floor()


# Geometry: 3 × 3 matrices on coordinates in [-1, 1] (torch.nn.functional.affine_grid), result → source


def _matrices(
    *,
    sx: Tensor | float = 1.0,
    sy: Tensor | float = 1.0,
    shear_x: Tensor | float = 0.0,
    shear_y: Tensor | float = 0.0,
    tx: Tensor | float = 0.0,
    ty: Tensor | float = 0.0,
) -> Tensor:
    """float32 [N, 3, 3]; at least one argument is a tensor [N]."""
    like = next(v for v in (sx, sy, shear_x, shear_y, tx, ty) if isinstance(v, Tensor))
    entries = (sx, shear_x, tx, shear_y, sy, ty, 0.0, 0.0, 1.0)
    return torch.stack([e if isinstance(e, Tensor) else torch.full_like(like, e) for e in entries], 1).view(-1, 3, 3)


def _warp(batch: Tensor, warps: list[Tensor], size: int, resample: str) -> Tensor:
    """float32 [N, 3, S, S] → [N, 3, size, size]; black outside of the stored image.

    Black is not blended in: a crop that ends where the picture does would be darker there than whole pictures ever are.
    """
    matrix = warps[0]
    for warp in warps[1:]:
        matrix = matrix @ warp
    grid = F.affine_grid(matrix[:, :2], [*batch.shape[:2], size, size], align_corners=False)
    warped: Tensor = F.grid_sample(batch, grid, mode=resample, padding_mode="border", align_corners=False)
    inside = grid.abs().amax(-1) <= 1 + 1e-4  # [N, size, size]; the rest is rounding
    return (warped * inside[:, None]).clamp(0, 1)  # a cubic overshoots at edges


# Colours: float32 [N, 3, S, S] in [0, 1] and a strength [N, 1, 1, 1] → the same


def _blend(image: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (factor * image + (1 - factor) * other).clamp(0, 1)


def _brightness(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, torch.zeros_like(image), factor)


def _color(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, vision.rgb_to_grayscale(image), factor)


def _contrast(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, vision.rgb_to_grayscale(image).mean((1, 2, 3), keepdim=True), factor)


def _sharpness(image: Tensor, factor: Tensor) -> Tensor:
    kernel = image.new_full((3, 1, 3, 3), 1 / 13)  # made on the device: a GPU waits for what comes from elsewhere
    kernel[:, :, 1, 1] = 5 / 13
    blurred = image.clone()  # the outermost pixels stay as they are
    blurred[..., 1:-1, 1:-1] = F.conv2d(image, kernel, groups=3)
    return _blend(image, blurred, factor)


def _posterize(image: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return (image * 255).round().div(step).floor() * step / 255


def _solarize(image: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(image >= threshold, 1 - image, image)


def _autocontrast(image: Tensor, _: Tensor) -> Tensor:
    low, high = image.amin((2, 3), keepdim=True), image.amax((2, 3), keepdim=True)
    flat = high <= low
    return torch.where(flat, image, (image - low) / torch.where(flat, 1.0, high - low))


def _equalize(image: Tensor, _: Tensor) -> Tensor:
    equalized: Tensor = vision.equalize((image * 255).round().byte())
    return equalized.float() / 255


_COLOR_OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    _brightness,
    _color,
    _contrast,
    _sharpness,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
]
_OPERATIONS = 14  # identity, five of geometry, eight of colour: the set of torchvision


class _Ranges:
    """The strongest setting of each operation, reached at strength 30."""

    def __init__(self, shear: float, translation: float, rotation: float, enhance: float, posterize: int) -> None:
        self.shear, self.translation, self.rotation = shear, translation, rotation
        self.enhance, self.posterize = enhance, posterize


_RAND = _Ranges(shear=0.3, translation=150 / 331, rotation=30.0, enhance=0.9, posterize=4)
_TRIVIAL = _Ranges(shear=0.99, translation=1.0, rotation=135.0, enhance=0.99, posterize=6)


def _random_operation(batch: Tensor, draw: _Draws, strength: Tensor, ranges: _Ranges) -> tuple[Tensor, Tensor]:
    """One operation an image, drawn from the 14: the recoloured batch and the warp still to do.

    All are computed for all and one is kept: at these sizes that is cheaper than gathering, and a GPU need not be asked
    which images go where.
    """
    choice = draw.integer(_OPERATIONS)
    level = strength / (_BINS - 1)
    signed = level * torch.where(draw.uniform() < 0.5, -1.0, 1.0)

    def only(operation: int, value: Tensor) -> Tensor:
        return torch.where(choice == operation, value, 0.0)

    angle = only(5, signed * math.radians(ranges.rotation))
    shear_x, shear_y = only(1, signed * ranges.shear), only(2, signed * ranges.shear)
    warp = _matrices(
        sx=angle.cos(),
        sy=angle.cos(),
        shear_x=shear_x - angle.sin(),
        shear_y=shear_y + angle.sin(),
        tx=only(3, signed * 2 * ranges.translation),
        ty=only(4, signed * 2 * ranges.translation),
    )

    factor = _per_image(1 + signed * ranges.enhance)
    bits = _per_image(8 - (level * ranges.posterize).round())
    threshold = _per_image(1 - level)
    values = [factor] * 4 + [bits, threshold, threshold, threshold]
    result = batch
    for number, (operation, value) in enumerate(zip(_COLOR_OPERATIONS, values, strict=True), start=6):
        result = torch.where(_per_image(choice == number), operation(batch, value), result)
    return result, warp


def _erase(batch: Tensor, draw: _Draws, probability: float) -> Tensor:
    """Replaces a rectangle by the mean colour (0 after normalisation) in a share of the images (arXiv 1708.04896)."""
    side = batch.shape[-1]
    area = draw.between(*_ERASE_AREA) * side * side
    ratio = draw.between(*_ERASE_LOG_RATIO).exp()
    height = (area * ratio).sqrt().round().clamp(1, side)
    width = (area / ratio).sqrt().round().clamp(1, side)
    top = (draw.uniform() * (side - height + 1)).floor()
    left = (draw.uniform() * (side - width + 1)).floor()
    chosen = draw.uniform() < probability

    position = torch.arange(side, device=batch.device)
    rows = (position >= top[:, None]) & (position < (top + height)[:, None])  # [N, S]
    columns = (position >= left[:, None]) & (position < (left + width)[:, None])
    hole = rows[:, None, :, None] & columns[:, None, None, :] & _per_image(chosen)
    return batch.masked_fill(hole, 0.0)


def _per_image(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _mixing(config: AugmentConfig, num_classes: int) -> v2.Transform | None:
    choices: list[v2.Transform] = []
    if config.mixup:
        choices.append(v2.MixUp(alpha=config.mixup, num_classes=num_classes))
    if config.cutmix:
        choices.append(v2.CutMix(alpha=config.cutmix, num_classes=num_classes))
    return v2.RandomChoice(choices) if choices else None
