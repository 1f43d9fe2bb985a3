"""How long an image is expected to take, learnt from batches alone and in company."""

from __future__ import annotations

import pytest

from app.engine.service_time import ServiceTime


def test_images_that_had_every_core_do_not_promise_as_much_to_a_crowd():
    learnt = ServiceTime(0.003, workers=16)
    for _ in range(100):
        learnt.observe(0.0006, alone=True)
    assert learnt.wait_s(waiting=500, busy=16, more=1) == pytest.approx(517 * 0.003 / 16)


def test_a_time_that_is_too_long_is_corrected_by_lone_images_too():
    learnt = ServiceTime(0.003, workers=2)
    for _ in range(100):
        learnt.observe(0.1)
    assert learnt.image_s > 0.09
    for _ in range(100):
        learnt.observe(0.001, alone=True)
    assert learnt.image_s == pytest.approx(0.003, rel=0.01)
    for _ in range(100):
        learnt.observe(0.001)
    assert learnt.image_s == pytest.approx(0.001, rel=0.01)


def test_lone_images_do_not_undo_what_a_crowd_has_taught():
    learnt = ServiceTime(0.01, workers=2)  # measured beside other work
    for _ in range(100):
        learnt.observe(0.003)
    for _ in range(100):
        learnt.observe(0.0015, alone=True)
    assert learnt.image_s == pytest.approx(0.003, rel=0.01)
    assert learnt.lone_s == pytest.approx(0.0015, rel=0.01)


def test_one_worker_is_always_alone():
    learnt = ServiceTime(0.01, workers=1)
    for _ in range(100):
        learnt.observe(0.003, alone=True)
    assert learnt.image_s == pytest.approx(0.003, rel=0.01)


def test_one_odd_image_hardly_counts_and_several_in_a_row_are_another_load():
    learnt = ServiceTime(0.01, workers=1)
    learnt.observe(10.0)
    assert learnt.image_s <= 0.011
    learnt.observe(10.0)
    assert learnt.image_s > 4
