"""The bound of docs/settings.md, for limits that must not be below it."""


def implied_mib(workers: int, max_pixels: int, max_held_bytes: int) -> float:
    """Most memory that the service takes with these settings."""
    return 120 + (4 * max_held_bytes + workers * max_pixels * 24) / 2**20
