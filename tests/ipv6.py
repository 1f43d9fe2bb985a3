"""Whether this machine has IPv6: a kernel may be built with it, and have no address."""

from __future__ import annotations

import socket
from contextlib import suppress

import pytest


def _has_ipv6() -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 here")
