"""The shortest way to an answer: one image as the raw body of `POST /classify`, without the framework's routing.

A FastAPI route costs more than everything else the service adds to decoding and inference. This takes the plain case out
of its way and gives the same answer by the same function; whatever is unusual about a request (another body, a parameter
it does not know, a value out of range) goes on to the documented route, which knows what to say.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from fastapi.responses import Response

from app.api.classify import RAW_TYPES, Upload, Wanted, answer, client_leaves
from app.api.problems import defect_response, problem_response
from app.errors import MalformedRequest, ServiceError
from app.protection import App, Receive, Scope, Send
from app.service import Service

_RAW_TYPES = frozenset(name.encode() for name in RAW_TYPES)
_FLAGS = {b"true": True, b"false": False}
_MAX_DIGITS = 3
"""Longer numbers are the route's business."""


class RawBodyFastPath:
    """Wraps an ASGI application; the guards of `app.protection` are outside of it.

    Args:
        app: gets every request that is not the plain case.
        service: the running service, None until the lifespan has started it.
    """

    def __init__(self, app: App, service: Callable[[], Service]) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection scope (ASGI 3)."""
        if scope["type"] != "http" or scope["path"] != "/classify" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        service = self.service()
        wanted = _plain_parameters(scope, service.settings.deadline_ms)
        if wanted is None:
            await self.app(scope, receive, send)
            return
        request_id: str = scope["state"]["request_id"]
        try:
            response = await _classify(service, receive, wanted, request_id)
        except ServiceError as error:
            response = problem_response(error, request_id)
        except Exception as error:
            response = defect_response(scope["path"], error, request_id)
        if response is not None:
            await response(scope, receive, send)


async def _classify(service: Service, receive: Receive, wanted: Wanted, request_id: str) -> Response | None:
    """The answer, or None if the client left before it had sent everything."""
    begin = time.monotonic()
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        parts = [body]
        while message.get("more_body"):
            message = await receive()
            parts.append(message.get("body", b""))
        body = b"".join(parts)
    if message["type"] == "http.disconnect":
        return None
    if not body:
        raise MalformedRequest("the body is empty; send an image")
    leaving = asyncio.ensure_future(client_leaves(receive))
    try:
        return await answer(service, [Upload(body)], wanted, begin, request_id, leaving)
    finally:
        leaving.cancel()


def _plain_parameters(scope: Scope, deadline_ms: int) -> Wanted | None:
    """The request's parameters, or None if it is not one raw image with simple ones."""
    is_raw = False
    for name, value in scope["headers"]:
        if name == b"content-type":
            is_raw = value in _RAW_TYPES
        elif name == b"x-deadline-ms":
            if not value.isdigit() or not 0 < int(value[:8]) <= 3_600_000 or len(value) > 7:
                return None
            deadline_ms = int(value)
    if not is_raw:
        return None
    top_k, explain = 5, False
    if scope["query_string"]:
        for pair in scope["query_string"].split(b"&"):
            name, _, value = pair.partition(b"=")
            if name == b"top_k" and value.isdigit() and len(value) <= _MAX_DIGITS and int(value) > 0:
                top_k = int(value)
            elif name == b"explain" and value in _FLAGS:
                explain = _FLAGS[value]
            else:
                return None
    return Wanted(top_k, explain, deadline_ms)
