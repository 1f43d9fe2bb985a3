"""A pure-ASGI guard in front of every route: request id, keys, body size; cookies are taken out.

Not a BaseHTTPMiddleware: that costs more than a whole route. The size is checked while bytes stream in, so also for
chunked bodies without Content-Length. How long they may take is the server's business (`app.connection`).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problems import answer_failure
from app.budget import ByteBudget
from app.errors import CLIENT_LEFT, BodyTooLarge, NotServing, ServiceError, Unauthorized
from app.keys import sent_key
from app.request import PROTECTED, choose_request_id, classifies, routed_path
from app.telemetry.exchange import Exchange, server_timing

if TYPE_CHECKING:
    from app.service import Service

OUT_OF_TIME = NotServing("the service shut down before the request was done; send it again, to another replica", retry_after_s=1)
"""The time for a graceful end is over: uploads are cut short, and what waits is cancelled, by uvicorn."""


class RequestGuard:
    """Wraps an ASGI application.

    A client's `X-Request-ID` is kept if it is short and plain, else replaced; it is in `scope["state"]["request_id"]`
    and in every answer's headers, as is `Server-Timing`. `scope["state"]["exchange"]` takes what routes know of the
    request's images and failures. Keys, limits and who is told of answers are the service's, in `scope["state"]["service"]`.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection scope (ASGI 3)."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["state"].get("refused"):  # by the connection, for what came behind its headers
            return None
        headers = dict(scope["headers"])
        request_id = choose_request_id(headers.get(b"x-request-id", b""))
        exchange = _begin(scope, request_id)
        service: Service = scope["state"]["service"]
        body = _LimitedBody(receive, service.settings.max_body_bytes, service.bodies, exchange)
        started = complete = False

        def finish(status: int, sent_bytes: int) -> None:
            exchange.route = getattr(scope.get("route"), "path", None)  # the router has put it there by now
            exchange.finish(status, sent_bytes)

        async def send_with_id(message: Message) -> None:
            nonlocal started, complete
            if message["type"] == "http.response.start":
                started = True
                sent = message.get("headers", ())
                finish(message["status"], int(dict(sent).get(b"content-length", 0)))
                timing = server_timing(exchange.timings, exchange.seconds)
                message["headers"] = [*sent, (b"x-request-id", request_id.encode()), (b"server-timing", timing.encode())]
                _tell(service, scope, exchange)
                if body.is_left:  # the rest is not worth reading, or may never come
                    message["headers"].append((b"connection", b"close"))
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            body.unread = True
            _admit(service, scope, headers)
            body.unread = False
            await self.app(scope, body.receive, send_with_id)
        except ServiceError as error:
            if started:
                raise
            await answer_failure(scope, error, send_with_id)
        except asyncio.CancelledError:
            if started:
                raise
            if service.drain_by is None:  # by Ray Serve: its client has left, or it has waited long enough
                finish(CLIENT_LEFT, 0)
                _tell(service, scope, exchange)
                raise
            body.unread = True
            await answer_failure(scope, OUT_OF_TIME, send_with_id)
        except Exception:
            if not complete:
                raise
            # a defect that was answered and logged: Starlette raises it again, for servers that would log it
        finally:
            service.bodies.give_back(exchange.received_bytes)


class _LimitedBody:
    """A request's body as it arrives, counted.

    Attributes:
        unread: whether the rest of it is not going to be read.
    """

    def __init__(self, receive: Receive, limit: int, budget: ByteBudget, exchange: Exchange) -> None:
        self._receive, self._limit, self._budget, self._exchange = receive, limit, budget, exchange
        self._asked_for = self.unread = False

    @property
    def is_left(self) -> bool:
        """Whether it ends the connection. A body that was not asked for may come or not, nobody can tell (RFC 9110, 10.1.1)."""
        waits = any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._exchange.headers)
        return self.unread or (waits and not self._asked_for)

    async def receive(self) -> Message:
        """The next message (ASGI).

        Raises:
            BodyTooLarge: more has come than one request may have.
            Overloaded: more has come than all may have.
        """
        self._asked_for = True
        message = await self._receive()
        count = len(message.get("body", b""))
        self._exchange.received_bytes += count
        self.unread = True
        if count:
            self._budget.take(count)
        if self._exchange.received_bytes > self._limit:
            raise BodyTooLarge(
                f"the body has more than {self._limit:,} bytes (CONVMIXER_MAX_BODY_BYTES); send fewer or smaller images"
            )
        self.unread = False
        return message


def _begin(scope: Scope, request_id: str) -> Exchange:
    """Puts request id and exchange where routes find them, and takes out what they must not."""
    if scope["path"].endswith("\n"):  # a route's `$` also matches before one line feed, so it would be routed and not counted
        scope["path"] += "\n"
    # nobody wants them, yet FastAPI reads cookies: of 32 KB of backslashes for seconds (CVE-2024-7592)
    scope["headers"] = [header for header in scope["headers"] if header[0] != b"cookie"]
    path = scope["raw_path"].decode("ascii", "backslashreplace")
    # behind others on its connection it has waited for their answers (`app.connection`; other servers do not tell)
    begin = scope["state"].get("arrived") or time.monotonic()
    exchange = Exchange(scope["method"], path, scope["client"], scope["headers"], request_id, begin)
    scope["state"] |= {"request_id": request_id, "exchange": exchange}
    return exchange


def _admit(service: Service, scope: Scope, headers: dict[bytes, bytes]) -> None:
    if routed_path(scope).startswith(PROTECTED) and not service.keys.admit(scope["headers"]):
        if sent_key(scope["headers"]):
            challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}  # not where none was sent (RFC 6750, 3.1)
            raise Unauthorized("the key that was sent is none of this service's", headers=challenge)
        detail = "this service asks for a key: send `Authorization: Bearer KEY`"
        raise Unauthorized(detail, headers={"WWW-Authenticate": "Bearer"})
    limit = service.settings.max_body_bytes
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise BodyTooLarge(
            f"the body has {int(declared[:20]):,} bytes; the limit is {limit:,} (CONVMIXER_MAX_BODY_BYTES); "
            "send fewer or smaller images"
        )


def _tell(service: Service, scope: Scope, exchange: Exchange) -> None:
    if classifies(routed_path(scope)):
        service.metrics.count_request(exchange.status)
    service.tell(exchange)
