"""The scheduler with the real model: batches, deadlines, drain, and that one bad image harms only itself."""

from __future__ import annotations

import io
import math
import sys
import threading
import time
from concurrent.futures import CancelledError, wait

import numpy as np
import pytest
from PIL import Image

from app.engine.artifact import read_verified
from app.engine.scheduler import Scheduler
from app.engine.session import Session
from app.errors import DeadlineExceeded, InferenceFailed, NotServing, Overloaded, ServiceError, UndecodableImage, UnsupportedImage
from app.images import DecodeLimits, decode_image
from tests.broken_model import write_broken_model
from tests.waiting import wait_until

TIMEOUT_S = 60


class GatedSession(Session):
    """The real session, stopped at a gate so that a queue can build up, and failing on demand."""

    def __init__(self, model) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.poison: np.ndarray | None = None
        self.batches: list[int] = []
        self.alone: list[bool] = []
        super().__init__(model, "cpu")
        self.batches.clear()
        self.alone.clear()

    def infer(self, images, *, explain=False, alone=False):
        self.batches.append(len(images))
        self.alone.append(alone)
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        if self.poison is not None and any(np.array_equal(image, self.poison) for image in images):
            raise RuntimeError("poisoned")
        return super().infer(images, explain=explain, alone=alone)


@pytest.fixture
def session(artifact_path):
    return GatedSession(read_verified(artifact_path))


@pytest.fixture
def make(session):
    made = []

    def build(**choices) -> Scheduler:
        choices = {"workers": 1, "max_batch": 4, "max_queue": 100, "coalesce": False, "image_s": 0.005, **choices}
        made.append(Scheduler(session, session.metadata.resize, DecodeLimits(10**6, 10**4), **choices))
        return made[-1]

    yield build
    session.gate.set()
    for scheduler in made:
        assert scheduler.drain(TIMEOUT_S)


def hold(session, scheduler, data):
    """Occupies a worker until the gate opens; returns that image's future."""
    session.gate.clear()
    session.entered.clear()
    (future,) = scheduler.submit([data])
    assert session.entered.wait(TIMEOUT_S)
    return future


def test_images_meet_in_batches_and_keep_their_order(session, make, samples):
    scheduler = make()
    alone = [scheduler.submit([s.data])[0].result(TIMEOUT_S).logits for s in samples[:9]]
    first = hold(session, scheduler, samples[0].data)
    futures = scheduler.submit([s.data for s in samples[:9]])
    session.batches.clear()
    session.gate.set()
    results = [f.result(TIMEOUT_S) for f in futures]
    assert session.batches == [4, 4, 1]
    assert [r.timing.batch_size for r in results] == [4] * 8 + [1]
    for expected, result in zip(alone, results, strict=True):
        assert np.allclose(expected, result.logits, atol=1e-4)
    assert first.result(TIMEOUT_S).class_maps is None


def test_explained_and_plain_images_share_a_queue(make, samples):
    scheduler = make()
    (plain,) = scheduler.submit([samples[0].data])
    (explained,) = scheduler.submit([samples[0].data], explain=True)
    assert explained.result(TIMEOUT_S).class_maps.shape[0] == 10
    assert np.allclose(plain.result().logits, explained.result().logits, atol=1e-4)


def test_only_the_guilty_image_of_a_failed_batch_fails(session, make, samples):
    scheduler = make()
    good = [s.data for s in samples[:4]]
    expected = [f.result(TIMEOUT_S).logits for f in scheduler.submit(good)]
    session.poison = np.full((32, 32, 3), 255, np.uint8)
    white = _png(np.full((32, 32, 3), 255, np.uint8))
    first = hold(session, scheduler, samples[0].data)
    futures = scheduler.submit([good[1], b"junk", white, good[3]])
    session.gate.set()
    assert np.allclose(futures[0].result(TIMEOUT_S).logits, expected[1], atol=1e-4)
    assert isinstance(futures[1].exception(TIMEOUT_S), ServiceError)
    assert isinstance(futures[2].exception(TIMEOUT_S), InferenceFailed)
    assert np.allclose(futures[3].result(TIMEOUT_S).logits, expected[3], atol=1e-4)
    assert first.exception(TIMEOUT_S) is None
    assert scheduler.failure() is None


