"""A pure-ASGI guard in front of every route: request id, body size.

Not a BaseHTTPMiddleware: that costs more than a whole route. The size is checked while bytes stream in, so also for
chunked bodies without Content-Length. How long they may take is the server's business (`app.server`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from app.errors import BodyTooLarge, ServiceError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def choose_request_id(sent: bytes) -> str:
    """The client's own `X-Request-ID` if it is short and plain, else a new one."""
    return sent.decode() if sent and _REQUEST_ID.fullmatch(sent) else f"{random.getrandbits(128):032x}"


class RequestGuard:
    """Wraps an ASGI application.

    A client's `X-Request-ID` is kept if it is short and plain, else replaced; it is in `scope["state"]["request_id"]`
    and in every answer's headers.

    Args:
        app: the application.
        max_body_bytes: largest body.
        answer_failure: answers a ServiceError raised before or while the body arrived.
        on_response: told scope and status of every answer, for metrics.
    """

    def __init__(
        self,
        app: App,
        *,
        max_body_bytes: int,
        answer_failure: Callable[[Scope, ServiceError, Send], Awaitable[None]],
        on_response: Callable[[Scope, int], None],
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.answer_failure = answer_failure
        self.on_response = on_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection scope (ASGI 3)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = choose_request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.on_response(scope, message["status"])
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        limit = self.max_body_bytes
        received = 0

        async def receive_within_limits() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
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
