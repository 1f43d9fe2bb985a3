"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores this process may use: its CPU affinity, or the cgroup quota (rounded up) where that is smaller."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in _quota_files():
        with suppress(OSError, ValueError):  # no such file, or no quota ("max", -1)
            quota, period = " ".join(path.read_text() for path in files).split()
            if int(quota) > 0:
                cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _quota_files() -> list[list[Path]]:
    """Where this process's CPU quotas stand, from its own control group up to the outermost: the least of them holds."""
    found = []
    with suppress(OSError, ValueError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = CGROUP / "cpu" if controllers else CGROUP  # cgroup v1, v2
            names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"] if controllers else ["cpu.max"]
            own = top / path.strip("/")
            folders = [own, *(parent for parent in own.parents if parent.is_relative_to(top))]
            found += [[folder / name for name in names] for folder in folders]
    return found
