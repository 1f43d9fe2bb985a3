"""Images on disk → one uint8 tensor with labels, split into training and validation.

CIFAR-10 fits in memory many times over, so a data set is a tensor and not a loader. Sources: torchvision's CIFAR-10
download, or any folder with one sub-folder per class.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR10
from tqdm import tqdm

from pictures.files import IMAGE_SUFFIXES, walk
from pictures.pixels import (
    compose_on_white,
    load_first_frame,
    scale_transparent_colour,
    to_8_bit,
    upright,
    with_a_third_colour,
)
from training.errors import DataError

_SPLITS = ("train", "test")
_LIKE_SPLITS = {*_SPLITS, "training", "testing", "val", "valid", "validation", "eval"}
_HELD_OUT_SEED = 0  # of the order in which images are held out; another number would hold out what released models have learnt


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: uint8 [N, 3, S, S], RGB.
        labels: int64 [N], index into `classes`.
        classes: names, in the order of the network's outputs.
        enlarged_from: side of the largest picture (its shorter one) before all were enlarged to S; None if one was not.
        source_sha256: of the files, labels and class names that all this was read from, so the same at every S; None for images
            that were read from nothing, or are a part of others.
        pictures_sha256: of the files alone, in whatever order and however they are labelled; likewise.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]
    enlarged_from: int | None = None
    source_sha256: str | None = None
    pictures_sha256: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> str:
        """SHA-256 of pixels, labels and class names: equal only for the same data in the same order."""
        digest = hashlib.sha256("\0".join(self.classes).encode())
        digest.update(np.ascontiguousarray(self.images.numpy()).data)  # no copy, which could be of gigabytes
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def load_images(source: Path | None, split: Literal["train", "test"], image_size: int, resample: str = "bilinear") -> ImageSet:
    """Loads one split.

    Args:
        source: a folder with one sub-folder per class, or with `train/` and `test/` that hold such folders; None for
            CIFAR-10, downloaded by torchvision to `data/torchvision` on first use.
        split: `train` or `test`; ignored for a folder of classes, of which one may have such a name if it has no sub-folders.
        image_size: side S that every image is brought to.
        resample: the filter used for it.

    Raises:
        DataError: the folder is missing, empty, has one class only, or holds an unreadable image or folder, or one of `train/`
            and `test/` is missing, or may be a class as well.
    """
    if source is None:
        return _load_cifar10(Path("data/torchvision"), split, image_size, resample)
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; --data takes a folder with one sub-folder per class")
    folder = _folder_of(source, split)
    if split == "train" and folder != source:
        _check_same_classes(folder, source / "test")
    return _load_folder(folder, image_size, resample)


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
    source = training.get("source_sha256")  # older checkpoints have none
    same = training["data_sha256"] == data.fingerprint() or (source is not None and source == data.source_sha256)
    if same and theirs < fraction:
        raise DataError(
            f"{path} held out {theirs:g} of the same images, so it has learnt some of the {fraction:g} that this run would be "
            f"judged by; give --set val_fraction={theirs:g}"
        )
    if not same and data.pictures_sha256 is not None and training.get("pictures_sha256") == data.pictures_sha256:
        print(
            f"{path} was trained with these very pictures, labelled or ordered otherwise, and others of them were held out: it "
            "has learnt most of those by which this run is judged, and validation accuracy, temperature and rejection threshold "
            "will be too good; the test set is not concerned",
            file=sys.stderr,
        )
    elif not same and set(description["classes"]) & set(data.classes):
        print(
            f"{path} was trained with other images of classes that are here, too, or with these in another order or size: if it "
            "has learnt some that are held out here, validation accuracy, temperature and rejection threshold will be too good; "
            "the test set is not concerned",
            file=sys.stderr,
        )


def count_learnt(source: Path | None) -> int:
    """Test images whose files are among those of the training, to the byte.

    Args:
        source: as of `load_images`; only of a folder with `train/` and `test/` there is something to count.
    """
    if source is None or not all(name in _sub_folders(source) for name in _SPLITS):
        return 0
    try:
        folders = [_folder_of(source, split) for split in _SPLITS]
        training, test = map(_images_in, folders)
    except DataError as error:  # what hinders training is no business of a test
        print(f"how many test images are in the training, too, is not known: {error}", file=sys.stderr)
        return 0
    if folders[0] == folders[1]:
        return 0
    sizes = {path.stat().st_size for path in test}
    learnt = set()
    for path in training:
        with suppress(OSError):  # a link that leads nowhere: it has not been learnt
            if path.stat().st_size in sizes:
                learnt.add(_sha256_of(path))
    return sum(_sha256_of(path) in learnt for path in test)


def _images_in(folder: Path) -> list[Path]:
    return [path for path, _ in _find(folder, _sub_folders(folder)) if path.suffix.lower() in IMAGE_SUFFIXES]


def _sha256_of(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _load_cifar10(root: Path, split: str, image_size: int, resample: str) -> ImageSet:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):  # torchrun's processes come at once
            source = CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded to {root}: {str(error).rstrip('.')}. Give a folder with --data."
        ) from error
    labels, classes = torch.tensor(source.targets), list(source.classes)
    native = ImageSet(torch.from_numpy(source.data).permute(0, 3, 1, 2), labels, classes)
    pixels, side = source.data, source.data.shape[1]
    if image_size != side:
        pixels = np.stack([np.asarray(_fit(Image.fromarray(image), image_size, resample)) for image in pixels])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    each = [hashlib.sha256(picture.tobytes()).digest() for picture in source.data]
    return ImageSet(images, labels, classes, side if side < image_size else None, native.fingerprint(), _together(each))


def _folder_of(source: Path, split: str) -> Path:
    """That of the split; `source` itself where its sub-folders are classes. Hidden ones decide nothing."""
    folders = _sub_folders(source)
    splits = [name for name in folders if name in _SPLITS]
    others = [name for name in folders if name not in _SPLITS]
    if others and all(name.lower() in _LIKE_SPLITS and _sub_folders(source / name) for name in folders):
        raise DataError(
            f"{source} holds {' and '.join(folders)}, which look like splits and would be taken for classes; call them train and "
            "test (validation images are held out of train)"
        )
    if others:
        for name in splits:
            if _sub_folders(source / name):
                raise DataError(
                    f"{source / name} holds folders, as a split does, and lies beside {others[0]!r}, as a class does; if it is a "
                    "class, rename it, and if not, leave nothing but train and test there"
                )
        return source
    if splits and split not in splits:
        raise DataError(f"{source / split} is missing beside {source / splits[0]}")
    return source / split if splits else source


def _check_same_classes(train: Path, test: Path) -> None:
    """Before hours of training, not when its result is to be evaluated."""
    if test.is_dir() and (different := sorted(set(_sub_folders(train)) ^ set(_sub_folders(test)))):
        names = ", ".join(map(repr, different[:5])) + (", …" if len(different) > 5 else "")
        raise DataError(f"{train} and {test} must hold the same classes; only one of them has {names}")


def _sub_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _load_folder(folder: Path, image_size: int, resample: str) -> ImageSet:
    classes = _sub_folders(folder)
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{folder} must hold one sub-folder per class, at least two; found {found}")
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            written = os.fsencode(folder / name).decode(errors="backslashreplace")
            raise DataError(f"{written} has a name that is not UTF-8, and gives it to a class: rename it") from error
    present = _find(folder, classes)
    files = [(path, label) for path, label in present if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path for path, _ in present if path.suffix.lower() not in IMAGE_SUFFIXES and path.is_file()]
    if passed_over := Counter(path.suffix for path in others):
        counts = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in passed_over.most_common())
        print(f"{folder}: files passed over, because such are not read: {counts}", file=sys.stderr)
    empty = set(range(len(classes))) - {label for _, label in files}
    if empty:
        raise DataError(f"no image in {', '.join(str(folder / classes[i]) for i in sorted(empty))}")
    images, largest = torch.empty((len(files), 3, image_size, image_size), dtype=torch.uint8), 0
    labels = torch.tensor([label for _, label in files])
    source = hashlib.sha256("\0".join(classes).encode())
    source.update(labels.numpy().tobytes())
    each = []
    for index, (path, _) in enumerate(tqdm(files, desc=f"reading {folder}", unit="img", leave=False, disable=None)):
        try:
            data = path.read_bytes()
            pixels, native = _decode(data, image_size, resample)
        except Exception as error:  # Pillow's decoders raise anything: ValueError, SyntaxError, struct.error, MemoryError, …
            reason = "of no known type" if isinstance(error, UnidentifiedImageError) else error
            raise DataError(f"{path} cannot be read as an image ({reason}); remove or replace it") from error
        images[index], largest = torch.from_numpy(pixels).permute(2, 0, 1), max(largest, native)
        each.append(hashlib.sha256(data).digest())
        source.update(each[-1])
    smaller = largest if largest < image_size else None
    return ImageSet(images, labels, classes, smaller, source.hexdigest(), _together(each))


def _together(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _find(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """Everything in the classes' folders, with their number, in order.

    A folder that is a class or lies in one counts there, and not where a link leads to it.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be looked into: {error.strerror}") from error

    roots = sorted((os.path.join(folder, name) for name in classes), key=os.path.islink)  # noqa: PTH118
    found = []
    for root, folders, files in walk(roots, refuse, {os.path.realpath(folder)}):
        label = classes.index(Path(root).relative_to(folder).parts[0])
        found += [(Path(path), label) for path in (*folders, *files)]
    return sorted(found, key=lambda one: (one[1], one[0]))


def _decode(data: bytes, image_size: int, resample: str) -> tuple[np.ndarray, int]:
    """A picture as the service reads it: upright, the middle square, on white.

    Returns:
        uint8 [S, S, 3], RGB, and the picture's shorter side before.
    """
    with Image.open(io.BytesIO(with_a_third_colour(data))) as image:
        scale_transparent_colour(image, data)
        full = to_8_bit(upright(load_first_frame(image)))
    native = min(full.size)
    if full.size != (image_size, image_size):
        full = _fit(full, image_size, resample)
    return np.array(compose_on_white(full)), native


def _fit(image: Image.Image, side: int, resample: str) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling[resample.upper()])
