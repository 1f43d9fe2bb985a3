"""What `convmixer classify` does when its engine fails; the rest is tested with the command (test_cli.py)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from app.cli_classify import classify_here
from app.errors import StartupError
from app.service import Service
from app.settings import Settings

GIVE_UP_S = 30


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service(Settings.load(cores=1))
    yield service
    service.close()


def test_a_model_that_fails_on_everything_ends_it(service, samples, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(service.session, "infer", broken)
    with pytest.raises(StartupError, match=r"^the model failed on the last \d+ images; the rows so far are written$"):
        list(classify_here(service, (str(sample.path) for sample in samples), 1))


def test_an_engine_that_hangs_ends_it_soon(service, samples, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr("app.cli_classify._LOOK_S", 0.05)
    monkeypatch.setattr(service.scheduler, "hang_timeout_s", 0.1)
    infer = service.session.infer

    def hang(*arguments, **options):
        go_on.wait(GIVE_UP_S)
        return infer(*arguments, **options)

    monkeypatch.setattr(service.session, "infer", hang)
    with pytest.raises(StartupError, match="a worker has been busy with one image or batch"):
        list(classify_here(service, [str(samples[0].path)], 1))
    begin = time.monotonic()
    service.close()
    assert time.monotonic() - begin < service.settings.drain_timeout_s / 2
    go_on.set()
