"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

GIVE_UP_S = 120
Found = TypeVar("Found")


def wait_until(happens: Callable[[], Found], told: Callable[[], object] = lambda: "") -> Found:
    """What `happens` gives, once that is true; fails with what `told` says if it never is."""
    give_up = time.monotonic() + GIVE_UP_S
    while not (found := happens()):
        assert time.monotonic() < give_up, told()
        time.sleep(0.01)
    return found