def test_a_model_that_fails_on_everything_is_seen(session, make, samples):
    scheduler = make()
    session.poison = np.full((32, 32, 3), 255, np.uint8)
    white = _png(session.poison)
    failed = [scheduler.submit([white])[0] for _ in range(40)]
    assert all(isinstance(future.exception(TIMEOUT_S), InferenceFailed) for future in failed)
    assert "failed on the last 40 images" in scheduler.failure()
    scheduler.submit([samples[0].data])[0].result(TIMEOUT_S)
    assert scheduler.failure() is None


def test_a_model_that_fails_teaches_nothing_of_how_long_images_take(session, make, samples):
    scheduler = make(image_s=0.5)
    session.poison = np.full((32, 32, 3), 255, np.uint8)
    white = _png(session.poison)
    for _ in range(20):
        scheduler.process_here(white)
        scheduler.submit([white])[0].exception(TIMEOUT_S)
    assert scheduler.service_time.image_s == 0.5
    assert not scheduler.may_process_here(samples[0].data), "the event loop does not try again at once"


def test_what_fails_over_a_large_file_leaves_the_batch_before_it_its_answers(session, make, samples, monkeypatch):
    outcomes = []
    scheduler = make(on_batch=outcomes.extend)
    first = hold(session, scheduler, samples[0].data)
    futures = scheduler.submit([samples[1].data, samples[2].data + bytes(300 * 1024)])  # a batch, and a large one behind it
    large_only = scheduler._process

    def process(batch, *arguments):
        if len(batch[0].data) > 256 * 1024:
            raise MemoryError
        large_only(batch, *arguments)

    monkeypatch.setattr(scheduler, "_process", process)
    session.gate.set()
    assert first.exception(TIMEOUT_S) is None
    assert futures[0].exception(TIMEOUT_S) is None
    assert isinstance(futures[1].exception(TIMEOUT_S), InferenceFailed)
    assert len(outcomes) == 2


def test_metrics_that_fail_harm_no_image(make, samples):
    def count(outcomes):
        raise ValueError("metrics")

    scheduler = make(on_batch=count)
    outcomes = [future.result(TIMEOUT_S) for future in scheduler.submit([sample.data for sample in samples[:20]])]
    assert len(outcomes) == 20


def test_a_twin_of_a_dropped_image_is_still_joined_by_the_next(session, make, samples):
    scheduler = make(coalesce=True, max_batch=1)
    first = hold(session, scheduler, samples[0].data)
    (dropped,) = scheduler.submit([samples[1].data])
    item = scheduler.admission._open[samples[1].data, False]
    dropped.cancel()
    assert not scheduler.admission.is_wanted(item)
    (second,) = scheduler.submit([samples[1].data])
    scheduler.admission.fail(item, InferenceFailed("late"))
    (third,) = scheduler.submit([samples[1].data])
    session.batches.clear()
    session.gate.set()
    assert np.array_equal(second.result(TIMEOUT_S).logits, third.result(TIMEOUT_S).logits)
    first.result(TIMEOUT_S)
    assert session.batches == [1], "computed once"


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_full_queue_refuses_all_or_none(session, make, samples):
    scheduler = make(max_queue=3)
    hold(session, scheduler, samples[0].data)
    scheduler.submit([samples[1].data] * 2)
    with pytest.raises(Overloaded) as refusal:
        scheduler.submit([samples[2].data] * 2)
    assert refusal.value.retry_after_s >= 1
    assert scheduler.waiting() == 2
    scheduler.submit([samples[2].data])


def test_a_predicted_wait_beyond_the_deadline_is_refused_at_once(session, make, samples):
    scheduler = make()
    hold(session, scheduler, samples[0].data)
    scheduler.submit([samples[1].data] * 50)
    with pytest.raises(Overloaded):
        scheduler.submit([samples[2].data], timeout_s=1e-6)


