"""How long a request may take: what it asks for, within what the service allows."""

from __future__ import annotations

import time

from app.errors import DeadlineExceeded
from app.settings import Settings


def deadline_ms(asked: int | None, settings: Settings) -> int:
    """Milliseconds that a request may take.

    Args:
        asked: `X-Deadline-Ms`, 1 to `settings.MOST_DEADLINE_MS`, if it was sent.
        settings: the default, and the most.
    """
    return min(asked, settings.max_deadline_ms) if asked else settings.deadline_ms


def time_left_s(deadline_s: float, begin: float) -> float:
    """Seconds that are left for the engine, above 0.

    Args:
        deadline_s: seconds that the request may take.
        begin: time.monotonic() at which its headers were complete.

    Raises:
        DeadlineExceeded: none are left.
    """
    left_s = deadline_s - (time.monotonic() - begin)
    if left_s <= 0:
        raise DeadlineExceeded(
            "the deadline passed while the request was being read; raise X-Deadline-Ms (under /v2 also `timeout`)"
        )
    return left_s
