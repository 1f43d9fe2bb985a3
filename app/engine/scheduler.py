"""Where the images of all clients meet: a bounded queue, worker threads, greedy batches, deadlines, drain.

A worker takes what is waiting (never waits for a batch to fill), decodes it, runs the model, and resolves the futures when
its next batch is ready for the model (docs/decisions/0011): one hop between threads a request. Decoding happens in the worker
because Pillow and onnxruntime both release the GIL, so decoding of one image runs beside inference of another without a second
queue.

Every future that `submit` returns is resolved, whatever happens: with a result, or with the ServiceError that says why
not. An image whose decoding or inference fails takes nobody with it.
"""

from __future__ import annotations

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from app.engine.item import Announce, Answered, Asker, Item, Key
from app.engine.outcome import Outcome, Timing
from app.engine.session import Session
from app.errors import DeadlineExceeded, InferenceFailed, NotServing, Overloaded, ServiceError
from app.images import DecodedImage, DecodeLimits, ResizeRule, decode_image

logger = logging.getLogger(__name__)

_SAFETY = 2.0
"""Only what would be done in half the time it has is accepted: the prediction may be wrong by so much, and a queue longer
than that makes nothing faster."""

_COALESCED_BYTES = 64 * 1024
"""Larger images are not compared: they rarely come twice at once, and the event loop would have to read all of each."""

_LARGE_BYTES = 256 * 1024
"""A larger file, whose decoding takes longer than the model, is a batch of its own: no image waits for it in company."""

_HOLD_BACK_S = 0.005
_HOLD_BACK_PIXELS = 512 * 512
_HOLD_BACK_BYTES = 64 * 1024
"""What is known is told at the latest when decoding of the next batch has taken so long, or comes to a larger picture or file."""

_SICK = 32
"""Images one after the other on which the model failed, each alone: it is the engine that is broken, as a GPU may be for good."""

HANG_TIMEOUT_S = 5.0
"""A worker busy with one step of decoding an image, or with one run of the model, for longer is taken for hung; the service
then reports itself dead. The largest picture accepted takes about a second."""


_REST_S = 5.0
"""A worker that had nothing to do for so long gives back the memory that work has left behind."""


