"""A thread that hangs is found whether it computes or waits; one that is only slow is not."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from app.engine.watchdog import Watchdog
from app.images import DecodeLimits, ResizeRule, decode_image
from tests.waiting import wait_until

GIVE_UP_S = 60
LONG_S = 1e6


@contextmanager
def at_work(watchdog: Watchdog, step: Callable[[], object]) -> Iterator[None]:
    """A thread that is at work, and takes step after step."""
    begun, stop = threading.Event(), threading.Event()

    def work() -> None:
        watchdog.begin()
        begun.set()
        while not stop.is_set():
            step()
        watchdog.end()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(GIVE_UP_S)
        yield
    finally:
        stop.set()
        thread.join(GIVE_UP_S)
    assert watchdog.busy() == 0


def test_a_thread_that_computes_is_judged_by_its_processor_time():
    watchdog = Watchdog()
    with at_work(watchdog, lambda: None):
        assert watchdog.busy() == 1
        assert wait_until(lambda: watchdog.stuck_s(cpu_s=0.1, wall_s=LONG_S)) >= 0.1
    assert watchdog.stuck_s(cpu_s=0, wall_s=0) is None, "it has ended"


def test_a_thread_that_gives_signs_of_life_never_hangs():
    watchdog = Watchdog()
    used_s = time.process_time() + 0.5
    with at_work(watchdog, watchdog.beat):
        while time.process_time() < used_s:
            assert watchdog.stuck_s(cpu_s=0.2, wall_s=LONG_S) is None


def test_a_thread_that_has_no_core_is_given_time_but_not_for_ever(monkeypatch):
    watchdog = Watchdog()
    waiting = threading.Event()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with at_work(watchdog, lambda: waiting.wait(GIVE_UP_S)):
        try:
            assert watchdog.stuck_s(cpu_s=5, wall_s=30) is None
            now += 25
            assert watchdog.stuck_s(cpu_s=5, wall_s=30) is None
            now += 25
            assert watchdog.stuck_s(cpu_s=5, wall_s=30) == 50
        finally:
            waiting.set()


def test_where_there_is_no_clock_of_another_thread_the_walls_counts(monkeypatch):
    monkeypatch.delattr(time, "pthread_getcpuclockid")
    watchdog = Watchdog()
    with at_work(watchdog, lambda: None):
        assert watchdog.stuck_s(cpu_s=0, wall_s=LONG_S) is None
        assert watchdog.stuck_s(cpu_s=LONG_S, wall_s=0) is not None


def test_a_thread_that_ended_while_it_was_looked_at_does_no_harm():
    watchdog = Watchdog()
    thread = threading.Thread(target=watchdog.begin)
    thread.start()
    thread.join()
    wait_until(lambda: watchdog.stuck_s(cpu_s=0, wall_s=LONG_S) is None)  # the system's thread ends a little later than Python's


def test_a_large_picture_gives_a_sign_of_life_with_each_piece():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    signs: list[None] = []
    limits = DecodeLimits(max_pixels=1_000_000, max_side=1000)
    decode_image(buffer.getvalue(), ResizeRule(32), limits, heartbeat=lambda: signs.append(None))
    assert len(signs) > len(buffer.getvalue()) // 2**16
