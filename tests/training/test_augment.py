"""Training images: the same under the same seed, normalised as the network expects, targets that stay distributions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torchvision.transforms.v2 import functional as vision

from training import augment as augment_module
from training.augment import Augmentation, preprocessing
from training.config import AugmentConfig, TrainConfig
from training.data import ImageSet

OFF = AugmentConfig(crop_scale=1.0, flip=0.0)
EVERYTHING = AugmentConfig(
    pad_crop=4,
    crop_scale=0.75,
    randaugment_ops=2,
    randaugment_magnitude=9,
    trivialaugment=1,
    erase=0.25,
    mixup=0.5,
    cutmix=0.5,
)
Batch = tuple[torch.Tensor, torch.Tensor]
Operation = Callable[..., torch.Tensor]


def augment(photos: ImageSet, config: AugmentConfig, seed: int = 0, size: int = 32) -> Batch:
    batch = torch.arange(0, 200, 7)
    torch.manual_seed(seed)
    return Augmentation(TrainConfig(augment=config), 10)(photos.images[batch], photos.labels[batch], size)


def unaugmented(photos: ImageSet) -> torch.Tensor:
    images: torch.Tensor = preprocessing(TrainConfig())(photos.images[::7])
    return images


def test_normalisation_is_the_textbooks() -> None:
    config = TrainConfig(normalize_mean=(0.1, 0.2, 0.3), normalize_std=(0.5, 0.25, 0.2))
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = torch.tensor([[-0.2, -0.8, -1.5], [1.8, 3.2, 3.5]]).view(2, 3, 1, 1)
    torch.testing.assert_close(preprocessing(config)(pixels), expected)


def test_switched_off_it_only_normalises(photos: ImageSet) -> None:
    images, labels = augment(photos, OFF)
    assert torch.equal(images, unaugmented(photos))
    assert torch.equal(labels, photos.labels[::7])


@pytest.mark.parametrize("config", [OFF, AugmentConfig(), EVERYTHING], ids=["off", "default", "everything"])
@pytest.mark.parametrize("size", [16, 32, 40])
def test_gives_floats_of_the_size_asked_for(photos: ImageSet, config: AugmentConfig, size: int) -> None:
    images, _ = augment(photos, config, size=size)
    assert images.shape == (29, 3, size, size)
    assert images.dtype == torch.float32
    assert images.isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        dataclasses.replace(OFF, flip=0.5),
        dataclasses.replace(OFF, pad_crop=4),
        dataclasses.replace(OFF, erase=0.5),
        dataclasses.replace(OFF, randaugment_ops=2),
        dataclasses.replace(OFF, trivialaugment=1),
        dataclasses.replace(OFF, mixup=0.5),
        dataclasses.replace(OFF, cutmix=0.5),
        EVERYTHING,
    ],
)
def test_the_seed_decides_everything(photos: ImageSet, config: AugmentConfig) -> None:
    before = photos.images.clone()
    (images, targets), (again, targets_again) = augment(photos, config), augment(photos, config)
    assert torch.equal(images, again)
    assert torch.equal(targets, targets_again)
    assert not torch.equal(images, augment(photos, config, seed=1)[0])
    assert torch.equal(photos.images, before), "the data set must stay as it is"


def test_every_image_is_drawn_for_by_itself(photos: ImageSet) -> None:
    same = ImageSet(photos.images[:1].expand(200, -1, -1, -1), photos.labels, photos.classes)
    images, _ = augment(same, AugmentConfig(crop_scale=0.5))
    assert len({image.numpy().tobytes() for image in images}) > 20


def test_a_bicubic_warp_stays_within_black_and_white(photos: ImageSet) -> None:
    """A cubic overshoots at edges; and it is sharper than a bilinear one."""
    board = (torch.arange(32)[:, None] // 4 + torch.arange(32) // 4).remainder(2).mul(255).byte().expand(200, 3, 32, 32)
    crops = {}
    for resample in ("bilinear", "bicubic"):
        config = TrainConfig(
            augment=AugmentConfig(crop_scale=0.5), resample=resample, normalize_mean=(0.0,) * 3, normalize_std=(1.0,) * 3
        )
        torch.manual_seed(0)
        crops[resample], _ = Augmentation(config, 10)(board, photos.labels, 40)
    assert 0 <= crops["bicubic"].min() < crops["bicubic"].max() <= 1
    assert crops["bicubic"].var() > 1.02 * crops["bilinear"].var()


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 32, 48])
def test_a_crop_is_as_bright_at_the_pictures_edge_as_within(photos: ImageSet, resample: str, size: int) -> None:
    """Of a white picture all is white, as where whole ones are looked at."""
    plain = {"resample": resample, "normalize_mean": (0.0,) * 3, "normalize_std": (1.0,) * 3}
    config = TrainConfig(augment=AugmentConfig(crop_scale=0.75, flip=0.5), **plain)  # type: ignore[arg-type]
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    images, _ = Augmentation(config, 10)(white, photos.labels, size)
    torch.testing.assert_close(images, torch.ones_like(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_outside_of_a_shifted_picture_is_black(photos: ImageSet, resample: str) -> None:
    plain = {"resample": resample, "normalize_mean": (0.0,) * 3, "normalize_std": (1.0,) * 3}
    config = TrainConfig(augment=dataclasses.replace(OFF, pad_crop=4), **plain)  # type: ignore[arg-type]
    white = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    images, _ = Augmentation(config, 10)(white, photos.labels, 32)
    assert ((images < 1e-5) | (images > 1 - 1e-5)).all(), "no grey between"
    black = (images < 0.5).all(1)
    rows, columns = black.all(2).sum(1), black.all(1).sum(1)
    assert rows.unique().tolist() == columns.unique().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal((~black).sum((1, 2)), (32 - rows) * (32 - columns)), "what is left of the picture is a rectangle"


def test_flip_mirrors(photos: ImageSet) -> None:
    assert torch.equal(augment(photos, dataclasses.replace(OFF, flip=1.0))[0], unaugmented(photos).flip(-1))


def test_pad_crop_shifts_by_at_most_the_padding(photos: ImageSet) -> None:
    images, _ = augment(photos, dataclasses.replace(OFF, pad_crop=2))
    black = preprocessing(TrainConfig())(torch.zeros(1, 3, 36, 36, dtype=torch.uint8))
    shifts = set()
    for image, original in zip(images, unaugmented(photos), strict=True):
        padded = black[0].clone()
        padded[:, 2:34, 2:34] = original
        windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(5) for x in range(5)}
        fits = [place for place, window in windows.items() if torch.allclose(window, image, atol=1e-4)]
        assert fits
        shifts.add(fits[0])
    assert len(shifts) > 5


def test_a_crop_shows_a_part_and_nothing_else(photos: ImageSet) -> None:
    """The corners of a picture whose pixels tell their place: each crop is a square of the share asked for, inside it."""
    ramp = (torch.arange(32) * 8).byte()
    places = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32), torch.zeros(32, 32).byte()])
    same = ImageSet(places.expand(200, -1, -1, -1), photos.labels, photos.classes)
    config = TrainConfig(augment=dataclasses.replace(OFF, crop_scale=0.25), normalize_mean=(0.0,) * 3, normalize_std=(1.0,) * 3)
    torch.manual_seed(0)
    images, _ = Augmentation(config, 10)(same.images, same.labels, 32)
    widths = (images[:, 0, 16, 28] - images[:, 0, 16, 4]) * 255 / 8 / 24  # stored pixels per pixel of the result
    heights = (images[:, 1, 28, 16] - images[:, 1, 4, 16]) * 255 / 8 / 24
    torch.testing.assert_close(widths, heights, atol=0.02, rtol=0)
    assert 0.49 < widths.min() < 0.6
    assert 0.9 < widths.max() < 1.01
    shares = widths.square()
    assert shares.mean() == pytest.approx(0.625, abs=0.05), "the area is uniform in [0.25, 1]"
    assert (images[:, 2] == 0).all(), "nothing from outside"


FACTOR = 1.6


@pytest.mark.parametrize(
    ("ours", "value", "theirs"),
    [
        (augment_module._brightness, FACTOR, lambda x: vision.adjust_brightness(x, FACTOR)),
        (augment_module._color, FACTOR, lambda x: vision.adjust_saturation(x, FACTOR)),
        (augment_module._contrast, FACTOR, lambda x: vision.adjust_contrast(x, FACTOR)),
        (augment_module._sharpness, FACTOR, lambda x: vision.adjust_sharpness(x, FACTOR)),
        (augment_module._posterize, 5, lambda x: vision.posterize((x * 255).byte(), 5) / 255),
        (augment_module._solarize, 0.4, lambda x: vision.solarize(x, 0.4)),
        (augment_module._autocontrast, 0, vision.autocontrast),
        (augment_module._equalize, 0, lambda x: vision.equalize((x * 255).byte()) / 255),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_colour_operations_are_torchvisions(photos: ImageSet, ours: Operation, value: float, theirs: Operation) -> None:
    pictures = photos.images[:20].float() / 255
    found = ours(pictures, torch.full((20, 1, 1, 1), float(value)))
    torch.testing.assert_close(found, theirs(pictures), atol=1e-4, rtol=0)


def test_every_operation_of_the_policy_occurs(photos: ImageSet) -> None:
    same = ImageSet(photos.images[:1].expand(200, -1, -1, -1), photos.labels, photos.classes)
    images, _ = augment(same, dataclasses.replace(OFF, randaugment_ops=1, randaugment_magnitude=20))
    kinds = {(image * 1000).round().short().numpy().tobytes() for image in images}
    # of the 14: identity, autocontrast, equalize, posterize and solarize have no sign, nine have one
    assert 15 < len(kinds) <= 5 + 9 * 2


def test_an_erased_rectangle_takes_the_mean_colour(photos: ImageSet) -> None:
    images, _ = augment(photos, dataclasses.replace(OFF, erase=1.0))
    erased = (images == 0).all(1)
    for hole, image, original in zip(erased, images, unaugmented(photos), strict=True):
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "one full rectangle"
        assert 0.01 < hole.float().mean() < 0.4
        assert torch.equal(image[:, ~hole], original[:, ~hole])


@pytest.mark.parametrize("config", [{"mixup": 0.5}, {"cutmix": 0.5}, {"mixup": 0.5, "cutmix": 0.5}])
def test_mixed_targets_are_distributions(photos: ImageSet, config: dict[str, float]) -> None:
    mixed = False
    for seed in range(5):
        _, targets = augment(photos, dataclasses.replace(OFF, **config), seed)  # type: ignore[arg-type]
        assert targets.shape == (29, 10)
        assert targets.dtype == torch.float32
        assert (targets >= 0).all()
        torch.testing.assert_close(targets.sum(1), torch.ones(29))
        mixed |= bool(((targets > 0.05) & (targets < 0.95)).any())
        own = targets.gather(1, photos.labels[::7, None])
        assert (own > 0).any(), "an image keeps a share of its own class"
    assert mixed


def test_without_mixing_the_pictures_are_as_if_none_were_configured(photos: ImageSet) -> None:
    config = TrainConfig(augment=dataclasses.replace(OFF, mixup=0.5, cutmix=0.5))
    images, labels = Augmentation(config, 10)(photos.images[::7], photos.labels[::7], 32, mix=False)
    assert torch.equal(images, unaugmented(photos))
    assert torch.equal(labels, photos.labels[::7])


def test_mixup_blends_pixels_as_it_blends_targets(photos: ImageSet) -> None:
    two = ImageSet(torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), 255)]).byte(), torch.tensor([0, 1]), ["a", "b"])
    config = TrainConfig(
        augment=dataclasses.replace(OFF, mixup=1.0), normalize_mean=(0.0, 0.0, 0.0), normalize_std=(1.0, 1.0, 1.0)
    )
    torch.manual_seed(0)
    images, targets = Augmentation(config, 2)(two.images, two.labels, 8)
    torch.testing.assert_close(images[:, 0, 0, 0], targets[:, 1])
    assert 0.02 < targets[0, 1] < 0.98
