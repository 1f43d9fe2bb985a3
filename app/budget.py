"""How many bytes of requests, and of long answers, may be in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from app.errors import Overloaded


class ByteBudget:
    """Bytes of request bodies held at once, over all requests: what keeps memory bounded whatever clients send.

    Args:
        limit: most bytes.

    Attributes:
        make_room: ends uploads that hold as many bytes as it is given, or says that there are none which may be ended; set by
            who knows of uploads (`app.server`).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.make_room: Callable[[int], bool] = lambda _: False

    def take(self, count: int) -> None:
        """Counts bytes that have arrived; they stay counted even if that is too much, until they are given back.

        Raises:
            Overloaded: more are held than allowed.
        """
        self.held += count
        if self.held > self.limit and not self.make_room(self.held - self.limit):
            raise self.full()

    def full(self) -> Overloaded:
        """What those are told who hold more than there is room for."""
        return Overloaded(
            f"more than {self.limit:,} bytes of requests are in work (CONVMIXER_MAX_HELD_BYTES); try again later",
            retry_after_s=1,
            reason="held_bytes",
        )

    def give_back(self, count: int) -> None:
        """Counts bytes that are no longer held."""
        self.held -= count

    @contextmanager
    def loan(self) -> Iterator[Callable[[int], None]]:
        """Gives a `take` of its own, and gives back at the end what was taken with it."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            taken += count
            self.take(count)

        try:
            yield take
        finally:
            self.give_back(taken)
