"""The one place where an exception becomes an HTTP answer.

Every failure is an RFC 9457 problem document, and under `/v2` what the Open Inference Protocol has in its place:
`{"error": "…"}`, whoever found it (a route, the guard, the server).
"""

from __future__ import annotations

import logging
import re
from collections.abc import MutableMapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import ServiceError, Unauthorized
from app.protection import Send
from app.schemas import Prediction

logger = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_OPEN_INFERENCE = re.compile(r"/v2(?:[/?]|$)")

CLIENT_LEFT = 499
"""No status of HTTP, but nginx's for a client that closed its connection before the answer."""


def problem_response(path: str, error: ServiceError, request_id: str, predictions: list[Prediction] | None = None) -> Response:
    """The answer to a failed request; `predictions` gives each image's reason when several failed."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return _respond(path, error.status, error.code, error.detail, request_id, headers, predictions)


def defect_response(path: str, error: Exception, request_id: str) -> Response:
    """The answer when the service itself is wrong; the reason goes to the log."""
    logger.error("defect while answering %s, request %s", path, request_id, exc_info=error)
    detail = "a defect of the service; its log has the reason under this request id"
    return _respond(path, HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", detail, request_id, {})


async def answer_failure(scope: MutableMapping[str, Any], error: ServiceError, send: Send) -> None:
    """Answers a failure found outside FastAPI."""
    response = problem_response(scope["path"], error, scope["state"]["request_id"])

    async def no_body() -> MutableMapping[str, Any]:
        return {"type": "http.disconnect"}

    await response(scope, no_body, send)


def install(app: FastAPI) -> None:
    """Registers the handlers."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> Response:
        return problem_response(request.scope["path"], error, request.state.request_id)

    @app.exception_handler(RequestValidationError)
    async def invalid_parameter(request: Request, error: RequestValidationError) -> Response:
        details = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        status, path = HTTPStatus.UNPROCESSABLE_ENTITY, request.scope["path"]
        return _respond(path, status, "invalid_parameter", details, request.state.request_id, {})

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        status = HTTPStatus(error.status_code)
        code = status.phrase.lower().replace(" ", "_")
        headers = dict(error.headers or {})
        return _respond(request.scope["path"], status, code, str(error.detail), request.state.request_id, headers)

    @app.exception_handler(ClientDisconnect)
    async def client_left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_LEFT)  # for the metrics; nobody reads it

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> Response:
        return defect_response(request.scope["path"], error, request.state.request_id)


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
    # schemas.Problem describes it; building one would take longer than all else in a refusal under overload
    problem: dict[str, Any] = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
        "code": code,
        "request_id": request_id,
    }
    if predictions is not None:
        problem["predictions"] = predictions
    return Response(to_json(problem), status, headers, MEDIA_TYPE)