class Scheduler:
    """Feeds a session from a bounded queue.

    Args:
        session: the model.
        rule: how pictures are brought to size.
        limits: largest picture decoded.
        workers: threads that decode and infer.
        max_batch: largest batch.
        max_queue: images waiting at most.
        coalesce: compute identical images that are in flight together once.
        image_s: seconds of a worker that an image takes, as far as that was measured.
        on_batch: called after each batch with its outcomes, for metrics; must not raise.
    """

    def __init__(
        self,
        session: Session,
        rule: ResizeRule,
        limits: DecodeLimits,
        *,
        workers: int,
        max_batch: int,
        max_queue: int,
        coalesce: bool = True,
        image_s: float | None = None,
        on_batch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
    ) -> None:
        self.session, self.rule, self.limits = session, rule, limits
        self.workers, self.max_batch, self.max_queue = workers, max_batch, max_queue
        self._coalesce, self._on_batch = coalesce, on_batch
        # None ends the worker that takes it. This queue's waiting and waking are the interpreter's own, a tenth of the
        # cost of a Condition's.
        self._waiting: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._admission = threading.Lock()  # of the queue, of `_open` and of every item's askers
        self._open: dict[Key, Item] = {}
        self._draining = False
        self._busy_since: dict[int, float] = {}
        self._failed_in_row = 0
        # seconds of one worker per image, learnt from the batches
        self._image_s = image_s or session.warm_up_ms / 1000 / 2
        self._odd_in_row = 0
        # thousands are asked for between two batches
        self._refused: tuple[tuple[float, ...], Overloaded | None] = ((), None)
        self._threads = [threading.Thread(target=self._work, name=f"engine-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, images: Sequence[bytes | DecodedImage], *, explain: bool = False, timeout_s: float = math.inf
    ) -> list[Future[Outcome]]:
        """Queues images, all or none.

        Args:
            images: whole image files, or pixels that need no decoding, of the model's input size.
            explain: also compute class maps.
            timeout_s: an image whose turn has not come by then is dropped.

        Returns:
            One future an image, in order. Cancelling it drops what has not begun of its work, decoding or inference.
            Its exception is
            one of UnsupportedImage, ImageTooLarge, UndecodableImage, DeadlineExceeded, InferenceFailed, NotServing.

        Raises:
            Overloaded: no room, or what waits would take more than half of `timeout_s` (503 with Retry-After).
            NotServing: draining (503).
        """
        now = time.monotonic()
        with self._admission:
            if self._draining:
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
                        continue  # at most 64 KiB, which may wait for its turn though all have left
                    key = None  # noqa: PLW2901 - nobody can join what is not the first of its kind
                item = Item(data, explain, [asker], Timing(now), key)
                if key is None:
                    asker.future.on_cancel = item.forget
                else:
                    self._open[key] = item
                self._waiting.put(item)
        return futures

    def refusal(self, image: bytes, *, explain: bool, timeout_s: float) -> Overloaded | None:
        """Why `submit` would refuse this image now, the same object while nothing has changed; None if it is to be asked."""
        if self._draining or (self._open and self._key(image, explain) in self._open):
            return None
        state = self.waiting(), len(self._busy_since), self._image_s, timeout_s
        if state != self._refused[0]:
            self._refused = state, self._refusal(1, timeout_s)
        return self._refused[1]

    def _refusal(self, count: int, timeout_s: float) -> Overloaded | None:
        waiting = self.waiting()
        wait_s = self._predicted_wait_s(waiting, count)
        full = waiting + count > self.max_queue
        if not full and wait_s * _SAFETY <= timeout_s:
            return None
        return Overloaded(
            f"{waiting} images are waiting (about {wait_s * 1000:.0f} ms); the limit is "
            f"{self.max_queue} (CONVMIXER_MAX_QUEUE) and the request's deadline; try again later",
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

    def busy(self) -> int:
        """Workers that have a batch."""
        return len(self._busy_since)

    def failure(self) -> str | None:
        """Why the engine is dead, or None while it is alive: every worker thread runs, none is stuck, and the model works."""
        dead = [t.name for t in self._threads if not t.is_alive()]
        if dead and not self._draining:
            return f"worker {', '.join(dead)} died"
        if self._failed_in_row >= _SICK:
            return f"the model failed on the last {self._failed_in_row} images"
        stuck_s = time.monotonic() - min(self._busy_since.copy().values(), default=math.inf)
        return f"a worker has been busy with one image or batch for {stuck_s:.0f} s" if stuck_s > HANG_TIMEOUT_S else None

    @property
    def draining(self) -> bool:
        """True once `drain` was called."""
        return self._draining

    def drain(self, timeout_s: float) -> bool:
        """Stops accepting, finishes what is queued, ends the workers. False if that took longer than `timeout_s`.

        Whatever is still waiting then is answered with NotServing.
        """
        with self._admission:
            if not self._draining:
                for _ in self._threads:
                    self._waiting.put(None)
            self._draining = True
        give_up = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        left = list(iter(self._take, None))
        for item in left:
            self._fail(item, NotServing("the service shut down before the image's turn came", retry_after_s=1))
        return not left and not any(t.is_alive() for t in self._threads)

    def _take(self) -> Item | None:
        """What waits next, or None if nothing does."""
        try:
            item = self._waiting.get_nowait()
        except queue.Empty:
            return None
        if item is None:
            self._waiting.put(None)  # the end of another worker; nothing comes behind it
        return item

    def _predicted_wait_s(self, waiting: int, more: int) -> float:
        """Until so many more images are done; 0 while a worker is free for each, or all are free.

        All free, they are tried whatever was learnt: nothing else would correct a time that is too long.
        """
        busy = len(self._busy_since)
        if not waiting and (not busy or busy + more <= self.workers):
            return 0.0
        return (waiting + busy + more) * self._image_s / self.workers

    def _work(self) -> None:
        me = threading.get_ident()
        untold: list[Answered] = []  # of the batch before
        rested = True
        while True:
            try:
                first = self._take() if untold else self._waiting.get(timeout=None if rested else _REST_S)
            except queue.Empty:
                self._rest()
                rested = True
                continue
            if first is None:
                if not untold:
                    return
                self._tell(untold)
                continue
            batches = self._gather(first)
            alone = not self._busy_since and not self.waiting()
            self._busy_since[me] = time.monotonic()
            try:
                self._process_all(batches, alone, untold)
            finally:
                del self._busy_since[me]
            del first, batches  # no image is held while the worker waits for the next
            rested = False

    def _rest(self) -> None:
        try:
            self.session.release_memory()
        except Exception:  # it runs the model, and the worker must live
            logger.exception("memory could not be given back")

    def _gather(self, first: Item) -> list[list[Item]]:
        """This image and what waits behind it: a batch, or a large file, or first the one and then the other."""
        batch = [first]
        # leave something for the other workers: two half batches end sooner than one whole
        share = math.ceil((self.waiting() + 1) / self.workers)
        while not _is_large(batch[-1]) and len(batch) < min(share, self.max_batch) and (item := self._take()):
            batch.append(item)
        return [batch[:-1], batch[-1:]] if len(batch) > 1 and _is_large(batch[-1]) else [batch]

    def _process_all(self, batches: list[list[Item]], alone: bool, untold: list[Answered]) -> None:
        try:
            for number, batch in enumerate(batches):
                self._process(batch, alone and number == 0, untold)
        except Exception:  # nobody may wait for ever, and the worker must live
            logger.exception("a batch failed outside decoding and inference")
            self._failed_in_row += sum(len(batch) for batch in batches)
            for item in itertools.chain(*batches):
                self._fail(item, InferenceFailed("the engine failed; the log has the reason"))

    def _process(self, batch: list[Item], alone: bool, untold: list[Answered]) -> None:
        """Decodes and infers a batch, and tells those of the batch before what came out.

        They are told when this batch is ready for the model: the event loop then has the interpreter to itself while the model
        runs. Told before, it would keep the interpreter from a worker that has to decode, and a core would rest.
        """
        begin = time.monotonic()
        end = begin + len(batch) * self._image_s

        def announce(*, large: bool) -> None:
            if large or time.monotonic() - begin > _HOLD_BACK_S:
                self._tell(untold)

        ready: list[Item] = []
        for item in batch:
            # the first is tried while it has any time, or nothing would be learnt; a client may leave during decoding, too
            if self._decode(item, announce, end if ready else begin) and self._is_wanted(item):
                ready.append(item)
        self._tell(untold)
        for explain in (False, True):
            group = [item for item in ready if item.explain is explain]
            if group:
                untold += self._infer(group, explain, alone)
        # pictures that could not be decoded count if they took long: so may the next. What fails at once tells nothing
        if tried := len(ready) or sum(item.timing.decode_s > 0 for item in batch):
            seconds = (time.monotonic() - begin) / tried
            if ready or seconds >= self._image_s:
                self._learn(seconds)

    def _learn(self, seconds: float) -> None:
        """What an image takes, from what those of the last batch took."""
        usual = self._image_s
        self._odd_in_row = self._odd_in_row + 1 if not usual / 2 <= seconds <= 2 * usual else 0
        if self._odd_in_row > self.workers:  # no exception any more, but another load
            self._image_s += 0.5 * (seconds - usual)
        else:  # one huge picture must not have the next hundred refused
            self._image_s += 0.1 * (min(seconds, 2 * usual) - usual)

    def _tell(self, answered: list[Answered]) -> None:
        """Resolves what waits for these, and empties the list."""
        for items, outcomes in answered:
            self._on_batch(outcomes)  # first: who has an answer finds it counted
            for item, outcome in zip(items, outcomes, strict=True):
                for future in self._close(item):
                    future.set_result(outcome)
        answered.clear()

    def _decode(self, item: Item, announce: Announce, end: float) -> bool:
        begin = self._busy_since[threading.get_ident()] = time.monotonic()
        item.timing.queue_s = begin - item.timing.submitted
        # what would be late at the end of its batch leaves its time to the next; without a next it is tried, also to learn how
        # long images take now
        if not self._is_wanted(item, max(begin, end) if self.waiting() else begin):
            return False
        try:
            data = item.data
            if isinstance(data, DecodedImage):
                item.decoded = data
            else:
                announce(large=len(data) > _HOLD_BACK_BYTES)
                item.decoded = decode_image(
                    data, self.rule, self.limits, lambda pixels: announce(large=pixels > _HOLD_BACK_PIXELS), self._still_busy
                )
        except Exception as error:  # decode_image raises only ServiceErrors; a defect in it must still resolve the future
            item.data = b""
            item.timing.decode_s = time.monotonic() - begin
            self._fail(item, error)
            return False
        item.data = b""
        item.timing.decode_s = time.monotonic() - begin
        return True

    def _still_busy(self) -> None:
        self._busy_since[threading.get_ident()] = time.monotonic()

    def _infer(self, group: list[Item], explain: bool, alone: bool) -> list[Answered]:
        begin = self._busy_since[threading.get_ident()] = time.monotonic()
        images = np.stack([item.decoded.pixels for item in group if item.decoded])
        try:
            answers = self.session.infer(images, explain=explain, alone=alone)
            if len(answers.logits) != len(group):
                raise RuntimeError(f"{len(group)} images gave {len(answers.logits)} answers")
        except Exception:
            if len(group) > 1:  # find the guilty one: alone, each answers for itself
                logger.warning("the model failed on a batch of %d images; each is tried alone", len(group), exc_info=True)
                return [answer for item in group for answer in self._infer([item], explain, alone)]
            logger.exception("inference failed")
            self._failed_in_row += 1
            group[0].timing.infer_begin, group[0].timing.infer_s = begin, time.monotonic() - begin
            self._fail(group[0], InferenceFailed("the model failed on this image; the log has the reason"))
            return []
        infer_s = time.monotonic() - begin
        outcomes = []
        for i, item in enumerate(group):
            item.timing.infer_begin, item.timing.infer_s, item.timing.batch_size = begin, infer_s, len(group)
            class_maps = None if answers.class_maps is None else answers.class_maps[i]
            similarity = None if answers.similarity is None else float(answers.similarity[i])
            warnings = item.decoded.warnings if item.decoded else ()
            outcomes.append(Outcome(answers.logits[i], class_maps, similarity, warnings, item.timing))
        self._failed_in_row = 0
        return [(group, outcomes)]

    def _is_wanted(self, item: Item, ready_by: float = -math.inf) -> bool:
        """Drops who has left, refuses who would have it too late; False if nobody remains and nothing is to be done."""
        with self._admission:
            late = [asker for asker in item.askers if asker.deadline < ready_by]
            item.askers = [a for a in item.askers if a.deadline >= ready_by and not a.future.cancelled()]
            if not item.askers and item.key is not None:
                self._open.pop(item.key, None)
        for asker in late:
            if asker.future.set_running_or_notify_cancel():
                error = DeadlineExceeded(
                    "the deadline passed while the image was waiting; raise X-Deadline-Ms or try again later"
                )
                error.timing = item.timing
                asker.future.set_exception(error)
        return bool(item.askers)

    def _close(self, item: Item) -> list[Future[Outcome]]:
        """Lets nobody join any more; the futures of those who still wait, which are to be resolved now."""
        with self._admission:
            if item.key is not None:
                self._open.pop(item.key, None)
            askers, item.askers = item.askers, []
        return [asker.future for asker in askers if asker.future.set_running_or_notify_cancel()]

    def _fail(self, item: Item, error: Exception) -> None:
        if isinstance(error, ServiceError):
            error.timing = item.timing
            error.forget_origin()
        for future in self._close(item):
            future.set_exception(error)


def _is_in_time(item: Item, deadline: float) -> bool:
    """Whether somebody with that deadline may wait for it: its turn may come as late as its first asker would take it."""
    return not item.askers or item.askers[0].deadline <= deadline


def _is_large(item: Item) -> bool:
    return isinstance(item.data, bytes) and len(item.data) > _LARGE_BYTES
