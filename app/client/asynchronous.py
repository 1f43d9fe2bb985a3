"""The client for asyncio. What its methods mean, `Client` says."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
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
from app.client.images import Batch, ImageInput, Picture, encode, filename_of, load


class AsyncClient:
    """Talks to a running service from an asyncio event loop.

    Files are read, and pixels encoded, in a thread; nothing blocks the loop.

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
        self._http = httpx.AsyncClient(base_url=check_url(url), headers=authorization(api_key), limits=NO_LIMITS)

    async def classify(
        self, image: ImageInput, *, top_k: int = 5, explain: bool = False, deadline_s: float | None = None
    ) -> Prediction:
        """Classifies one image; arguments and failures as those of `Client.classify`."""
        wanted = Wanted(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        data = await asyncio.to_thread(encode, image)
        (result,) = await self._carry_out(exchange([Picture(0, filename_of(image), data)], wanted))
        if isinstance(result, RequestFailed):
            raise result
        return result

    def classify_many(
        self,
        images: Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        top_k: int = 5,
        explain: bool = False,
        deadline_s: float | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Prediction | ClassificationError]:
        """Classifies any number of images; arguments, order and failures as those of `Client.classify_many`."""
        wanted = Wanted(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        return self._stream(images, wanted, on_progress or (lambda done: None))

    async def _stream(
        self, images: Iterable[ImageInput] | AsyncIterable[ImageInput], wanted: Wanted, on_progress: Callable[[int], None]
    ) -> AsyncIterator[Prediction | ClassificationError]:
        in_flight: deque[tuple[Batch, asyncio.Task[Results]]] = deque()
        under_way = asyncio.Semaphore(self._concurrency)
        done = 0

        async def classify_batch(batch: Batch) -> Results:
            pictures = batch.pictures()
            async with under_way:
                return await self._carry_out(exchange(pictures, wanted)) if pictures else []

        async def oldest() -> list[Prediction | ClassificationError]:
            nonlocal done
            batch, task = in_flight[0]
            results = batch.merge(await task)
            in_flight.popleft()
            done += len(results)
            on_progress(done)
            return results

        try:
            async for batch in _batches(images, self._batch_size):
                in_flight.append((batch, asyncio.create_task(classify_batch(batch))))
                if len(in_flight) >= 2 * self._concurrency:
                    for result in await oldest():
                        yield result
            while in_flight:
                for result in await oldest():
                    yield result
        finally:
            for _, task in in_flight:
                task.cancel()
            await asyncio.gather(*(task for _, task in in_flight), return_exceptions=True)

    async def _carry_out(self, steps: Exchange) -> Results:
        reply: Reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if isinstance(step, Pause):
                reply = None
                await asyncio.sleep(step.seconds)
                continue
            try:
                # httpx counts anew for the connection, for sending and for every piece that comes
                async with asyncio.timeout(step.timeout_s):
                    reply = await self._http.post(
                        "classify", content=step.content, headers=step.headers, params=step.params, timeout=step.timeout_s
                    )
            except TimeoutError:
                reply = httpx.ReadTimeout("the deadline passed")
            except httpx.TransportError as error:
                reply = error

    async def health(self) -> Health:
        """As `Client.health`."""
        return read_health(*await asyncio.gather(self._get("livez"), self._get("readyz")))

    async def model(self) -> Model:
        """As `Client.model`."""
        return read_model(await self._get("model"))

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._http.get(path, timeout=PROBE_TIMEOUT_S)
        except httpx.TransportError as error:
            raise Unreachable(f"no answer from {self._http.base_url}: {error or type(error).__name__}") from error

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()


async def _batches(images: Iterable[ImageInput] | AsyncIterable[ImageInput], size: int) -> AsyncIterator[Batch]:
    """`images.batches` for both kinds of iterables; each image is encoded before the next is asked for."""
    batch, index = Batch(), 0
    async for image in images if isinstance(images, AsyncIterable) else _each(images):
        batch.add(load(index, image) if isinstance(image, bytes) else await asyncio.to_thread(load, index, image))
        index += 1
        if batch.is_full(size):
            yield batch
            batch = Batch()
    if batch.entries:
        yield batch


async def _each(images: Iterable[ImageInput]) -> AsyncIterator[ImageInput]:
    for image in images:
        yield image
