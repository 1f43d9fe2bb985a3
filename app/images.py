"""Bytes from anywhere → uint8 pixels of the model's input size, safely.

What is checked before any pixel is decoded: the format (by content, never by name or Content-Type), the number of
pixels, the longest side. What is done to the picture, in this order: EXIF orientation is applied, transparency is
composed on white, grey, palette, CMYK and 16-bit pictures become 8-bit RGB, and the artifact's resize rule brings it to
size. Of an animation the first frame counts.
"""

from __future__ import annotations

import warnings as warnings_module
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError, WebPImagePlugin

from app.errors import ImageTooLarge, ServiceError, UndecodableImage, UnsupportedImage
from app.file_cost import CountedReads, check_jpeg
from pictures.pixels import (
    compose_on_white,
    is_deep_grey,
    load_first_frame,
    scale_transparent_colour,
    to_8_bit,
    upright,
    with_a_third_colour,
)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DRAFT_MARGIN = 4
"""A large JPEG is decoded at a reduced scale of at least this many times the model's side: 10 × cheaper at 12 megapixels."""

# When an answer deserves doubt whatever the model says. Of the 10,000 CIFAR-10 test images and 250 ordinary photos none is
# called blank or blurred; of the test images blurred with a Gaussian of 1.5 pixels 93 % are.
_MAX_ASPECT = 2
_MAX_REDUCTION = 64
_MIN_CONTRAST = 16
_MIN_SHARPNESS = 0.6

# Pillow warns of what is odd in a file, in words of the file's: the log would fill, and Python remembers each warning for ever
warnings_module.filterwarnings("ignore", module=r"PIL\.")
# Pillow imports decoders at the first image; the first client should not wait for that. (preinit leaves WebP out.)
Image.preinit()
if not WebPImagePlugin.SUPPORTED:
    raise ImportError("this Pillow was built without WebP; install the one from PyPI")


