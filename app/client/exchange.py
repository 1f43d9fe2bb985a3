"""One request to `/classify` with its retries, without input and output: `Client` and `AsyncClient` share it.

`exchange` is a generator: it yields what to do next (`Send` or `Pause`), is sent what came of it, and returns the results.

How images travel was measured against the real server (two threads, 32 x 32 images; CPU time an image of client + server
beside the model's): one by one as raw bodies 1,600 µs in the client alone; forms of 32 built by httpx 180 + 250; forms of 32
built here 60 + 150; JSON with base64 the same and a third more bytes. So: a lone image raw, which the server answers
fastest, several as a form.
"""

from __future__ import annotations

import email.utils
import math
import os
import random
import ssl
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeAlias

import httpx

from app.client.answers import (
    ClientError,
    DeadlineExceeded,
    Health,
    ImageRejected,
    Model,
    ModelRef,
    Overloaded,
    Prediction,
    RequestFailed,
    Unauthorized,
    Unreachable,
)
from app.client.images import Picture

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
_MAX_PORT = 65535
_REJECTIONS = {"body_too_large", "image_too_large", "unsupported_image", "undecodable_image"}
_KINDS: dict[int, type[RequestFailed]] = {
    HTTPStatus.UNAUTHORIZED: Unauthorized,
    HTTPStatus.TOO_MANY_REQUESTS: Overloaded,
    HTTPStatus.SERVICE_UNAVAILABLE: Overloaded,
    HTTPStatus.GATEWAY_TIMEOUT: DeadlineExceeded,
}
_PROBE_WORDS = ("ok", "unavailable")

_PART = b'--%b\r\nContent-Disposition: form-data; name="images"; filename="image"\r\n\r\n'


@dataclass(frozen=True)
class Wanted:
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


Reply: TypeAlias = httpx.Response | httpx.RequestError | None
Results: TypeAlias = list[Prediction | ClientError]
Exchange: TypeAlias = Generator[Send | Pause, Reply, Results]


def exchange(
    pictures: list[Picture], wanted: Wanted, contact: Contact, begun: float | None = None, refusals: int = 0
) -> Exchange:
    """Classifies the images of one batch, again and in halves if need be, until the deadline.

    Args:
        pictures: at least one.
        wanted: parameters.
        contact: of the client.
        begun: time.monotonic() from which the deadline counts; None: the first request.
        refusals: attempts that failed already.

    Returns:
        A prediction or a failure for each image, in order.

    Raises:
        Unreachable: no answer at all before the deadline, to other requests of the client neither.
        RequestFailed: what would fail every other image too: a wrong key or parameter, or this is not the service.
    """
    begun = time.monotonic() if begun is None else begun
    end = begun + wanted.deadline_s
    while True:
        reply = yield _request(pictures, wanted, end - time.monotonic())
        outcome = _read(reply, pictures)
        if not isinstance(outcome, Unreachable):
            contact.answered = time.monotonic()
        if not isinstance(outcome, ClientError):
            return outcome
        others_fare_better = contact.answered >= begun
        too_large = isinstance(outcome, RequestFailed) and outcome.status in _TOO_LARGE and len(pictures) > 1
        lost = isinstance(outcome, Unreachable) and not _is_for_good(reply)
        if lost or (isinstance(outcome, RequestFailed) and outcome.status in _RETRIED):
            pause_s = _pause_s(refusals, outcome)
            if time.monotonic() + pause_s >= end:
                return _give_up(outcome, pictures, others_fare_better)
            refusals += 1
            yield Pause(pause_s)
        elif not too_large:
            return _give_up(outcome, pictures, others_fare_better)
        guilty_among = lost and others_fare_better and refusals > 1
        if len(pictures) > 1 and (too_large or guilty_among or isinstance(outcome, Overloaded)):
            # what does not fit as a whole may fit in halves: into a body limit, into the time for a body, into a queue; and one
            # that breaks the connection takes no others with it
            middle = len(pictures) // 2
            first = yield from exchange(pictures[:middle], wanted, contact, begun, refusals)
            return first + (yield from exchange(pictures[middle:], wanted, contact, begun, refusals))


