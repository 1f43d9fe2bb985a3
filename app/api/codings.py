"""Content codings of HTTP (RFC 9110, 8.4): compressed requests, within the limits of plain ones, and compressed answers."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterable

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers

from app.errors import BodyTooLarge, MalformedRequest, UnsupportedMediaType

_COMPRESSED_AT_ONCE = 64 * 1024
_INFLATED_AT_ONCE = 1024 * 1024
_MOST_INFLATED = 200
"""Times, as Apache's DeflateInflateRatioLimit: else a few kilobytes would take the room of everybody's bodies."""
_SURELY_INFLATED = 4 * 1024 * 1024
"""Bytes that may come of any body, at least."""
_WBITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
"""zlib's names for the formats (RFC 1952, RFC 1950)."""

_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda body: gzip.compress(body, 1, mtime=0),
    "deflate": lambda body: zlib.compress(body, 1),
}
_MIN_COMPRESSED = 1024
"""Shorter answers fit into one packet anyway."""


def coding_of(headers: Headers) -> str:
    """What a request's body is compressed with: a name, several with commas, or nothing."""
    codings = ",".join(headers.getlist("content-encoding")).lower().split(",")  # lines are one list (RFC 9110, 5.3)
    return ", ".join(coding for text in codings if (coding := text.strip()) not in {"", "identity"})


async def decompress(body: bytes, encoding: str, limit: int, take: Callable[[int], None], surely: int) -> bytes:
    """Decompresses piece by piece, beside the event loop: a bomb ends at the limit.

    Args:
        body: as it arrived.
        encoding: its Content-Encoding.
        limit: most bytes of the result.
        take: counts the result's bytes as those of bodies are.
        surely: so many may come of any body, however well it was compressed.

    Raises:
        BodyTooLarge: over the limit, or far longer than what was sent.
        MalformedRequest: not what `encoding` says.
        Overloaded: too many bytes of bodies are held.
        UnsupportedMediaType: an encoding that is not read here.
    """
    if encoding not in _WBITS:
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding[:100]!r} is not read here; send gzip, deflate or none",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    decompressor = zlib.decompressobj(_WBITS[encoding])
    result = bytearray()
    rest, piece = memoryview(body), b""
    # a full piece may have more behind it even when all input is read
    while not decompressor.eof and (rest or decompressor.unconsumed_tail or len(piece) == _INFLATED_AT_ONCE):
        compressed = decompressor.unconsumed_tail
        if not compressed:
            compressed, rest = bytes(rest[:_COMPRESSED_AT_ONCE]), rest[_COMPRESSED_AT_ONCE:]
        try:
            piece = await run_in_threadpool(decompressor.decompress, compressed, _INFLATED_AT_ONCE)
        except zlib.error as error:
            raise MalformedRequest(f"the body is no valid {encoding} stream: {error}") from error
        take(len(piece))
        result += piece
        if len(result) > limit:
            raise BodyTooLarge(
                f"the body has more than {limit:,} bytes when decompressed (CONVMIXER_MAX_BODY_BYTES); send fewer images"
            )
        if len(result) > max(surely, _SURELY_INFLATED, _MOST_INFLATED * (len(body) - len(rest))):
            raise BodyTooLarge(
                f"the body becomes more than {_MOST_INFLATED} times as long when decompressed; send it with less compression"
            )
    if not decompressor.eof or decompressor.unused_data or rest:
        raise MalformedRequest(f"the body must be one whole {encoding} stream; this one is cut off, or more follows it")
    return bytes(result)


def compress(body: bytes, accept_encoding: str) -> tuple[bytes, str | None]:
    """Compresses an answer if that is worth it and its client can read it.

    Args:
        body: the answer's.
        accept_encoding: the request's header, of several lines joined.

    Returns:
        The body, and its Content-Encoding if it has one.
    """
    coding = choose_coding(accept_encoding, _COMPRESSORS) if len(body) >= _MIN_COMPRESSED else None
    return (_COMPRESSORS[coding](body), coding) if coding else (body, None)


def choose_coding(accept_encoding: str, offered: Iterable[str]) -> str | None:
    """The coding that the client likes best of those offered; None if it takes none.

    Args:
        accept_encoding: the request's header (RFC 9110, 12.5.3).
        offered: names of codings; of those liked as well, the first is taken.
    """
    weights = {}
    for item in accept_encoding.lower().split(","):
        coding, _, weight = item.partition(";")
        found = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", weight) if weight else None
        weights[coding.strip()] = float(found[1]) if found else 1.0
    liked = {coding: weights.get(coding, weights.get("*", 0.0)) for coding in offered}
    best = max(liked, key=lambda coding: liked[coding], default=None)
    return best if best and liked[best] else None
