"""Images on disk → one uint8 tensor with labels, split into training and validation.

CIFAR-10 fits in memory many times over, so a data set is a tensor and not a loader. Sources: torchvision's CIFAR-10
download, or any folder with one sub-folder per class.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from training.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif"}
_HELD_OUT_SEED = 0  # of the order in which images are held out; another number would hold out what released models have learnt


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: uint8 [N, 3, S, S], RGB.
        labels: int64 [N], index into `classes`.
        classes: names, in the order of the network's outputs.
        enlarged_from: side of the largest picture (its shorter one) before all were enlarged to S; None if one was not.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    enlarged_from: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 of pixels, labels and class names: equal only for the same data in the same order."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def order_sha256(self) -> str:
        """SHA-256 of labels and class names: what `split_validation` goes by; the same for the same pictures at another size."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def load_images(source: Path | None, split: Literal["train", "test"], image_size: int, resample: str = "bilinear") -> ImageSet:
    """Loads one split.

    Args:
        source: a folder with one sub-folder per class, or with `train/` and `test/` that hold such folders; None for
            CIFAR-10, downloaded by torchvision to `data/torchvision` on first use.
        split: `train` or `test`; ignored for a folder that has neither, or has one of them as a class.
        image_size: side S that every image is brought to.
        resample: the filter used for it.

    Raises:
        DataError: the folder is missing, empty, has one class only, or holds an unreadable image, or one of `train/` and `test/`
            is missing.
    """
    if source is None:
        return _load_cifar10(Path("data/torchvision"), split, image_size, resample)
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; --data takes a folder with one sub-folder per class")
    return _load_folder(_folder_of(source, split), image_size, resample)


def split_validation(data: ImageSet, fraction: float) -> tuple[ImageSet, ImageSet]:
    """Holds out the same share of every class: (training slice, validation slice).

    Which images depends on nothing but the data and the fraction. So runs of all seeds are judged by the same images, and one
    that begins with another's weights, learns from it or is averaged with it is not judged by images the other has learnt.

    Raises:
        DataError: a class has fewer than two images, so that one slice would lack it.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(_HELD_OUT_SEED))
    held_out = []
    for index, name in enumerate(data.classes):
        members = order[data.labels[order] == index]
        if len(members) < 2:
            raise DataError(f"class {name!r} has {len(members)} image(s); at least 2 are needed to hold one out")
        held_out.append(members[: max(1, round(len(members) * fraction))])
    is_validation = torch.zeros(len(data), dtype=torch.bool)
    is_validation[torch.cat(held_out)] = True
    return tuple(  # type: ignore[return-value]
        ImageSet(data.images[mask], data.labels[mask], data.classes) for mask in (~is_validation, is_validation)
    )


def check_held_out(path: Path, description: dict[str, Any], data: ImageSet, fraction: float) -> None:
    """Refuses a checkpoint that has learnt images by which a new run would be judged; warns of one that may have.

    Args:
        path: of the checkpoint.
        description: the checkpoint's.
        data: of the new run.
        fraction: held out in the new run; a smaller slice is part of a larger one.

    Raises:
        DataError: it was trained with the same pictures, perhaps at another size, of which it held out less.
    """
    training = description["training"]
    theirs = training["config"]["val_fraction"]
    same = training["data_sha256"] == data.fingerprint() or training.get("order_sha256") == data.order_sha256()
    if same and theirs < fraction:
        raise DataError(
            f"{path} held out {theirs:g} of the same images, so it has learnt some of the {fraction:g} that this run would be "
            f"judged by; give --set val_fraction={theirs:g}"
        )
    if not same and set(description["classes"]) & set(data.classes):
        print(
            f"{path} was trained with other images of the same classes, or with these in another order or size: if it has learnt "
            "some that are held out here, validation accuracy, temperature and rejection threshold will be too good; the test "
            "set is not concerned",
            file=sys.stderr,
        )


def _load_cifar10(root: Path, split: str, image_size: int, resample: str) -> ImageSet:
    try:
        source = CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"CIFAR-10 could not be downloaded to {root}: {error}. Give a folder with --data.") from error
    pixels = source.data
    if image_size != pixels.shape[1]:
        pixels = np.stack([np.asarray(_fit(Image.fromarray(image), image_size, resample)) for image in pixels])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    native = source.data.shape[1]
    return ImageSet(images, torch.tensor(source.targets), list(source.classes), native if native < image_size else None)


def _folder_of(source: Path, split: str) -> Path:
    splits = [folder for folder in (source / "train", source / "test") if folder.is_dir()]
    if len(splits) == 1 and not any(path.is_dir() for path in splits[0].iterdir()):
        return source  # a class with that name
    if splits and source / split not in splits:
        raise DataError(f"{source / split} is missing beside {splits[0]}")
    return source / split if splits else source


def _load_folder(folder: Path, image_size: int, resample: str) -> ImageSet:
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{folder} must hold one sub-folder per class, at least two; found {found}")
    present = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob("*"))]
    files = [(path, label) for path, label in present if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path for path, _ in present if path.suffix.lower() not in IMAGE_SUFFIXES and path.is_file()]
    if passed_over := Counter(path.suffix for path in others):
        counts = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in passed_over.most_common())
        print(f"{folder}: files passed over, because such are not read: {counts}", file=sys.stderr)
    empty = set(range(len(classes))) - {label for _, label in files}
    if empty:
        raise DataError(f"no image in {', '.join(str(folder / classes[i]) for i in sorted(empty))}")
    images, largest = torch.empty((len(files), 3, image_size, image_size), dtype=torch.uint8), 0
    for index, (path, _) in enumerate(tqdm(files, desc=f"reading {folder}", unit="img", leave=False, disable=None)):
        pixels, native = _read_image(path, image_size, resample)
        images[index], largest = torch.from_numpy(pixels).permute(2, 0, 1), max(largest, native)
    labels = torch.tensor([label for _, label in files])
    return ImageSet(images, labels, classes, largest if largest < image_size else None)


def _read_image(path: Path, image_size: int, resample: str) -> tuple[np.ndarray, int]:
    """A picture as the service reads it (`app.images`, a test compares): upright, the middle square, on white.

    Returns:
        uint8 [S, S, 3], RGB, and the picture's shorter side before.

    An orientation that only XMP has turns it, too; the service reads EXIF alone.
    """
    try:
        with Image.open(path) as image:
            full = _to_8_bit(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); remove or replace it") from error
    native = min(full.size)
    if full.size != (image_size, image_size):
        full = _fit(full, image_size, resample)
    if full.mode == "RGBA":
        full = Image.alpha_composite(Image.new("RGBA", full.size, "white"), full)
    return np.array(full.convert("RGB")), native


def _fit(image: Image.Image, side: int, resample: str) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling[resample.upper()])


def _to_8_bit(image: Image.Image) -> Image.Image:
    """RGB, grey, or RGBA where something is transparent; Pillow itself would make nearly all of 16-bit grey white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")
