"""Room for connections, and for what they upload: who is ended so that another may come.

A client that waits for its answer is never ended for another: only one that asks for nothing, does not read what it was sent, or
has stopped sending.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING, cast

from app.sockets import HAS_SENT, happened

if TYPE_CHECKING:
    from app.connection import Protocol

PROBES = {b"/livez", b"/readyz", b"/v2/health/live", b"/v2/health/ready", b"/metrics"}
PROBE_CONNECTIONS = 16
"""Beyond `CONVMIXER_MAX_CONNECTIONS`, for nothing but these: overload is no reason to be restarted."""

_STUCK_S = 2.0
"""A client that has not read its answer for so long makes room for another."""

_LOOKS = 64
"""Connections looked at for one that may be closed to make room."""


class Room:
    """The connections of this process, as far as they are in others' way.

    Attributes:
        waiting: those that wait for their clients, whose uploads are not complete or who have nothing in work; the longest
            waiting first.
        probes: those beyond the limit, which may ask for nothing but probes; the oldest first.
    """

    def __init__(self) -> None:
        self.waiting: OrderedDict[Protocol, None] = OrderedDict()
        self.probes: dict[Protocol, None] = {}

    def enter(self, connection: Protocol, others: int) -> bool:
        """A client has connected.

        Args:
            connection: its own.
            others: open before it came, probes included.

        Returns:
            Whether there is room for it, be it as a probe.
        """
        admitted = True
        if others - len(self.probes) >= connection.settings.max_connections and not self._make(connection, for_probes=False):
            # who takes the place of a probe may only probe, too: else clients would make all of these ordinary ones, one by one
            admitted = len(self.probes) < PROBE_CONNECTIONS or self._make(connection, for_probes=True)
            if admitted:
                self.probes[connection] = None
        self.waiting[connection] = None
        return admitted

    def leave(self, connection: Protocol) -> None:
        """A connection is lost."""
        self.waiting.pop(connection, None)
        self.probes.pop(connection, None)

    def allows(self, connection: Protocol, path: bytes) -> bool:
        """Whether it may ask for that; a probe becomes an ordinary connection if others have left since it came."""
        if connection not in self.probes or path in PROBES:
            return True
        if len(connection.connections) - len(self.probes) >= connection.settings.max_connections:
            return False
        del self.probes[connection]
        return True

    def _make(self, newcomer: Protocol, *, for_probes: bool) -> bool:
        """Closes who has waited longest for its client, or does not read its answer; False if there is nobody.

        Args:
            newcomer: who needs the room.
            for_probes: among `probes`, or among all others.
        """
        waiting = filter(self.waiting.__contains__, self.probes) if for_probes else islice(self.waiting, _LOOKS)
        for connection in [one for one in waiting if (one in self.probes) is for_probes]:
            if connection.transport.is_closing():
                del self.waiting[connection]
            elif connection.transport.get_write_buffer_size() or happened(connection.transport, HAS_SENT):
                self.waiting.move_to_end(connection)  # closing now would lose an answer, or a request that was just sent
            else:
                connection.transport.abort()
                return True
        stuck_before = newcomer.active - _STUCK_S
        for other in newcomer.connections:
            connection = cast("Protocol", other)
            if (connection in self.probes) is for_probes and (connection.stuck_since or newcomer.active) < stuck_before:
                connection.cut_off()
                newcomer.connections.discard(connection)  # or the next one would find it, too
                self.probes.pop(connection, None)
                return True
        return False

    def end_slow_uploads(self, count: int) -> bool:
        """Ends uploads that have stopped or crawl, the largest first, or none if all of those hold too little.

        Args:
            count: bytes that they must hold together.

        Returns:
            Whether they do; all of it is given back.
        """
        now = time.monotonic()
        slow = [(upload.received_bytes, one, upload) for one in self.waiting if (upload := one.slow_upload(now))]
        ended = []
        for held, one, upload in sorted(slow, key=lambda found: -found[0]):
            if count > 0 and not happened(one.transport, HAS_SENT):  # else it has sent more, and nobody has looked yet
                count -= held
                ended.append((one, upload))
        if count > 0:
            return False
        for one, upload in ended:
            one.end_upload(upload)
        return True
