"""The shortest way to an answer: one image as the raw body of `POST /classify`, answered without ASGI.

A task, a route and their messages cost more than everything else the service adds to decoding and inference. Whatever is
unusual about a request (another body, a chunked one, a parameter out of range) goes to the documented route, which knows
what to say (docs/decisions/0005-around-the-framework.md).
"""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import Future
from http import HTTPStatus
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from app.api.classify import RAW_TYPES, Parameters
from app.api.problems import MEDIA_TYPE, defect_response, problem_body, problem_headers
from app.deadline import deadline_ms, time_left_s
from app.engine.outcome import Outcome, Timing
from app.errors import CLIENT_LEFT, ServiceError
from app.request import choose_request_id
from app.settings import MOST_DEADLINE_MS
from app.telemetry.exchange import Exchange, server_timing
from app.verdict import answer_body, judge

if TYPE_CHECKING:
    from app.connection import Protocol

logger = logging.getLogger(__name__)

_RAW_TYPES = frozenset(name.encode() for name in RAW_TYPES)
_FLAGS = {b"true": True, b"false": False}
_MAX_DIGITS = 3
"""Longer numbers are the route's business."""
_MAX_DEADLINE_DIGITS = len(str(MOST_DEADLINE_MS))
_LONGEST_LENGTH = 12
_LONGEST_HEAD = 2048
"""Longer ones are parsed each time: every connection would keep one."""
_UNUSUAL = frozenset((b"expect", b"transfer-encoding", b"upgrade", b"content-encoding", b"origin"))


_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: ?(\d+)(?=\r\n)", re.IGNORECASE)


class Head(NamedTuple):
    """What a request's head says, if it asks for one raw image with simple parameters.

    Attributes:
        parameters: the request's parameters.
        request_id: the client's, as sent.
        keep_alive: whether the client may send another request.
        headers: all, names in lower case.
    """

    parameters: Parameters
    request_id: bytes
    keep_alive: bool
    headers: list[tuple[bytes, bytes]]


def match(protocol: Protocol) -> Head | None:
    """The head that has come, or None if it asks for something else."""
    path, _, query = protocol.url.partition(b"?")
    if path != b"/classify" or protocol.parser.get_method() != b"POST" or protocol.flow.write_paused:
        return None
    length, kind, asked, request_id = -1, None, None, b""
    for name, value in protocol.headers:
        if name == b"content-type":
            if kind is not None:
                return None
            kind = value
        elif name == b"content-length":
            length = int(value) if value.isdigit() else -1
        elif name == b"x-request-id":
            request_id = value
        elif name == b"x-deadline-ms":
            if asked or not value.isdigit() or len(value) > _MAX_DEADLINE_DIGITS or not 0 < int(value) <= MOST_DEADLINE_MS:
                return None
            asked = int(value)
        elif name in _UNUSUAL:
            return None
    if (
        kind not in _RAW_TYPES
        or not 0 < length <= protocol.settings.max_body_bytes
        or not protocol.service.keys.admit(protocol.headers)
    ):
        return None
    parameters = _parameters(query, deadline_ms(asked, protocol.settings))
    # HTTP/1.0 could ask to be kept, but would wait for a header that says so
    keep_alive = protocol.parser.should_keep_alive() and protocol.parser.get_http_version() != "1.0"
    return Head(parameters, request_id, keep_alive, protocol.headers) if parameters else None


class RepeatedHead:
    """A head that has come before on this connection.

    A request that differs from it in nothing but the image and its length needs no parser, whose calls back into Python
    cost as much as all else in the event loop.

    Args:
        before: its bytes up to the length.
        after: those behind it, to the image's first.
        head: what the parser made of it.
        max_body_bytes: largest image.
    """

    __slots__ = ("_after", "_before", "_max_body_bytes", "head")

    def __init__(self, before: bytes, after: bytes, head: Head, max_body_bytes: int) -> None:
        self._before, self._after, self.head, self._max_body_bytes = before, after, head, max_body_bytes

    @classmethod
    def learn(cls, data: bytes, request: RawImageRequest) -> RepeatedHead | None:
        """From what came in one piece, if that was this request and nothing else, and its head is not too long to be kept."""
        end = data.find(b"\r\n\r\n", 0, _LONGEST_HEAD) + 4
        lengths = list(_CONTENT_LENGTH.finditer(data, 0, end))
        if len(lengths) != 1 or len(data) - end != request.received_bytes:
            return None
        first, last = lengths[0].span(1)
        return cls(data[:first], data[last:end], request.head, request.protocol.settings.max_body_bytes)

    def image(self, data: bytes) -> bytes | None:
        """The image, if this is one whole request with the same head; else None: it is the parser's business."""
        if not data.startswith(self._before):
            return None
        first = len(self._before)
        last = data.find(b"\r", first, first + _LONGEST_LENGTH)
        length = data[first:last]
        if last < 0 or not length.isdigit() or not data.startswith(self._after, last):
            return None
        begin = last + len(self._after)
        return data[begin:] if 0 < len(data) - begin == int(length) <= self._max_body_bytes else None


