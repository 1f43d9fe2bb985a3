"""Bytes from anywhere → uint8 pixels of the model's input size, safely.

What is checked before any pixel is decoded: the format (by content, never by name or Content-Type), the number of
pixels, the longest side. What is done to the picture, in this order: EXIF orientation is applied, transparency is
composed on white, grey, palette, CMYK and 16-bit pictures become 8-bit RGB, and the artifact's resize rule brings it to
size. Of an animation the first frame counts.
"""

from __future__ import annotations

import io
import re
import time
import warnings as warnings_module
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError, WebPImagePlugin

from app.errors import ImageTooLarge, ServiceError, UndecodableImage, UnsupportedImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DRAFT_MARGIN = 4
"""A large JPEG is decoded at a reduced scale of at least this many times the model's side: 10 × cheaper at 12 megapixels."""

_DEEP = 16
"""Bits of a colour."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each orientation upright, as in Pillow's `exif_transpose`."""

_MOST_READS = 400_000
"""A PNG of 32 MiB in pieces of 8 KiB takes 20,000, a GIF of that size 260,000."""

_FEW_READS = 1000
_MOST_CPU_S = 3.0
"""A file that was read more than a few times must be decoded by then. The slowest ordinary picture found, a PNG of 50 megapixels
and 18 MiB with 16 bits a colour, takes 2.1 s of a Zen 5 core."""

_CHECKED_READS = 256
_CHECKED_BYTES = 1024
"""These limits are looked at, and a sign of life is given, once in so many reads, and at each of so many bytes, after which there
may be more to do. At every read it would double the price of small ones, of which a JPEG of any size has 38."""

_MOST_SCANS = 40
"""Of a JPEG, each of which touches every pixel however short it is; progressive ones have about ten."""

_MOST_VISITS = 16
"""To each pixel of a JPEG of `max_pixels`; smaller ones may have more scans."""

_MOST_MARKERS = 10_000
"""Of a JPEG. One of 32 MiB that is nothing but an ICC profile has 500."""

_MOST_EXIF = 128 * 1024
"""In a JPEG: two segments. What cameras write is shorter than one."""

_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xc7\xc9-\xcf\xd9-\xdf\xe0-\xef\xfe])")
"""The end, and those that have a length for libjpeg and for Pillow: either passes over others, and reads on right behind them."""
_JPEG_FRAMES, _JPEG_PROGRESSIVE = b"\xc0\xc1\xc2\xc5\xc6\xc7", b"\xc2\xc6"
_JPEG_UNREAD = b"\xc3\xc9\xca\xcb\xcd\xce\xcf"
_JPEG_WINDOW = 64 * 1024
"""Bytes searched at once: a search keeps the interpreter to itself, and 32 MiB of fill bytes take a second."""
_TIFF_INTEGERS = {1: 1, 3: 2, 4: 4}
"""Bytes of a number by its type: BYTE, SHORT, LONG."""

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
        through: side that a picture is brought to before it is enlarged to S: that of the training pictures, where these were
            smaller than S. A sharper picture is none that the model knows.

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


