"""An image on its way through the scheduler, and those who wait for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from app.engine.outcome import Outcome, Timing
from app.images import DecodedImage


class Promise(Future[Outcome]):
    """A future that tells when it is cancelled, and only then: `add_done_callback` would be paid for at the end of each."""

    on_cancel: Callable[[], None] = staticmethod(lambda: None)

    def cancel(self) -> bool:
        """As a Future's."""
        cancelled = super().cancel()
        if cancelled:
            self.on_cancel()
        return cancelled


@dataclass(eq=False, slots=True)
class Asker:
    """Who waits for an image, and until when (time.monotonic())."""

    deadline: float
    future: Promise = field(default_factory=Promise)


Key = tuple[bytes, bool]


@dataclass(eq=False, slots=True)
class Item:
    """One image on its way. `decoded` is set by the worker; `key` is None if nobody can join the one that asked first."""

    data: bytes | DecodedImage
    explain: bool
    askers: list[Asker]
    timing: Timing
    key: Key | None
    decoded: DecodedImage | None = None

    def forget(self) -> None:
        """Lets go of the file: its only asker has left, and it may be large, and the queue long."""
        self.data = b""


Answered = tuple[list[Item], list[Outcome]]


class Announce(Protocol):
    """A function that hears of work on an image before it begins."""

    def __call__(self, *, large: bool) -> None:
        """Before a file is opened, and before its pixels are decoded; `large` if that may take long."""
