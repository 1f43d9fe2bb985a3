"""What the service's answers mean, and why there is none."""

from __future__ import annotations

import email.utils
import os
import ssl
import time
from collections.abc import Iterator
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

REJECTIONS = {"body_too_large", "image_too_large", "unsupported_image", "undecodable_image"}
"""Codes of what is wrong with an image and with no other."""

_KINDS: dict[int, type[RequestFailed]] = {
    HTTPStatus.UNAUTHORIZED: Unauthorized,
    HTTPStatus.TOO_MANY_REQUESTS: Overloaded,
    HTTPStatus.SERVICE_UNAVAILABLE: Overloaded,
    HTTPStatus.GATEWAY_TIMEOUT: DeadlineExceeded,
}
_PROBE_WORDS = ("ok", "unavailable")

Reply: TypeAlias = httpx.Response | httpx.RequestError | None
Results: TypeAlias = list[Prediction | ClientError]


def read_results(reply: Reply, pictures: list[Picture]) -> Results | ClientError:
    """What came of a request to `/classify`: a result for each image, or the failure of all.

    Args:
        reply: to it.
        pictures: those that were sent.
    """
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


def is_for_good(reply: Reply) -> bool:
    """Whether it is no better the next time: the request itself is wrong, or the server is not who it should be.

    Args:
        reply: none that is an answer.
    """
    return isinstance(reply, httpx.LocalProtocolError | httpx.UnsupportedProtocol) or any(
        isinstance(cause, ssl.SSLCertVerificationError) for cause in _causes(reply if isinstance(reply, Exception) else None)
    )


def shown(url: httpx.URL) -> str:
    """An address without the password that may stand in it.

    Args:
        url: any.
    """
    return str(url.copy_with(userinfo=b""))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    cause = error
    while cause := cause and (cause.__cause__ or cause.__context__):
        if isinstance(cause, BaseExceptionGroup):  # of one error an address
            cause = cause.exceptions[0]
        yield cause


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
    kind = ImageRejected if code in REJECTIONS else _KINDS.get(status, RequestFailed)
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