class _CountedReads(io.BytesIO):
    """A file that can be read a limited number of times.

    Pillow walks chunks, segments, frames and runs in Python, a read or more for each, and with the interpreter to itself: a file
    of millions of empty ones would keep it for ten seconds and more, and the engine would be taken for hung.
    """

    reads = 0

    def __init__(self, data: bytes, heartbeat: Callable[[], object]) -> None:
        super().__init__(data)
        self._begin, self._heartbeat = time.thread_time(), heartbeat

    def read(self, size: int | None = -1) -> bytes:
        """As BytesIO's.

        Raises:
            UndecodableImage: the file was read too many times, or many times and for too much of the processor's time.
        """
        self.reads += 1
        if size is None or not 0 <= size < _CHECKED_BYTES or self.reads % _CHECKED_READS == 0:
            self._check()
        return super().read(size)

    def _check(self) -> None:
        self._heartbeat()
        if self.reads > _MOST_READS:
            raise UndecodableImage(f"the image file consists of more than {_MOST_READS:,} pieces; encode it again")
        if self.reads > _FEW_READS and time.thread_time() - self._begin > _MOST_CPU_S:
            raise UndecodableImage(f"the image file consists of pieces that take more than {_MOST_CPU_S:g} s; encode it again")


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
        UndecodableImage: damaged, or made so that decoding takes too long (422).
    """
    try:
        if data.startswith(b"\xff\xd8"):
            _check_jpeg(data, limits)
        with Image.open(_CountedReads(_with_a_third_colour(data), heartbeat), formats=FORMATS) as image:
            _check_size(image, limits)
            key = image.info.get("transparency")
            # Pillow shortens pixels to 8 bits, but not the colour that is transparent
            if image.format == "PNG" and data[24] == _DEEP and isinstance(key, tuple):
                image.info["transparency"] = tuple(value >> 8 for value in key)
            announce(image.width * image.height)
            shape = _doubts_about_shape(image.size, rule)
            if image.format == "JPEG":
                image.draft(None, (rule.side * _DRAFT_MARGIN, rule.side * _DRAFT_MARGIN))
            warnings = ["animation: only the first frame was classified"] if getattr(image, "is_animated", False) else []
            if image.format in {"JPEG", "MPO"}:  # in one piece: what cannot be decoded yet would be looked at again with each
                image.decodermaxblock = len(data)
            image.load()
            full = _to_8_bit(_upright(image), warnings)
            # composed when small: a full-size layer and its white ground would double the memory of a large picture
            small = _compose_on_white(_resize(full, rule), warnings)
            seen = small.resize((rule.side, rule.side), Image.Resampling[rule.filter.upper()]) if rule.through else small
            return DecodedImage(np.asarray(seen), (*warnings, *shape, *_doubts_about_content(small)))
    except ServiceError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(
            f"a frame of the picture has more than {limits.max_pixels:,} pixels (CONVMIXER_MAX_PIXELS); send a smaller image"
        ) from error
    except UnidentifiedImageError as error:
        raise UnsupportedImage(f"not an image of a type read here: {', '.join(FORMATS)}") from error
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


def _with_a_third_colour(data: bytes) -> bytes:
    """A BMP of bytes or half bytes that says it uses two colours, as if it used one more.

    Pillow reads a black-and-white palette as one bit a pixel, whatever the header says.
    """
    if data.startswith(b"BM") and data[28:29] in {b"\4", b"\x08"} and data[46:50] == b"\2\0\0\0":
        return data[:46] + b"\3" + data[47:]
    return data


def _check_jpeg(data: bytes, limits: DecodeLimits) -> None:
    """Walks the markers, as Pillow and libjpeg will.

    Raises:
        UndecodableImage: too many scans or segments, or too long an EXIF block: Pillow makes an object of each of its numbers;
            or lossless or arithmetic coding, which no browser reads, and of which the latter takes several times as long.
    """
    position, scans, exif_bytes, components, pixels, progressive = 2, 0, 0, 0, 0, False
    for _ in range(_MOST_MARKERS):
        while not (found := _JPEG_MARKER.search(data, position, position + _JPEG_WINDOW)):
            position += _JPEG_WINDOW - 1
            if position >= len(data):
                return
        marker, position = found[1], found.end()
        if marker == b"\xd9":
            if scans:
                return
            continue  # the end of nothing but tables: libjpeg goes on with what follows
        length = int.from_bytes(data[position : position + 2])
        if marker in _JPEG_FRAMES:
            components, progressive = int.from_bytes(data[position + 7 : position + 8]), marker in _JPEG_PROGRESSIVE
            height, width = data[position + 3 : position + 5], data[position + 5 : position + 7]
            pixels = int.from_bytes(height) * int.from_bytes(width)
        elif marker in _JPEG_UNREAD:
            raise UndecodableImage(
                "lossless and arithmetic coding are not read here; encode the image again, as browsers read it"
            )
        elif marker == b"\xe1" and data.startswith(b"Exif\0", position + 2):
            exif_bytes += length
            if exif_bytes > _MOST_EXIF:
                raise UndecodableImage(f"more than {_MOST_EXIF:,} bytes of EXIF; encode the image again, without")
        elif marker == b"\xda":
            scans += 1
            if scans > _MOST_SCANS or (scans > 1 and scans * pixels > _MOST_VISITS * limits.max_pixels):
                raise UndecodableImage(f"more than {_MOST_SCANS} scans, or many of a large picture; encode the image again")
            if scans == 1 and not progressive and int.from_bytes(data[position + 2 : position + 3]) >= components:
                return  # a first scan with all components is the last, and this the end for nearly every file
        position += max(2, length)
    raise UndecodableImage(f"the image file consists of more than {_MOST_MARKERS:,} pieces; encode it again")


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says.

    `ImageOps.exif_transpose` reads all of EXIF and writes it again, which a hostile file makes long.
    """
    exif = image.info.get("exif")  # a PNG may have a text of that name
    profile = image.info.get("Raw profile type exif")  # so older ImageMagick writes it into a PNG: three lines, then digits
    if not isinstance(exif, bytes) and isinstance(profile, str) and len(profile) < 4 * _MOST_EXIF:
        with suppress(ValueError):  # no digits: then it says nothing, and the picture is none the worse
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    if not isinstance(exif, bytes):
        return image
    prefix = b"Exif\0\0"  # Pillow puts one before what some files have put one before already
    method = _TRANSPOSED.get(_orientation(exif.removeprefix(prefix).removeprefix(prefix)))
    return image.transpose(method) if method is not None else image


def _orientation(exif: bytes) -> int:
    """Tag 274 of the first directory (TIFF 6.0, page 13 and following); 1 if there is none."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(begin: int, size: int) -> int:
        return int.from_bytes(exif[begin : begin + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if entry >= len(exif):
            break
        size = _TIFF_INTEGERS.get(number(entry + 2, 2))
        if number(entry, 2) == _ORIENTATION_TAG and size and number(entry + 4, 4) == 1:
            return number(entry + 8, size)
    return 1


def _to_8_bit(image: Image.Image, warnings: list[str]) -> Image.Image:
    """RGB or grey, or RGBA where something is transparent. Grey stays grey until it is small: a quarter of the memory."""
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips 16-bit grey at 255 when it converts, which turns nearly every such picture white
        deep, key = np.asarray(image).clip(0, 65535), image.info.get("transparency")
        image = Image.fromarray((deep // 257).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
        warnings.append("16-bit grey was reduced to 8 bit")
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # nobody stores a picture of nothing: the fourth byte was never filled in
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")


def _compose_on_white(image: Image.Image, warnings: list[str]) -> Image.Image:
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    if np.asarray(image.getchannel("A")).min() < 255:
        warnings.append("transparency was composed on white")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _resize(image: Image.Image, rule: ResizeRule) -> Image.Image:
    size = (rule.through or rule.side,) * 2
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
        doubts.append(f"{size[0]} x {size[1]} pixels were enlarged to {side} x {side}")
    if long > _MAX_ASPECT * short:
        effect = {
            "crop": f"only the middle {short / long:.0%} of it was classified",
            "squash": f"it was squeezed {long / short:.1f} to 1",
            "pad": f"it fills only {short / long:.0%} of what was classified",
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
