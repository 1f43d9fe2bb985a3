"""What waits for a worker: which images are the same work. How workers take it: test_scheduler.py."""

from __future__ import annotations

import pytest

from app.engine.admission import Admission
from app.engine.service_time import ServiceTime


@pytest.mark.parametrize(("size", "works"), [(64 * 1024, 1), (64 * 1024 + 1, 2)])
def test_only_small_images_are_compared(size, works):
    admission = Admission(ServiceTime(0.005, 1), lambda: 0, max_queue=10, coalesce=True)
    for _ in range(2):
        admission.submit([bytes(size)])
    assert admission.waiting() == works
