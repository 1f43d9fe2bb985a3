"""The bound of docs/settings.md, for limits that must not be below it."""

import re
from pathlib import Path

from app.settings import Settings

SETTINGS = (Path(__file__).parent.parent / "docs" / "settings.md").read_text()


def implied_mib(settings: Settings) -> float:
    """Most memory that the service takes with these settings."""
    at_rest, bodies, pixel_bytes, connections = map(int, _numbers())
    in_work = bodies * settings.max_held_bytes + settings.workers * settings.max_pixels * pixel_bytes
    return at_rest + in_work / 2**20 + settings.max_connections / connections


def _numbers() -> tuple[str, ...]:
    pattern = r"about (\d+) MiB at rest, plus (\d+) x `MAX_HELD_BYTES` .*?, plus `WORKERS` x `MAX_PIXELS` x (\d+) bytes "
    pattern += r"\(.*?\), plus `MAX_CONNECTIONS` / (\d+) MiB"
    found = re.search(pattern, " ".join(SETTINGS.split()))
    assert found, "docs/settings.md says it otherwise"
    return found.groups()