@dataclass(frozen=True)
class ResizeRule:
    """How a picture of any shape becomes a square: part of the artifact, because it belongs to the model.

    Attributes:
        side: S, pixels.
        mode: `crop` keeps the largest middle square, `squash` ignores the aspect ratio, `pad` adds grey bars.
        filter: name of a Pillow resampling filter.
        through: side that a larger picture is brought to before it is enlarged to S: that of the largest training picture, where
            these were smaller than S. A sharper picture is none that the model knows.

    Raises:
        ValueError: `through` is not between 1 and S.
    """

    side: int
    mode: Literal["crop", "squash", "pad"] = "crop"
    filter: Literal["bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    through: int | None = None

    def __post_init__(self) -> None:
        if self.through is not None and not 1 <= self.through <= self.side:
            raise ValueError(f"a picture cannot be brought through {self.through} pixels a side to {self.side}")


@dataclass(frozen=True)
class DecodeLimits:
    """Largest picture that is decoded.

    Attributes:
        max_pixels: width × height.
        max_side: the longer of width and height; a 24,000,000 × 1 strip passes a pixel limit and still takes seconds.
    """

    max_pixels: int
    max_side: int

    def apply_to_pillow(self) -> None:
        """Sets Pillow's own limit, which holds for the whole process.

        Our check needs an opened picture, and opening a GIF of 59 bytes whose first frame is larger than its screen makes
        Pillow fill that frame: 8 gigapixels, half a minute. Its own check comes before that.
        """
        Image.MAX_IMAGE_PIXELS = (self.max_pixels + 1) // 2  # it refuses more than twice as many


@dataclass(frozen=True)
class DecodedImage:
    """One picture, ready for the model.

    Attributes:
        pixels: uint8 [S, S, 3], RGB.
        warnings: what the client should know about the conversion.
    """

    pixels: NDArray[np.uint8]
    warnings: tuple[str, ...] = ()


def decode_image(
    data: bytes,
    rule: ResizeRule,
    limits: DecodeLimits,
    announce: Callable[[int], None] = lambda pixels: None,
    heartbeat: Callable[[], object] = lambda: None,
) -> DecodedImage:
    """Decodes one encoded picture.

    Args:
        data: a whole PNG, JPEG, WebP, GIF or BMP file.
        rule: size and shape of the result.
        limits: largest picture accepted.
        announce: called with the number of pixels, before the work on them begins; a ServiceError of it ends that.
        heartbeat: called again and again while the file is read, which other threads may make slow.

    Raises:
        UnsupportedImage: none of the formats above (415).
        ImageTooLarge: over a limit (413).
        UndecodableImage: empty, damaged, or made so that decoding takes too long (422).
    """
    try:
        if data.startswith(b"\xff\xd8"):
            check_jpeg(data, limits.max_pixels)
        with Image.open(CountedReads(with_a_third_colour(data), heartbeat), formats=FORMATS) as image:
            _check_size(image, limits)
            scale_transparent_colour(image, data)
            announce(image.width * image.height)
            shape = _doubts_about_shape(image.size, rule)
            warnings = []
            if image.format in {"JPEG", "MPO"}:  # cameras put a small copy behind the photo, which Pillow then calls MPO
                image.draft(None, (rule.side * _DRAFT_MARGIN, rule.side * _DRAFT_MARGIN))
                image.decodermaxblock = len(data)  # in one piece: what cannot be decoded yet would be looked at again with each
            elif getattr(image, "is_animated", False):
                warnings.append("animation: only the first frame was classified")
            first = load_first_frame(image)
            if is_deep_grey(first):
                warnings.append("16-bit grey was reduced to 8 bit")
            # composed when small: a full-size layer and its white ground would double the memory of a large picture
            picture = to_8_bit(upright(first))
            small = _resize(picture, rule.through or rule.side, rule)
            if small.mode == "RGBA" and np.asarray(small.getchannel("A")).min() < 255:
                warnings.append("transparency was composed on white")
            small = compose_on_white(small)
            if not rule.through:
                seen = small
            elif min(picture.size) > rule.through:
                seen = _resize(small, rule.side, rule)
            else:  # in one step, as evaluation enlarges what is no larger than the training's
                seen = compose_on_white(_resize(picture, rule.side, rule))
            return DecodedImage(np.asarray(seen), (*warnings, *shape, *_doubts_about_content(small)))
    except ServiceError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(
            f"a frame of the picture has more than {limits.max_pixels:,} pixels (CONVMIXER_MAX_PIXELS); send a smaller image"
        ) from error
    except UnidentifiedImageError as error:
        unknown = UnsupportedImage(f"not an image of a type read here: {', '.join(FORMATS)}")
        raise (unknown if data else UndecodableImage("the file is empty")) from error
    except Exception as error:
        # Pillow's decoders raise ValueError, SyntaxError, struct.error, MemoryError, … on hostile bytes; whatever a
        # picture makes them raise is the picture's fault and must not become a 500.
        raise UndecodableImage("the image is truncated or damaged; encode it again") from error


def _check_size(image: Image.Image, limits: DecodeLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageTooLarge(
            f"{width} x {height} = {width * height:,} pixels; the limit is {limits.max_pixels:,} "
            "(CONVMIXER_MAX_PIXELS); send a smaller image"
        )
    if max(width, height) > limits.max_side:
        raise ImageTooLarge(
            f"{width} x {height}: the longest side may have {limits.max_side:,} pixels (CONVMIXER_MAX_SIDE); send a smaller image"
        )


def _resize(image: Image.Image, side: int, rule: ResizeRule) -> Image.Image:
    size = (side, side)
    if image.size == size:
        return image
    method = Image.Resampling[rule.filter.upper()]
    if rule.mode == "squash":
        return image.resize(size, method)
    if rule.mode == "pad":
        return ImageOps.pad(image, size, method, color="#808080")  # grey in every mode
    return ImageOps.fit(image, size, method)


def _doubts_about_shape(size: tuple[int, int], rule: ResizeRule) -> list[str]:
    """What bringing a picture of this size to the model's does to it."""
    short, long = sorted(size)
    doubts = []
    side = rule.through or rule.side
    if short < side:
        doubts.append(f"{size[0]} x {size[1]} pixels were enlarged to {rule.side} x {rule.side}")
    if long > _MAX_ASPECT * short:
        part = f"{short / long:.0%}" if short / long >= 0.01 else "less than 1%"
        effect = {
            "crop": f"only the middle {part} of it was classified",
            "squash": f"it was squeezed {long / short:.1f} to 1",
            "pad": f"it fills only {part} of what was classified",
        }
        doubts.append(f"the picture is {size[0]} x {size[1]}: {effect[rule.mode]}")
    reduction = (short if rule.mode == "crop" else long) / side
    if reduction >= _MAX_REDUCTION:
        doubts.append(f"reduced {reduction:.0f} times: what is small in the picture cannot be seen; crop it to the object")
    return doubts


def _doubts_about_content(small: Image.Image) -> list[str]:
    """Whether there is something to see: contrast, and the sharpest edge relative to it."""
    grey = small.convert("L")
    low, high = grey.getextrema()
    contrast = cast("int", high) - cast("int", low)
    if contrast < _MIN_CONTRAST:
        return ["the picture is nearly of one colour"]
    inner = (1, 1, grey.width - 1, grey.height - 1)  # Pillow's filters leave the border as it was
    edges = grey.filter(ImageFilter.FIND_EDGES).crop(inner)
    return ["the picture is blurred"] if cast("int", edges.getextrema()[1]) < _MIN_SHARPNESS * contrast else []
