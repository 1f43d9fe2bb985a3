"""Same picture, same answer: however it is stored and turned, the top class is that of the plain picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

# what turns an upright picture into one stored with that EXIF orientation (the inverse of what the tag asks for)
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
GREY = {"L", "LA", "16-bit grey"}


def interlaced(image: Image.Image) -> bytes:
    """A PNG with Adam7 interlacing (PNG specification, 8.2), which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = np.asarray(image)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + row.tobytes() for top, left, down, right in passes for row in np.ascontiguousarray(pixels[top::down, left::right])
    )
    header = struct.pack(">IIBBBBB", image.width, image.height, 8, 2, 0, 0, 1)
    exif = image.getexif().tobytes().removeprefix(b"Exif\0\0")
    parts = [chunk(b"IHDR", header), chunk(b"eXIf", exif), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def stored_as(kind: str, picture: Image.Image, orientation: int) -> bytes:
    turn = STORED[orientation]
    image = picture.transpose(turn) if turn is not None else picture.copy()
    exif = image.getexif()
    exif[0x0112] = orientation
    other = Image.new(image.mode, image.size, "white")
    buffer = io.BytesIO()
    match kind:
        case "P":  # its own 256 colours, not the web's
            image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", exif=exif)
        case "L" | "LA" | "RGB" | "RGBA":
            image.convert(kind).save(buffer, "PNG", exif=exif)
        case "16-bit grey":
            wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
            Image.fromarray(wide).save(buffer, "PNG", exif=exif)
        case "CMYK":
            image.convert("CMYK").save(buffer, "JPEG", exif=exif, quality=97, subsampling=0)
        case "progressive JPEG":
            image.save(buffer, "JPEG", exif=exif, quality=97, subsampling=0, progressive=True)
        case "interlaced PNG":
            return interlaced(image)
        case "animated PNG":
            image.save(buffer, "PNG", exif=exif, save_all=True, append_images=[other])
        case "animated WebP":
            image.save(buffer, "WEBP", exif=exif, lossless=True, save_all=True, append_images=[other])
    return buffer.getvalue()


KINDS = [
    "L", "LA", "P", "RGB", "RGBA", "CMYK", "16-bit grey", "progressive JPEG", "interlaced PNG", "animated PNG", "animated WebP",
]  # fmt: skip


@pytest.fixture(scope="module")
def certain(client, samples) -> Image.Image:
    """A picture that the model is sure of, in colour and in grey."""
    for sample in samples:
        picture = Image.open(io.BytesIO(sample.data)).convert("RGB")
        if confidence(client, picture) > 0.98 and confidence(client, picture.convert("L")) > 0.98:
            return picture
    raise AssertionError("no such picture")


def classify(client, data: bytes) -> dict:
    response = client.post("/classify", content=data, headers={"Content-Type": "application/octet-stream"})
    assert response.status_code == 200, response.text
    return response.json()["predictions"][0]


def confidence(client, picture: Image.Image) -> float:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return classify(client, buffer.getvalue())["confidence"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", STORED)
def test_the_top_class_does_not_depend_on_how_it_is_stored(client, certain, kind, orientation):
    plain = stored_as("L" if kind in GREY else "RGB", certain, 1)
    expected = classify(client, plain)
    found = classify(client, stored_as(kind, certain, orientation))
    assert found["label"] == expected["label"]
    assert found["confidence"] == pytest.approx(expected["confidence"], abs=0.05)
