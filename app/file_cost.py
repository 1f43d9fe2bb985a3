"""What one file may cost: bounds of bytes and pixels do not bound the time that Pillow and libjpeg take (decision 12).

A JPEG's markers are walked before it is opened; of any file the reads are counted while it is.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable

from app.errors import UndecodableImage

_MOST_READS = 400_000
"""A PNG of 32 MiB in pieces of 8 KiB takes 20,000, a GIF of that size 260,000."""

_FEW_READS = 1000
_MOST_CPU_S = 3.0
"""A file that was read more than a few times must be decoded by then. The slowest ordinary picture found, a PNG of 50 megapixels
and 18 MiB with 16 bits a colour, takes 2.1 s of a Zen 5 core."""

_CHECKED_READS = 256
_CHECKED_BYTES = 1024
"""Limits are checked, and a sign of life is given, at every so many reads and at each read of so many bytes. At every read that
would double the cost of small ones, of which a JPEG of any size has 38."""

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


class CountedReads(io.BytesIO):
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


def check_jpeg(data: bytes, max_pixels: int) -> None:
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
            raise UndecodableImage("lossless and arithmetic coding are not read here; save it as an ordinary JPEG")
        elif marker == b"\xe1" and data.startswith(b"Exif\0", position + 2):
            exif_bytes += length
            if exif_bytes > _MOST_EXIF:
                raise UndecodableImage(f"more than {_MOST_EXIF:,} bytes of EXIF; encode the image again, without")
        elif marker == b"\xda":
            scans += 1
            if scans > _MOST_SCANS or (scans > 1 and scans * pixels > _MOST_VISITS * max_pixels):
                raise UndecodableImage(f"more than {_MOST_SCANS} scans, or many of a large picture; save it as a baseline JPEG")
            if scans == 1 and not progressive and int.from_bytes(data[position + 2 : position + 3]) >= components:
                return  # a first scan with all components is the last, and this the end for nearly every file
        position += max(2, length)
    raise UndecodableImage(f"the image file consists of more than {_MOST_MARKERS:,} pieces; encode it again")
