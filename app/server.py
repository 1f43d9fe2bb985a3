"""The HTTP/1.1 server: uvicorn's, which sweeps over its connections, says when it leaves, and ends what hangs.

What one connection may do is in `app.connection`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import uvicorn

from app.connection import Protocol
from app.exit_codes import ExitCode
from app.room import PROBE_CONNECTIONS
from app.settings import Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from app.service import Service

logger = logging.getLogger(__name__)

_ANSWERED_WITHIN_S = 1.6
"""So long before the end of the time to drain, uploads that are still arriving are refused: they could not be answered."""

_OTHER_FILES = 256
"""Open files that are no client's connection, with room to spare: libraries, sockets, pipes, probes."""

_SWEPT_AT_ONCE = 64
"""Connections looked at before others have their turn: an attack's, refused together, would hold them up for milliseconds."""


def run(app: ASGIApp, settings: Settings, listening: socket.socket | None = None, parent: int | None = None) -> None:
    """Serves until SIGTERM or SIGINT; open requests are finished first.

    Args:
        app: the ASGI application; its lifespan puts the running service into `state["service"]`.
        settings: address, limits and timeouts.
        listening: an open socket in place of the address, shared with other processes (`app.processes`).
        parent: id of the process that replaces this one, if there is one; without it this one leaves.
    """
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http=Protocol,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # they would replace the client's address in some logs, whoever sent them
        log_config=None,
        timeout_graceful_shutdown=settings.drain_timeout_s,
    )
    server = _Server(config, parent)
    server.run([listening] if listening else None)
    if not server.started:
        raise SystemExit(ExitCode.STARTUP_FAILURE)


class _Server(uvicorn.Server):
    """Ends what passed its deadline, twice a second: cheaper than a timer for each request. Leaves late, if asked to."""

    def __init__(self, config: uvicorn.Config, parent: int | None) -> None:
        super().__init__(config)
        self._parent = parent
        self._leave_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; an address that cannot be listened on ends the start.

        Raises:
            SystemExit: it does not start; the log says why.
        """
        try:
            await super().startup(sockets)
            for opened in sockets or ():
                opened.listen(self.config.backlog)  # where another service has begun to meanwhile, uvloop says nothing
        except OSError as error:  # what uvicorn does with the address that it opens itself
            logger.error("%s", error)
            await self.lifespan.shutdown()
            self._say_it_cannot_listen()
            raise SystemExit(ExitCode.STARTUP_FAILURE) from error
        except SystemExit:
            if not self.lifespan.should_exit:  # else it has said why
                self._say_it_cannot_listen()
            raise
        service: Service = self.lifespan.state["service"]
        service.bodies.make_room = Protocol.room.end_slow_uploads
        threading.Thread(target=_end_if_failed, args=(service,), name="watch", daemon=True).start()

    def _say_it_cannot_listen(self) -> None:
        logger.critical("the service does not start: cannot listen on %s:%d", self.config.host, self.config.port)

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if counter % 5 == 0:  # uvicorn ticks ten times a second
            await self._enforce_deadlines(now)
            if self._parent is not None and os.getppid() != self._parent:
                self.should_exit = True  # nobody would replace it, or stop it
        if not await super().on_tick(counter):
            return False
        if self._leave_at is None:
            service: Service = self.lifespan.state["service"]
            service.leaving = True
            self._leave_at = now + service.settings.shutdown_delay_s
        return self.force_exit or now >= self._leave_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for open requests; uvicorn no longer ticks then, and uploads that never end would hold it to the last."""
        service: Service = self.lifespan.state["service"]
        service.drain_by = drain_by = time.monotonic() + service.settings.drain_timeout_s

        async def enforce() -> None:
            while True:
                now = time.monotonic()
                await self._enforce_deadlines(now)
                if now > drain_by - _ANSWERED_WITHIN_S:
                    for connection in self._connections():
                        with _contained(connection):
                            connection.refuse_unfinished()
                await asyncio.sleep(0.5)

        enforcing = asyncio.get_running_loop().create_task(enforce())
        try:
            await super().shutdown(sockets)
        finally:
            enforcing.cancel()

    async def _enforce_deadlines(self, now: float) -> None:
        for count, connection in enumerate(self._connections()):
            if count % _SWEPT_AT_ONCE == _SWEPT_AT_ONCE - 1:
                await asyncio.sleep(0)
            with _contained(connection):
                connection.enforce_deadlines(now)

    def _connections(self) -> list[Protocol]:
        return [cast("Protocol", connection) for connection in self.server_state.connections]


@contextlib.contextmanager
def _contained(connection: Protocol) -> Iterator[None]:
    """A defect met at one connection costs that one: raised further, it would end uvicorn's loop, and with it the service."""
    try:
        yield
    except Exception:
        logger.exception("a connection could not be looked after; it is closed")
        connection.transport.abort()


def _end_if_failed(service: Service) -> None:
    """Ends the process when its engine has failed, so that whoever started it starts another; the event loop may hang, too.

    A container's restart policy looks at nothing else: neither at health checks nor at clients that wait.
    """
    seen = 0
    while seen < 2:  # a worker that was stopped together with the whole machine goes on in between
        time.sleep(0.5)
        if service.leaving:
            return
        reason = service.scheduler.failure()
        seen = seen + 1 if reason else 0
    logger.critical("%s; this process ends with exit code %d, to be started anew", reason, ExitCode.ENGINE_FAILURE)
    logging.shutdown()  # or that line would be lost
    os._exit(ExitCode.ENGINE_FAILURE)  # threads that hang would keep any other end waiting


def within_open_files(settings: Settings) -> Settings:
    """Settings whose connections may all be open: else the listening socket would fail before our own cap, for probes too.

    The soft limit of open files, usually 1,024, is raised as far as that is needed and the hard limit allows. If it does not
    suffice, there will be fewer connections, and a warning says so.

    Args:
        settings: as they were given.

    Returns:
        The same, or a copy with a smaller `max_connections`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    with contextlib.suppress(ValueError, OSError):  # not allowed: then the lower limit stands
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed >= wanted:
        return settings
    connections = max(1, allowed - min(_OTHER_FILES, allowed // 2 + PROBE_CONNECTIONS))
    logger.warning(
        "no more than %d files may be open: %d connections instead of CONVMIXER_MAX_CONNECTIONS=%d; raise the hard limit "
        "(ulimit -Hn, LimitNOFILE, --ulimit nofile) to %d",
        allowed,
        connections,
        settings.max_connections,
        wanted,
    )
    return settings.model_copy(update={"max_connections": connections})
