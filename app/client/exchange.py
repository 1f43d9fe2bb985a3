"""One request to `/classify` with its retries, without input and output: `Client` and `AsyncClient` share it.

`exchange` is a generator: it yields what to do next (`Send` or `Pause`), is sent what came of it, and returns the results.

How images travel was measured against the real server (two threads, 32 x 32 images; CPU time an image of client + server
beside the model's): one by one as raw bodies 1,600 µs in the client alone; forms of 32 built by httpx 180 + 250; forms of 32
built here 60 + 150; JSON with base64 the same and a third more bytes. So: a lone image raw, which the server answers
fastest, several as a form.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeAlias

import httpx

from app.client.answers import ClientError, Overloaded, RequestFailed, Unreachable
from app.client.arguments import check_deadline
from app.client.images import Picture
from app.client.replies import REJECTIONS, Reply, Results, is_for_good, read_results

DEADLINE_S = 60.0
"""Longer than the server's own default: with retries, and for batches that may wait behind others."""

BATCH_SIZE = 32
CONCURRENCY = 4
"""Requests under way: two keep a server in the same rack busy, the others cover the way there."""

PROBE_TIMEOUT_S = 10.0
BACKOFF_S = 0.1
"""Mean of the first pause where the server names none is half of it; each next one is twice as long."""

MAX_BACKOFF_S = 8.0
GRACE_S = 1.0
"""Beyond the deadline we wait for the server's own word that it has passed."""

NO_LIMITS = httpx.Limits(max_connections=None)
"""A request that waits for one of a hundred connections waits beyond its deadline, and the server knows nothing of it."""

_RETRIED = {
    HTTPStatus.REQUEST_TIMEOUT,  # it did not arrive in time: perhaps others had the line
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
}
_TOO_LARGE = {HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT}

_PART = b'--%b\r\nContent-Disposition: form-data; name="images"; filename="image"\r\n\r\n'


@dataclass(frozen=True)
class Options:
    """What is asked for all images.

    Attributes:
        top_k: classes listed, at least 1.
        explain: whether to add heat maps.
        deadline_s: time for one request, retries included; 0.001 to 3600.
    """

    top_k: int
    explain: bool
    deadline_s: float

    def __post_init__(self) -> None:
        check_deadline(self.deadline_s)
        if not 1 <= self.top_k <= 1000:
            raise ValueError(f"top_k must be between 1 and 1000, not {self.top_k}")


@dataclass(frozen=True)
class Send:
    """`POST classify` this, and send back the httpx.Response, or the httpx.RequestError that it raised."""

    content: bytes
    headers: dict[str, str]
    params: dict[str, str]
    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """Wait for so long."""

    seconds: float


@dataclass
class Contact:
    """What the requests of one client know of each other.

    Attributes:
        answered: time.monotonic() of the last answer that was the service's or a proxy's, whatever it said.
    """

    answered: float = -math.inf


Conversation: TypeAlias = Generator[Send | Pause, Reply, Results]


def exchange(pictures: list[Picture], options: Options, contact: Contact) -> Conversation:
    """Classifies the images of one batch, again and in parts if need be, until the deadline.

    Args:
        pictures: at least one.
        options: parameters. The deadline counts from the first request.
        contact: of the client.

    Returns:
        A prediction or a failure for each image, in order.

    Raises:
        Unreachable: no answer at all before the deadline, to other requests of the client neither.
        RequestFailed: what would fail every other image too: a wrong key or parameter, or this is not the service.
    """
    begun = time.monotonic()
    return (yield from _attempts(pictures, options, contact, begun, begun + options.deadline_s, 0))


def _attempts(
    pictures: list[Picture], options: Options, contact: Contact, begun: float, end: float, refusals: int
) -> Conversation:
    """As `exchange`, from one time.monotonic() to another, after so many attempts that failed."""
    while True:
        reply = yield _request(pictures, options, end - time.monotonic())
        outcome = read_results(reply, pictures)
        if not isinstance(outcome, Unreachable):
            contact.answered = time.monotonic()
        if not isinstance(outcome, ClientError):
            return outcome
        is_there = contact.answered >= begun
        too_large = isinstance(outcome, RequestFailed) and outcome.status in _TOO_LARGE and len(pictures) > 1
        lost = isinstance(outcome, Unreachable) and not is_for_good(reply)
        if lost or (isinstance(outcome, RequestFailed) and outcome.status in _RETRIED):
            pause_s = _pause_s(refusals, outcome)
            if time.monotonic() + pause_s >= end:
                return _give_up(outcome, pictures, is_there)
            refusals += 1
            yield Pause(pause_s)
        elif not too_large:
            return _give_up(outcome, pictures, is_there)
        # no image is to blame for a connection that was not made: the service is down for a moment
        one_breaks_it = lost and is_there and refusals > 1 and not isinstance(reply, httpx.ConnectError | httpx.ConnectTimeout)
        # not 429: a limit of requests would refuse two halves as well
        too_many = isinstance(outcome, Overloaded) and outcome.status == HTTPStatus.SERVICE_UNAVAILABLE
        if len(pictures) > 1 and (too_large or one_breaks_it or too_many):
            # what does not fit as a whole may fit in halves: into a body limit, into the time for a body, into a queue. An image
            # that breaks the connection does so until its time is over, so half of the time is left to the other half
            now, middle = time.monotonic(), len(pictures) // 2
            first_end = now + (end - now) / 2 if one_breaks_it else end
            if now >= end:
                return _late(pictures)
            first = yield from _attempts(pictures[:middle], options, contact, begun, first_end, refusals)
            if time.monotonic() >= end:
                return first + _late(pictures[middle:])
            return first + (yield from _attempts(pictures[middle:], options, contact, begun, end, refusals))


def _late(pictures: list[Picture]) -> Results:
    return [Unreachable("the deadline passed before this part of the batch was sent")] * len(pictures)


def _request(pictures: list[Picture], options: Options, left_s: float) -> Send:
    if len(pictures) == 1:
        content, content_type = pictures[0].data, "application/octet-stream"
    else:
        boundary = os.urandom(16).hex()
        head, tail = _PART % boundary.encode(), b"--%b--\r\n" % boundary.encode()
        content = b"".join([*(piece for picture in pictures for piece in (head, picture.data, b"\r\n")), tail])
        content_type = f"multipart/form-data; boundary={boundary}"
    headers = {"Content-Type": content_type, "X-Deadline-Ms": str(max(1, int(left_s * 1000)))}
    params = {"top_k": str(options.top_k)} | ({"explain": "true"} if options.explain else {})
    return Send(content, headers, params, max(0.001, left_s) + GRACE_S)


def _pause_s(refusals: int, failure: ClientError) -> float:
    """Exponential with full jitter, but not before the server said; later by chance, so that not all come back at once."""
    doubled = 2.0 ** min(refusals, 64)  # 2.0**1024 would overflow
    backoff_s = random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * doubled))  # noqa: S311 (no secret)
    told_s = failure.retry_after_s if isinstance(failure, RequestFailed) else None
    return backoff_s if told_s is None else max(backoff_s, told_s * random.uniform(1, 1.25))  # noqa: S311


def _give_up(failure: ClientError, pictures: list[Picture], is_there: bool) -> Results:
    """The failure in the place of each image, if other images may fare better.

    Raises:
        ClientError: if they will not.
    """
    if not isinstance(failure, RequestFailed):
        if is_there:  # the service, and answers for other images are under way
            return [failure] * len(pictures)
        raise failure
    mine = failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR or failure.status in {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
    if mine or failure.code in REJECTIONS:
        return [failure] * len(pictures)
    raise failure
