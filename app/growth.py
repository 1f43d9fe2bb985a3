"""Whether an upload grows, or has stopped, or crawls."""

from __future__ import annotations

_LOOK_S = 2.0
"""So long an upload may hardly grow."""


class Growth:
    """Of the request that arrives on a connection. Age alone says nothing: the oldest upload may be nearly complete.

    Args:
        receive_timeout_s: seconds in which a request must arrive. One that comes steadily in all of that time has grown, each
            `_LOOK_S` seconds, by at least `_LOOK_S / receive_timeout_s` of what has come of it; half as much will do here.
    """

    __slots__ = ("_bytes", "_grew_at", "_grown_to", "_part")

    def __init__(self, receive_timeout_s: float) -> None:
        self._part = _LOOK_S / receive_timeout_s / 2
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """A request's first byte, or the time from which on it is read.

        Args:
            now: time.monotonic(), as below.
        """
        self._bytes = self._grown_to = 0
        self._grew_at = now

    def add(self, count: int, now: float) -> None:
        """So many bytes of its body have come."""
        self._bytes += count
        if self._bytes - self._grown_to > self._part * self._bytes:
            self._grown_to, self._grew_at = self._bytes, now

    def has_stalled(self, now: float) -> bool:
        """Whether it has hardly grown for a while."""
        return now - self._grew_at > _LOOK_S
