"""How this machine runs this model, measured at start: the latency curve, and from it workers and largest batch.

On a CPU a larger batch is often no faster an image, because activations leave the cache; on a GPU it is many times
faster; and two hardware threads of one core are not two cores. So nothing is assumed: a fraction of a second of real runs
decides, inside whatever quota the process has.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from app.engine.session import Session
from app.errors import StartupError

CURVE_S = 0.06
"""Aimed at for the curve; a first pass over the batch sizes is always made."""

THROUGHPUT_S = 0.02
"""For each number of workers whose rate the curve does not tell. Little, for a disturbance makes that number of workers look
worse than it is, and then every core has one, which is right on most machines."""

_LARGEST_BATCH = {"cpu": 8, "cuda": 256, "openvino": 8}
_AS_GOOD = 1.15
"""A larger batch may cost so much more an image in the model alone: what a batch costs outside of it is shared by more. (Over
HTTP batches of 4 gave 15 to 20 % more than single images where the model alone gave 7 %.) And batches form only of images that
would have waited anyway."""

_LONGEST_BATCH_MS = 1000
"""Whoever comes next waits for it, and a worker busy for several seconds is taken for hung."""

_MORE_LOOKS = 2
"""At the operator's batch if it takes too long: a start must not be refused for a moment of other work."""

_CLEARLY_FASTER = 1.25
"""Fewer workers must be this much faster: a start beside other work must not halve the service for its whole life."""


@dataclass(frozen=True)
class Calibration:
    """What was measured and what follows.

    Attributes:
        workers: inference threads.
        max_batch: largest batch.
        batch_ms: duration of a batch by its size while every worker has one, in milliseconds; of the operator's size and of one
            image if the operator has decided.
        images_s: images a second by number of workers side by side, in batches of `max_batch`; empty if there was no choice.
        seconds: what measuring took.
    """

    workers: int
    max_batch: int
    batch_ms: dict[int, float]
    images_s: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def image_s(self) -> float:
        """Seconds of a worker that an image takes in the largest batch, while every worker has one."""
        return self.batch_ms[self.max_batch] / self.max_batch / 1000


def calibrate(session: Session, cores: int, *, workers: int = 0, max_batch: int = 0) -> Calibration:
    """Measures and decides.

    Args:
        session: the warm model.
        cores: this process may use.
        workers: decided by the operator; 0 to measure.
        max_batch: decided by the operator; 0 to measure.

    Raises:
        StartupError: the operator's batch takes too long.
    """
    begin = time.perf_counter()
    # on a GPU one worker computes and one more decodes and copies meanwhile
    most = workers or (min(2, cores) if session.provider == "cuda" else cores)
    if max_batch:
        batch_ms = _operators_batch(session, most, max_batch)
    else:
        batch_ms = _latency_curve(session, 1 if session.provider == "cuda" else most, begin + CURVE_S)
        max_batch = _best_batch(batch_ms)
    images_s: dict[int, float] = {}
    if not workers and most > 1:
        images_s = {count: _throughput(session, count, max_batch, THROUGHPUT_S) for count in {1, most // 2}}
        if session.provider != "cuda":  # the curve has it
            images_s[most] = most * max_batch / batch_ms[max_batch] * 1000
        else:
            images_s[most] = _throughput(session, most, max_batch, THROUGHPUT_S)
        workers = _best_workers(images_s)
    session.release_memory()
    return Calibration(workers or 1, max_batch, batch_ms, images_s, time.perf_counter() - begin)


def _operators_batch(session: Session, workers: int, largest: int) -> dict[int, float]:
    """Time in which every worker has done its batch of one image, and of as many as the operator says.

    Raises:
        StartupError: the latter takes too long.
    """

    def measure(size: int) -> float:
        return workers * size / _throughput(session, workers, size, THROUGHPUT_S) * 1000

    def is_too_long() -> bool:
        return largest > 1 and curve[largest] > _LONGEST_BATCH_MS

    curve = {size: measure(size) for size in (1, largest)}
    for _ in range(_MORE_LOOKS):
        if is_too_long():
            curve[largest] = min(curve[largest], measure(largest))
    if is_too_long():
        most_images = max(1, int(_LONGEST_BATCH_MS * largest / curve[largest]))
        raise StartupError(
            f"a batch of CONVMIXER_MAX_BATCH={largest} images takes {curve[largest] / 1000:.1f} s here; whoever comes "
            f"next waits for it, and soon the engine is taken for hung; set it to {most_images} at most, or leave it out"
        )
    return curve


def _latency_curve(session: Session, workers: int, end: float) -> dict[int, float]:
    """Best time in which every worker has done its batch of 1, 2, 4, … images.

    Together, because a core alone is another machine: it clocks higher, and has the caches to itself, so that single images
    looked better than they are when it matters. All sizes in turn, so that a moment's disturbance hits one run of each; at
    least once each unless they get slower an image, and again while time is left.
    """
    side = session.metadata.input_size
    curve: dict[int, float] = {}
    largest = _LARGEST_BATCH[session.provider]
    passes = 0

    def measure(size: int) -> None:
        batches = [np.zeros((size, side, side, 3), np.uint8)] * workers
        if session.provider == "cuda":
            session.infer(batches[0])  # cuDNN plans a size when it comes after another
        begin = time.perf_counter()
        list(threads.map(session.infer, batches))
        curve[size] = min((time.perf_counter() - begin) * 1000, curve.get(size, math.inf))

    def gets_slower(size: int) -> bool:
        return size >= 4 and curve[size] / size > 1.2 * curve[size // 4] / (size // 4)

    with ThreadPoolExecutor(workers) as threads:
        while passes == 0 or time.perf_counter() < end:
            size = 1
            while size <= largest and (passes == 0 or time.perf_counter() < end):
                measure(size)
                if gets_slower(size):
                    measure(size)  # or one disturbance would decide
                if gets_slower(size):
                    largest = size
                size *= 2
            passes += 1
    return curve


def _best_batch(batch_ms: dict[int, float]) -> int:
    """The largest that is as good as the best, and not too long."""
    short = {size: ms for size, ms in batch_ms.items() if size == 1 or ms <= _LONGEST_BATCH_MS}
    least = min(ms / size for size, ms in short.items())
    return max(size for size, ms in short.items() if ms / size <= _AS_GOOD * least)


def _best_workers(images_s: dict[int, float]) -> int:
    """The most, unless fewer are clearly faster: others decode while one is busy with a large picture."""
    best = max(images_s)
    for count in sorted(images_s, reverse=True):
        if images_s[count] > _CLEARLY_FASTER * images_s[best]:
            best = count
    return best


def _throughput(session: Session, workers: int, batch: int, seconds: float) -> float:
    """Images a second of so many threads side by side, each of which has a batch at least once, however late it gets a core."""
    side = session.metadata.input_size
    images = np.zeros((batch, side, side, 3), np.uint8)
    begin = time.perf_counter()

    def work(_: int) -> int:
        count = 0
        while not count or time.perf_counter() - begin < seconds:
            session.infer(images)
            count += batch
        return count

    with ThreadPoolExecutor(workers) as threads:
        count = sum(threads.map(work, range(workers)))
    return count / (time.perf_counter() - begin)