def check_url(url: str) -> str:
    """The service's address, as it must be.

    Args:
        url: with or without a path.

    Raises:
        ValueError: no http or https address.
    """
    example = "it begins with http:// or https://, e.g. http://127.0.0.1:8000"
    try:
        parsed = httpx.URL(url)
        port = parsed.port
    except httpx.InvalidURL as error:
        raise ValueError(f"{url!r} is no address: {error}; {example}") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ValueError(f"{url!r} is no address; {example}")
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise ValueError(f"{url!r} is no address: there is no port {port}; {example}")
    return url


def check_deadline(deadline_s: float) -> float:
    """A deadline that the service takes.

    Args:
        deadline_s: seconds.

    Raises:
        ValueError: out of range.
    """
    if not 0.001 <= deadline_s <= 3600:
        raise ValueError(f"deadline_s must be between 0.001 and 3600 seconds, not {deadline_s}")
    return deadline_s


def check_count(name: str, count: int) -> int:
    """A number of which there must be one at least: with room for no request, all would wait for ever.

    Args:
        name: of the argument.
        count: its value.

    Raises:
        ValueError: less than 1.
    """
    if count < 1:
        raise ValueError(f"{name} must be at least 1, not {count}")
    return count


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries the key (RFC 6750).

    Args:
        api_key: None: no header.

    Raises:
        ValueError: no header can carry it. httpx would say so at each request, and show the key.
    """
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise ValueError("the API key must be one line of printable ASCII, without spaces around it")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def reason_of(error: httpx.RequestError | None) -> str:
    """Why there is no answer: what the system said of a connection, where httpx says only that none was made.

    Args:
        error: of httpx.
    """
    if isinstance(error, httpx.LocalProtocolError):
        return "HTTP does not allow such a request"  # which one it says itself, with what may be secret
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError):  # an OSError, but its numbers are OpenSSL's
            why = getattr(cause, "verify_message", None) or (cause.reason or str(cause)).replace("_", " ").lower()
            return f"TLS failed: {why}"
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:  # those of looking a name up are negative
            return os.strerror(cause.errno)
    return str(error) or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    cause = error
    while cause := cause and (cause.__cause__ or cause.__context__):
        if isinstance(cause, BaseExceptionGroup):  # of one error an address
            cause = cause.exceptions[0]
        yield cause


def _is_for_good(reply: Reply) -> bool:
    """Whether it is no better the next time: the request itself is wrong, or the server is not who it should be."""
    return isinstance(reply, httpx.LocalProtocolError | httpx.UnsupportedProtocol) or any(
        isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(reply if isinstance(reply, Exception) else None)
    )


def shown(url: httpx.URL) -> str:
    """An address without the password that may stand in it.

    Args:
        url: any.
    """
    return str(url.copy_with(userinfo=b""))


def read_health(livez: httpx.Response, readyz: httpx.Response) -> Health:
    """What the answers of both probes say.

    Args:
        livez: of `/livez`.
        readyz: of `/readyz`.

    Raises:
        RequestFailed: one of them is no probe's answer.
    """
    for response in (livez, readyz):
        problem = _problem(response)
        if response.status_code not in {HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE}:
            raise _failure(response, problem)
        if problem.get("status") not in _PROBE_WORDS:  # a proxy without a replica answers 503 as well, and its `status` is 503
            raise _stranger(response) if response.status_code == HTTPStatus.OK else _failure(response, problem)
    reason = _problem(livez).get("reason") or _problem(readyz).get("reason")
    return Health(livez.status_code == HTTPStatus.OK, readyz.status_code == HTTPStatus.OK, reason)


def read_model(response: httpx.Response) -> Model:
    """What the answer of `/model` says.

    Args:
        response: of `/model`.

    Raises:
        RequestFailed: another status than 200, or another body than the service's.
    """
    if response.status_code != HTTPStatus.OK:
        raise _failure(response, _problem(response))
    try:
        return Model.from_wire(_problem(response))
    except (KeyError, TypeError) as error:
        raise _stranger(response) from error


def _request(pictures: list[Picture], wanted: Wanted, left_s: float) -> Send:
    if len(pictures) == 1:
        content, content_type = pictures[0].data, "application/octet-stream"
    else:
        boundary = os.urandom(16).hex()
        head, tail = _PART % boundary.encode(), b"--%b--\r\n" % boundary.encode()
        content = b"".join([*(piece for picture in pictures for piece in (head, picture.data, b"\r\n")), tail])
        content_type = f"multipart/form-data; boundary={boundary}"
    headers = {"Content-Type": content_type, "X-Deadline-Ms": str(max(1, int(left_s * 1000)))}
    params = {"top_k": str(wanted.top_k)} | ({"explain": "true"} if wanted.explain else {})
    return Send(content, headers, params, max(0.001, left_s) + GRACE_S)


def _read(reply: Reply, pictures: list[Picture]) -> Results | ClientError:
    if not isinstance(reply, httpx.Response):
        return Unreachable(f"no answer: {reason_of(reply)}")
    body = _problem(reply)
    if reply.status_code != HTTPStatus.OK and "predictions" not in body:
        return _failure(reply, body)
    try:
        answers, request_id = body["predictions"], body["request_id"]
        model = ModelRef(**body["model"]) if reply.status_code == HTTPStatus.OK else ModelRef("", "")
        return [
            RequestFailed(reply.status_code, **answer["error"], request_id=request_id)
            if "error" in answer
            else Prediction.from_wire(answer, model, request_id, picture.index, picture.filename)
            for answer, picture in zip(answers, pictures, strict=True)
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return _stranger(reply)


def _problem(response: httpx.Response) -> dict[str, Any]:
    """The JSON object in the body; empty if there is none."""
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _stranger(response: httpx.Response) -> RequestFailed:
    detail = f"{shown(response.url)} gave an answer that is not convmixer-serve's; is the address right?"
    return RequestFailed(response.status_code, "unexpected_answer", detail)


def _failure(response: httpx.Response, problem: dict[str, Any]) -> RequestFailed:
    status = response.status_code
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "unknown status"
    code = str(problem.get("code") or phrase.lower().replace(" ", "_"))
    detail = str(problem.get("detail") or f"{shown(response.url)} answered {status} {phrase}")
    kind = ImageRejected if code in _REJECTIONS else _KINDS.get(status, RequestFailed)
    request_id = problem.get("request_id") or response.headers.get("X-Request-ID")
    return kind(status, code, detail, request_id=request_id, retry_after_s=_retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float | None:
    """`Retry-After` (RFC 9110, 10.2.3): seconds, or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _pause_s(refusals: int, failure: ClientError) -> float:
    """Exponential with full jitter, but not before the server said; later by chance, so that not all come back at once."""
    backoff_s = random.uniform(0, min(MAX_BACKOFF_S, BACKOFF_S * 2**refusals))  # noqa: S311 (no secret)
    told_s = failure.retry_after_s if isinstance(failure, RequestFailed) else None
    return backoff_s if told_s is None else max(backoff_s, told_s * random.uniform(1, 1.25))  # noqa: S311


def _give_up(failure: ClientError, pictures: list[Picture], others_fare_better: bool) -> Results:
    """The failure in the place of each image, if other images may fare better.

    Raises:
        ClientError: if they will not.
    """
    if not isinstance(failure, RequestFailed):
        if others_fare_better:  # the service is there, and answers for other images are under way
            return [failure] * len(pictures)
        raise failure
    mine = failure.status >= HTTPStatus.INTERNAL_SERVER_ERROR or failure.status in {
        HTTPStatus.REQUEST_TIMEOUT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.TOO_MANY_REQUESTS,
    }
    if mine or failure.code in _REJECTIONS:
        return [failure] * len(pictures)
    raise failure
