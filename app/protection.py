"""Pure-ASGI guards in front of every route: request id, body size, time for the body to arrive.

Not a BaseHTTPMiddleware: that costs more than a whole route. The limits are enforced while bytes stream in, so also for
chunked bodies without Content-Length.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from app.errors import BodyTooLarge, ReceiveTimeout, ServiceError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestGuard:
    """Wraps an ASGI application.

    A client's `X-Request-ID` is kept if it is short and plain, else replaced; it is in `scope["state"]["request_id"]`
    and in every answer's headers.

    Args:
        app: the application.
        max_body_bytes: largest body.
        receive_timeout_s: seconds from the first to the last byte of a body.
        answer_failure: answers a ServiceError raised before or while the body arrived.
        on_response: told path and status of every answer, for metrics.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body_bytes: int,
        receive_timeout_s: float,
        answer_failure: Callable[[Scope, ServiceError, Send], Awaitable[None]],
        on_response: Callable[[str, int], None],
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.receive_timeout_s = receive_timeout_s
        self.answer_failure = answer_failure
        self.on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection scope (ASGI 3)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        sent_id = headers.get(b"x-request-id", b"")
        request_id = sent_id.decode() if _REQUEST_ID.fullmatch(sent_id) else f"{random.getrandbits(128):032x}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.on_response(scope["path"], message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        limit = self.max_body_bytes
        received, body_ended = 0, False
        deadline = time.monotonic() + self.receive_timeout_s

        async def receive_within_limits() -> Message:
            nonlocal received, body_ended
            if body_ended:
                return await receive()  # waits for the client to leave
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError as error:
                raise ReceiveTimeout(
                    f"the body did not arrive within {self.receive_timeout_s:g} s (CONVMIXER_RECEIVE_TIMEOUT_S)"
                ) from error
            received += len(message.get("body", b""))
            body_ended = not message.get("more_body", False)
            if received > limit:
                raise BodyTooLarge(
                    f"the body has more than {limit:,} bytes (CONVMIXER_MAX_BODY_BYTES); send fewer or smaller images"
                )
            return message

        try:
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared[:20]) > limit:
                raise BodyTooLarge(
                    f"the body has {int(declared[:20]):,} bytes; the limit is {limit:,} (CONVMIXER_MAX_BODY_BYTES); "
                    "send fewer or smaller images"
                )
            await self.app(scope, receive_within_limits, send_with_id)
        except ServiceError as error:
            if started:
                raise
            await self.answer_failure(scope, error, send_with_id)
