"""The queueing model behind "how many replicas" agrees with theory where theory has a formula."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.capacity import Replica, replicas_for, simulate

IMAGE_S = 0.01


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_one_worker_waits_as_pollaczek_and_khinchine_say(utilisation):
    wait_s = simulate(utilisation / IMAGE_S, Replica(1, IMAGE_S)).mean() - IMAGE_S
    assert wait_s == pytest.approx(utilisation * IMAGE_S / (2 * (1 - utilisation)), rel=0.1)


def test_more_workers_behind_one_queue_wait_less():
    waits = [simulate(0.8 * workers / IMAGE_S, Replica(workers, IMAGE_S)).mean() - IMAGE_S for workers in (1, 2, 4)]
    assert waits == sorted(waits, reverse=True)


def test_a_batch_is_what_waits_when_a_worker_is_free_and_ends_together():
    replica = Replica(1, IMAGE_S, batch_s=0.005, max_batch=4)
    took = simulate(1e9, replica, requests=101)  # all come at once: one finds a free worker, the others make 25 batches
    assert took[0] == pytest.approx(0.015)
    assert took[1:5] == pytest.approx([0.015 + 0.045] * 4)
    assert took[-1] == pytest.approx(0.015 + 25 * 0.045)
    assert replica.capacity == pytest.approx(4 / 0.045)


def test_batches_bear_a_load_that_single_images_do_not():
    rate = 80
    assert rate < Replica(1, IMAGE_S, 0.005, 8).capacity
    assert rate > Replica(1, IMAGE_S, 0.005).capacity
    assert np.quantile(simulate(rate, Replica(1, IMAGE_S, 0.005, 8)), 0.99) < 0.3


def test_replicas_are_the_fewest_that_keep_the_limit():
    replica = Replica(2, IMAGE_S)
    found = replicas_for(500, 0.05, replica)
    kept, missed = (np.quantile(simulate(500 / count, replica), 0.99) for count in (found, found - 1))
    assert kept <= 0.05 < missed
    assert replicas_for(500, IMAGE_S / 2, replica) is None
