"""What asyncio does not tell of a connection's socket, and does not do with it."""

from __future__ import annotations

import asyncio
import select
import socket
import struct

HAS_LEFT = getattr(select, "POLLRDHUP", 0)
"""That a client closed its sending side; where that is not told (macOS), one that closed both or broke off still is."""

HAS_SENT = select.POLLIN
"""That there is something to be read, the end included."""


def happened(transport: asyncio.BaseTransport, event: int) -> bool:
    """Whether it has happened, or an error or the end of both sides have, at the transport's socket (poll(2))."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), event)
    return bool(poll.poll(0))


def reset(transport: asyncio.Transport) -> None:
    """Closes at once, what was not sent is lost: else the kernel would keep it for minutes, waiting to be read."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
