"""The client for threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import httpx

from app.client.answers import ClassificationError, Health, Model, Prediction, RequestFailed, Unreachable
from app.client.exchange import (
    BATCH_SIZE,
    CONCURRENCY,
    DEADLINE_S,
    NO_LIMITS,
    PROBE_TIMEOUT_S,
    Exchange,
    Pause,
    Reply,
    Results,
    Wanted,
    authorization,
    check_deadline,
    check_url,
    exchange,
    read_health,
    read_model,
)
from app.client.images import Batch, ImageInput, Picture, batches, encode, filename_of


class Client:
    """Talks to a running service. Thread-safe; keep one for as long as you need it, connections are reused.

    Args:
        url: of the service; may have a path, if it stands behind a proxy.
        api_key: if the service asks for one.
        deadline_s: time for a request, retries included; the server drops what would be late.
        batch_size: images in a request of `classify_many`; fewer if they are large.
        concurrency: requests of one `classify_many` under way at once.

    Raises:
        ValueError: the address or the deadline is none.
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
        self._batch_size, self._concurrency = batch_size, concurrency
        self._http = httpx.Client(base_url=check_url(url), headers=authorization(api_key), limits=NO_LIMITS)
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="convmixer-client")
        self._closed = threading.Event()

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
            RequestFailed: any other failure; base of all but `Unreachable`.
            OSError: the file cannot be read.
            ValueError: an array has another shape or type, a parameter is out of range.
        """
        wanted = Wanted(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        (result,) = self._carry_out(exchange([Picture(0, filename_of(image), encode(image))], wanted))
        if isinstance(result, RequestFailed):
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

        `images` is consumed as answers are, never much ahead of them, so it may be a generator without end.

        Args:
            images: as for `classify`.
            top_k: classes listed, at most all.
            explain: whether to add heat maps.
            deadline_s: for each request instead of the client's own.
            on_progress: called in this thread with the number of images done, whenever a batch is.

        Returns:
            A `Prediction` for each image, or a `ClassificationError` in its place, in the order given.

        Raises:
            Unreachable: the service gave no answer for a whole deadline. (While iterating, as all below.)
            RequestFailed: what would fail every image: a wrong key or parameter, or this is not the service.
            TypeError: one of `images` is no image at all.
            ValueError: a parameter is out of range.
        """
        wanted = Wanted(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        return self._stream(images, wanted, on_progress or (lambda done: None))

    def _stream(
        self, images: Iterable[ImageInput], wanted: Wanted, on_progress: Callable[[int], None]
    ) -> Iterator[Prediction | ClassificationError]:
        in_flight: deque[tuple[Batch, Future[Results]]] = deque()
        done = 0

        def oldest() -> list[Prediction | ClassificationError]:
            nonlocal done
            batch, future = in_flight[0]
            results = batch.merge(future.result())
            in_flight.popleft()
            done += len(results)
            on_progress(done)
            return results

        try:
            for batch in batches(images, self._batch_size):
                in_flight.append((batch, self._threads.submit(self._classify_batch, batch, wanted)))
                # as many wait as are under way: the threads have work while the caller looks at results
                if len(in_flight) >= 2 * self._concurrency:
                    yield from oldest()
            while in_flight:
                yield from oldest()
        finally:
            for _, future in in_flight:
                future.cancel()

    def _classify_batch(self, batch: Batch, wanted: Wanted) -> Results:
        pictures = batch.pictures()
        return self._carry_out(exchange(pictures, wanted)) if pictures else []

    def _carry_out(self, steps: Exchange) -> Results:
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(step, Pause):
                reply = None
                if self._closed.wait(step.seconds):
                    raise Unreachable("the client was closed")
                continue
            try:
                reply = self._http.post(
                    "classify", content=step.content, headers=step.headers, params=step.params, timeout=step.timeout_s
                )
            except httpx.TransportError as error:
                reply = error

    def health(self) -> Health:
        """What the probes say, now; never tried again.

        Raises:
            Unreachable: no answer.
            RequestFailed: this is not the service.
        """
        return read_health(self._get("livez"), self._get("readyz"))

    def model(self) -> Model:
        """What is served, and how.

        Raises:
            Unreachable: no answer.
            RequestFailed: this is not the service.
        """
        return read_model(self._get("model"))

    def _get(self, path: str) -> httpx.Response:
        try:
            return self._http.get(path, timeout=PROBE_TIMEOUT_S)
        except httpx.TransportError as error:
            raise Unreachable(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error

    def close(self) -> None:
        """Ends what is under way, without further tries, and closes the connections."""
        self._closed.set()
        self._threads.shutdown(cancel_futures=True)
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