class RawImageRequest:
    """One image as the raw body of `POST /classify`; stands where uvicorn has its RequestResponseCycle.

    uvicorn tells a cycle what happens through attributes and an event; the event here is the object itself.

    Args:
        protocol: the connection.
        head: what was asked.

    Attributes:
        received_bytes: of the image so far.
        maybe_alone: complete ones that the event loop has read while the engine rests, and has not begun with.
    """

    maybe_alone: ClassVar[list[RawImageRequest]] = []

    __slots__ = (
        "begin",
        "begun",
        "body",
        "disconnected",
        "future",
        "head",
        "keep_alive",
        "message_event",
        "more_body",
        "protocol",
        "received_bytes",
        "request_id",
        "response_complete",
        "response_started",
    )

    def __init__(self, protocol: Protocol, head: Head) -> None:
        self.protocol, self.head, self.begin = protocol, head, protocol.active
        self.request_id, self.keep_alive = choose_request_id(head.request_id), head.keep_alive
        self.body: bytes | bytearray = b""  # not a list of pieces: each of a million tiny ones would weigh 40 bytes more
        self.received_bytes = 0
        self.more_body, self.begun, self.disconnected = True, False, False
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
        self.received_bytes += len(data)
        try:
            self.protocol.service.bodies.take(len(data))
        except ServiceError as error:
            self.fail(error, keep_alive=False)

    def set(self) -> None:
        """The body is complete, or the client has left."""
        if self.disconnected:
            self.abandon()
        elif not (self.more_body or self.response_complete or self.begun):
            self._begin()

    def abandon(self) -> None:
        """The client has left: what has not begun of the work is dropped."""
        if self.response_complete:
            return
        self.disconnected = self.response_complete = True
        if self.future:
            self.future.cancel()
            self.future = None
        self._release(CLIENT_LEFT)

    def _begin(self) -> None:
        self.begun, self.body = True, bytes(self.body)
        if not self.protocol.service.scheduler.may_process_here(self.body):
            self._submit()
            return
        self.maybe_alone.append(self)
        if len(self.maybe_alone) == 1:  # others that have come are read before this is called
            self.protocol.loop.call_soon(self._process_or_submit)

    @classmethod
    def _process_or_submit(cls) -> None:
        """Answers the only one that has come in this turn of the event loop, or submits all."""
        requests, cls.maybe_alone = cls.maybe_alone, []
        for request in requests:
            if request.response_complete or request.protocol.transport.is_closing():
                continue  # its client has left
            try:
                if len(requests) > 1 or not request._process():
                    request._submit()
            except Exception:  # of telling what failed: the others are still to be begun with
                request._give_up()

    def _process(self) -> bool:
        """Computes the image here, if it is fit for that."""
        scheduler, image = self.protocol.service.scheduler, bytes(self.body)
        if not scheduler.may_process_here(image):  # any more: a request of another kind came behind it
            return False
        try:
            self._time_left_s()
            future = scheduler.process_here(image, explain=self.head.parameters.explain)
        except Exception as error:
            self.fail(error)
            return True
        if future is None:
            return False
        self.future = future
        self._end()
        return True

    def _submit(self) -> None:
        image, self.body = bytes(self.body), b""
        try:
            (self.future,) = self.protocol.service.scheduler.submit(
                [image], explain=self.head.parameters.explain, timeout_s=self._time_left_s()
            )
        except Exception as error:
            self.fail(error)
            return
        self.future.add_done_callback(self._wake_loop)

    def _time_left_s(self) -> float:
        return time_left_s(self.head.parameters.deadline_ms / 1000, self.begin)

    def _wake_loop(self, future: Future[Outcome]) -> None:
        """Called in the worker's thread."""
        if not future.cancelled():
            self.protocol.loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self.disconnected or self.protocol.transport.is_closing() or self.future is None:
            return
        # forgotten, as the connection remembers this request until the next; and a failure that is not raised gathers no frames
        future, self.future = self.future, None
        error = future.exception()
        if isinstance(error, Exception):
            self.fail(error)
            return
        try:
            self._answer(future.result())
        except Exception as defect:
            if self.response_started:  # what is written now would be taken for the next answer
                self._give_up()
            else:
                self.fail(defect)

    def _give_up(self) -> None:
        logger.exception("a request could not be answered; its connection is closed")
        self.protocol.transport.abort()

    def _answer(self, outcome: Outcome) -> None:
        service = self.protocol.service
        predictions = [judge(outcome, service.metadata, index=0, filename=None, top_k=self.head.parameters.top_k)]
        body = answer_body(service.metadata, predictions, self.request_id)
        seconds = time.monotonic() - self.begin
        self._write(HTTPStatus.OK, "application/json", body, {"Server-Timing": server_timing((outcome.timing,), seconds)})
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
            status, code, reason = error.status, error.code, error.reason
            timings = (error.timing,) if error.timing else ()
            body, headers = problem_body(status, code, error.detail, self.request_id), problem_headers(error)
            headers["Server-Timing"] = server_timing(timings, time.monotonic() - self.begin)
        else:
            status, code, reason = ServiceError.status, ServiceError.code, None
            body, headers = bytes(defect_response("/classify", error, self.request_id).body), {}
        self._write(status, MEDIA_TYPE, body, headers)
        self.protocol.service.metrics.count_failure(code, reason)
        self._complete(status, len(body), timings, code, error)

    def _write(self, status: HTTPStatus, media_type: str, body: bytes, headers: dict[str, str]) -> None:
        self.response_started = True
        self.protocol.write(status, media_type, body, headers, self.request_id, keep_alive=self.keep_alive)

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
            self.protocol.close()
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
        service.bodies.give_back(self.received_bytes)
        service.metrics.count_request(status)
        if service.is_watched(status, time.monotonic() - self.begin):
            exchange = Exchange("POST", "/classify", self.protocol.client, self.head.headers, self.request_id, self.begin)
            exchange.route, exchange.timings, exchange.code, exchange.error = exchange.path, timings, code, error
            exchange.finish(status, sent_bytes)
            service.tell(exchange)


def _parameters(query: bytes, deadline_ms: int) -> Parameters | None:
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
    return Parameters(top_k, explain, deadline_ms)
