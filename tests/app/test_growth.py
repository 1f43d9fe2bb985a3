"""Which uploads are told from those that have stopped."""

from __future__ import annotations

import pytest

from app.growth import Growth


@pytest.fixture
def growth() -> Growth:
    growth = Growth(receive_timeout_s=10)
    growth.begin(100.0)
    return growth


def test_what_sends_nothing_has_stalled_two_seconds_later(growth):
    assert not growth.has_stalled(102.0)
    assert growth.has_stalled(102.1)
    growth.begin(200.0)  # the next request on its connection
    assert not growth.has_stalled(202.0)


def test_what_comes_steadily_in_all_of_its_time_grows(growth):
    for second in range(1, 11):
        growth.add(1000, 100.0 + second)
        assert not growth.has_stalled(100.0 + second + 1)


def test_what_comes_late_but_much_grows(growth):
    growth.add(50_000, 100.1)
    growth.add(40_000, 102.0)
    assert not growth.has_stalled(103.9)
    assert growth.has_stalled(104.1)


def test_what_crawls_has_stalled_although_it_sends(growth):
    growth.add(100_000, 100.1)
    for tenth in range(2, 30):
        growth.add(100, 100.0 + tenth / 10)
    assert growth.has_stalled(103.0)
