"""The client for asyncio. What its methods mean, `Client` says."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, suppress
from contextvars import copy_context
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeAlias

import httpx

from app.client.answers import ClassificationError, ClientClosed, ClientError, Health, Model, Prediction, Unreachable
from app.client.arguments import authorization, check_count, check_deadline, check_url
from app.client.exchange import (
    BATCH_SIZE,
    CONCURRENCY,
    DEADLINE_S,
    NO_LIMITS,
    PROBE_TIMEOUT_S,
    Contact,
    Options,
    Pause,
    exchange,
)
from app.client.images import Batch, ImageInput, Picture, check_several, encode, filename_of, load
from app.client.replies import Reply, Results, read_health, read_model, reason_of, shown

Answer: TypeAlias = "asyncio.Future[Picture | ClassificationError | None]"


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
        self._http = httpx.AsyncClient(base_url=check_url(url, api_key), headers=authorization(api_key), limits=NO_LIMITS)
        self._contact = Contact()

    async def classify(
        self, image: ImageInput, *, top_k: int = 5, explain: bool = False, deadline_s: float | None = None
    ) -> Prediction:
        """Classifies one image; arguments and failures as those of `Client.classify`."""
        options = Options(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        data = await asyncio.to_thread(encode, image)
        (result,) = await self._classify([Picture(0, filename_of(image), data)], options)
        if isinstance(result, ClientError):
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
        """Classifies any number of images; arguments, order and failures as those of `Client.classify_many`.

        `images` is iterated in a task of its own, so answers are given on while it is waited for; in a thread of its own if it is
        a plain iterable other than a list or tuple. There its last `next` may still wait when the answers are left.
        """
        check_several(images)
        options = Options(top_k, explain, self._deadline_s if deadline_s is None else deadline_s)
        return self._stream(images, options, on_progress or (lambda done: None))

    async def _stream(
        self, images: Iterable[ImageInput] | AsyncIterable[ImageInput], options: Options, on_progress: Callable[[int], None]
    ) -> AsyncIterator[Prediction | ClassificationError]:
        in_flight: asyncio.Queue[tuple[Batch, asyncio.Task[Results]] | None] = asyncio.Queue()
        tasks: set[asyncio.Task[Results]] = set()
        # as many wait as are under way: there is work while the caller looks at results
        places, under_way = asyncio.Semaphore(2 * self._concurrency), asyncio.Semaphore(self._concurrency)

        async def read() -> None:
            """In a task of its own: answers are given on while the source is waited for."""
            source = _batches(images, self._batch_size)
            try:
                while await places.acquire() and (batch := await anext(source, None)):
                    task = asyncio.create_task(self._classify_batch(batch, options, under_way))
                    tasks.add(task)
                    in_flight.put_nowait((batch, task))
            finally:
                in_flight.put_nowait(None)
                await source.aclose()

        reading = asyncio.create_task(read())
        try:
            done = 0
            while entry := await in_flight.get():
                batch, task = entry
                results = batch.merge(await task)
                tasks.discard(task)
                places.release()
                done += len(results)
                on_progress(done)
                for result in results:
                    yield result
            await reading  # raises what the source has raised
        finally:
            for pending in (reading, *tasks):
                pending.cancel()
            await asyncio.gather(reading, *tasks, return_exceptions=True)

    async def _classify_batch(self, batch: Batch, options: Options, under_way: asyncio.Semaphore) -> Results:
        """One request of `classify_many`, when it is its turn.

        Args:
            batch: images; those that cannot be sent are left out.
            options: parameters.
            under_way: as many as requests may be under way.
        """
        pictures = batch.pictures()
        async with under_way:
            return await self._classify(pictures, options) if pictures else []

    async def _classify(self, pictures: list[Picture], options: Options) -> Results:
        """Does what an `exchange` asks for, within its times.

        Args:
            pictures: at least one.
            options: parameters.
        """
        steps = exchange(pictures, options, self._contact)
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
            self._check_open()
            try:
                # httpx counts anew for the connection, for sending and for every piece that comes
                async with asyncio.timeout(step.timeout_s):
                    reply = await self._http.post(
                        "classify", content=step.content, headers=step.headers, params=step.params, timeout=step.timeout_s
                    )
            except TimeoutError:
                reply = httpx.ReadTimeout("the deadline passed")
            except httpx.RequestError as error:
                reply = error

    async def health(self) -> Health:
        """As `Client.health`."""
        return read_health(*await asyncio.gather(self._get("livez"), self._get("readyz")))

    async def model(self) -> Model:
        """As `Client.model`."""
        return read_model(await self._get("model"))

    async def _get(self, path: str) -> httpx.Response:
        self._check_open()
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):  # httpx counts anew for every piece that comes
                return await self._http.get(path, timeout=PROBE_TIMEOUT_S)
        except TimeoutError as error:
            raise Unreachable(f"no answer from {shown(self._http.base_url)} within {PROBE_TIMEOUT_S:g} s") from error
        except httpx.RequestError as error:
            raise Unreachable(f"no answer from {shown(self._http.base_url)}: {reason_of(error)}") from error

    def _check_open(self) -> None:
        if self._http.is_closed:
            raise ClientClosed("the client was closed")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()


async def _batches(images: Iterable[ImageInput] | AsyncIterable[ImageInput], size: int) -> AsyncGenerator[Batch]:
    """`images.batches` for both kinds of iterables; each image is encoded before the next is asked for."""
    batch = Batch()
    try:
        async with aclosing(_entries(images)) as entries:
            async for entry in entries:
                batch.add(entry)
                if batch.is_full(size):
                    yield batch
                    batch = Batch()
    except Exception:
        if batch.entries:
            yield batch
        raise
    if batch.entries:
        yield batch


async def _entries(
    images: Iterable[ImageInput] | AsyncIterable[ImageInput],
) -> AsyncGenerator[Picture | ClassificationError]:
    if isinstance(images, AsyncIterable):
        index = 0
        async for image in images:
            yield await _load(index, image)
            index += 1
    elif isinstance(images, list | tuple):
        for index, image in enumerate(images):
            yield await _load(index, image)
    else:  # the next may be long in coming (a camera, a queue): the loop goes on meanwhile
        source = _Source(map(load, itertools.count(), images))
        try:
            while entry := await source.take():
                yield entry
        finally:
            source.leave()


class _Source:
    """A plain iterator in a thread of its own.

    Of its own, since a few that wait would take all threads of the loop, and what a generator has opened may be bound to one. A
    daemon, since whoever leaves, or ends the program, need not wait for one more image: Python joins the others at its end, also
    those of a ThreadPoolExecutor.

    Args:
        entries: none of them false.
    """

    def __init__(self, entries: Iterator[Picture | ClassificationError]) -> None:
        self._entries, self._loop = entries, asyncio.get_running_loop()
        self._asked: SimpleQueue[Answer | None] = SimpleQueue()
        context = copy_context()
        threading.Thread(target=context.run, args=[self._work], name="convmixer-source", daemon=True).start()

    async def take(self) -> Picture | ClassificationError | None:
        """The next; None if there is none."""
        answer: Answer = self._loop.create_future()
        self._asked.put(answer)
        return await answer

    def leave(self) -> None:
        """Ends the thread, when the iterator lets it."""
        self._asked.put(None)

    def _work(self) -> None:
        while answer := self._asked.get():
            try:
                give = partial(answer.set_result, next(self._entries, None))
            except BaseException as error:  # a generator may raise anything
                give = partial(answer.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(_give, answer, give)


def _give(answer: Answer, give: Callable[[], None]) -> None:
    if not answer.done():  # whoever asked may have left
        give()


async def _load(index: int, image: ImageInput) -> Picture | ClassificationError:
    return load(index, image) if isinstance(image, bytes) else await asyncio.to_thread(load, index, image)
