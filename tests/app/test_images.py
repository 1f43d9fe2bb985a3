"""Any ordinary picture gives the right pixels; any other bytes give one of three errors."""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.errors import ImageTooLarge, UndecodableImage, UnsupportedImage
from app.images import DecodeLimits, ResizeRule, decode_image

RULE = ResizeRule(32)
LIMITS = DecodeLimits(max_pixels=1_000_000, max_side=2_000)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, rule: ResizeRule = RULE) -> np.ndarray:
    return decode_image(data, rule, LIMITS).pixels


@pytest.fixture(scope="module")
def picture(samples) -> Image.Image:
    with Image.open(samples[25].path) as image:
        return image.convert("RGB")


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_lossless_formats_are_exact(picture, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(decode(encode(picture, kind, **options)), np.asarray(picture))


def close(found: np.ndarray, expected: Image.Image, tolerance: float) -> bool:
    """Mean absolute difference of pixels, in grey levels."""
    difference = np.abs(found.astype(float) - np.asarray(expected, dtype=float)).mean()
    return bool(difference <= tolerance)


def test_jpeg_of_every_kind(picture):
    for options in ({}, {"progressive": True}, {"subsampling": 2}):
        assert close(decode(encode(picture, "JPEG", quality=95, **options)), picture, 6)
    grey = picture.convert("L")
    assert close(decode(encode(grey, "JPEG", quality=98)), grey.convert("RGB"), 3)
    cmyk = picture.convert("CMYK")
    assert close(decode(encode(cmyk, "JPEG", quality=98)), cmyk.convert("RGB"), 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, orientation):
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, 1)
    tags = Image.Exif()
    tags[0x0112] = undo
    carrier = Image.new("RGB", picture.size)
    carrier.paste(picture)
    carrier.getexif()[0x0112] = undo
    stored = ImageOps.exif_transpose(carrier)
    stored_tags = Image.Exif()
    stored_tags[0x0112] = orientation
    assert np.array_equal(decode(encode(stored, "PNG", exif=stored_tags)), np.asarray(picture))


def test_transparency_is_composed_on_white_and_said(picture):
    layer = picture.convert("RGBA")
    layer.putalpha(0)
    result = decode_image(encode(layer, "PNG"), RULE, LIMITS)
    assert (result.pixels == 255).all()
    assert "transparency was composed on white" in result.warnings
    opaque = decode_image(encode(picture.convert("RGBA"), "PNG"), RULE, LIMITS)
    assert np.array_equal(opaque.pixels, np.asarray(picture))
    assert opaque.warnings == ()


def test_palettes_with_and_without_transparency(picture):
    palette = picture.quantize(64)
    assert np.array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    assert np.array_equal(decode(encode(palette, "GIF")), np.asarray(palette.convert("RGB")))
    first = palette.getpixel((0, 0))
    pixels = decode(encode(palette, "PNG", transparency=first))
    assert (pixels[0, 0] == 255).all()


def test_grey_with_alpha_and_bilevel(picture):
    grey = picture.convert("L")
    assert np.array_equal(decode(encode(grey.convert("LA"), "PNG")), np.asarray(grey.convert("RGB")))
    bilevel = picture.convert("1")
    assert np.array_equal(decode(encode(bilevel, "PNG")), np.asarray(bilevel.convert("RGB")))