def test_a_deadline_that_passed_in_the_queue_costs_no_inference(session, make, samples):
    scheduler = make()
    hold(session, scheduler, samples[0].data)
    (late,) = scheduler.submit([samples[1].data], timeout_s=0.5)
    (patient,) = scheduler.submit([samples[2].data])
    wait([late], timeout=0.6)  # lets the deadline pass: the worker is held
    session.batches.clear()
    session.gate.set()
    assert isinstance(late.exception(TIMEOUT_S), DeadlineExceeded)
    assert patient.result(TIMEOUT_S).timing.batch_size == 1
    assert session.batches == [1]


def test_what_would_probably_be_late_is_refused_at_once(session, make, samples):
    scheduler = make()
    for sample in samples[:20]:  # learns how long an image takes
        scheduler.submit([sample.data])[0].result(TIMEOUT_S)
    hold(session, scheduler, samples[0].data)
    waiting = scheduler.submit([samples[1].data] * 50)
    with pytest.raises(Overloaded) as refusal:
        scheduler.submit([samples[2].data], timeout_s=0.001)
    assert refusal.value.retry_after_s >= 1
    (accepted,) = scheduler.submit([samples[2].data], timeout_s=TIMEOUT_S)
    session.gate.set()
    assert accepted.result(TIMEOUT_S)
    assert all(future.result(TIMEOUT_S) for future in waiting)
    # an idle worker tries however little time there is: otherwise one slow picture could close the service for good
    (tried,) = scheduler.submit([samples[3].data], timeout_s=0.001)
    assert isinstance(tried.exception(TIMEOUT_S), DeadlineExceeded | None)


def test_an_idle_engine_tries_what_it_thinks_too_slow(session, make, samples, monkeypatch):
    scheduler = make(workers=2)
    monkeypatch.setattr(scheduler.service_time, "image_s", 2.0)  # as after a start beside other work
    images, timeout_s = [sample.data for sample in samples[:8]], 10
    first = hold(session, scheduler, samples[0].data)
    with pytest.raises(Overloaded):
        scheduler.submit(images, timeout_s=timeout_s)
    session.gate.set()
    first.result(TIMEOUT_S)
    wait_until(lambda: not scheduler.busy())
    futures = scheduler.submit(images, timeout_s=timeout_s)
    assert all(future.result(TIMEOUT_S) for future in futures)


