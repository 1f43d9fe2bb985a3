"""A picture of one colour, for whoever does not care what it shows."""

from __future__ import annotations

import io

from PIL import Image


def png(colour: str, size: tuple[int, int]) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()
