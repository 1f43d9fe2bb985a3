"""Who may wait: a bounded queue of images, measured in time, and who waits for which of them.

Identical images that are in flight together are one item with several askers. Every future that `submit` returns is resolved by
whoever takes the item, through `answer` or `fail`, or by the one who asked, by cancelling it.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from app.engine.item import Asker, Item, Key
from app.engine.outcome import Outcome, Timing
from app.engine.service_time import ServiceTime
from app.errors import DeadlineExceeded, NotServing, Overloaded, ServiceError
from app.images import DecodedImage

_SAFETY = 2.0
"""Only what would be done in half the time it has is accepted: the prediction may be wrong by so much, and a queue longer
than that makes nothing faster."""

_COALESCED_BYTES = 64 * 1024
"""Larger images are not compared: they rarely come twice at once, and the event loop would have to read all of each."""


class Admission:
    """Thread-safe: the event loop and others submit, workers take.

    Args:
        service_time: what an image is expected to take.
        busy: tells how many workers have a batch.
        max_queue: images waiting at most.
        coalesce: compute identical images that are in flight together once.
    """

    def __init__(self, service_time: ServiceTime, busy: Callable[[], int], *, max_queue: int, coalesce: bool) -> None:
        self.max_queue = max_queue
        self._service_time, self._busy, self._coalesce = service_time, busy, coalesce
        # None ends the worker that takes it. This queue's waiting and waking are the interpreter's own, a tenth of the
        # cost of a Condition's.
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of the queue, of `_open` and of every item's askers
        self._open: dict[Key, Item] = {}
        self._closed = False
        # thousands are asked for between two batches
        self._refused: tuple[tuple[float, ...], Overloaded | None] = ((), None)

    def submit(
        self, images: Sequence[bytes | DecodedImage], *, explain: bool = False, timeout_s: float = math.inf
    ) -> list[Future[Outcome]]:
        """Queues images, all or none.

        Args:
            images: whole image files, or pixels that need no decoding, of the model's input size.
            explain: also compute class maps.
            timeout_s: an image whose turn has not come by then is dropped.

        Returns:
            One future an image, in order. Cancelling it drops what has not begun of its work, decoding or inference. Its
            exception is one of UnsupportedImage, ImageTooLarge, UndecodableImage, DeadlineExceeded, InferenceFailed, NotServing.

        Raises:
            Overloaded: no room, or what waits would take more than half of `timeout_s` (503 with Retry-After).
            NotServing: draining (503).
        """
        now = time.monotonic()
        with self._lock:
            if self._closed:
                raise NotServing("the service is shutting down; send the request again, to another replica", retry_after_s=1)
            deadline = now + timeout_s
            keys = [self._key(data, explain) for data in images]
            # counted before anything is made: a refusal must cost next to nothing when they come by thousands
            count = self._count_new(keys, deadline)
            if count and (refusal := self._refusal(count, timeout_s)):
                raise refusal
            futures: list[Future[Outcome]] = []
            for data, key in zip(images, keys, strict=True):
                asker = Asker(deadline)
                futures.append(asker.future)
                if key is not None and (twin := self._open.get(key)):
                    if _is_in_time(twin, deadline):
                        twin.askers.append(asker)
                        continue  # it has at most 64 KiB, so it may keep its turn though all who asked have left
                    key = None  # noqa: PLW2901 - `_open` holds the first item of a key; nobody can join this one
                item = Item(data, explain, [asker], Timing(now), key)
                if key is None:
                    asker.future.on_cancel = item.forget
                else:
                    self._open[key] = item
                self._waiting.put(item)
        return futures

    def refusal(self, image: bytes, *, explain: bool, timeout_s: float) -> Overloaded | None:
        """Why `submit` would refuse this image now.

        Args:
            image: a whole image file.
            explain: as for `submit`, as is timeout_s.
            timeout_s: seconds.

        Returns:
            The same object while nothing has changed; None if `submit` is to be asked.
        """
        if self._closed or (self._open and self._key(image, explain) in self._open):
            return None
        state = self.waiting(), self._busy(), self._service_time.image_s, timeout_s
        if state != self._refused[0]:
            self._refused = state, self._refusal(1, timeout_s)
        return self._refused[1]

    def _refusal(self, count: int, timeout_s: float) -> Overloaded | None:
        waiting = self.waiting()
        wait_s = self._service_time.wait_s(waiting, self._busy(), count)
        full = waiting + count > self.max_queue
        if not full and wait_s * _SAFETY <= timeout_s:
            return None
        waits = f"{waiting} images are waiting, about {wait_s * 1000:.0f} ms"
        return Overloaded(
            f"{waits}; the limit is {self.max_queue} (CONVMIXER_MAX_QUEUE); try again later"
            if full
            else f"{waits}; too long for the deadline of {timeout_s * 1000:.0f} ms; try again later, or with a longer one",
            retry_after_s=max(1, math.ceil(wait_s)),
            reason="queue_full" if full else "would_be_late",
        )

    def _key(self, data: bytes | DecodedImage, explain: bool) -> Key | None:
        """What makes two images the same work; None if it is not looked for."""
        return (data, explain) if self._coalesce and isinstance(data, bytes) and len(data) <= _COALESCED_BYTES else None

    def _count_new(self, keys: list[Key | None], deadline: float) -> int:
        """How many of a request's images are work: those in flight in time are not, twins among themselves count once."""
        count = keys.count(None)
        for key in {key for key in keys if key is not None}:  # minus `self._open.keys()` would look at all of those
            twin = self._open.get(key)
            if twin is None:
                count += 1
            elif not _is_in_time(twin, deadline):
                count += keys.count(key)
        return count

    def waiting(self) -> int:
        """Images in the queue."""
        return self._waiting.qsize()

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    def close(self, workers: int) -> None:
        """Accepts nothing more; each of so many workers gets None when what waits is taken."""
        with self._lock:
            if not self._closed:
                for _ in range(workers):
                    self._waiting.put(None)
            self._closed = True

    def wait(self, timeout_s: float | None) -> Item | None:
        """The next item, when there is one; None if nothing will come any more.

        Raises:
            TimeoutError: none came in time.
        """
        try:
            return self._waiting.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None

    def take(self) -> Item | None:
        """What waits next, or None if nothing does."""
        try:
            item = self._waiting.get_nowait()
        except queue.Empty:
            return None
        if item is None:
            self._waiting.put(None)  # the end of another worker; nothing comes behind it
        return item

    def is_wanted(self, item: Item, ready_by: float = -math.inf) -> bool:
        """Drops who has left, and refuses who would have it too late.

        Args:
            item: taken from here.
            ready_by: time.monotonic() at which the answer is expected.

        Returns:
            False if nobody remains and nothing is to be done.
        """
        with self._lock:
            late = [asker for asker in item.askers if asker.deadline < ready_by]
            item.askers = [a for a in item.askers if a.deadline >= ready_by and not a.future.cancelled()]
            if not item.askers:
                self._close(item)
        for asker in late:
            if asker.future.set_running_or_notify_cancel():
                error = DeadlineExceeded(
                    "the deadline passed while the image was waiting; raise X-Deadline-Ms (under /v2 also `timeout`) or "
                    "try again later"
                )
                error.timing = item.timing
                asker.future.set_exception(error)
        return bool(item.askers)

    def answer(self, item: Item, outcome: Outcome) -> None:
        """Resolves the futures of those who still wait."""
        for future in self._leave(item):
            future.set_result(outcome)

    def fail(self, item: Item, error: Exception) -> None:
        """Gives those who still wait the reason why there is no outcome."""
        if isinstance(error, ServiceError):
            error.timing = item.timing
            error.forget_origin()
        for future in self._leave(item):
            future.set_exception(error)

    def _leave(self, item: Item) -> list[Future[Outcome]]:
        """Lets nobody join any more; the futures of those who still wait, which are to be resolved now."""
        with self._lock:
            self._close(item)
            askers, item.askers = item.askers, []
        return [asker.future for asker in askers if asker.future.set_running_or_notify_cancel()]

    def _close(self, item: Item) -> None:
        """Lets nobody join it; another item of the same bytes, submitted since it was dropped, stays open."""
        if item.key is not None and self._open.get(item.key) is item:
            del self._open[item.key]


def _is_in_time(item: Item, deadline: float) -> bool:
    """Whether somebody with that deadline may wait for it: its turn may come as late as its first asker would take it."""
    return not item.askers or item.askers[0].deadline <= deadline
