"""Files that come as base64 in JSON."""

from __future__ import annotations

import base64
import re

_DATA_URL = re.compile(r"\s*data:[^,]{0,200};base64,", re.IGNORECASE)
_WHITESPACE = b" \t\r\n"
_FOREIGN = re.compile(r"[^A-Za-z0-9+/=]")


def decode(text: str) -> bytes:
    """Base64 (RFC 4648) as it is, or as other programs wrap it: in a data URL (RFC 2397), in lines (RFC 2045).

    Args:
        text: what was sent.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        pass  # only now is it looked at: what is right, and may be megabytes, costs nothing more
    begin = _DATA_URL.match(text)
    digits = text[begin.end() :] if begin else text
    try:
        plain = digits.encode("ascii").translate(None, _WHITESPACE)
        return base64.b64decode(plain, validate=True)
    except ValueError as error:
        raise ValueError(_what_is_wrong(digits)) from error


def _what_is_wrong(digits: str) -> str:
    for found in _FOREIGN.finditer(digits):
        character = found[0]
        if character in "-_":
            return f"it has {character!r}, of the URL-safe alphabet; send '+' and '/' in place of '-' and '_'"
        if character not in " \t\r\n":
            return f"it has the character {character!r}, which is none of base64"
    return "it is cut off, or its padding ('=' at the end) is missing or misplaced"
