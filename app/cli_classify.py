"""Who classifies the images of `convmixer classify`: this process, or a server.

Everything streams: files are found, read, classified and written with a bounded number of them in memory. A row is an entry
of `predictions` as in docs/api.md, whoever made it; `filename` is the path.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli_images import STDIN, standard_input
from app.cli_interrupt import Interruption
from app.cli_writers import Row
from app.errors import InferenceFailed, ServiceError, StartupError

if TYPE_CHECKING:
    from app.client import Client
    from app.engine.outcome import Outcome
    from app.service import Service

_WINDOW = 64
"""Images in flight at least: enough to keep every core busy, few enough to keep memory flat."""

_LOOK_S = 0.5
"""While an answer is awaited, so often is asked whether the engine is alive and whether a signal came."""


def classify_here(service: Service, files: Iterable[str], top_k: int, interruption: Interruption) -> Generator[Row, None, None]:
    """Rows in the order of `files`, made by this process on every core.

    Args:
        service: the running engine.
        files: paths.
        top_k: classes in a row.
        interruption: whose signals leave the engine's locks alone.

    Raises:
        StartupError: the engine has failed, and would on all that is left.
    """
    from app.schemas import item_error
    from app.verdict import judge

    scheduler, settings = service.scheduler, service.settings
    window = min(max(_WINDOW, 2 * scheduler.workers * scheduler.max_batch), settings.max_queue)
    in_flight: deque[tuple[int, str, int, Future[Outcome] | ServiceError]] = deque()
    held_bytes = 0

    def is_ready() -> bool:
        pending = in_flight[0][-1]
        with interruption.postponed():
            return isinstance(pending, ServiceError) or pending.done()

    def oldest() -> Row:
        nonlocal held_bytes
        index, path, size, pending = in_flight.popleft()
        held_bytes -= size
        try:
            outcome = _wait(service, pending, interruption)
        except ServiceError as error:
            return dict(item_error(index, path, error))
        return dict(judge(outcome, service.metadata, index=index, filename=path, top_k=top_k))

    try:
        for index, path in enumerate(files):
            data = _read(path, settings.max_body_bytes)
            size = len(data) if isinstance(data, bytes) else 0
            while in_flight and (len(in_flight) >= window or held_bytes + size > settings.max_held_bytes or is_ready()):
                yield oldest()
            held_bytes += size
            with interruption.postponed():
                in_flight.append((index, path, size, scheduler.submit([data])[0] if isinstance(data, bytes) else data))
        while in_flight:
            yield oldest()
    finally:
        if in_flight:  # nobody is left to be told
            service.drain_by = time.monotonic()
            for *_, pending in in_flight:
                if isinstance(pending, Future):
                    pending.cancel()


def classify_there(client: Client, files: Iterable[str], top_k: int, interruption: Interruption) -> Generator[Row, None, None]:
    """Rows in the order of `files`, made by a server.

    Args:
        client: of that server.
        files: paths.
        top_k: classes in a row.
        interruption: whose signals are not lost.
    """
    from app.client import Prediction

    images = (standard_input().read() if path == STDIN else path for path in files)
    for result in client.classify_many(images, top_k=top_k):
        interruption.check()
        name = {"index": result.index, "filename": result.filename or STDIN}
        if isinstance(result, Prediction):
            row = result.to_dict() | name
            del row["model"], row["request_id"]  # an entry as the server has it, and as `classify_here` makes it
            yield row
        else:
            yield name | {"error": {"code": result.code, "detail": result.detail}}


def _read(path: str, max_bytes: int) -> bytes | ServiceError:
    from app.errors import BodyTooLarge, UndecodableImage

    try:
        if path == STDIN:
            return standard_input().read()
        size = Path(path).stat().st_size
        if size > max_bytes:
            return BodyTooLarge(f"the file has {size:,} bytes; the limit is {max_bytes:,} (CONVMIXER_MAX_BODY_BYTES)")
        return Path(path).read_bytes()
    except OSError as error:
        return UndecodableImage(f"cannot be read: {error.strerror}")
    except ValueError as error:  # no name of a file
        return UndecodableImage(f"cannot be read: {error}")


def _wait(service: Service, pending: Future[Outcome] | ServiceError, interruption: Interruption) -> Outcome:
    if isinstance(pending, ServiceError):
        raise pending
    is_done = False
    while not is_done:
        with interruption.postponed():
            is_done = bool(wait([pending], _LOOK_S).done)
        if not is_done:
            _raise_if_failed(service)
    try:
        with interruption.postponed():
            return pending.result()
    except InferenceFailed:
        _raise_if_failed(service)
        raise


def _raise_if_failed(service: Service) -> None:
    if reason := service.scheduler.failure():
        service.drain_by = time.monotonic()  # what a failed engine has in hand is not waited for
        raise StartupError(f"{reason}; the rows so far are written")
