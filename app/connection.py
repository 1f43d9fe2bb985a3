"""One connection: uvicorn's HTTP/1.1 protocol, with the deadlines and caps it lacks.

uvicorn waits for ever for the rest of a header or a body and takes headers of any size. `Protocol` adds: one deadline
from a request's first byte to its last, a cap on its headers, a cap on connections, an end for clients that do not read
their answers; and idle connections are closed by a sweep over all (`app.server`) instead of a timer for each answer. Failures
found here are problem documents like all others.

One image as the raw body of `POST /classify` does not go through ASGI: `app.raw_image`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app import cross_origin, head, raw_image, refusal
from app.api.problems import problem_headers, problem_response
from app.errors import MalformedRequest, Overloaded, ReceiveTimeout, ServiceError
from app.growth import Growth
from app.protection import OUT_OF_TIME
from app.request import choose_request_id
from app.room import Room
from app.sockets import HAS_LEFT, HAS_SENT, happened, reset
from app.telemetry.exchange import Exchange, server_timing
from app.wire import DefaultHeaders, compose

if TYPE_CHECKING:
    from app.service import Service

logger = logging.getLogger(__name__)

MAX_PIPELINED = 32
"""Requests that may wait on one connection for the answer to an earlier one; uvicorn would keep any number."""

_MOST_PIPELINED_HEADERS = 320
"""Of those requests together: ten each; a head may have a hundred, of some 200 bytes."""

_MOST_PIPELINED_BODY = 64 * 1024
"""Bytes of requests that wait for the answer to an earlier one: they are not counted as held yet."""

_CLOSE_WITHIN_S = 2.0
"""So long a client that still sends may go on after an answer that ends the connection."""

_LAST_REQUEST_S = 1.0
"""So long an idle connection stays when the server ends: its client, who does not know yet, may have sent a request that is still
on its way. Who sends one is told in the answer that the connection ends."""

_CLOSED_BEFORE_THE_END_S = 1.0
"""So long before the end of the time to drain, none goes on any more; the sweep that closes them may be late."""


class Protocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        receive_by: time.monotonic() at which the request that is arriving must be complete; None while none is.
        active: time.monotonic() at which something last arrived, or an answer was written.
        room: for the connections of this process.
        stuck_since: time.monotonic() since when its client does not read; None if it does.
        last_refusal: what was refused last, written down.
    """

    room: ClassVar[Room] = Room()
    last_refusal: ClassVar[refusal.Written | None] = None
    _default_headers: ClassVar[DefaultHeaders] = DefaultHeaders()

    def __init__(self, config: uvicorn.Config, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.url = b""  # uvicorn's, of the request that came last
        self.service: Service = app_state["service"]
        self.settings = self.service.settings
        self.receive_by: float | None = None
        self.active = time.monotonic()
        self._raw: raw_image.RawImageRequest | None = None
        self._repeated: raw_image.RepeatedHead | None = None
        self._running: RequestResponseCycle | raw_image.RawImageRequest | None = None
        self._between = True  # nothing of a request has come since the last one's end
        self._in_headers = True
        self._header_bytes = 0  # of headers, trailers and chunk extensions that are not complete
        self._body_came = False
        self._parsed_bytes = 0
        self._growth = Growth(self.settings.receive_timeout_s)
        self._deaf = False
        self._close_at: float | None = None  # our side is closed, the client's not yet
        self.stuck_since: float | None = None
        self._last = False  # the connection ends with the request that is arriving

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected (asyncio)."""
        others = len(self.connections)
        super().connection_made(transport)
        self.receive_by = self.active + self.settings.receive_timeout_s
        if not self.room.enter(self, others):
            self._refuse(self._all_busy())

    def _all_busy(self) -> Overloaded:
        limit = f"{self.settings.max_connections} (CONVMIXER_MAX_CONNECTIONS)"
        return Overloaded(f"all {limit} connections are busy; try again later", retry_after_s=1, reason="connections")

    def slow_upload(self, now: float) -> raw_image.RawImageRequest | Exchange | None:
        """The request that is arriving, if there is one that holds anything and hardly grows."""
        arriving = self.receive_by is not None and not self._in_headers and self._growth.has_stalled(now)
        if not arriving or self.cycle is None or self.cycle.response_complete:
            return None
        upload: raw_image.RawImageRequest | Exchange | None = self._raw or self.cycle.scope["state"].get("exchange")
        return upload if upload and upload.received_bytes else None

    def end_upload(self, upload: raw_image.RawImageRequest | Exchange) -> None:
        """Refuses that request, and gives back what has come of it.

        Args:
            upload: as `slow_upload` told it.
        """
        bodies = self.service.bodies
        try:
            self._refuse(bodies.full())
        except Exception:  # of writing the refusal: it must not reach the request that needs the room
            logger.exception("an upload could not be refused; its connection is closed")
            self.transport.abort()
        if isinstance(upload, Exchange):  # its route ends a moment later, and would give them back then
            bodies.give_back(upload.received_bytes)
            upload.received_bytes = 0

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or was cut off (asyncio)."""
        self.room.leave(self)
        self._stop_running()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived (asyncio)."""
        if self._deaf:
            return
        if self._between and not self._header_bytes and not (data := data.lstrip(b"\r\n")):
            return  # an empty line before a request is no part of it (RFC 9112, 2.2)
        self.active = begin = time.monotonic()
        self.room.waiting.pop(self, None)
        # the parser holds no part of a request, so one that is whole may go around it
        whole = self._between and not self._header_bytes and (self.cycle is None or self.cycle.response_complete)
        repeats = whole and not self.flow.write_paused and not self._ends()
        image = self._repeated.image(data) if repeats and self._repeated else None
        if self._repeated and image is not None:
            if refusal.refuse(self, self._repeated.head, image):
                self.server_state.total_requests += 1
            else:
                self._start_raw(self._repeated.head).receive(image)
                super().on_message_complete()
        else:
            self._parse(data)
            if whole and self._between and self._raw and self._raw.begin == begin and not self._repeated:
                self._repeated = raw_image.RepeatedHead.learn(data, self._raw)
        running = self._running
        if running is None or running.response_complete or running.more_body:
            self.room.waiting[self] = None

    def _parse(self, data: bytes) -> None:
        in_body = not self._in_headers
        if not in_body:
            self._header_bytes += len(data)
            data = head.without_upgrade(data)
        self._body_came = False
        super().data_received(data)
        if in_body and not self._in_headers and not self._body_came:
            self._header_bytes += len(data)
        if error := head.too_large(0, self._header_bytes):
            self._refuse(error)

    def on_message_begin(self) -> None:
        """A request's first byte (httptools, as those below)."""
        super().on_message_begin()
        if not self._deaf and not self.pipeline:
            self.receive_by = self.active + self.settings.receive_timeout_s
        self._between = False
        self._in_headers = True
        self._parsed_bytes = 0
        self._growth.begin(self.active)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, or one trailer, which nobody wants (RFC 9110, 6.5.1: it must not become a header)."""
        value = value.rstrip(b" \t")  # no part of it (RFC 9112, 5.1), but the parser leaves what stands behind it
        if self._in_headers:
            super().on_header(name, value)
        self._parsed_bytes += len(name) + len(value)
        if error := head.too_large(len(self.headers), self._parsed_bytes + len(self.url)):
            self._refuse(error)

    def on_headers_complete(self) -> None:
        """All headers: decides which way the request goes."""
        if error := head.too_large(len(self.headers), self._parsed_bytes + len(self.url)):  # there may be none
            self._refuse(error)
        if error := head.unreadable(self.parser.get_http_version(), self.headers, upgrade=self.parser.should_upgrade()):
            self._refuse(error)
        waiting_headers = sum(len(list(cycle.scope["headers"])) for cycle, _ in self.pipeline)
        if len(self.pipeline) >= MAX_PIPELINED or waiting_headers > _MOST_PIPELINED_HEADERS:
            self._refuse(MalformedRequest("too many requests wait on this connection"))  # ends it, unsaid
        if not self.room.allows(self, self.url.partition(b"?")[0]):
            self._refuse(self._all_busy())
        if self._deaf:
            return
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # such clients do not know an answer before the answer (RFC 9110, 10.1.1)
        image = raw_image.match(self) if self.cycle is None or self.cycle.response_complete else None
        if image:
            self._start_raw(image)
        else:
            super().on_headers_complete()  # may find the target unreadable: then this request has not begun
            self._raw = None
            if self.pipeline:
                self.receive_by = None  # nothing more is read before its turn comes
            self.cycle.scope["state"]["arrived"] = self.active
            self.cycle.transport = _CycleTransport(self.transport.write, self.transport.is_closing, self.close)  # type: ignore[assignment]
        self._in_headers, self._header_bytes = False, 0
        if self._ends():
            self.cycle.keep_alive = False

    def _ends(self) -> bool:
        """Whether the client should make its next request on another connection, of another server if there is one."""
        return self._last or self.service.leaving

    def _start_raw(self, head: raw_image.Head) -> raw_image.RawImageRequest:
        self._raw = raw_image.RawImageRequest(self, head)
        self.cycle = self._running = self._raw  # type: ignore[assignment]
        return self._raw

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._body_came, self._header_bytes = True, 0
        if self._deaf:
            return
        self._growth.add(len(body), self.active)
        if self._raw:
            self._raw.receive(body)
        elif self.cycle is not None:
            super().on_body(body)
            if self.cycle is not self._running and sum(len(cycle.body) for cycle, _ in self.pipeline) > _MOST_PIPELINED_BODY:
                self._drop_last()

    def on_message_complete(self) -> None:
        """A request's last byte."""
        if self._deaf:
            return
        self.receive_by, self._in_headers, self._between, self._header_bytes = None, True, True, 0
        if self.cycle is not None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer was written. uvicorn's own would set a timer for each; `enforce_deadlines` closes what is idle."""
        self.server_state.total_requests += 1
        self.active = time.monotonic()
        if self._close_at or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            if not cycle.more_body:
                return
        if not self._between and self.receive_by is None:  # what has begun behind others has its time from now on
            self.receive_by = self.active + self.settings.receive_timeout_s
            self._growth.begin(self.active)
        self.room.waiting.pop(self, None)
        self.room.waiting[self] = None

    def _unsupported_upgrade_warning(self) -> None:
        """Uvicorn's hook. Its advice, to install a library for WebSockets, is none here; the refusal has its own line."""

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's hook for bytes that are no HTTP."""
        self._refuse(MalformedRequest("the bytes received are no valid HTTP/1.1 request"))

    def enforce_deadlines(self, now: float) -> None:
        """Ends the connection if its request should have arrived by now, if it is idle, or if its client does not read.

        Args:
            now: time.monotonic().
        """
        if self not in self.connections:
            return  # lost since the sweep began
        if self.transport.is_closing() or self.transport.get_write_buffer_size():
            self.stuck_since = self.stuck_since or now
            if now - self.stuck_since > self.settings.receive_timeout_s:
                self.cut_off()
        else:
            self.stuck_since = None
        if self._close_at:
            if now > self._close_at:
                self.transport.close()
            return
        if self.pipeline and self.flow.read_paused and happened(self.transport, HAS_LEFT):
            self.transport.abort()  # nothing is read behind two requests, so nobody else would see it
        if self.transport.is_closing() or now <= (self.receive_by or self.active + self.timeout_keep_alive):
            return
        if self.receive_by is None or (self._between and not self._header_bytes):  # nothing was asked
            # what was sent in time may still lie there: after a pause of the whole process this comes before reading
            if self in self.room.waiting and not happened(self.transport, HAS_SENT):
                self.transport.close()
        else:
            timeout = f"{self.settings.receive_timeout_s:g} s (CONVMIXER_RECEIVE_TIMEOUT_S)"
            self._refuse(ReceiveTimeout(f"the request did not arrive within {timeout}"))

    def close(self) -> None:
        """Ends the connection after what was written; in stages while the client is still sending (RFC 9112, 9.6).

        Closed at once, what it sends would be answered with a reset, and many clients then never see why: they look at an answer
        when all is sent.
        """
        if self._between and not self._header_bytes:
            self.transport.close()
        elif not (self._close_at or self.transport.is_closing()):
            self._deaf, self.receive_by = True, None
            self._stop_running()  # what has come of the request is not held meanwhile
            self._close_at = time.monotonic() + _CLOSE_WITHIN_S
            self._hurry()
            self.transport.write_eof()
            self.flow.resume_reading()

    def _hurry(self) -> None:
        """A client that still sends after its answer goes on no longer than the process does."""
        if self._close_at and self.service.drain_by is not None:
            self._close_at = min(self._close_at, self.service.drain_by - _CLOSED_BEFORE_THE_END_S)

    def shutdown(self) -> None:
        """The server ends (uvicorn): so does the connection, after the answer to a request that is in work or has been sent."""
        self._hurry()
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy or self.transport.is_closing():
            super().shutdown()
        elif self.cycle is not None and not self._in_headers:
            self.close()  # it has its answer, and what still comes of it is not read
        elif not self._between or self._header_bytes or happened(self.transport, HAS_SENT):
            self._last = True
        else:
            self._wait_for_a_last_request()

    def _wait_for_a_last_request(self) -> None:
        """Stays open a little, if there is time, and ends with the answer to what still comes."""
        now = time.monotonic()
        left_s = math.inf if self.service.drain_by is None else self.service.drain_by - _CLOSED_BEFORE_THE_END_S - now
        if left_s <= 0:
            self.transport.close()
            return
        self._last, self.receive_by, self.active = True, None, now
        # uvicorn's, of whole seconds there: `enforce_deadlines` closes what is idle for longer
        self.timeout_keep_alive = min(_LAST_REQUEST_S, left_s)  # type: ignore[assignment]

    def refuse_unfinished(self) -> None:
        """Ends the connection if its request is still arriving: the process is about to end."""
        if self.receive_by is None or self.transport.is_closing():
            return
        if self._between and not self._header_bytes:
            self.transport.close()  # nothing was asked
        else:
            self._refuse(OUT_OF_TIME)

    def _stop_running(self) -> None:
        """Tells the application that its client has left; uvicorn tells only the request that came last."""
        self.pipeline.clear()
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.flow.resume_writing()

    def _drop_last(self) -> None:
        """Forgets the request that is arriving behind others; the connection ends with the answers to those."""
        self._deaf, self.receive_by = True, None
        self.pipeline.popleft()
        self.cycle = self.pipeline[0][0] if self.pipeline else self._running  # type: ignore[assignment]
        self.cycle.keep_alive = False
        self.flow.resume_reading()  # what comes is thrown away, and it is seen when the client leaves

    def cut_off(self) -> None:
        """Closes at once: its client does not read."""
        self._stop_running()
        reset(self.transport)

    def _refuse(self, error: ServiceError) -> None:
        """Ends the connection with this answer, or with the answers to earlier requests; what else comes is not read."""
        if self._deaf or self.transport.is_closing():
            return
        self._deaf, self.receive_by = True, None
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and self._in_headers:
            cycle.keep_alive = False  # closes when the earlier requests have their answers
        elif self._raw and not self._raw.response_complete:
            self._raw.fail(error, keep_alive=False)
        elif self.pipeline:
            self._drop_last()
        else:
            # one that was answered before all of it had come gets no second answer
            answered = cycle is not None and cycle.response_complete and not self._in_headers
            in_work = cycle is not None and not cycle.response_complete and (cycle.response_started or bool(self.pipeline))
            if not answered and not in_work:
                self._answer_nothing(error)
            self.close()

    def _answer_nothing(self, error: ServiceError) -> None:
        """Answers where there is no whole request."""
        state = {} if self.cycle is None or self.cycle.response_complete else self.cycle.scope["state"]
        state["refused"] = True  # if its head came just now, its route has not begun, and must not
        upload = state.get("exchange")  # whose route waits for the rest
        headers = () if self._between else self.headers
        request_id = choose_request_id(dict(headers).get(b"x-request-id", b""))
        exchange = upload or Exchange("", "", self.client, (), request_id, self.active, code=error.code)
        response = problem_response(self.url.decode("latin-1"), error, exchange.request_id)
        media_type, body = str(response.media_type), bytes(response.body)
        said = {**problem_headers(error), "Server-Timing": server_timing((), time.monotonic() - exchange.begin)}
        if self.settings.cors_origins:
            # None: of a head that has not come as a whole it is not known, it may still be to come
            origin = dict(headers).get(b"origin", None if self._between or self._in_headers else b"")
            said |= cross_origin.headers(self.settings.origins(), origin)
        wire = compose(error.status, self.default_headers(), media_type, body, said, exchange.request_id, keep_alive=False)
        asked_for_the_head = not self._between and self.parser.get_method() == b"HEAD"  # RFC 9110, 9.3.2
        self.transport.write(wire.removesuffix(body) if asked_for_the_head else wire)
        if upload:
            upload.error = error  # the route learns that its client has left, and tells this in its place
            return
        exchange.finish(response.status_code, len(response.body))
        self.service.metrics.count_failure(error.code, error.reason)
        self.service.tell(exchange)

    def write(
        self, status: HTTPStatus, media_type: str, body: bytes, headers: dict[str, str], request_id: str, *, keep_alive: bool
    ) -> None:
        """Sends a whole answer; for the arguments see `wire.compose`."""
        default_headers = self.default_headers()
        self.transport.write(compose(status, default_headers, media_type, body, headers, request_id, keep_alive=keep_alive))

    def default_headers(self) -> bytes:
        """Those of every answer, written down; the same object until they change."""
        return self._default_headers.write(self.server_state.default_headers)


class _CycleTransport(NamedTuple):
    """A transport as uvicorn's `RequestResponseCycle` uses it, but closed as `Protocol.close` does."""

    write: Callable[[bytes], None]
    is_closing: Callable[[], bool]
    close: Callable[[], None]
