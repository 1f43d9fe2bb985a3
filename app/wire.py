"""How a whole answer is written down (HTTP/1.1, RFC 9112), for what is answered without ASGI."""

from __future__ import annotations

from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from app.errors import PHRASES

# uvicorn's own, which it writes before every answer
STATUS_LINE.update({status: f"HTTP/1.1 {status} {phrase}\r\n".encode() for status, phrase in PHRASES.items()})


class DefaultHeaders:
    """The headers of every answer, written down anew when uvicorn has new ones: once a second, for the date."""

    def __init__(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._written = b""

    def write(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The same object while uvicorn's list, its `default_headers`, is the same."""
        if self._headers is not headers:
            self._headers, self._written = headers, b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._written


def compose(
    status: HTTPStatus,
    default_headers: bytes,
    media_type: str,
    body: bytes,
    headers: dict[str, str],
    request_id: str,
    *,
    keep_alive: bool,
) -> bytes:
    """A whole answer as it is sent.

    Args:
        status: of the answer.
        default_headers: those that every answer has, written down.
        media_type: of the body.
        body: all of it.
        headers: besides those.
        request_id: for the header.
        keep_alive: whether the client may send another request.
    """
    return b"%b%bcontent-type: %b\r\ncontent-length: %d\r\n%bx-request-id: %b\r\n%b\r\n%b" % (
        STATUS_LINE[status],
        default_headers,
        media_type.encode(),
        len(body),
        "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode(),
        request_id.encode(),
        b"" if keep_alive else b"connection: close\r\n",
        body,
    )
