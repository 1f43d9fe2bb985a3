"""What callers may pass as an image → the bytes of an image file, and images → batches worth a request."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from app.client.answers import ClassificationError, ClientError, Prediction, RequestFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]"
"""A path, the bytes of an image file, a Pillow image, or uint8 [H, W, 3] RGB or [H, W] grey."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Of one request, so that large photos go one by one and a request stays far below `CONVMIXER_MAX_BODY_BYTES`."""

UNREADABLE = "unreadable"
UNREACHABLE = "unreachable"

_PNG_MODES = {"1", "L", "LA", "I;16", "P", "RGB", "RGBA"}
_WITHOUT_LOSS = {
    "I": ("I;16",),
    "I;16B": ("I", "I;16"),
    "I;16L": ("I", "I;16"),
    "I;16N": ("I", "I;16"),
    "La": ("LA",),
    "PA": ("RGBA",),
    "RGBa": ("RGBA",),
}
"""By which modes others become one of a PNG; those left out become RGB. Pillow clips 16-bit grey to 8 bits on any shorter way."""

_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True, slots=True)
class Picture:
    """One image ready to be sent.

    Attributes:
        index: position among the images given.
        filename: the path, if a path was given.
        data: a whole image file.
    """

    index: int
    filename: str | None
    data: bytes

    def result(self, result: Prediction | ClientError) -> Prediction | ClassificationError:
        """A failure as the entry that stands in this image's place; a prediction as it is."""
        if isinstance(result, Prediction):
            return result
        if isinstance(result, RequestFailed):
            return ClassificationError(self.index, self.filename, result.code, result.detail, result.request_id)
        return ClassificationError(self.index, self.filename, UNREACHABLE, str(result), None)


@dataclass
class Batch:
    """Images of one request, and in their places those that cannot be sent."""

    entries: list[Picture | ClassificationError] = field(default_factory=list)
    size_bytes: int = 0

    def add(self, entry: Picture | ClassificationError) -> None:
        """Appends."""
        self.entries.append(entry)
        self.size_bytes += len(entry.data) if isinstance(entry, Picture) else 0

    def pictures(self) -> list[Picture]:
        """What is to be sent."""
        return [entry for entry in self.entries if isinstance(entry, Picture)]

    def merge(self, results: list[Prediction | ClientError]) -> list[Prediction | ClassificationError]:
        """What came of each entry, in order.

        Args:
            results: of `pictures()`.
        """
        remaining = iter(results)
        return [entry if isinstance(entry, ClassificationError) else entry.result(next(remaining)) for entry in self.entries]

    def is_full(self, size: int) -> bool:
        """Whether it should be sent.

        Args:
            size: most images.
        """
        return len(self.entries) >= size or self.size_bytes >= MAX_BATCH_BYTES


def encode(image: ImageInput) -> bytes:
    """The bytes of an image file; pixels become a PNG, so nothing is lost.

    Args:
        image: see `ImageInput`.

    Raises:
        OSError: a path cannot be read, or a Pillow image not be decoded.
        ValueError: an array is not uint8 [H, W, 3] or [H, W].
        TypeError: something else was passed.
    """
    _check_type(image)
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        return Path(image).read_bytes()
    if _is_a(image, "numpy", "ndarray"):
        return _png(_from_array(cast("NDArray[np.uint8]", image)))
    return _png(cast("Image.Image", image))


