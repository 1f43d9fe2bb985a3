"""Where the images of all clients meet: worker threads, greedy batches, deadlines, drain. The queue is `admission`'s.

A worker takes what is waiting (never waits for a batch to fill), decodes it, runs the model, and resolves the futures when
its next batch is ready for the model (docs/decisions/0011): one hop between threads a request. Decoding happens in the worker
because Pillow and onnxruntime both release the GIL, so decoding of one image runs beside inference of another without a second
queue.

Every future that `submit` returns is resolved, whatever happens: with a result, or with the ServiceError that says why
not. An image whose decoding or inference fails takes nobody with it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from app.engine.admission import Admission
from app.engine.item import Announce, Answered, Asker, Item
from app.engine.outcome import Outcome, Timing
from app.engine.service_time import ServiceTime
from app.engine.session import Session
from app.engine.watchdog import Watchdog
from app.errors import ImageTooLarge, InferenceFailed, NotServing, Overloaded
from app.images import DecodedImage, DecodeLimits, ResizeRule, decode_image

logger = logging.getLogger(__name__)

_LARGE_BYTES = 256 * 1024
"""A larger file, whose decoding takes longer than the model, is a batch of its own: no image waits for it in company."""

_HOLD_BACK_S = 0.005
_HOLD_BACK_PIXELS = 512 * 512
_HOLD_BACK_BYTES = 64 * 1024
"""Answers that wait for the next batch are told at the latest when its decoding has taken so long, or before it comes to a larger
picture or file."""

_SICK = 32
"""Images on which the model failed, each alone, or batches that failed otherwise, one after the other: it is the engine that is
broken, as a GPU may be for good."""

_REST_S = 5.0
_RESTS_AT_LEAST_S = 60.0
"""The memory that work has left behind is given back when there was nothing to do for so long, and under steady load this often:
that takes two runs of the model, and the next batch takes a tenth longer."""

_WAITS = 6
"""A worker may be at one step for so many times the processor time that it may take for it."""

_HERE_BYTES = 16 * 1024
_HERE_PIXELS = 256 * 256
_HERE_S = 0.005
_HERE_PAUSE = 100
_HERE_LONGEST_S = 0.2
"""Images of up to this size that should take at most `_HERE_S` are computed in the event loop. After one that took longer, or
failed, this is not tried for `_HERE_PAUSE` times what it took, of which at most `_HERE_LONGEST_S` count: the process may have
been stopped meanwhile."""


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
        image_s: seconds of a worker that an image takes, to begin with.
        on_batch: called after each batch with its outcomes, for metrics.
        on_failure: called with the times of an image that took a worker's time and has no outcome, likewise.
        hang_timeout_s: processor time of one step of decoding an image, or of one run of the model, from which on a worker is
            taken for hung (by the wall's clock, six times as long); the service then reports itself dead. The longest step of the
            largest picture accepted takes a second of a Zen 5 core.
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
        image_s: float,
        on_batch: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
        on_failure: Callable[[Timing], None] = lambda timing: None,
        hang_timeout_s: float = 5.0,
    ) -> None:
        self.session, self.rule, self.limits = session, rule, limits
        self.workers, self.max_batch, self.hang_timeout_s = workers, max_batch, hang_timeout_s
        self._on_batch, self._on_failure = on_batch, on_failure
        self.service_time = ServiceTime(image_s, workers)
        self.admission = Admission(self.service_time, self.busy, max_queue=max_queue, coalesce=coalesce)
        self._watchdog = Watchdog()
        self._worked = self._rested = self._here_from = time.monotonic()
        self._failed_in_row = 0
        self._threads = [threading.Thread(target=self._work, name=f"engine-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, images: Sequence[bytes | DecodedImage], *, explain: bool = False, timeout_s: float = math.inf
    ) -> list[Future[Outcome]]:
        """As `Admission.submit`."""
        return self.admission.submit(images, explain=explain, timeout_s=timeout_s)

    def refusal(self, image: bytes, *, explain: bool, timeout_s: float) -> Overloaded | None:
        """As `Admission.refusal`."""
        return self.admission.refusal(image, explain=explain, timeout_s=timeout_s)

    def may_process_here(self, image: bytes) -> bool:
        """Whether `process_here` is worth a try: it is small, and nothing else is in work."""
        return (
            len(image) <= _HERE_BYTES
            and not self.busy()
            and not self.waiting()
            and not self.draining
            and self.session.provider == "cpu"  # a GPU may hang for good, and with it who waits for it
            and self.service_time.lone_s <= _HERE_S
            and time.monotonic() >= self._here_from
        )

    def process_here(self, image: bytes, *, explain: bool = False) -> Future[Outcome] | None:
        """Decodes and infers in the calling thread, which may be the event loop's.

        To wake a worker, and to be woken by it, takes a tenth of a lone image's time (docs/decisions/0014).

        Args:
            image: a whole image file that `may_process_here`.
            explain: with class maps.

        Returns:
            A resolved future; None if the image is to be submitted: it has many pixels, or could not be decoded. That the model
            failed is the future's exception.
        """
        begin = self._watchdog.begin()
        asked: Future[Outcome] | None = None
        answered: list[Answered] = []
        try:
            with suppress(Exception):  # whatever it is, it happens to the worker, too, which says and counts it
                decoded = decode_image(image, self.rule, self.limits, _only_few)
                asker = Asker(math.inf)
                item = Item(decoded, explain, [asker], Timing(begin), None, decoded)
                item.timing.decode_s = time.monotonic() - begin
                answered = self._infer([item], explain, alone=True)
                self._tell(list(answered))
                asked = asker.future
        finally:
            self._watchdog.end()
        self._worked = time.monotonic()
        took_s = self._worked - begin
        if not answered or took_s > _HERE_S:
            self._here_from = self._worked + _HERE_PAUSE * min(took_s, _HERE_LONGEST_S)
        if answered:
            self.service_time.observe(took_s, alone=True)
        return asked

    def waiting(self) -> int:
        """Images in the queue."""
        return self.admission.waiting()

    def busy(self) -> int:
        """Workers that have a batch."""
        return self._watchdog.busy()

    def failure(self) -> str | None:
        """Why the engine is dead, or None while it is alive: every worker thread runs, none is stuck, and the model works."""
        dead = [t.name for t in self._threads if not t.is_alive()]
        if dead and not self.draining:
            return f"worker {', '.join(dead)} died"
        if self._failed_in_row >= _SICK:
            return f"the model failed on the last {self._failed_in_row} images"
        stuck_s = self._watchdog.stuck_s(cpu_s=self.hang_timeout_s, wall_s=_WAITS * self.hang_timeout_s)
        return None if stuck_s is None else f"a worker has been busy with one image or batch for {stuck_s:.0f} s"

    @property
    def draining(self) -> bool:
        """True once `drain` was called."""
        return self.admission.closed

    def drain(self, timeout_s: float) -> bool:
        """Stops accepting, finishes what is queued, ends the workers. False if that took longer than `timeout_s`.

        Whatever is still waiting then is answered with NotServing.
        """
        self.admission.close(self.workers)
        give_up = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        left = list(iter(self.admission.take, None))
        for item in left:
            self.admission.fail(item, NotServing("the service shut down before the image's turn came", retry_after_s=1))
        return not left and not any(t.is_alive() for t in self._threads)

    def _work(self) -> None:
        untold: list[Answered] = []  # of the batch before
        while True:
            try:
                first = self.admission.take() if untold else self.admission.wait(_REST_S)
            except TimeoutError:
                self._rest()
                continue
            if first is None:
                if not untold:
                    return
                self._tell(untold)
                continue
            batches = self._gather(first)
            alone = not self.busy() and not self.waiting()
            self._watchdog.begin()
            try:
                self._process_all(batches, alone, untold)
            finally:
                self._watchdog.end()
                self._worked = time.monotonic()
            del first, batches  # no image is held while the worker waits for the next
            if self._worked - self._rested >= _RESTS_AT_LEAST_S:
                self._tell(untold)
                self._release_memory()

    def _rest(self) -> None:
        now = time.monotonic()
        is_time = now - self._worked >= _REST_S or now - self._rested >= _RESTS_AT_LEAST_S
        if self._rested < self._worked and not self.busy() and is_time:
            self._release_memory()

    def _release_memory(self) -> None:
        self._rested = self._watchdog.begin()  # it runs the model
        try:
            self.session.release_memory()
        except Exception:  # the worker must live
            logger.exception("memory could not be given back")
        finally:
            self._watchdog.end()

    def _gather(self, first: Item) -> list[list[Item]]:
        """This image and what waits behind it: a batch, or a large file, or first the one and then the other."""
        batch = [first]
        # leave something for the other workers: two half batches end sooner than one whole
        share = math.ceil((self.waiting() + 1) / self.workers)
        while not _is_large(batch[-1]) and len(batch) < min(share, self.max_batch) and (item := self.admission.take()):
            batch.append(item)
        return [batch[:-1], batch[-1:]] if len(batch) > 1 and _is_large(batch[-1]) else [batch]

    def _process_all(self, batches: list[list[Item]], alone: bool, untold: list[Answered]) -> None:
        for number, batch in enumerate(batches):
            try:
                self._process(batch, alone and number == 0, untold)
            except Exception:  # nobody may wait for ever, and the worker must live
                logger.exception("a batch failed outside decoding and inference")
                self._failed_in_row += 1
                for item in batch:
                    self.admission.fail(item, InferenceFailed("the engine failed; the log has the reason"))

    def _process(self, batch: list[Item], alone: bool, untold: list[Answered]) -> None:
        """Decodes and infers a batch, and tells those of the batch before what came out.

        They are told when this batch is ready for the model: the event loop then has the interpreter to itself while the model
        runs. Told before, it would keep the interpreter from a worker that has to decode, and a core would rest.
        """
        begin = time.monotonic()
        end = begin + len(batch) * self.service_time.image_s

        def announce(*, large: bool) -> None:
            if large or time.monotonic() - begin > _HOLD_BACK_S:
                self._tell(untold)

        ready: list[Item] = []
        for item in batch:
            # the first is tried while it has any time, or nothing would be learnt; a client may leave during decoding, too
            if not self._decode(item, announce, end if ready else begin):
                continue
            if self.admission.is_wanted(item):
                ready.append(item)
            else:
                self._on_failure(item.timing)
        self._tell(untold)
        for explain in (False, True):
            group = [item for item in ready if item.explain is explain]
            if group:
                untold += self._infer(group, explain, alone)
        # pictures that could not be decoded, or on which the model failed, count if they took long: so may the next. What fails
        # at once tells nothing
        if tried := len(ready) or sum(item.timing.decode_s > 0 for item in batch):
            seconds = (time.monotonic() - begin) / tried
            if untold or seconds >= self.service_time.image_s:
                self.service_time.observe(seconds, alone=alone)

    def _tell(self, answered: list[Answered]) -> None:
        """Resolves what waits for these, and empties the list."""
        for items, outcomes in answered:
            try:
                self._on_batch(outcomes)  # first: who has an answer finds it counted
            except Exception:  # it may be told amid the decoding of another's image, which would be called damaged
                logger.exception("%d images were not counted", len(outcomes))
            for item, outcome in zip(items, outcomes, strict=True):
                self.admission.answer(item, outcome)
        answered.clear()

    def _decode(self, item: Item, announce: Announce, end: float) -> bool:
        begin = self._watchdog.beat()
        item.timing.queue_s = begin - item.timing.submitted
        # an image that would be late by the end of its batch is dropped if others wait; if none does it is tried, also to learn
        # how long images take now
        if not self.admission.is_wanted(item, max(begin, end) if self.waiting() else begin):
            return False
        try:
            data = item.data
            if isinstance(data, DecodedImage):
                item.decoded = data
            else:
                announce(large=len(data) > _HOLD_BACK_BYTES)
                item.decoded = decode_image(
                    data, self.rule, self.limits, lambda pixels: announce(large=pixels > _HOLD_BACK_PIXELS), self._watchdog.beat
                )
        except Exception as error:  # decode_image raises only ServiceErrors; a defect in it must still resolve the future
            item.data = b""
            item.timing.decode_s = time.monotonic() - begin
            self._on_failure(item.timing)
            self.admission.fail(item, error)
            return False
        item.data = b""
        item.timing.decode_s = time.monotonic() - begin
        return True

    def _infer(self, group: list[Item], explain: bool, alone: bool) -> list[Answered]:
        begin = self._watchdog.beat()
        images = np.stack([item.decoded.pixels for item in group if item.decoded])
        try:
            answers = self.session.infer(images, explain=explain, alone=alone)
            if len(answers.logits) != len(group):
                raise RuntimeError(f"{len(group)} images gave {len(answers.logits)} answers")
            if not np.isfinite(answers.logits).all() or not (answers.similarity is None or np.isfinite(answers.similarity).all()):
                raise RuntimeError("the model's answer is not finite")
        except Exception:
            if len(group) > 1:  # find the guilty one: alone, each answers for itself
                logger.warning("the model failed on a batch of %d images; each is tried alone", len(group), exc_info=True)
                return [answer for item in group for answer in self._infer([item], explain, alone)]
            logger.exception("inference failed")
            self._failed_in_row += 1
            group[0].timing.infer_begin, group[0].timing.infer_s = begin, time.monotonic() - begin
            self._on_failure(group[0].timing)
            self.admission.fail(group[0], InferenceFailed("the model failed on this image; the log has the reason"))
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


def _only_few(pixels: int) -> None:
    if pixels > _HERE_PIXELS:
        raise ImageTooLarge("a worker's business")


def _is_large(item: Item) -> bool:
    return isinstance(item.data, bytes) and len(item.data) > _LARGE_BYTES
