"""How long an image takes, learnt from batches, and how long one that comes now would wait."""

from __future__ import annotations


class ServiceTime:
    """Seconds of one worker an image.

    Several threads tell it without a lock: what is lost when two do at once is one of many batches.

    Args:
        image_s: to begin with, of one worker while all others work too.
        workers: side by side.

    Attributes:
        image_s: what is expected of the next.
    """

    def __init__(self, image_s: float, workers: int) -> None:
        self.image_s, self._workers = image_s, workers
        self._least_alone = image_s
        self._odd_in_row = 0

    def observe(self, seconds: float, *, alone: bool = False) -> None:
        """Learns from what an image of the last batch took.

        Args:
            seconds: of the batch's worker, for each of its images.
            alone: it had every core, and so was faster than an image in company will be: it may only tell of a longer time, or
                correct one that is too long.
        """
        if alone:
            seconds = max(seconds, self._least_alone)
        usual = self.image_s
        self._odd_in_row = self._odd_in_row + 1 if not usual / 2 <= seconds <= 2 * usual else 0
        if self._odd_in_row > self._workers:  # no exception any more, but another load
            self.image_s += 0.5 * (seconds - usual)
        else:  # one huge picture must not have the next hundred refused
            self.image_s += 0.1 * (min(seconds, 2 * usual) - usual)

    def wait_s(self, waiting: int, busy: int, more: int) -> float:
        """Until so many more images are done; 0 while a worker is free for each, or all are free.

        All free, they are tried whatever was learnt: nothing else would correct a time that is too long.

        Args:
            waiting: images in the queue.
            busy: workers that have a batch.
            more: images that would come.
        """
        if not waiting and (not busy or busy + more <= self._workers):
            return 0.0
        return (waiting + busy + more) * self.image_s / self._workers
