"""What a coroutine in another thread's event loop comes to, for a thread that waits and may be interrupted.

`asyncio.run_coroutine_threadsafe` gives a `concurrent.futures.Future`, whose methods take its condition in Python code. A signal
handler that raises there, as Ctrl-C's does, leaves the condition taken, and the loop's thread waits for it for ever (Python's
documentation, "Note on Signal Handlers and Exceptions"). A bare lock is taken by a function in C, and no handler runs within.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Pending(Generic[T]):
    """Runs a coroutine function in a loop; every method may be ended by a signal, and then called again.

    Args:
        loop: running in another thread.
        function: called there.
        *args: its arguments.
        **kwargs: its arguments.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        self._loop = loop
        self._result: T
        self._failure: BaseException | None = None
        self._task: asyncio.Task[T] | None = None
        self._ended = threading.Lock()  # free when it has
        self._ended.acquire()

        def begin() -> None:
            self._task = loop.create_task(function(*args, **kwargs))
            self._task.add_done_callback(self._end)

        loop.call_soon_threadsafe(begin)

    def _end(self, task: asyncio.Task[T]) -> None:
        self._task = None  # what it leaves behind is for this thread to clear up
        try:
            self._result = task.result()
        except BaseException as failure:
            self._failure = failure
        self._ended.release()

    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return not self._ended.locked()

    def result(self) -> T:
        """Waits for what it returns, or raises.

        Raises:
            asyncio.CancelledError: it was cancelled.
        """
        with self._ended:
            pass
        if self._failure:
            raise self._failure
        return self._result

    def cancel(self) -> None:
        """Cancels it unless it has ended."""
        if not self.done():
            with suppress(RuntimeError):  # the loop was closed meanwhile
                self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task:
            self._task.cancel()
