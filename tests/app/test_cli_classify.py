"""What `convmixer classify` does when its engine fails or a signal comes; the rest is tested with the command (test_cli.py)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from PIL import Image

from app.cli_classify import classify_here
from app.cli_interrupt import Interruption
from app.engine.outcome import Outcome
from app.errors import StartupError
from app.service import Service
from app.settings import Settings
from tests.broken_model import write_broken_model

GIVE_UP_S = 30


@pytest.fixture
def interruption() -> Iterator[Interruption]:
    with Interruption() as interruption:
        yield interruption


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(Settings.load(cores=1, drain_timeout_s=2 * GIVE_UP_S))
    yield service
    service.close()


def test_a_model_that_fails_on_everything_ends_it(artifact_path, interruption, tmp_path):
    model, white = tmp_path / "broken.onnx", tmp_path / "white.png"
    write_broken_model(artifact_path, "logits", model)
    Image.new("RGB", (32, 32), "white").save(white)
    service = Service(Settings.load(cores=1, model=str(model), coalesce=False))
    try:
        with pytest.raises(StartupError, match=r"^the model failed on the last \d+ images; the rows so far are written$"):
            list(classify_here(service, [str(white)] * 200, 1, interruption))
    finally:
        service.close()


def test_an_engine_that_hangs_ends_it_soon(service, samples, interruption, monkeypatch):
    go_on, left = threading.Event(), threading.Event()
    monkeypatch.setattr("app.cli_classify._LOOK_S", 0.05)
    monkeypatch.setattr(service.scheduler, "hang_timeout_s", 0.1)
    infer = service.session.infer

    def hang(*arguments, **options):
        go_on.wait(GIVE_UP_S)
        left.set()
        return infer(*arguments, **options)

    monkeypatch.setattr(service.session, "infer", hang)
    try:
        with pytest.raises(StartupError, match="a worker has been busy with one image or batch"):
            list(classify_here(service, [str(samples[0].path)], 1, interruption))
        service.close()
        assert not left.is_set(), "what hangs was waited for"
    finally:
        go_on.set()


def test_a_row_waits_for_the_next_file_at_most(service, samples, interruption, monkeypatch):
    asked: list[str] = []
    answers: list[Future[Outcome]] = []
    submit = service.scheduler.submit

    def submit_and_tell(images):
        answers.extend(submit(images))
        return answers[-1:]

    def files() -> Iterator[str]:
        for sample in samples[:50]:  # fewer than are in flight at once
            asked.append(str(sample.path))
            yield asked[-1]
            answers[0].result(GIVE_UP_S)

    monkeypatch.setattr(service.scheduler, "submit", submit_and_tell)
    rows = classify_here(service, files(), 1, interruption)
    assert next(rows)["filename"] == asked[0]
    assert len(asked) == 2
    assert len(list(rows)) == 49


ENDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.mark.parametrize(("signum", "end"), ENDS)
def test_a_signal_ends_the_wait_for_the_next_file(service, samples, interruption, signum, end):
    def files() -> Iterator[str]:
        yield str(samples[0].path)
        os.kill(os.getpid(), signum)
        pytest.fail("it went on")

    with pytest.raises(end):
        list(classify_here(service, files(), 1, interruption))


@pytest.mark.parametrize(("signum", "end"), ENDS)
def test_a_postponed_signal_raises_at_the_end(interruption, signum, end):
    harmed: list[BaseException] = []

    def interrupted() -> None:
        try:
            os.kill(os.getpid(), signum)
        except BaseException as error:
            harmed.append(error)

    with pytest.raises(end), interruption.postponed():
        interrupted()
    assert not harmed


def test_another_signal_after_a_second_raises_wherever_it_comes(interruption, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    went_on: list[float] = []

    def work() -> None:
        nonlocal now
        with interruption.postponed():
            for pause in (0, 0.9, 0.2):  # the second one is what a wrapper passes on of what the terminal has sent to both
                now += pause
                signal.raise_signal(signal.SIGINT)
                went_on.append(pause)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert went_on == [0, 0.9]


def test_a_signal_that_python_dropped_ends_the_next_turn(interruption, monkeypatch):
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    dropped: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    Finalized()
    assert len(dropped) == 1
    with pytest.raises(KeyboardInterrupt):
        interruption.check()


def test_whoever_leaves_has_the_rest_not_computed(service, samples, interruption, monkeypatch):
    go_on, counts = threading.Event(), []
    infer = service.session.infer

    def wait_after_the_first(images, **options):
        counts.append(len(images))
        if len(counts) > 1:
            go_on.wait(GIVE_UP_S)
        return infer(images, **options)

    monkeypatch.setattr(service.session, "infer", wait_after_the_first)
    rows = classify_here(service, (str(sample.path) for sample in samples), 1, interruption)
    next(rows)
    rows.close()
    go_on.set()
    service.close()
    assert sum(counts) <= 2 * service.scheduler.max_batch


def test_an_ignored_signal_stays_ignored_and_the_handlers_come_back():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)
    try:
        with Interruption() as interruption:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            interruption.check()
        assert signal.getsignal(signal.SIGTERM) is before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])
