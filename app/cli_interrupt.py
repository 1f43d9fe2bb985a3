"""Ctrl-C and SIGTERM for a command that has other threads at work."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

_AGAIN_S = 1.0
"""From then on a further signal is meant: a wrapper may pass on at once what the terminal has sent to both."""


class Interruption:
    """Signals end a loop wherever they find it, but not where that would do harm, and are not lost.

    A handler that raises may leave a lock taken that another thread waits for (not in `app.client`, which is made for that), or
    be called in a finalizer, where Python drops what is raised. So it raises nothing in what is `postponed`, and is remembered
    for `check`. Another one, after a second, raises wherever it comes: what waits for a lock, or for a reader of the output, is
    given up. A signal that is ignored, as Ctrl-C is in a shell's background job, stays so.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._first_came = 0.0
        self._postponed = False
        taken = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._handle) for signum in taken}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._signum is None:
            self._signum, self._first_came = signum, now
            if not self._postponed:
                self.check()
        elif now - self._first_came > _AGAIN_S:
            self.check()

    def check(self) -> None:
        """Raises if there was a signal.

        Raises:
            KeyboardInterrupt: SIGINT.
            SystemExit: SIGTERM; the status as a shell has it.
        """
        if self._signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self._signum:
            raise SystemExit(128 + self._signum)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """The first signal that comes within raises at its end."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
        self.check()
