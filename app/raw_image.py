"""The shortest way to an answer: one image as the raw body of `POST /classify`, answered without ASGI.

A task, a route and their messages cost more than everything else the service adds to decoding and inference. Whatever is
unusual about a request (another body, a chunked one, a parameter out of range) goes to the documented route, which knows
what to say (docs/decisions/0005-around-the-framework.md).
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from pydantic_core import to_json

from app.api.classify import RAW_TYPES, Wanted
from app.api.problems import defect_response, problem_response
from app.engine.scheduler import Outcome, Timing
from app.errors import CLIENT_LEFT, DeadlineExceeded, ServiceError
from app.protection import choose_request_id
from app.telemetry.exchange import Exchange, server_timing
from app.verdict import judge

if TYPE_CHECKING:
    from app.server import Protocol

_RAW_TYPES = frozenset(name.encode() for name in RAW_TYPES)
_FLAGS = {b"true": True, b"false": False}
_MAX_DIGITS = 3
"""Longer numbers are the route's business."""
_UNUSUAL = frozenset((b"expect", b"transfer-encoding", b"upgrade", b"content-encoding", b"origin"))


def match(protocol: Protocol) -> RawImageRequest | None:
    """The request whose headers have come, as one raw image with simple parameters; None if it is something else."""
    path, _, query = protocol.url.partition(b"?")
    if path != b"/classify" or protocol.parser.get_method() != b"POST" or protocol.flow.write_paused:
        return None
    length, is_raw, deadline_ms, request_id = -1, False, protocol.settings.deadline_ms, b""
    for name, value in protocol.headers:
        if name == b"content-type":
            is_raw = value in _RAW_TYPES
        elif name == b"content-length":
            length = int(value) if value.isdigit() else -1
        elif name == b"x-request-id":
            request_id = value
        elif name == b"x-deadline-ms":
            if not value.isdigit() or len(value) > 7 or not 0 < int(value) <= 3_600_000:
                return None
            deadline_ms = int(value)
        elif name in _UNUSUAL:
            return None
    if not is_raw or not 0 < length <= protocol.settings.max_body_bytes or not protocol.service.keys.admit(protocol.headers):
        return None
    wanted = _wanted(query, deadline_ms)
    if wanted is None:
        return None
    return RawImageRequest(protocol, wanted, choose_request_id(request_id), protocol.parser.should_keep_alive())


