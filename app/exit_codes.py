"""What `convmixer serve` ends with (docs/settings.md)."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process says of its end."""

    FAILED = 1
    """A setting or the artifact is wrong; Python's own after an exception."""

    USAGE = 2
    """The command line is wrong (typer)."""

    STARTUP_FAILURE = 3
    """The server did not start; uvicorn's own."""

    ENGINE_FAILURE = 70
    """The engine died or hangs (EX_SOFTWARE of sysexits.h)."""
