"""Who is at work, and whether somebody hangs."""

from __future__ import annotations

import threading
import time


class Watchdog:
    """Threads say when they begin, that they live, and when they end. Thread-safe; a sign of life is one store.

    A thread that computes is judged by its own processor time: the wall's clock goes on while others have the core, or a
    container's quota is spent, and a large picture is no hang there. One that waits for ever, for a lock or a driver, takes no
    processor time, so there is a limit of the other kind, too. On macOS, where no thread is told what another takes, it is all.
    """

    def __init__(self) -> None:
        # by thread
        self._beats: dict[int, float] = {}  # last sign of life of those at work, time.monotonic()
        self._clocks: dict[int, int] = {}  # of the processor time of all that ever were
        self._looks: dict[int, tuple[float, float]] = {}  # a sign of life, and the processor time when it was first seen

    def begin(self) -> float:
        """This thread is at work from now, time.monotonic()."""
        thread = threading.get_ident()
        if hasattr(time, "pthread_getcpuclockid"):
            self._clocks[thread] = time.pthread_getcpuclockid(thread)
        return self.beat()

    def beat(self) -> float:
        """This thread, which is at work, lives now, time.monotonic()."""
        now = self._beats[threading.get_ident()] = time.monotonic()
        return now

    def end(self) -> None:
        """This thread's work is done."""
        del self._beats[threading.get_ident()]

    def busy(self) -> int:
        """Threads at work."""
        return len(self._beats)

    def stuck_s(self, *, cpu_s: float, wall_s: float) -> float | None:
        """For how long the one that hangs has given no sign of life, in seconds; None if none does.

        Processor time counts from the first time that this was asked after a sign of life, so it must be asked now and then.

        Args:
            cpu_s: processor time without a sign of life, from which on a thread hangs.
            wall_s: time without one, from which on it hangs in any case.
        """
        now = time.monotonic()
        for thread, beat in self._beats.copy().items():
            if now - beat >= wall_s or self._computed_s(thread, beat) >= cpu_s:
                return now - beat
        return None

    def _computed_s(self, thread: int, beat: float) -> float:
        try:
            taken = time.clock_gettime(self._clocks[thread])
        except (KeyError, OSError):  # there is no such clock here; or the thread has ended meanwhile, and its work before
            return -1.0
        look = self._looks.get(thread)
        if look is None or look[0] != beat:
            look = self._looks[thread] = beat, taken
        return taken - look[1]
