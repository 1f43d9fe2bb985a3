"""What separates known pictures from strangers, and how well so few strangers tell it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.photos import above, interval, passes


def test_the_mean_share_of_higher_ones_is_the_auroc() -> None:
    rng = np.random.default_rng(1)
    known, unknown = rng.integers(3, 9, 50).astype(float), rng.integers(0, 7, 20).astype(float)
    pairs = np.sign(known[:, None] - unknown[None, :]) / 2 + 0.5
    assert above(known, unknown) == pytest.approx(pairs.mean(0))
    assert passes(np.arange(100.0), np.array([-1.0, 4.0, 5.0, 99.0])).tolist() == [0, 0, 1, 1]


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(2).random(380)
    low, high = interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert interval(values) == (low, high)
