"""What glibc does with memory that was freed; elsewhere (musl, macOS) nothing is done and nothing fails."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD = -3
"""`M_MMAP_THRESHOLD` of mallopt(3)."""

_LARGE_BUFFER = 2**20
"""Bytes, from which memory is the system's again when it is freed: pictures of more than a quarter of a megapixel, long bodies.
What most requests need is smaller, and reused."""


def return_large_buffers() -> None:
    """Fixes the size from which memory is mapped: glibc raises it once such a buffer is freed, and keeps others on the heap."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _LARGE_BUFFER)


def return_free_pages() -> None:
    """Gives back the pages of the heap on which nothing is left, which takes about a millisecond."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