def test_pictures_that_take_long_and_fail_are_counted_in_the_predicted_wait(session, make, samples, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    scheduler = make()

    def slow_and_damaged(*arguments):
        nonlocal now
        now += 0.05
        raise UndecodableImage("damaged")

    scheduler.submit([samples[0].data])[0].result(TIMEOUT_S)
    hold(session, scheduler, samples[0].data)
    with monkeypatch.context() as patched:
        patched.setattr("app.engine.scheduler.decode_image", slow_and_damaged)
        failing = [scheduler.submit([sample.data])[0] for sample in samples[:60]]
        session.gate.set()
        assert all(isinstance(future.exception(TIMEOUT_S), UndecodableImage) for future in failing)
    hold(session, scheduler, samples[0].data)
    with pytest.raises(Overloaded):
        scheduler.submit([samples[1].data], timeout_s=0.04)


def test_another_load_is_learnt_from_a_few_batches(session, make, samples, monkeypatch):
    """A single slow picture must not have others refused, many must."""
    scheduler = make()
    hold(session, scheduler, samples[0].data)

    def is_accepted_after(*seconds: float) -> bool:
        for took in seconds:
            scheduler.service_time.observe(took)
        return scheduler.refusal(samples[1].data, explain=False, timeout_s=0.5) is None

    monkeypatch.setattr(scheduler.service_time, "image_s", 0.005)
    assert is_accepted_after(0.005, 0.5)
    assert is_accepted_after(0.005, 0.5, 0.005, 0.5, 0.005)
    assert not is_accepted_after(0.5, 0.5, 0.5)
    assert is_accepted_after(*[0.005] * 6)


def test_a_large_file_keeps_no_company_waiting(session, make, samples, monkeypatch):
    """What came with it is answered while it is decoded, and the next worker finds the next large one."""
    scheduler = make(max_batch=8)
    large = samples[5].data + bytes(300_000)
    decoding, go_on = threading.Event(), threading.Event()

    def watched(data, *arguments):
        if data is large:
            decoding.set()
            assert go_on.wait(TIMEOUT_S)
        return decode_image(data, *arguments)

    monkeypatch.setattr("app.engine.scheduler.decode_image", watched)
    first = hold(session, scheduler, samples[0].data)
    small = scheduler.submit([samples[1].data, samples[2].data])
    (big,) = scheduler.submit([large])
    (behind,) = scheduler.submit([samples[3].data])
    session.gate.set()
    assert decoding.wait(TIMEOUT_S)
    assert first.result(TIMEOUT_S)
    assert [future.result(TIMEOUT_S).timing.batch_size for future in small] == [2, 2]
    assert not behind.done()
    go_on.set()
    assert big.result(TIMEOUT_S).timing.batch_size == 1
    assert behind.result(TIMEOUT_S).timing.batch_size == 1


def test_a_cancelled_image_costs_no_inference(session, make, samples):
    scheduler = make()
    hold(session, scheduler, samples[0].data)
    gone, stays = scheduler.submit([samples[1].data, samples[2].data])
    assert gone.cancel()
    session.batches.clear()
    session.gate.set()
    assert stays.result(TIMEOUT_S).timing.batch_size == 1
    with pytest.raises(CancelledError):
        gone.result(TIMEOUT_S)


def test_an_image_cancelled_while_it_is_decoded_costs_no_inference(session, make, samples, monkeypatch):
    decoding, go_on = threading.Event(), threading.Event()

    def slowly(data, rule, limits, announce, heartbeat):
        decoding.set()
        assert go_on.wait(TIMEOUT_S)
        return decode_image(data, rule, limits, announce, heartbeat)

    scheduler = make()
    monkeypatch.setattr("app.engine.scheduler.decode_image", slowly)
    (gone,) = scheduler.submit([samples[0].data])
    assert decoding.wait(TIMEOUT_S)
    assert gone.cancel()
    go_on.set()
    (stays,) = scheduler.submit([samples[1].data])
    assert stays.result(TIMEOUT_S).timing.batch_size == 1
    assert session.batches == [1]


def test_an_answer_does_not_wait_for_the_next_images_inference(session, make, samples, monkeypatch):
    scheduler = make(max_batch=1)
    first = hold(session, scheduler, samples[0].data)
    (second,) = scheduler.submit([samples[1].data])
    in_model, go_on = threading.Event(), threading.Event()

    def slowly(images, **options):
        in_model.set()
        assert go_on.wait(TIMEOUT_S)
        return Session.infer(session, images, **options)

    monkeypatch.setattr(session, "infer", slowly)
    session.gate.set()
    assert in_model.wait(TIMEOUT_S)
    assert first.result(TIMEOUT_S).timing.batch_size == 1
    assert not second.done()
    go_on.set()
    assert second.result(TIMEOUT_S).timing.batch_size == 1


def test_an_answer_does_not_wait_while_the_next_large_picture_is_decoded(session, make, samples, monkeypatch):
    scheduler = make(max_batch=1)
    first = hold(session, scheduler, samples[0].data)
    buffer = io.BytesIO()
    Image.new("1", (900, 900)).save(buffer, "PNG")
    decoding, go_on = threading.Event(), threading.Event()

    def slowly(data, rule, limits, announce, heartbeat):
        def announced(pixels):
            announce(pixels)
            decoding.set()
            assert go_on.wait(TIMEOUT_S)

        return decode_image(data, rule, limits, announced, heartbeat)

    monkeypatch.setattr("app.engine.scheduler.decode_image", slowly)
    (second,) = scheduler.submit([buffer.getvalue()])
    session.gate.set()
    assert decoding.wait(TIMEOUT_S)
    assert first.result(TIMEOUT_S).timing.batch_size == 1
    go_on.set()
    assert "the picture is nearly of one colour" in second.result(TIMEOUT_S).warnings


def test_only_a_lone_image_gets_every_core(session, make, samples):
    scheduler = make(workers=2)
    first = hold(session, scheduler, samples[0].data)
    second = hold(session, scheduler, samples[1].data)
    session.gate.set()
    assert first.result(TIMEOUT_S).timing.batch_size == second.result(TIMEOUT_S).timing.batch_size == 1
    assert session.alone == [True, False]


@pytest.fixture
def patient(monkeypatch):
    """A busy machine may interrupt what is computed here for longer than a real server would accept."""
    monkeypatch.setattr("app.engine.scheduler._HERE_S", 60.0)


@pytest.mark.usefixtures("patient")
def test_a_small_image_of_an_idle_engine_is_computed_where_it_is(session, make, samples):
    outcomes = []
    scheduler = make(workers=2, on_batch=outcomes.extend)
    by_worker = scheduler.submit([samples[0].data], explain=True)[0].result(TIMEOUT_S)
    session.alone.clear()
    assert scheduler.may_process_here(samples[0].data)
    future = scheduler.process_here(samples[0].data, explain=True)
    assert future.done()
    here = future.result()
    assert session.alone == [True]
    assert outcomes[1:] == [here]
    assert np.allclose(here.logits, by_worker.logits, atol=1e-4)
    assert np.allclose(here.class_maps, by_worker.class_maps, atol=1e-4)
    assert here.similarity == pytest.approx(by_worker.similarity, abs=1e-4)
    assert here.timing.queue_s == 0
    assert min(here.timing.decode_s, here.timing.infer_s) > 0
    assert scheduler.busy() == 0


def test_a_model_that_fails_where_the_image_is_fails_that_image_alone(session, make, samples):
    scheduler = make()
    session.poison = np.full((32, 32, 3), 255, np.uint8)
    assert isinstance(scheduler.process_here(_png(session.poison)).exception(), InferenceFailed)
    assert scheduler.process_here(samples[0].data).exception() is None
    assert scheduler.failure() is None


@pytest.mark.usefixtures("patient")
def test_what_may_take_long_or_fails_is_left_to_a_worker(session, make, samples, monkeypatch):
    monkeypatch.setattr("app.engine.scheduler._HERE_PAUSE", 0)
    scheduler = make()
    session.batches.clear()
    blank = _png(np.zeros((256, 257, 3), np.uint8))
    assert len(blank) < len(samples[0].data)
    for image in (blank, b"junk", samples[0].data[:100]):
        assert scheduler.may_process_here(image)
        assert scheduler.process_here(image) is None
    assert session.batches == []
    assert not scheduler.may_process_here(samples[0].data + bytes(16 * 1024))
    monkeypatch.setattr(session, "provider", "cuda")
    assert not scheduler.may_process_here(samples[0].data)


@pytest.mark.usefixtures("patient")
def test_an_image_in_company_is_left_to_a_worker(session, make, samples):
    scheduler = make(workers=2)
    assert scheduler.may_process_here(samples[0].data)
    future = hold(session, scheduler, samples[0].data)
    assert not scheduler.may_process_here(samples[1].data)
    session.gate.set()
    future.result(TIMEOUT_S)
    scheduler.drain(TIMEOUT_S)
    assert not scheduler.may_process_here(samples[1].data)


def test_after_an_image_that_took_long_or_failed_the_next_are_left_to_workers(make, samples, monkeypatch):
    scheduler = make(image_s=0.001)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    answers = scheduler.session.infer(np.zeros((1, 32, 32, 3), np.uint8))

    def process(image, seconds):
        def infer(*arguments, **choices):
            nonlocal now
            now += seconds
            return answers

        monkeypatch.setattr(scheduler.session, "infer", infer)
        return scheduler.process_here(image)

    assert process(samples[0].data, 0.0015).exception() is None
    assert scheduler.may_process_here(samples[0].data)
    for seconds, pause in ((0.02, 2), (3600, 20)):  # of an hour in which the whole machine slept only so much counts
        assert process(samples[0].data, seconds).exception() is None
        now += pause - 0.1
        assert not scheduler.may_process_here(samples[0].data)
        now += 0.2
        assert scheduler.may_process_here(samples[0].data)
        assert process(samples[0].data, 0.001).exception() is None

    def decode(*arguments):
        nonlocal now
        now += 0.001
        raise UndecodableImage("broken")

    monkeypatch.setattr("app.engine.scheduler.decode_image", decode)
    assert process(samples[0].data, 0) is None
    assert not scheduler.may_process_here(samples[0].data)
    now += 0.11
    assert scheduler.may_process_here(samples[0].data)


@pytest.mark.parametrize("way", ["here", "worker"])
def test_memory_is_given_back_when_there_is_nothing_to_do(session, make, samples, monkeypatch, way):
    monkeypatch.setattr("app.engine.scheduler._REST_S", 0.05)
    given_back = threading.Event()
    monkeypatch.setattr(session, "release_memory", given_back.set)
    scheduler = make()
    if way == "here":
        scheduler.process_here(samples[0].data)
    else:
        scheduler.submit([samples[0].data])[0].result(TIMEOUT_S)
    assert given_back.wait(TIMEOUT_S)


def test_memory_is_given_back_now_and_then_when_there_is_always_something_to_do(session, make, samples, monkeypatch):
    monkeypatch.setattr("app.engine.scheduler._REST_S", TIMEOUT_S)  # no worker ever waits so long
    begin = now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    given_back: list[float] = []
    monkeypatch.setattr(session, "release_memory", lambda: given_back.append(now - begin))
    scheduler = make(max_batch=1)
    for after in (59, 61, 120, 122):
        now = begin + after
        assert scheduler.submit([samples[0].data])[0].result(TIMEOUT_S)
        if after in (61, 122):
            wait_until(lambda after=after: after in given_back)
    assert given_back == [61, 122]


@pytest.mark.parametrize("output", ["logits", "similarity"])
def test_an_answer_that_is_no_number_fails_for_that_image_alone(artifact_path, samples, tmp_path, output):
    """JSON has no word for it."""
    path = tmp_path / "broken.onnx"
    session = Session(read_verified(path, write_broken_model(artifact_path, output, path)), "cpu")
    scheduler = Scheduler(
        session,
        session.metadata.resize,
        DecodeLimits(10**6, 10**4),
        workers=1,
        max_batch=8,
        max_queue=100,
        coalesce=False,
        image_s=0.005,
    )
    white = _png(np.full((32, 32, 3), 255, np.uint8))
    images = [samples[0].data, white, samples[1].data]
    good, bad, other = scheduler.submit(images)
    assert isinstance(bad.exception(TIMEOUT_S), InferenceFailed)
    assert np.isfinite([*good.result(TIMEOUT_S).logits, *other.result(TIMEOUT_S).logits]).all()
    for future in scheduler.submit([white] * 32):
        assert isinstance(future.exception(TIMEOUT_S), InferenceFailed)
    assert "failed on the last 32 images" in scheduler.failure()
    assert scheduler.drain(TIMEOUT_S)


def test_pixels_need_no_decoding_and_meet_files_in_one_batch(session, make, samples):
    scheduler = make(max_batch=8)
    limits = DecodeLimits(10**6, 10**4)
    files = [s.data for s in samples[:4]]
    pixels = [decode_image(data, session.metadata.resize, limits) for data in files]
    first = hold(session, scheduler, files[0])
    futures = scheduler.submit([image for pair in zip(files, pixels, strict=True) for image in pair])
    session.batches.clear()
    session.gate.set()
    wait([first, *futures], TIMEOUT_S)
    assert session.batches == [8]
    for file, image in zip(futures[::2], futures[1::2], strict=True):
        assert np.array_equal(file.result().logits, image.result().logits)


def test_drain_answers_everything_accepted_and_refuses_the_rest(session, make, samples):
    scheduler = make()
    first = hold(session, scheduler, samples[0].data)
    futures = scheduler.submit([s.data for s in samples[:20]])
    drained: list[bool] = []
    thread = threading.Thread(target=lambda: drained.append(scheduler.drain(TIMEOUT_S)))
    thread.start()
    wait_until(lambda: scheduler.draining)
    with pytest.raises(NotServing):
        scheduler.submit([samples[0].data])
    session.gate.set()
    thread.join(TIMEOUT_S)
    assert drained == [True]
    assert all(f.exception() is None for f in [first, *futures])


def test_a_drain_that_takes_too_long_still_resolves_every_future(session, make, samples):
    scheduler = make()
    first = hold(session, scheduler, samples[0].data)
    (waiting,) = scheduler.submit([samples[1].data])
    assert not scheduler.drain(0.01)
    assert isinstance(waiting.exception(TIMEOUT_S), NotServing)
    session.gate.set()
    assert first.exception(TIMEOUT_S) is None


def test_a_worker_that_hangs_is_seen(session, make, samples):
    scheduler = make(hang_timeout_s=0)
    assert scheduler.failure() is None
    hold(session, scheduler, samples[0].data)
    assert "busy with one image or batch" in scheduler.failure()
    session.gate.set()


def test_a_worker_that_has_no_core_is_not_taken_for_hung(session, make, samples, monkeypatch):
    """A picture that takes a second alone takes ten where others have it. Who waits for ever computes nothing, either."""
    scheduler = make()
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    future = hold(session, scheduler, samples[0].data)
    now += 25
    assert scheduler.failure() is None
    now += 6
    assert "busy with one image or batch for 31 s" in scheduler.failure()
    session.gate.set()
    future.result(TIMEOUT_S)
    assert scheduler.failure() is None


def test_a_worker_that_computes_for_ever_is_seen_soon(session, make, samples, monkeypatch):
    scheduler = make(hang_timeout_s=0.2)
    end = threading.Event()

    def compute(images, **options):
        while not end.is_set():
            pass
        return Session.infer(session, images, **options)

    monkeypatch.setattr(session, "infer", compute)
    monkeypatch.setattr("app.engine.scheduler._WAITS", math.inf)
    (future,) = scheduler.submit([samples[0].data])
    try:
        assert "busy with one image or batch" in wait_until(scheduler.failure)
    finally:
        end.set()
    future.result(TIMEOUT_S)
    assert scheduler.failure() is None


def test_many_threads_submitting_get_their_own_answers(make, samples):
    scheduler = make(workers=2)
    expected = [f.result(TIMEOUT_S).logits for f in scheduler.submit([s.data for s in samples[:40]])]
    answers: dict[int, np.ndarray] = {}

    def ask(index: int) -> None:
        answers[index] = scheduler.submit([samples[index].data])[0].result(TIMEOUT_S).logits

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    for index, logits in answers.items():
        assert np.allclose(logits, expected[index], atol=1e-4)
    assert len(answers) == 40


def test_identical_images_in_flight_are_computed_once(session, make, samples):
    scheduler = make(coalesce=True)
    first = hold(session, scheduler, samples[0].data)
    joined = scheduler.submit([samples[0].data, samples[1].data, samples[1].data]) + scheduler.submit([samples[1].data])
    (explained,) = scheduler.submit([samples[1].data], explain=True)
    session.batches.clear()
    session.gate.set()
    results = [future.result(TIMEOUT_S) for future in (first, *joined, explained)]
    assert results[0] is results[1]
    assert results[2] is results[3] is results[4]
    assert results[5].class_maps is not None
    assert sum(session.batches) == 2, "the first image was under way; the second is computed plain, and with class maps"
    assert scheduler.submit([samples[0].data])[0].result(TIMEOUT_S) is not results[0], "nothing is remembered"


def test_an_image_is_computed_as_long_as_anybody_wants_it(session, make, samples):
    scheduler = make(coalesce=True)
    first = hold(session, scheduler, samples[0].data)
    late, leaves, stays = (scheduler.submit([samples[1].data], timeout_s=timeout_s)[0] for timeout_s in (1.0, math.inf, math.inf))
    abandoned = [scheduler.submit([samples[2].data])[0] for _ in range(2)]
    for future in (leaves, *abandoned):
        assert future.cancel()
    wait([late], timeout=1.1)  # lets the deadline pass: the worker is held
    session.batches.clear()
    session.gate.set()
    assert stays.result(TIMEOUT_S).timing.batch_size == 1
    with pytest.raises(DeadlineExceeded):
        late.result(TIMEOUT_S)
    wait([first], TIMEOUT_S)
    assert sum(session.batches) == 1
    assert scheduler.submit([samples[2].data])[0].result(TIMEOUT_S).logits is not None, "a dropped image can be asked for again"


def test_nobody_waits_for_a_twin_that_may_come_later_than_they_would(session, make, samples):
    """Who asks for an image that somebody has queued with an hour's patience would hear nothing for as long."""
    scheduler = make(coalesce=True, max_queue=3)
    first = hold(session, scheduler, samples[0].data)
    patient = scheduler.submit([sample.data for sample in samples[1:4]])
    (joined,) = scheduler.submit([samples[1].data])
    with pytest.raises(Overloaded):
        scheduler.submit([samples[1].data], timeout_s=TIMEOUT_S)
    session.gate.set()
    assert all(future.result(TIMEOUT_S) for future in [first, *patient, joined])
    hurried = hold(session, scheduler, samples[0].data)
    (patient_one,) = scheduler.submit([samples[1].data])
    own = scheduler.submit([samples[1].data, samples[1].data], timeout_s=TIMEOUT_S)
    assert scheduler.waiting() == 3
    session.gate.set()
    assert all(future.result(TIMEOUT_S) for future in [hurried, patient_one, *own])


def test_a_bad_image_fails_for_all_who_sent_it(session, make, samples):
    scheduler = make(coalesce=True)
    first = hold(session, scheduler, samples[0].data)
    bad = [scheduler.submit([b"no image"])[0] for _ in range(2)]
    session.gate.set()
    for future in bad:
        with pytest.raises(UnsupportedImage):
            future.result(TIMEOUT_S)
    assert first.result(TIMEOUT_S)


def test_joining_an_image_needs_no_room_in_the_queue(session, make, samples):
    scheduler = make(coalesce=True, max_queue=1)
    hold(session, scheduler, samples[0].data)
    scheduler.submit([samples[1].data])
    (joined,) = scheduler.submit([samples[1].data])
    with pytest.raises(Overloaded):
        scheduler.submit([samples[2].data])
    session.gate.set()
    assert joined.result(TIMEOUT_S)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_dies_is_told(session, make, samples, monkeypatch):
    scheduler = make()
    monkeypatch.setattr(session, "infer", lambda *_, **__: sys.exit())
    scheduler.submit([samples[0].data])
    wait_until(lambda: "worker engine-0 died" in (scheduler.failure() or ""))


def test_what_fails_beside_the_model_fails_its_batch_alone(session, make, samples, monkeypatch):
    scheduler = make()
    with monkeypatch.context() as broken:
        broken.setattr(scheduler.service_time, "observe", lambda *_, **__: 1 / 0)
        (future,) = scheduler.submit([samples[0].data])
        assert isinstance(future.exception(TIMEOUT_S), InferenceFailed)
    assert scheduler.submit([samples[0].data])[0].result(TIMEOUT_S).logits is not None


def test_who_is_refused_is_told_how_long_the_queue_is(session, make, samples):
    scheduler = make(image_s=2.0)
    hold(session, scheduler, samples[0].data)
    scheduler.submit([samples[1].data] * 50)
    with pytest.raises(Overloaded) as refusal:
        scheduler.submit([samples[2].data], timeout_s=1)
    assert refusal.value.retry_after_s >= 100
