"""The engine's choices follow from what it measured, within the operator's word."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from app.engine.artifact import read_verified
from app.engine.calibration import _best_batch, _best_workers, calibrate
from app.engine.session import Session
from app.errors import StartupError


@pytest.fixture(scope="module")
def session(artifact_path):
    return Session(read_verified(artifact_path), "cpu")


def test_measures_this_machine(session):
    found = calibrate(session, cores=2)
    assert found.workers in (1, 2)
    assert set(found.images_s) == {1, 2}
    assert 1 in found.batch_ms
    assert found.max_batch in found.batch_ms
    assert all(ms > 0 for ms in found.batch_ms.values())
    assert found.seconds > 0


def test_the_operators_word_counts(session, monkeypatch):
    monkeypatch.setattr("app.engine.calibration._LONGEST_BATCH_MS", math.inf)  # this machine may be busy
    assert calibrate(session, cores=8, workers=3, max_batch=5).workers == 3
    found = calibrate(session, cores=1, max_batch=5)
    assert (found.workers, found.max_batch) == (1, 5)
    assert found.batch_ms.keys() == {1, 5}
    assert found.images_s == {}, "one core leaves no choice, and a start no time to measure it"


def test_the_largest_batch_that_is_as_good_as_the_best():
    assert _best_batch({1: 2.0, 2: 4.7, 4: 9.4}) == 1
    assert _best_batch({1: 2.0, 2: 4.1, 4: 9.1, 8: 18.6}) == 4, "a little more is no reason against it"
    assert _best_batch({1: 2.0, 2: 3.0, 4: 4.0, 8: 12.0}) == 4
    assert _best_batch({1: 700.0, 2: 900.0, 4: 1300.0}) == 2, "who comes next waits for it"
    assert _best_batch({1: 1500.0, 2: 2000.0}) == 1


def test_fewer_workers_must_be_clearly_faster():
    assert _best_workers({1: 100.0, 2: 180.0, 4: 300.0}) == 4
    assert _best_workers({1: 100.0, 2: 301.0, 4: 300.0}) == 4
    assert _best_workers({1: 240.0, 2: 200.0}) == 2, "a noisy start is no reason"
    assert _best_workers({1: 100.0, 2: 380.0, 4: 300.0}) == 2


class Clock:
    """Stands still unless it is told that something took time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class SlowSession:
    """Takes a millisecond, but for its first runs of more than one image."""

    provider = "cpu"
    metadata = SimpleNamespace(input_size=8)

    def __init__(self, clock: Clock, slow_runs: int = 0) -> None:
        self.clock, self.slow_runs = clock, slow_runs

    def infer(self, images, **options):
        self.clock.now += 0.001
        if len(images) > 1 and self.slow_runs:
            self.slow_runs -= 1
            self.clock.now += 0.15

    def release_memory(self) -> None: ...


def test_a_thread_that_gets_no_core_for_a_while_is_measured_all_the_same(monkeypatch, clock):
    class LateExecutor(ThreadPoolExecutor):
        def map(self, *arguments):
            clock.now += 0.03
            return super().map(*arguments)

    monkeypatch.setattr("app.engine.calibration.ThreadPoolExecutor", LateExecutor)
    found = calibrate(SlowSession(clock), cores=1, max_batch=4)
    assert found.max_batch == 4
    assert all(0 < ms < 1000 for ms in found.batch_ms.values())


def test_a_batch_that_would_look_like_a_hang_is_refused_but_not_for_a_moment_of_other_work(monkeypatch, clock):
    monkeypatch.setattr("app.engine.calibration._LONGEST_BATCH_MS", 100)
    assert calibrate(SlowSession(clock, slow_runs=2), cores=1, max_batch=4).batch_ms[4] < 100
    with pytest.raises(StartupError, match=r"CONVMIXER_MAX_BATCH=4 images takes 0\.\d s here; .* set it to [12] at most"):
        calibrate(SlowSession(clock, slow_runs=3), cores=1, max_batch=4)
