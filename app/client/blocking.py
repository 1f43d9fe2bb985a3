"""The client for threads: the one for asyncio, in an event loop of its own.

With sockets that block, a deadline would hold for every piece of a request alone: httpx gives it anew to each address of the
host, each piece that is sent and each that comes. The loop costs a lone image half a millisecond (1.7 → 2.2 ms on two Zen 5
cores, server included) and many images none of their rate (75 µs of the client for each, where it was 53).
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

from app.client.answers import ClassificationError, ClientClosed, ClientError, Health, Model, Prediction
from app.client.arguments import check_count, check_deadline
from app.client.asynchronous import AsyncClient
from app.client.exchange import BATCH_SIZE, CONCURRENCY, DEADLINE_S, Options
from app.client.images import Batch, ImageInput, Picture, batches, check_several, encode, filename_of
from app.client.pending import Pending
from app.client.replies import Results

P = ParamSpec("P")
T = TypeVar("T")


class Client:
    """Talks to a running service. Thread-safe; keep one for as long as you need it, connections are reused.

    Args:
        url: of the service; may have a path, if it stands behind a proxy.
        api_key: if the service asks for one.
        deadline_s: time for a request, retries included; the server drops what would be late.
        batch_size: images in a request of `classify_many`; fewer if they are large.
        concurrency: requests of one `classify_many` under way at once.

    Raises:
        ValueError: the address, the key or the deadline is none, or a number is less than 1.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        deadline_s: float = DEADLINE_S,
        batch_size: int = BATCH_SIZE,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self._deadline_s = check_deadline(deadline_s)
        self._batch_size, self._concurrency = check_count("batch_size", batch_size), check_count("concurrency", concurrency)
        self._client = AsyncClient(url, api_key=api_key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=[self._loop], name="convmixer-client", daemon=True)
        self._thread.start()
        self._closing = threading.Lock()
        self._closed = False
        self._process = os.getpid()
        self._end = weakref.finalize(self, _end, self._loop, self._client, self._process)  # also of one that nobody closes
        self._end.atexit = False

    def classify(
        self, image: ImageInput, *, top_k: int = 5, explain: bool = False, deadline_s: float | None = None
    ) -> Prediction:
        """Classifies one image.

        Args:
            image: a path, the bytes of an image file, a Pillow image, or uint8 [H, W, 3] RGB or [H, W] grey.
            top_k: classes listed, at most all.
            explain: whether to add a heat map.
            deadline_s: for this request instead of the client's own.

        Raises:
            ImageRejected: damaged, too large, or of a type that is not read.
            Overloaded: until the deadline.
            DeadlineExceeded: accepted, but not in time.
            Unreachable: no answer until the deadline.
            Unauthorized: the key is wrong.
            RequestFailed: any other failure; base of all above but `Unreachable`.
            ClientClosed: this client was closed.
            OSError: the file cannot be read.
            TypeError: this is no image.
            ValueError: an array has another shape or type, a parameter is out of range.
        """
        options = Options(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        (result,) = self._run(self._client._classify, [Picture(0, filename_of(image), encode(image))], options)
        if isinstance(result, ClientError):
            raise result
        return result

    def classify_many(
        self,
        images: Iterable[ImageInput],
        *,
        top_k: int = 5,
        explain: bool = False,
        deadline_s: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Iterator[Prediction | ClassificationError]:
        """Classifies any number of images, several requests at once.

        `images` is consumed as answers are, never much ahead of them, so it may be a generator without end. While it is waited
        for, no answer is given on: of a live stream, each comes with the next image (of `AsyncClient`, at once).

        Args:
            images: as for `classify`.
            top_k: classes listed, at most all.
            explain: whether to add heat maps.
            deadline_s: for each request instead of the client's own.
            on_progress: called in this thread with the number of images done, whenever a batch is.

        Returns:
            A `Prediction` for each image, or a `ClassificationError` in its place, in the order given.

        Raises:
            Unreachable: the service gave no answer for a whole deadline. (While iterating, as all below. What `images` raises
                comes after the results of all images before it.)
            RequestFailed: what would fail every image: a wrong key or parameter, or this is not the service.
            TypeError: `images` is one image (at once), or one of them is no image at all.
            ValueError: a parameter is out of range (at once).
        """
        check_several(images)
        options = Options(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        return self._stream(images, options, on_progress or (lambda done: None))

    def _stream(
        self, images: Iterable[ImageInput], options: Options, on_progress: Callable[[int], None]
    ) -> Iterator[Prediction | ClassificationError]:
        in_flight: deque[tuple[Batch, Pending[Results]]] = deque()
        under_way = asyncio.Semaphore(self._concurrency)
        failure: Exception | None = None
        done = 0

        def oldest() -> list[Prediction | ClassificationError]:
            nonlocal done
            batch, pending = in_flight[0]
            results = batch.merge(self._result(pending))
            in_flight.popleft()
            done += len(results)
            on_progress(done)
            return results

        try:
            source = batches(images, self._batch_size)
            while True:
                try:
                    batch = next(source, None)
                except Exception as error:
                    failure = error
                    break
                if not batch:
                    break
                in_flight.append((batch, self._submit(self._client._classify_batch, batch, options, under_way)))
                # as many wait as are under way: there is work while the caller looks at results
                while in_flight and (in_flight[0][1].done() or len(in_flight) >= 2 * self._concurrency):
                    yield from oldest()
            while in_flight:
                yield from oldest()
            if failure:
                raise failure
        finally:
            for _, pending in reversed(in_flight):  # those that wait first, or each would begin when the one before it ends
                pending.cancel()

    def _submit(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        if self._process != os.getpid():
            raise ClientClosed("the client was made before this process was forked; make one here")
        with self._closing:  # or one that is submitted meanwhile would wait for a loop that has stopped
            if self._closed:
                raise ClientClosed("the client was closed")
            return Pending(self._loop, function, *args, **kwargs)

    def _result(self, pending: Pending[T]) -> T:
        try:
            return pending.result()
        except asyncio.CancelledError:
            raise ClientClosed("the client was closed") from None

    def _run(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        pending = self._submit(function, *args, **kwargs)
        try:
            return self._result(pending)
        finally:
            pending.cancel()  # if a signal, such as Ctrl-C, ended the wait

    def health(self) -> Health:
        """What the probes say, now; never tried again.

        Raises:
            Unreachable: no answer.
            Overloaded: a proxy has no process to ask.
            RequestFailed: this is not the service.
        """
        return self._run(self._client.health)

    def model(self) -> Model:
        """What is served, and how.

        Raises:
            Unreachable: no answer.
            RequestFailed: this is not the service.
        """
        return self._run(self._client.model)

    def close(self) -> None:
        """Ends what is under way, without further tries, and closes the connections.

        Not to be called in a signal handler: what it interrupts may hold the lock. One that raises lets `with` close the client.
        """
        if self._process != os.getpid():  # they are the parent's
            return
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._end()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, client: AsyncClient, process: int) -> None:
    """Begins to end a client, in whatever thread; its own thread ends with it. A forked process has none."""

    async def end() -> None:
        try:
            pending = asyncio.all_tasks() - {asyncio.current_task()}
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            await client.aclose()
            await loop.shutdown_asyncgens()  # httpx leaves some behind that read a damaged body
        finally:
            loop.stop()

    if process == os.getpid():
        Pending(loop, end)