def test_16_bit_grey_keeps_its_tones(picture):
    grey = np.asarray(picture.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    result = decode_image(encode(deep, "PNG"), RULE, LIMITS)
    assert np.array_equal(result.pixels[..., 0], grey)
    assert result.warnings == ("16-bit grey was reduced to 8 bit",)


def png(colour_type: int, transparent: bytes, pixels: np.ndarray, bits: int = 16) -> bytes:
    """Of 16 bits a colour, or grey of less than 8, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], bits, colour_type, 0, 0, 0)

    def packed(row: np.ndarray) -> bytes:
        if bits == 16:
            return row.astype(">u2").tobytes()
        each = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
        return np.packbits(each).tobytes()

    rows = b"".join(b"\0" + packed(row) for row in pixels)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def test_a_transparent_tone_of_16_bits_becomes_white():
    grey = np.full((32, 32), 1000)
    grey[:16] = 40_000
    found = decode(png(0, struct.pack(">H", 1000), grey))
    assert (found[:16] == 155).all()
    assert (found[16:] == 255).all()
    colours = np.full((32, 32, 3), 513)
    colours[:16] = 40_000
    found = decode(png(2, struct.pack(">HHH", 513, 513, 513), colours))
    assert (found[:16] == 156).all()
    assert (found[16:] == 255).all()


@pytest.mark.parametrize(("bits", "key"), [(1, 0), (2, 1), (4, 7)])
def test_a_transparent_tone_of_few_bits_becomes_white(bits, key):
    grey = np.full((32, 32), key)
    grey[:16] = key ^ 1
    found = decode(png(0, struct.pack(">H", key), grey, bits))
    assert (found[:16] == (key ^ 1) * 255 // (2**bits - 1)).all()
    assert (found[16:] == 255).all()


def bmp(bits: int, colours: int, masks: bytes, pixels: np.ndarray) -> bytes:
    height, width = 32, 32
    palette = bytes(4) + b"\xff\xff\xff\0" if colours else b""
    size = 108 if masks else 40
    info = struct.pack("<IiiHHIIiiII", size, width, -height, 1, bits, 3 if masks else 0, 0, 0, 0, colours, 0) + masks
    head = info.ljust(size, b"\0") + palette
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + pixels.nbytes, 0, 0, 14 + len(head)) + head + pixels.tobytes()


def test_two_colours_in_a_byte_each_are_not_read_as_bits():
    rows = np.zeros((32, 32), np.uint8)
    rows[:16] = 1
    expected = np.repeat(rows[..., None] * 255, 3, axis=2)
    assert np.array_equal(decode(bmp(8, 2, b"", rows)), expected)
    assert np.array_equal(decode(bmp(4, 2, b"", rows[:, ::2] * 0x11)), expected)


def test_an_alpha_channel_that_was_never_filled_in_hides_nothing():
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 2] = 200
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    assert (decode(bmp(32, 0, masks, pixels)) == [200, 0, 0]).all()
    pixels[0, 0, 3] = 255
    assert (decode(bmp(32, 0, masks, pixels))[1:] == 255).all()


def test_the_first_frame_of_an_animation_counts_and_is_said(picture):
    other = Image.new("RGB", picture.size, "red")
    for kind in ("WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        result = decode_image(encode(picture, kind, save_all=True, append_images=[other], **options), RULE, LIMITS)
        assert np.array_equal(result.pixels, np.asarray(picture))
        assert result.warnings == ("animation: only the first frame was classified",)


def test_of_an_animated_png_the_picture_for_other_viewers_does_not_count(picture):
    other = Image.new("RGB", picture.size, "red")
    data = encode(other, "PNG", save_all=True, append_images=[picture, other], default_image=True)
    result = decode_image(data, RULE, LIMITS)
    assert np.array_equal(result.pixels, np.asarray(picture))
    assert result.warnings == ("animation: only the first frame was classified",)


@pytest.mark.parametrize("half", [False, True])
def test_the_first_frame_of_an_animated_png_stands_on_nothing(half):
    """Pillow puts it on the picture for other viewers."""
    frame = Image.new("RGBA", (32, 32), (0, 255, 0, 128))
    data = encode(Image.new("RGBA", (32, 32), "red"), "PNG", save_all=True, append_images=[frame], default_image=True, blend=1)
    if half:
        at = data.index(b"fcTL")
        control = bytearray(data[at : at + 30])
        control[8:12] = struct.pack(">I", 16)  # of the width
        pixels = zlib.compress((b"\0" + b"\0\xff\0\x80" * 16) * 32)
        content = b"fdAT" + struct.pack(">I", 1) + pixels
        parts = [data[: at - 4], struct.pack(">I", 26), control, struct.pack(">I", zlib.crc32(control))]
        parts += [struct.pack(">I", len(content) - 4), content, struct.pack(">I", zlib.crc32(content)), data[-12:]]
        data = b"".join(parts)
    found = decode(data)
    assert (found[:, :16] == [127, 255, 127]).all()
    assert (found[:, 16:] == ([255] * 3 if half else [127, 255, 127])).all()


def test_an_animated_png_whose_frames_are_missing_is_the_picture_for_other_viewers(picture):
    data = encode(picture, "PNG", save_all=True, append_images=[picture.rotate(90)], default_image=True)
    at = data.index(b"fcTL") - 4
    assert np.array_equal(decode(data[:at] + data[-12:]), np.asarray(picture))
    assert np.array_equal(decode(data[:at]), np.asarray(picture))


def test_what_the_first_frame_of_a_gif_leaves_uncovered_is_transparent():
    frame = Image.new("P", (16, 32), 1)
    frame.putpalette([255, 0, 0, 0, 255, 0])
    data = bytearray(encode(frame, "GIF"))
    data[6:8] = struct.pack("<H", 32)  # the screen, twice as wide
    result = decode_image(bytes(data), RULE, LIMITS)
    assert (result.pixels[:, :16] == [0, 255, 0]).all()
    assert (result.pixels[:, 16:] == 255).all()
    assert result.warnings == ("transparency was composed on white",)


def test_a_photo_with_a_small_copy_behind_it_is_read_as_any_other(picture):
    large = picture.resize((800, 800))
    data = encode(large, "MPO", quality=95, save_all=True, append_images=[picture])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    result = decode_image(data, RULE, LIMITS)
    assert result.warnings == ()
    assert np.array_equal(result.pixels, decode(encode(large, "JPEG", quality=95)))


def test_a_picture_may_be_made_as_small_as_those_of_the_training_and_enlarged_then(samples, repository):
    rule = ResizeRule(48, "crop", "bilinear", through=32)
    with Image.open(samples[0].path) as image:
        expected = np.asarray(image.convert("RGB").resize((48, 48), Image.Resampling.BILINEAR))
    small = decode_image(samples[0].data, rule, LIMITS)
    assert np.array_equal(small.pixels, expected)
    assert small.warnings == ()
    path = repository / "app" / "web" / "samples" / "cat-photo.webp"
    with Image.open(path) as photo:
        middle = ImageOps.fit(photo.convert("RGB"), (32, 32), Image.Resampling.BILINEAR)
    large = decode_image(path.read_bytes(), rule, LIMITS)
    assert np.array_equal(large.pixels, np.asarray(middle.resize((48, 48), Image.Resampling.BILINEAR)))
    buffer = io.BytesIO()
    middle.resize((24, 24)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), rule, LIMITS).warnings[0] == "24 x 24 pixels were enlarged to 48 x 48"


def test_what_is_smaller_than_the_training_pictures_is_enlarged_at_once(picture):
    small = picture.resize((20, 24))
    found = decode(encode(small, "PNG"), ResizeRule(48, "crop", "bicubic", through=40))
    assert np.array_equal(found, np.asarray(ImageOps.fit(small, (48, 48), Image.Resampling.BICUBIC)))


def test_shapes_follow_the_resize_rule():
    wide = Image.new("RGB", (120, 60), "blue")
    wide.paste("white", (30, 0, 90, 60))  # the middle square is white
    data = encode(wide, "PNG")
    assert (decode(data, ResizeRule(32, "crop"))[:, 2:-2] == 255).all()
    squashed = decode(data, ResizeRule(32, "squash"))
    assert (squashed[:, :6] == (0, 0, 255)).all()
    assert (squashed[:, 10:22] == 255).all()
    padded = decode(data, ResizeRule(32, "pad"))
    assert (padded[:6] == 128).all()
    assert (padded[16, 10:22] == 255).all()
    grey = decode(encode(Image.new("L", (40, 20), 255), "PNG"), ResizeRule(32, "pad"))
    assert (grey[:6] == 128).all()
    assert (grey[16] == 255).all()


def test_a_small_picture_is_enlarged_and_that_is_said(picture):
    result = decode_image(encode(picture.resize((16, 16)), "PNG"), RULE, LIMITS)
    assert result.pixels.shape == (32, 32, 3)
    assert result.warnings == ("16 x 16 pixels were enlarged to 32 x 32",)


def test_a_large_jpeg_is_read_at_reduced_scale_with_the_same_result():
    gradient = Image.radial_gradient("L").resize((990, 990)).convert("RGB")
    expected = ImageOps.fit(gradient, (32, 32), Image.Resampling.BICUBIC)
    assert close(decode(encode(gradient, "JPEG", quality=95)), expected, 1)


@pytest.mark.parametrize("size", [(1001, 1000), (2001, 1), (1, 2001)])
def test_too_many_pixels_or_too_long_a_side(size):
    with pytest.raises(ImageTooLarge, match=f"{size[0]} x {size[1]}"):
        decode(encode(Image.new("1", size), "PNG"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # half of the limit is passed, as it may be
@pytest.mark.parametrize("pixels", [1, 9_999])
def test_a_picture_of_exactly_as_many_pixels_as_are_allowed(monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    limits = DecodeLimits(max_pixels=pixels, max_side=pixels)
    limits.apply_to_pillow()
    width = 101 if pixels > 1 else 1
    data = encode(Image.new("RGB", (width, pixels // width)), "PNG")
    assert decode_image(data, RULE, limits).pixels.shape == (32, 32, 3)


def test_a_frame_beyond_its_screen_is_refused_before_it_is_filled(monkeypatch):
    """59 bytes, found by fuzzing: the screen is small, the first frame has 8 gigapixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    LIMITS.apply_to_pillow()
    frame = struct.pack("<HHHH", 0, 63522, 65535, 65535)
    data = b"GIF89a" + struct.pack("<HH", 32, 32) + b"\0\0\0" + b"," + frame + b"\0" + b"\2\2L\1\0;"
    with pytest.raises(ImageTooLarge, match="CONVMIXER_MAX_PIXELS"):
        decode_image(data, RULE, LIMITS)


def in_pieces(picture: Image.Image) -> dict[str, bytes]:
    """Files in millions of pieces, each of which Pillow walks in Python; they differ in nothing else from a good one."""
    png, jpeg, gif = encode(picture, "PNG"), encode(picture, "JPEG"), encode(picture.quantize(), "GIF")
    chunk = struct.pack(">I", 0) + b"abCd" + struct.pack(">I", zlib.crc32(b"abCd"))
    first_block = 13 + 3 * 2 ** ((gif[10] & 7) + 1)  # behind the palette
    # a picture of one colour whose runs are of one pixel each
    runs = 900 * (b"\1\0" * 900 + b"\0\0")
    bmp = encode(Image.new("P", (900, 900)), "BMP")
    offset = struct.unpack("<I", bmp[10:14])[0]
    return {
        "chunks": png[:33] + chunk * 1_000_000 + png[33:],
        "fill bytes": jpeg[:2] + b"\xff" * 1_000_000 + jpeg[2:],
        "comments": jpeg[:2] + b"\xff\xfe\0\2" * 1_000_000 + jpeg[2:],
        "extensions": gif[:first_block] + b"!\xfe\0" * 1_000_000 + gif[first_block:],
        "runs": bmp[:30] + struct.pack("<I", 1) + bmp[34:offset] + runs + b"\0\1",
    }


@pytest.mark.parametrize("kind", ["chunks", "fill bytes", "comments", "extensions", "runs"])
def test_a_file_in_too_many_pieces_is_refused_before_all_are_walked(picture, kind):
    with pytest.raises(UndecodableImage, match="pieces"):
        decode(in_pieces(picture)[kind])


def test_a_jpeg_of_too_many_scans_is_refused_before_they_are_walked(picture):
    progressive = encode(picture.convert("L"), "JPEG", progressive=True)
    assert decode(progressive).shape == (32, 32, 3)
    last = progressive.rindex(b"\xff\xda")
    with pytest.raises(UndecodableImage, match="40 scans"):
        decode(progressive[:last] + progressive[last:-2] * 100 + b"\xff\xd9")
    # a first scan of one colour: libjpeg then reads all that come, be there as many colours in the second as there are
    baseline = encode(picture, "JPEG", subsampling=0)
    scan = baseline.index(b"\xff\xda")
    one, all_three = b"\xff\xda\0\x08\1\1\0\0\x3f\0", baseline[scan : scan + 14]
    with pytest.raises(UndecodableImage, match="40 scans"):
        decode(baseline[:scan] + one + all_three * 100 + b"\xff\xd9")
    # behind the end of nothing but tables, with which libjpeg goes on
    many = progressive[:last] + progressive[last:-2] * 100 + b"\xff\xd9"
    for front in (b"\xff\xd8\xff\xd9", b"\xff\xd8\xff\xf0\xff\xff"):
        with pytest.raises(UndecodableImage, match="40 scans"):
            decode(front + many)
    # behind a marker that has no length: libjpeg, lost among restarts, looks for the next right behind it
    hidden = b"\xff\xdd\0\4\0\1" + progressive[last:-2] + b"\xff\x02\xfd\xfd" + progressive[last:-2] * 100
    with pytest.raises(UndecodableImage, match="40 scans"):
        decode(progressive[:last] + hidden + b"\xff\xd9")
    # in a segment that Pillow passes over, though libjpeg knows no such
    false_end = b"\xff\xc0\0\x0b\x08\0\1\0\1\1\1\x11\0" + b"\xff\xda\0\x08\1"
    exif = b"\xff\xe1" + struct.pack(">H", 65_002) + b"Exif\0\0" + bytes(64_994)
    with pytest.raises(UndecodableImage, match="EXIF"):
        decode(baseline[:2] + b"\xff\xdf" + struct.pack(">H", 2 + len(false_end)) + false_end + exif * 3 + baseline[2:])
    for kind in (b"\xff\xc3", b"\xff\xc9"):
        with pytest.raises(UndecodableImage, match="arithmetic"):
            decode(baseline.replace(b"\xff\xc0", kind))
    # fewer of a larger one
    large = encode(Image.new("L", (1000, 1000)), "JPEG", progressive=True)
    last_of_large = large.rindex(b"\xff\xda")
    assert decode(large[:last_of_large] + large[last_of_large:-2] * 8 + b"\xff\xd9").shape == (32, 32, 3)
    with pytest.raises(UndecodableImage, match="many of a large picture"):
        decode(large[:last_of_large] + large[last_of_large:-2] * 20 + b"\xff\xd9")
    # what only looks like scans: in a comment, and behind the end
    many = b"\xff\xda\0\2" * 100
    comment = b"\xff\xfe" + struct.pack(">H", 2 + len(many)) + many
    assert np.array_equal(decode(progressive[:2] + comment + progressive[2:] + many), decode(progressive))


def tiff(entries: list[tuple[int, int, int, bytes]], more: bytes = b"") -> bytes:
    """An EXIF block: entries of tag, type, count and value or offset; what they point to."""
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + directory + more


def decoder_calls(data: bytes) -> int:
    """How often Pillow hands its decoder bytes: the same on every machine, which the time it takes is not."""
    calls = 0

    def count(_frame: object, event: str, function: object) -> None:
        nonlocal calls
        of_decoder = type(getattr(function, "__self__", None)).__name__ == "ImagingDecoder"
        calls += event == "c_call" and of_decoder and function.__name__ == "decode"

    sys.setprofile(count)
    try:
        with contextlib.suppress(UndecodableImage):
            decode(data)
    finally:
        sys.setprofile(None)
    return calls


def test_bytes_that_decode_to_nothing_are_looked_at_once(picture):
    """Pillow hands libjpeg what could not be decoded yet again and again, with 64 KiB more each time."""
    jpeg = encode(picture, "JPEG")
    begin = jpeg.index(b"\xff\xda") + 14
    assert 1 <= decoder_calls(jpeg[:begin] + b"\xff" * 32_000_000) <= 2, "in pieces it would be 488"


def test_a_tiny_file_of_a_large_picture_is_decoded_in_large_pieces():
    """Pillow copies what it has of a line for each piece; of the file's own length they would be tens of thousands."""
    small = encode(Image.new("RGB", (2000, 500)), "WEBP", lossless=True)
    assert len(small) < 200
    assert 1 <= decoder_calls(small) < 100


def test_exif_is_read_no_further_than_the_orientation(picture):
    rationals = 400_000
    many = (0x011A, 5, rationals, struct.pack("<I", 8 + 2 + 2 * 12 + 4))
    exif = tiff([(0x0112, 3, 1, struct.pack("<HH", 6, 0)), many], bytes(8 * rationals))
    turned = np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(decode(encode(picture, "PNG", exif=exif)), turned)
    strange = tiff([(0x0112, 5, rationals, struct.pack("<I", 8 + 2 + 12 + 4))], bytes(8 * rationals))
    assert np.array_equal(decode(encode(picture, "PNG", exif=strange)), np.asarray(picture))
    assert np.array_equal(decode(encode(picture, "PNG", exif=tiff([])[:10])), np.asarray(picture))
    long = tiff([(0x0112, 4, 1, struct.pack("<I", 6))])
    assert np.array_equal(decode(encode(picture, "PNG", exif=b"Exif\0\0" + long)), turned)
    big = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    assert np.array_equal(decode(encode(picture, "PNG", exif=big)), turned)
    text = PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n    {len(big)}\n{(b'Exif' + bytes(2) + big).hex()}\n")
    assert np.array_equal(decode(encode(picture, "PNG", pnginfo=text)), turned)
    text = PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n 4\nno digits\n")
    assert np.array_equal(decode(encode(picture, "PNG", pnginfo=text)), np.asarray(picture))
    text = PngInfo()
    text.add_text(
        "Raw profile type exif", f"\nexif\n    {len(big)}\n{(b'Exif' + bytes(2) + big).hex()}" + "\n" * 600_000, zip=True
    )
    assert np.array_equal(decode(encode(picture, "PNG", pnginfo=text)), np.asarray(picture)), "millions of lines are not split"
    jpeg, part = encode(picture, "JPEG"), b"Exif\0\0" + bytes(65_000)
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part
    with pytest.raises(UndecodableImage, match="EXIF"):
        decode(jpeg[:2] + segment * 3 + jpeg[2:])


def test_pieces_that_take_long_are_not_walked_to_the_end(picture):
    png = encode(picture, "PNG")
    data = b"iCCPk\0\0" + zlib.compress(bytes(2**20 - 1))
    profile = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    with pytest.raises(UndecodableImage, match="take more than 3 s"):
        decode(png[:33] + profile * 28_000 + png[33:])


def test_of_a_long_animation_no_more_than_the_second_frame_is_looked_at(picture):
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\2\0"
    gif = encode(picture.quantize(), "GIF")
    result = decode_image(gif[:-1] + frame * 1_000_000 + b";", RULE, LIMITS)
    assert result.warnings == ("animation: only the first frame was classified",)
    assert np.array_equal(result.pixels, decode(gif))


def test_what_cannot_be_seen_well_is_said(samples):
    doubted = [decode_image(sample.data, RULE, LIMITS).warnings for sample in samples]
    assert not any(doubted)

    def warnings_of(image: Image.Image, rule: ResizeRule = RULE) -> tuple[str, ...]:
        return decode_image(encode(image, "PNG"), rule, DecodeLimits(10**8, 10**5)).warnings

    pictures = [Image.open(io.BytesIO(sample.data)) for sample in samples]
    blurred = [warnings_of(each.filter(ImageFilter.GaussianBlur(1.5))) for each in pictures]
    assert sum(found == ("the picture is blurred",) for found in blurred) > 0.9 * len(samples)
    assert warnings_of(Image.new("RGB", (40, 40), (200, 10, 10))) == ("the picture is nearly of one colour",)

    wide = pictures[0].convert("RGB").resize((320, 80), Image.Resampling.NEAREST)
    (_, narrow, *_) = warnings_of(wide.resize((3200, 8)))
    assert "only the middle less than 1% of it" in narrow
    effects = {"crop": "only the middle 25% of it", "squash": "squeezed 4.0 to 1", "pad": "fills only 25%"}
    for mode, effect in effects.items():
        assert effect in warnings_of(wide, ResizeRule(32, mode))[0]
    huge = pictures[0].convert("RGB").resize((2100, 2100), Image.Resampling.NEAREST)
    assert warnings_of(huge) == ("reduced 66 times: what is small in the picture cannot be seen; crop it to the object",)


def test_other_bytes_are_no_image(picture):
    for data in (b"hello", b"<svg/>", encode(picture, "TIFF"), encode(picture, "PPM")):
        with pytest.raises(UnsupportedImage, match="PNG, JPEG, WEBP, GIF, BMP"):
            decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_cut_off_anywhere_it_is_an_error_or_a_picture_never_a_crash(picture, kind):
    whole = encode(picture, kind)
    refused = 0
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        try:
            assert decode(whole[:length]).shape == (32, 32, 3)
        except (UnsupportedImage, UndecodableImage):
            refused += 1
    assert refused > 30


def test_flipped_bytes_never_crash(picture):
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        whole = np.frombuffer(encode(picture, kind), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[generator.integers(0, len(whole), 5)] = generator.integers(0, 256, 5)
            with contextlib.suppress(UnsupportedImage, UndecodableImage, ImageTooLarge):
                assert decode(damaged.tobytes()).dtype == np.uint8