def filename_of(image: ImageInput) -> str | None:
    """The path, if it is one.

    Args:
        image: see `ImageInput`.
    """
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def load(index: int, image: ImageInput) -> Picture | ClassificationError:
    """Encodes one of many; one that cannot be read is reported in its place.

    Args:
        index: position among the images given.
        image: see `ImageInput`.

    Raises:
        TypeError: what was passed is no image at all.
    """
    _check_type(image)  # apart from encoding: Pillow raises TypeError, too
    filename = filename_of(image)
    try:
        data = encode(image)
        if not data:
            return ClassificationError(index, filename, "undecodable_image", "the file is empty", None)  # as the service says
        return Picture(index, filename, data)
    except OSError as error:
        return ClassificationError(index, filename, UNREADABLE, f"cannot be read: {error.strerror or error}", None)
    except ValueError as error:
        return ClassificationError(index, filename, UNREADABLE, str(error), None)
    except Exception as error:  # a damaged file opened by Pillow raises SyntaxError, struct.error, zlib.error, TypeError, …
        return ClassificationError(index, filename, UNREADABLE, f"cannot be read: {error or type(error).__name__}", None)


def batches(images: Iterable[ImageInput], size: int) -> Iterator[Batch]:
    """Takes from `images` only what the next batch needs; if `images` fails, what came before it still makes a batch.

    Args:
        images: of any number.
        size: images in a batch.
    """
    batch = Batch()
    try:
        for index, image in enumerate(images):
            batch.add(load(index, image))
            if batch.is_full(size):
                yield batch
                batch = Batch()
    except Exception:
        if batch.entries:
            yield batch
        raise
    if batch.entries:
        yield batch


def check_several(images: object) -> None:
    """Refuses one image where several are wanted: what it consists of would be taken for images.

    Args:
        images: as given.

    Raises:
        TypeError: it is one.
    """
    is_one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview) or _is_a(images, "PIL.Image", "Image")
    if _is_a(images, "numpy", "ndarray"):
        pixels = cast("NDArray[np.uint8]", images)
        holds_images = pixels.dtype.kind in "OSU" and pixels.ndim > 0  # paths, bytes or pictures
        is_one = not holds_images and (pixels.ndim < 3 or (pixels.ndim == 3 and pixels.shape[2] == 3))
    if is_one:
        raise TypeError("that is one image; classify_many takes several, classify takes one")


def _check_type(image: object) -> None:
    known = isinstance(image, str | os.PathLike | bytes | bytearray | memoryview)
    if not known and not _is_a(image, "numpy", "ndarray") and not _is_a(image, "PIL.Image", "Image"):
        raise TypeError(f"an image is a path, bytes, a Pillow image or a numpy array, not {type(image).__name__}")


def _is_a(value: Any, module: str, name: str) -> bool:
    """`isinstance` without importing: whoever made the value has imported its module."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    from PIL import Image

    if pixels.dtype != "uint8" or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise ValueError(f"an array must be uint8 [H, W, 3] (RGB) or [H, W] (grey), not {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(pixels)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    # an image may be asked about twice at once, and Pillow's are not for two threads
    with image.__dict__.setdefault("_convmixer_lock", threading.Lock()):
        image.load()  # turns a TIFF upright, which is then no more to be done
        exif = _orientation_alone(image)
        if image.mode not in _PNG_MODES:
            for mode in _WITHOUT_LOSS.get(image.mode, ("RGB",)):
                image = image.convert(mode)
        image.save(buffer, "PNG", compress_level=1, exif=exif)  # a little larger than the best and several times faster
    return buffer.getvalue()


def _orientation_alone(image: Image.Image) -> Image.Exif:
    """Of EXIF what the server applies: nobody needs the place and the maker's notes, and an odd tag cannot be written again."""
    from PIL import Image

    exif = Image.Exif()
    with suppress(Exception):  # what cannot be read turns nothing, as with the file itself
        if any("xmp" in str(name).lower() for name in image.info):  # Pillow would take that word for it, the server does not
            plain = Image.new("1", (1, 1))
            plain.info = {name: image.info[name] for name in ("exif", "Raw profile type exif") if name in image.info}
            image = plain
        orientation = image.getexif().get(_ORIENTATION_TAG)
        if isinstance(orientation, int) and 2 <= orientation <= 8:
            exif[_ORIENTATION_TAG] = orientation
    return exif
