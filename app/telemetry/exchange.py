"""One request and its answer: what the access log and the traces are made from."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from app.engine.outcome import Timing


@dataclass(slots=True)
class Exchange:
    """What is known of a request; the second half is filled in on the way.

    Attributes:
        method: of HTTP; empty if what came was no whole request.
        path: as it was sent, percent-encoded, without the query.
        client: address and port, or None.
        headers: the request's, names in lower case.
        request_id: the client's or our own.
        begin: time.monotonic() at which the headers were complete.
        status: of the answer.
        sent_bytes: of the answer's body.
        received_bytes: of the request's body, so far.
        seconds: from `begin` until the answer was ready.
        route: the pattern that the path fits, or None.
        code: of the failure, if it was one.
        error: that failure.
        timings: of each image that was queued, in the order sent.
        trace_id: hexadecimal, if the request is traced.
    """

    method: str
    path: str
    client: tuple[str, int] | None
    headers: Sequence[tuple[bytes, bytes]]
    request_id: str
    begin: float
    status: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0
    route: str | None = None
    code: str | None = None
    error: Exception | None = None
    timings: Sequence[Timing] = ()
    trace_id: str | None = None

    def finish(self, status: int, sent_bytes: int) -> None:
        """The answer is ready."""
        self.status, self.sent_bytes = status, sent_bytes
        self.seconds = time.monotonic() - self.begin


class Watcher(Protocol):
    """Is told of answers."""

    def wants(self, status: int, seconds: float) -> bool:
        """Whether it would do anything with such an answer; for the others nothing is made.

        Args:
            status: of the answer.
            seconds: that it took.
        """

    def __call__(self, exchange: Exchange) -> None:
        """An answer is ready."""


def server_timing(timings: Iterable[Timing], seconds: float) -> str:
    """The `Server-Timing` header: the slowest image's time in each stage and all of it, in milliseconds (W3C Server Timing).

    Args:
        timings: of the request's images; without any only the whole is told.
        seconds: from the headers to the answer.
    """
    total = f"total;dur={seconds * 1000:.2f}"
    stages = [(t.decode_s, t.queue_s, t.infer_s) for t in timings] if timings else None
    if not stages:
        return total
    decode_s, queue_s, infer_s = stages[0] if len(stages) == 1 else map(max, zip(*stages, strict=True))
    return f"decode;dur={decode_s * 1000:.2f}, queue;dur={queue_s * 1000:.2f}, infer;dur={infer_s * 1000:.2f}, {total}"
