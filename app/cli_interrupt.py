"""Ctrl-C and SIGTERM for a command that has other threads at work."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterable
from types import FrameType, TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class Interruption:
    """Ends a loop where that does no harm, and at its next turn at the latest.

    A handler that raises wherever the signal finds the main thread may leave a lock taken that another thread waits for, or be
    called in a finalizer, where Python drops what is raised. So from the loop's begin on it raises only while `during` waits, and
    is remembered for `check`. A signal that is ignored, as Ctrl-C is in a shell's background job, stays so.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._waiting = True  # nothing is under way yet
        taken = [signum for signum in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(signum) is not signal.SIG_IGN]
        self._before = {signum: signal.signal(signum, self._handle) for signum in taken}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        self._signum = signum
        if self._waiting:
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

    def during(self, items: Iterable[T]) -> Generator[T]:
        """The same items; a signal ends the wait for the next.

        Args:
            items: must take no lock that another thread needs, or take it as `app.client` does.
        """
        iterator = iter(items)
        while True:
            try:
                self._waiting = True
                self.check()
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item
