"""An opened file → the 8-bit RGB picture that a person would see: upright, transparency on white.

Training and service both read pictures by these rules, so that a network is asked about what it has learnt. Pillow alone reads
some files otherwise than browsers do; each function says which.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import numpy as np
from PIL import GifImagePlugin, Image, PngImagePlugin

_DEEP = 16
"""Bits of a colour."""

_MOST_PROFILE = 512 * 1024
"""Digits of EXIF in a text of a PNG. What cameras write is a quarter of that at most."""

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

_TIFF_INTEGERS = {1: 1, 3: 2, 4: 4}
"""Bytes of a number by its type: BYTE, SHORT, LONG."""


def with_a_third_colour(data: bytes) -> bytes:
    """A BMP of bytes or half bytes that says it uses two colours, as if it used one more; any other file as it is.

    Pillow reads a black-and-white palette as one bit a pixel, whatever the header says.
    """
    if data.startswith(b"BM") and data[28:29] in {b"\4", b"\x08"} and data[46:50] == b"\2\0\0\0":
        return data[:46] + b"\3" + data[47:]
    return data


def scale_transparent_colour(image: Image.Image, data: bytes) -> None:
    """Of a PNG, Pillow brings the pixels from 16, 4 or 2 bits a colour to 8, but not the colour that is transparent.

    Args:
        image: opened, and not loaded yet.
        data: the file.
    """
    key = image.info.get("transparency")
    if image.format != "PNG":
        return
    bits, is_grey = data[24], data[25] == 0
    if bits == _DEEP and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif bits in {2, 4} and is_grey and isinstance(key, int):
        most = (1 << bits) - 1
        image.info["transparency"] = (key & most) * 255 // most


def load_first_frame(image: Image.Image) -> Image.Image:
    """Of an animation the first frame that a browser shows, and as it shows it; of any other file the picture.

    Pillow begins an animated PNG with the picture for viewers that know no animations, and puts the first frame on it; what the
    first frame of a GIF leaves uncovered it fills with the first colour. For a browser both are transparent there.

    Args:
        image: opened, and not loaded yet.
    """
    covered: tuple[float, float, float, float] | None = None
    if isinstance(image, PngImagePlugin.PngImageFile) and image.default_image:
        with suppress(EOFError, OSError, SyntaxError):  # it has no frame, or none that is whole
            image.seek(1)
            image.blend_op, covered = PngImagePlugin.Blend.OP_SOURCE, image.dispose_extent
    elif isinstance(image, GifImagePlugin.GifImageFile) and image.tile:
        covered = image.tile[0].extents
    image.load()
    if covered is None or covered == (0, 0, *image.size):
        return image
    left, top, right, bottom = map(int, covered)
    frame = image.convert("RGBA")
    outside = Image.new("L", image.size, 255)
    outside.paste(0, (left, top, right, bottom))
    frame.paste((0, 0, 0, 0), mask=outside)
    return frame


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says.

    `ImageOps.exif_transpose` reads all of EXIF and writes it again, which a hostile file makes long and an odd one an error.
    """
    exif = image.info.get("exif")  # a PNG may have a text of that name
    profile = image.info.get("Raw profile type exif")  # so older ImageMagick writes it into a PNG: three lines, then digits
    if not isinstance(exif, bytes) and isinstance(profile, str) and len(profile) < _MOST_PROFILE:
        with suppress(ValueError):  # no digits: then it says nothing, and the picture is none the worse
            exif = bytes.fromhex("".join(profile.split("\n")[3:]))
    if not isinstance(exif, bytes):
        return image
    prefix = b"Exif\0\0"  # Pillow puts one before what some files have put one before already
    method = _TRANSPOSED.get(_orientation(exif.removeprefix(prefix).removeprefix(prefix)))
    return image.transpose(method) if method is not None else image


def is_deep_grey(image: Image.Image) -> bool:
    """Whether `to_8_bit` loses something that a person may miss."""
    return image.mode.startswith("I") or image.mode == "F"


def to_8_bit(image: Image.Image) -> Image.Image:
    """RGB or grey, or RGBA where something is transparent. Grey stays grey until it is small: a quarter of the memory."""
    if is_deep_grey(image):
        # Pillow clips 16-bit grey at 255 when it converts, which turns nearly every such picture white
        deep, key = np.asarray(image).clip(0, 65535), image.info.get("transparency")
        image = Image.fromarray((deep // 257).astype(np.uint8))
        if isinstance(key, int):
            image.putalpha(Image.fromarray(np.where(deep == key, 0, 255).astype(np.uint8)))
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # nobody stores a picture of nothing: the fourth byte was never filled in
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in {"RGB", "L"} else image.convert("RGB")


def compose_on_white(image: Image.Image) -> Image.Image:
    """RGB, from what `to_8_bit` gives."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(exif: bytes) -> int:
    """Tag 274 of the first directory (TIFF 6.0, page 13 and following); 1 if there is none."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(begin: int, size: int) -> int:
        return int.from_bytes(exif[begin : begin + size], order)

    directory = number(4, 4)
    for entry in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(exif)), 12):
        size = _TIFF_INTEGERS.get(number(entry + 2, 2))
        if number(entry, 2) == _ORIENTATION_TAG and size and number(entry + 4, 4) == 1:
            return number(entry + 8, size)
    return 1
