"""The bound of docs/settings.md, for limits that must not be below it."""

import re
from pathlib import Path

SETTINGS = (Path(__file__).parent.parent / "docs" / "settings.md").read_text()


def implied_mib(workers: int, max_pixels: int, max_held_bytes: int) -> float:
    """Most memory that the service takes with these settings."""
    at_rest, bodies, pixel_bytes = map(int, _numbers())
    return at_rest + (bodies * max_held_bytes + workers * max_pixels * pixel_bytes) / 2**20


def _numbers() -> tuple[str, ...]:
    pattern = r"about (\d+) MiB at rest, plus (\d+) x `MAX_HELD_BYTES` .*?, plus `WORKERS` x `MAX_PIXELS` x (\d+) bytes"
    found = re.search(pattern, " ".join(SETTINGS.split()))
    assert found, "docs/settings.md says it otherwise"
    return found.groups()
