"""The one place where an exception becomes an HTTP answer.

Every failure is an RFC 9457 problem document, and under `/v2` what the Open Inference Protocol has in its place:
`{"error": "…"}`, whoever found it (a route, the guard, the server).
"""

from __future__ import annotations

import logging
import re
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Scope, Send

from app.errors import CLIENT_LEFT, PHRASES, InvalidParameter, ServiceError
from app.request import routed_path
from app.schemas import Prediction

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_SHOWN = 100
"""Characters of a client's own path that an error repeats."""
_OPEN_INFERENCE = re.compile(r"/v2(?:[/?]|$)")


def problem_response(path: str, error: ServiceError, request_id: str, predictions: list[Prediction] | None = None) -> Response:
    """The answer to a failed request.

    Args:
        path: of the request; under /v2 failures have another form.
        error: what went wrong.
        request_id: for the answer.
        predictions: each image's reason when several failed.
    """
    return _respond(path, error.status, error.code, error.detail, request_id, problem_headers(error), predictions)


def problem_headers(error: ServiceError) -> dict[str, str]:
    """What the answer to this failure says in headers: when to try again, how to show a key, what is read instead."""
    return {**error.headers} if error.retry_after_s is None else {**error.headers, "Retry-After": str(error.retry_after_s)}


def problem_body(
    status: HTTPStatus, code: str, detail: str, request_id: str, predictions: list[Prediction] | None = None
) -> bytes:
    """The problem document (RFC 9457), as `schemas.Problem` describes it.

    Args:
        status: of the answer.
        code: of the failure.
        detail: one sentence for the client.
        request_id: for the answer.
        predictions: each image's reason when several failed.
    """
    # building a model would take longer than all else in a refusal under overload
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": PHRASES.get(status) or status.phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    if predictions is not None:
        problem["predictions"] = predictions
    return to_json(problem)


def defect_response(path: str, error: Exception, request_id: str) -> Response:
    """The answer when the service itself is wrong; the reason goes to the log."""
    logger.error("defect while answering %s", path, exc_info=error, extra={"request_id": request_id})
    detail = "a defect of the service; its log has the reason under this request id"
    return _respond(path, HTTPStatus.INTERNAL_SERVER_ERROR, ServiceError.code, detail, request_id, {})


async def answer_failure(scope: Scope, error: ServiceError, send: Send) -> None:
    """Answers a failure found outside FastAPI."""
    _note(scope, error.code, error)
    response = problem_response(routed_path(scope), error, scope["state"]["request_id"])

    async def no_body() -> Message:
        return {"type": "http.disconnect"}

    await response(scope, no_body, send)


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        _note(request.scope, error.code, error)
        return problem_response(routed_path(request.scope), error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        # of a parameter that may be left out pydantic also says that it is not None, and names the branch it tried
        told = [e for e in error.errors() if e["type"] != "none_required"]
        details = "; ".join(f"{'.'.join(map(str, e['loc'][:2]))}: {e['msg']}" for e in told)
        return await service_error(request, InvalidParameter(details))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        code = status.phrase.lower().replace(" ", "_")
        _note(request.scope, code, error)
        headers = dict(error.headers or {})
        if "Allow" in headers:  # Starlette keeps methods in a set, whose order changes from one process to the next
            headers["Allow"] = ", ".join(sorted(headers["Allow"].split(", ")))
        detail = _of_path(request, headers.get("Allow")) if error.detail == status.phrase else str(error.detail)
        return _respond(routed_path(request.scope), status, code, detail, request.state.request_id, headers)

    @app.exception_handler(ClientDisconnect)
    async def client_left(request: Request, _: ClientDisconnect) -> Response:
        """For the metrics; nobody reads it."""
        error = request.state.exchange.error
        if isinstance(error, ServiceError):  # it did not leave: the connection has answered, and closed
            _note(request.scope, error.code, error)
            return Response(status_code=error.status)
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        _note(request.scope, ServiceError.code, error)
        return defect_response(routed_path(request.scope), error, request.state.request_id)


def _of_path(request: Request, allowed: str | None) -> str:
    """What is wrong with the method, if others are allowed, or with the path: in place of Starlette's bare phrase."""
    path = request.state.exchange.path[:_SHOWN]
    if allowed:
        return f"{path} takes {allowed}, not {request.method[:_SHOWN]}"
    return f"there is no {path} here; /docs has what there is"


def _note(scope: Scope, code: str, error: Exception) -> None:
    """Tells metrics, access log and traces what went wrong."""
    if isinstance(error, ServiceError):
        error.forget_origin()
    state = scope["state"]
    state["service"].metrics.count_failure(code, error.reason if isinstance(error, ServiceError) else None)
    state["exchange"].code, state["exchange"].error = code, error


def _respond(
    path: str,
    status: HTTPStatus,
    code: str,
    detail: str,
    request_id: str,
    headers: dict[str, str],
    predictions: list[Prediction] | None = None,
) -> Response:
    if _OPEN_INFERENCE.match(path):
        return Response(to_json({"error": detail}), status, headers, "application/json")
    return Response(problem_body(status, code, detail, request_id, predictions), status, headers, MEDIA_TYPE)
