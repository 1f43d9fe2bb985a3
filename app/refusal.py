"""The cheapest answer: an image that the engine would refuse, under overload.

Most requests end here then, and what they cost is taken from those that are accepted. So a refusal is written down once for
each state of the queue, and what differs from one to the next (request id, duration) is put in between.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NamedTuple

from app.api.problems import MEDIA_TYPE, problem_body, problem_headers
from app.errors import Overloaded
from app.telemetry.exchange import server_timing
from app.wire import compose

if TYPE_CHECKING:
    from app.connection import Protocol
    from app.raw_image import Head

_REQUEST_ID = "the-request-id-has-32-characters"
_NO_TIME = server_timing((), 0.0)
_MILLISECONDS = "0.00"


class Written(NamedTuple):
    """One refusal as it is sent, in the pieces between duration, request id (header) and request id (body).

    Attributes:
        error: what it says.
        default_headers: those of every answer when it was written down, whose date changes.
        pieces: four.
    """

    error: Overloaded
    default_headers: bytes
    pieces: list[bytes]

    @classmethod
    def of(cls, error: Overloaded, protocol: Protocol) -> Written:
        """Written down as every other answer is."""
        body = problem_body(error.status, error.code, error.detail, _REQUEST_ID)
        headers = {**problem_headers(error), "Server-Timing": _NO_TIME}
        default_headers = protocol.default_headers()
        wire = compose(error.status, default_headers, MEDIA_TYPE, body, headers, _REQUEST_ID, keep_alive=True)
        before, timing, after = wire.partition(_NO_TIME.encode())
        timing = timing.removesuffix(_MILLISECONDS.encode())
        return cls(error, default_headers, [before + timing, *after.split(_REQUEST_ID.encode())])


def refuse(protocol: Protocol, head: Head, image: bytes) -> bool:
    """Answers a whole request that the engine would refuse, with as little as possible.

    Whatever is to be told of it besides (a log, a trace, a connection to be closed, an id of the client's) is left to
    `RawImageRequest`.

    Returns:
        Whether it was answered.
    """
    service, parameters = protocol.service, head.parameters
    if head.request_id or not head.keep_alive or service.bodies.held + len(image) > service.bodies.limit:
        return False
    error = service.scheduler.refusal(image, explain=parameters.explain, timeout_s=parameters.deadline_ms / 1000)
    if error is None or service.is_watched(error.status, 0.0):
        return False
    written = protocol.last_refusal
    if written is None or written.error is not error or written.default_headers is not protocol.default_headers():
        written = type(protocol).last_refusal = Written.of(error, protocol)
    request_id = b"%032x" % random.getrandbits(128)
    before, between, to_body, after = written.pieces
    milliseconds = (time.monotonic() - protocol.active) * 1000
    protocol.transport.write(b"%b%.2f%b%b%b%b%b" % (before, milliseconds, between, request_id, to_body, request_id, after))
    service.metrics.count_refusal(error)
    return True
