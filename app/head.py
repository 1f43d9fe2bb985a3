"""What the head of a request may be: its size, its version, one Host, no coding but chunks (RFC 9112)."""

from __future__ import annotations

import re

from app.errors import HeadersTooLarge, MalformedRequest, ServiceError

_MOST_BYTES = 32 * 1024
_MOST_HEADERS = 100
_VERSIONS = ("1.1", "1.0")
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]*|\[[0-9A-Fa-fvV:.]+\])(?::\d*)?")
_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)


def too_large(headers: int, size: int) -> ServiceError | None:
    """What is wrong with that many headers (0 if that is not known yet) of that many bytes together."""
    if headers > _MOST_HEADERS:
        return HeadersTooLarge(f"more than {_MOST_HEADERS} headers; send fewer")
    if size > _MOST_BYTES:
        return HeadersTooLarge(f"more than {_MOST_BYTES:,} bytes of headers; send fewer or shorter ones")
    return None


def unreadable(version: str, headers: list[tuple[bytes, bytes]], *, upgrade: bool) -> ServiceError | None:
    """What is wrong with a complete head.

    Args:
        version: of HTTP; the parser knows more than are spoken here.
        headers: names in lower case, and values.
        upgrade: the parser takes what follows for another protocol: it would leave the body out, and read it as the next request.
    """
    if version not in _VERSIONS:
        return MalformedRequest("only HTTP/1.1 and 1.0 are spoken here")
    if upgrade:
        return MalformedRequest("only HTTP/1.1 is spoken here: send the request without CONNECT or Upgrade")
    hosts = [value for name, value in headers if name == b"host"]
    if (version == "1.1" and len(hosts) != 1) or not all(map(_HOST.fullmatch, hosts)):
        return MalformedRequest("send one Host header, with a host and maybe a port (RFC 9112, 3.2)")
    if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in headers):
        return MalformedRequest("only Transfer-Encoding: chunked is read here; a compressed body is told by Content-Encoding")
    return None


def without_upgrade(data: bytes) -> bytes:
    """A head in which `Upgrade` has another name: who cannot upgrade may ignore it (RFC 9110, 7.8), which the parser does not.

    Java's HttpClient sends `Upgrade: h2c` with every first request.

    Args:
        data: what came while a head was arriving; if it begins with the end of a line, all behind that may be body.
    """
    if data.startswith((b"\r", b"\n")):
        return data
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return _UPGRADE.sub(b"\r\nx-upgrade", head) + data[len(head) :] if _UPGRADE.search(head) else data