class RawImageRequest:
    """One image as the raw body of `POST /classify`; stands where uvicorn has its RequestResponseCycle.

    uvicorn tells a cycle what happens through attributes and an event; the event here is the object itself.

    Args:
        protocol: the connection.
        wanted: the request's parameters.
        request_id: for the answer.
        keep_alive: whether the client may send another request.
    """

    __slots__ = (
        "begin",
        "body",
        "disconnected",
        "future",
        "headers",
        "keep_alive",
        "message_event",
        "more_body",
        "protocol",
        "received",
        "request_id",
        "response_complete",
        "response_started",
        "wanted",
    )

    def __init__(self, protocol: Protocol, wanted: Wanted, request_id: str, keep_alive: bool) -> None:
        self.protocol, self.wanted, self.request_id, self.keep_alive = protocol, wanted, request_id, keep_alive
        self.begin, self.headers = protocol.active, protocol.headers
        self.body: bytes | bytearray = b""  # not a list of pieces: each of a million tiny ones would weigh 40 bytes more
        self.received = 0
        self.more_body, self.disconnected = True, False
        self.response_started = self.response_complete = False
        self.future: Future[Outcome] | None = None
        self.message_event = self

    def receive(self, data: bytes) -> None:
        """A piece of the image."""
        if self.response_complete:
            return
        if not self.body:
            self.body = data
        else:
            self.body = self.body if isinstance(self.body, bytearray) else bytearray(self.body)
            self.body += data
        self.received += len(data)
        try:
            self.protocol.service.bodies.take(len(data))
        except ServiceError as error:
            self.fail(error, keep_alive=False)

    def set(self) -> None:
        """The body is complete, or the client has left."""
        if self.disconnected:
            self.abandon()
        elif not self.more_body and self.future is None:
            self._begin()

    def abandon(self) -> None:
        """The client has left: what has not begun of the work is dropped."""
        if self.response_complete:
            return
        self.disconnected = self.response_complete = True
        if self.future:
            self.future.cancel()
        self._release(CLIENT_LEFT)

    def _begin(self) -> None:
        image, self.body = bytes(self.body), b""
        timeout_s = self.wanted.deadline_ms / 1000 - (time.monotonic() - self.begin)
        try:
            if timeout_s <= 0:
                raise DeadlineExceeded("the deadline passed while the request was being read; raise X-Deadline-Ms")
            (self.future,) = self.protocol.service.scheduler.submit([image], explain=self.wanted.explain, timeout_s=timeout_s)
        except Exception as error:
            self.fail(error)
            return
        self.future.add_done_callback(self._wake_loop)

    def _wake_loop(self, future: Future[Outcome]) -> None:
        """Called in the worker's thread."""
        if not future.cancelled():
            self.protocol.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self.disconnected or self.protocol.transport.is_closing() or self.future is None:
            return
        try:
            self._answer(self.future.result())
        except Exception as error:
            self.fail(error)

    def _answer(self, outcome: Outcome) -> None:
        service = self.protocol.service
        metadata = service.metadata
        predictions = [judge(outcome, metadata, index=0, filename=None, top_k=self.wanted.top_k)]
        body = to_json(
            {
                "model": {"name": metadata.name, "version": metadata.version},
                "predictions": predictions,
                "request_id": self.request_id,
            }
        )
        headers = b"".join([b"%s: %s\r\n" % header for header in self.protocol.server_state.default_headers])
        seconds = time.monotonic() - self.begin
        self.response_started = True
        self.protocol.transport.write(
            b"HTTP/1.1 200 OK\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\nserver-timing: %b\r\n"
            b"x-request-id: %b\r\n%b\r\n%b"
            % (
                headers,
                len(body),
                server_timing((outcome.timing,), seconds).encode(),
                self.request_id.encode(),
                b"" if self.keep_alive else b"connection: close\r\n",
                body,
            )
        )
        service.metrics.observe_answer(seconds, predictions)
        self._complete(200, len(body), (outcome.timing,))

    def fail(self, error: Exception, *, keep_alive: bool = True) -> None:
        """Answers with what went wrong.

        Args:
            error: a ServiceError, or anything else that then is a defect.
            keep_alive: False if the connection must not be used again.
        """
        self.keep_alive = self.keep_alive and keep_alive
        timings: tuple[Timing, ...] = ()
        if isinstance(error, ServiceError):
            code, reason = error.code, error.reason
            timings = (error.timing,) if error.timing else ()
            timing = server_timing(timings, time.monotonic() - self.begin)
            response = problem_response("/classify", error, self.request_id, timing=timing)
        else:
            code, reason = ServiceError.code, None
            response = defect_response("/classify", error, self.request_id)
        self.response_started = True
        self.protocol.write(response, self.request_id, keep_alive=self.keep_alive)
        self.protocol.service.metrics.count_failure(code, reason)
        self._complete(response.status_code, len(response.body), timings, code, error)

    def _complete(
        self,
        status: int,
        sent_bytes: int,
        timings: tuple[Timing, ...],
        code: str | None = None,
        error: Exception | None = None,
    ) -> None:
        self.response_complete = True
        self._release(status, sent_bytes, timings, code, error)
        if not self.keep_alive:
            self.protocol.transport.close()
        self.protocol.on_response_complete()

    def _release(
        self,
        status: int,
        sent_bytes: int = 0,
        timings: tuple[Timing, ...] = (),
        code: str | None = None,
        error: Exception | None = None,
    ) -> None:
        self.body = b""
        service = self.protocol.service
        service.bodies.give_back(self.received)
        service.metrics.count_request(status)
        if service.watchers:
            exchange = Exchange("POST", "/classify", self.protocol.client, self.headers, self.request_id, self.begin)
            exchange.route, exchange.timings, exchange.code, exchange.error = exchange.path, timings, code, error
            exchange.finish(status, sent_bytes)
            service.tell(exchange)


def _wanted(query: bytes, deadline_ms: int) -> Wanted | None:
    """The request's parameters, or None if one is unknown or needs a word."""
    top_k, explain = 5, False
    if query:
        for pair in query.split(b"&"):
            name, _, value = pair.partition(b"=")
            if name == b"top_k" and value.isdigit() and len(value) <= _MAX_DIGITS and int(value) > 0:
                top_k = int(value)
            elif name == b"explain" and value in _FLAGS:
                explain = _FLAGS[value]
            else:
                return None
    return Wanted(top_k, explain, deadline_ms)
