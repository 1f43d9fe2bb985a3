"""What every surface that classifies has in common: the body is read, the images go to the engine, a client may leave."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import Header, Request, Response
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from app.deadline import time_left_s
from app.engine.outcome import Outcome
from app.errors import Overloaded
from app.images import DecodedImage
from app.service import Service
from app.settings import MOST_DEADLINE_MS

DeadlineHeader = Annotated[
    Annotated[int, Field(ge=1, le=MOST_DEADLINE_MS)] | SkipJsonSchema[None], Header(description="Time this request may take.")
]
"""`X-Deadline-Ms`."""


SHORT_JSON = 256 * 1024
"""Bytes of JSON that are read in less time than a thread would be told to."""

LONG_ANSWER = 10_000
"""Images times classes from which on an answer takes longer to write than a thread would take to be told to."""

_COUNTED = 64 * 1024
"""Shorter answers are not worth refusing: their requests have been paid for."""


class CountedResponse(Response):
    """An answer that, if it is long, counts as held bytes until its client has taken nearly all of it.

    Args:
        service: whose budget it is.
        content: the body.
        told: called with whether there was room for it: only then the request is answered.
        **options: of Starlette's Response.
    """

    def __init__(self, service: Service, content: bytes, told: Callable[[bool], None] = lambda _: None, **options: Any) -> None:
        super().__init__(content, **options)
        self.service = service
        self.told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it (ASGI). A long one in two pieces: uvicorn waits with the second, an empty one, until the first is on its way.

        Raises:
            Overloaded: there is no room for it.
        """
        if len(self.body) <= _COUNTED:
            self.told(True)
            await super().__call__(scope, receive, send)
            return
        with self.service.bodies.loan() as take:
            try:
                take(len(self.body))
            except Overloaded:
                self.told(False)
                raise
            self.told(True)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})


async def read_body(request: Request) -> bytes:
    """Unlike Starlette's, this keeps no list of pieces: each of a million tiny ones would weigh 40 bytes more."""
    body = io.BytesIO()
    async for piece in request.stream():
        body.write(piece)
    return body.getvalue()  # its own buffer, no copy


async def infer(
    request: Request, images: Sequence[bytes | DecodedImage], *, explain: bool, deadline_s: float, begin: float
) -> list[Outcome | BaseException]:
    """Hands images to the engine and waits for all of them; what has not begun is dropped when the client leaves.

    Args:
        request: whose body has been read.
        images: as `Scheduler.submit` takes them.
        explain: also compute class maps.
        deadline_s: seconds the request may take.
        begin: time.monotonic() at which the body began to arrive.

    Returns:
        One result an image, in order.

    Raises:
        ServiceError: the request as a whole is refused.
        ClientDisconnect: the client has left.
    """
    service: Service = request.state.service
    timeout_s = time_left_s(deadline_s, begin)
    leaving = asyncio.ensure_future(_client_leaves(request.receive))
    try:
        futures = service.scheduler.submit(images, explain=explain, timeout_s=timeout_s) if images else []
        leaving.add_done_callback(lambda _: [future.cancel() for future in futures])
        await _all_done(futures)
        if leaving.done():
            raise ClientDisconnect
    finally:
        leaving.cancel()
    return [future.exception() or future.result() for future in futures]


async def _all_done(futures: list[Future[Outcome]]) -> None:
    """Waits for the engine's threads: one wake-up of the event loop a request, however many images it has."""
    if not futures:
        return
    loop = asyncio.get_running_loop()
    waiter = loop.create_future()
    left = itertools.count(len(futures) - 1, -1)  # atomic: `next` on it is one step of the interpreter

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def one_done(_: Future[Outcome]) -> None:
        if next(left) == 0:
            loop.call_soon_threadsafe(wake)

    for future in futures:
        future.add_done_callback(one_done)
    await waiter


async def _client_leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
