"""The queueing model behind "how many replicas" agrees with theory where theory has a formula."""

from __future__ import annotations

import pytest

from benchmarks.capacity import replicas_for, simulate

SERVICE_S = 0.01


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_one_worker_waits_as_pollaczek_and_khinchine_say(utilisation):
    wait_s = simulate(utilisation / SERVICE_S, 1, SERVICE_S).mean() - SERVICE_S
    assert wait_s == pytest.approx(utilisation * SERVICE_S / (2 * (1 - utilisation)), rel=0.1)


def test_more_workers_behind_one_queue_wait_less():
    waits = [simulate(0.8 * workers / SERVICE_S, workers, SERVICE_S).mean() - SERVICE_S for workers in (1, 2, 4)]
    assert waits == sorted(waits, reverse=True)


def test_replicas_are_the_fewest_that_keep_the_limit():
    found = replicas_for(500, 0.05, 2, SERVICE_S)
    shares = [simulate(500 / count, 2, SERVICE_S) for count in (found, found - 1)]
    kept, missed = (sorted(took)[int(0.99 * len(took))] for took in shares)
    assert kept <= 0.05 < missed or 500 / (found - 1) >= 2 / SERVICE_S
    assert replicas_for(500, SERVICE_S / 2, 2, SERVICE_S) is None
