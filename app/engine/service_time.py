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
        lone_s: the same of one that has every core.
    """

    def __init__(self, image_s: float, workers: int) -> None:
        self.image_s = self.lone_s = image_s
        self._workers = workers
        self._in_company = image_s if workers > 1 else 0.0  # one worker has every core whatever waits
        self._odd_in_row = self._odd_alone = 0

    def observe(self, seconds: float, *, alone: bool = False) -> None:
        """Learns from what an image of the last batch took.

        Args:
            seconds: of the batch's worker, for each of its images.
            alone: it had every core, and so was faster than an image in company will be: of those it may only tell that they
                take longer, or correct a time that is too long.
        """
        if alone:
            self.lone_s, self._odd_alone = self._moved(self.lone_s, seconds, self._odd_alone)
            seconds = max(seconds, min(self.image_s, self._in_company))
        self.image_s, self._odd_in_row = self._moved(self.image_s, seconds, self._odd_in_row)

    def _moved(self, usual: float, seconds: float, odd_in_row: int) -> tuple[float, int]:
        """The moving average with one value more, and how many in a row have been odd."""
        odd_in_row = odd_in_row + 1 if not usual / 2 <= seconds <= 2 * usual else 0
        if odd_in_row > self._workers:  # no exception any more, but another load
            return usual + 0.5 * (seconds - usual), odd_in_row
        counted = min(seconds, 2 * usual)  # one huge picture must not have the next hundred refused
        return usual + 0.1 * (counted - usual), odd_in_row

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
