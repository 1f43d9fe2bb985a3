"""Several processes behind one address: `CONVMIXER_PROCESSES`.

The first process opens the listening socket, starts the others on it, replaces what dies and passes SIGTERM on; it answers
nothing itself. The others share nothing but the socket, and a folder in which each tells its metrics (`app.telemetry.siblings`),
as it does itself.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry

from app.errors import StartupError
from app.exit_codes import ExitCode
from app.settings import Settings
from app.telemetry.metrics_port import metrics_server
from app.telemetry.siblings import ParentMetrics, Siblings, socket_path

logger = logging.getLogger(__name__)


_CANNOT_START = (ExitCode.FAILED, ExitCode.USAGE, ExitCode.STARTUP_FAILURE)
"""A process that ends so would fail in the same way again."""

_LARGEST_PID = 2**22
_LONGEST_SOCKET_PATH = 103  # bytes, on macOS; on Linux 107 (unix(7))

_STARTED_S = 60.0
"""Whoever lives longer has started, whatever its exit code."""

_RESPAWN_DELAY_S = 1.0
"""Between two starts of a process that lives no longer; twice as long, and so on, for one that does not start."""

_MOST_DOUBLINGS = 4
_POLL_S = 0.05


class Supervisor:
    """Runs `settings.processes` of them until SIGTERM or SIGINT.

    Args:
        settings: address, number of processes, the metrics' own port.
        command: what starts one; `--fd`, `--siblings` and `--parent` are added.
        environment: of each.
    """

    def __init__(self, settings: Settings, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._settings, self._command, self._environment = settings, command, environment
        self._started: dict[int, float] = {}
        self._due = [0.0] * settings.processes  # time.monotonic() at which those that are missing are to be started
        self._early_ends = 0
        self._ever_ready = self._stopping = False
        self._exit_code = 0
        self._metrics = ParentMetrics(settings.processes)

    def run(self) -> int:
        """Comes back when all have ended.

        Returns:
            Exit code: 0 after a signal, else that of the process that could not start.

        Raises:
            StartupError: the address or the metrics' port cannot be opened, there is no place for temporary files, or no process
                can be started.
        """
        bound = _bind(self._settings)
        host, port = bound.getsockname()[:2]
        with bound, _meeting_place() as name:
            folder = Path(name)
            everybody = CollectorRegistry()
            everybody.register(Siblings(folder))
            command = [*self._command, "--fd", str(bound.fileno()), "--siblings", name, "--parent", str(os.getpid())]

            def stop(*_: object) -> None:
                bound.close()  # or new clients would wait here, for nobody, until the last process has ended
                self._stop()

            with metrics_server(self._settings, everybody):
                signal.signal(signal.SIGTERM, stop)
                signal.signal(signal.SIGINT, stop)
                # a signal just before a blocking wait would not end it; looking twenty times a second has no such moment
                while self._started or not self._stopping:
                    self._metrics.leave(folder)
                    self._start_due(command)
                    self._reap(folder)
                    if not self._ever_ready and _is_listened_on(bound):
                        self._ever_ready = True
                        logger.info("Uvicorn running on http://%s:%d (%d processes)", host, port, self._settings.processes)
                    time.sleep(_POLL_S)
        return self._exit_code

    def _start_due(self, command: list[str]) -> None:
        now = time.monotonic()
        for due in [due for due in self._due if due <= now]:
            if self._stopping:
                return
            self._due.remove(due)
            try:
                pid = os.posix_spawn(command[0], command, self._environment)
            except OSError as error:
                if not self._ever_ready:
                    self._stop()
                    raise StartupError(f"a process cannot be started: {error}") from error
                logger.error("a process cannot be started: %s", error)
                self._replace(now, early=True)
                continue
            self._watch(pid)

    def _watch(self, pid: int) -> None:
        self._started[pid] = time.monotonic()
        if self._stopping:  # the signal came when it was not known yet
            os.kill(pid, signal.SIGTERM)

    def _reap(self, folder: Path) -> None:
        while self._started:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            if pid in self._started:  # as process 1 this one inherits others, too, whose parents have died
                socket_path(folder, pid).unlink(missing_ok=True)  # if it was killed
                self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, code: int) -> None:
        """Has it replaced, if that is of any use."""
        begin = self._started.pop(pid)
        early = code in _CANNOT_START and time.monotonic() - begin < _STARTED_S
        if self._stopping:
            return
        if early and not self._ever_ready:
            logger.critical("process %d does not start (exit code %d); stopping", pid, code)
            self._exit_code = code
            self._stop()
            return
        # the others go on; what keeps this one from starting (memory, a file that is being replaced) may pass
        logger.error("process %d ended with %d; it is replaced", pid, code)
        self._replace(begin, early=early)

    def _replace(self, begin: float, *, early: bool) -> None:
        """Has another started, at the earliest some time after the begin of the one that is missing."""
        self._metrics.replacements += 1
        self._early_ends = min(self._early_ends + 1, _MOST_DOUBLINGS) if early else 0
        self._due.append(begin + _RESPAWN_DELAY_S * (1 << self._early_ends))

    def _stop(self) -> None:
        self._stopping = True
        for pid in list(self._started):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _bind(settings: Settings) -> socket.socket:
    """The address, taken but not listened on: clients are refused until the first process is ready."""
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if bound.family == socket.AF_INET6:  # as one process does, whose socket uvloop opens
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise StartupError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
    bound.set_inheritable(True)
    return bound


def _is_listened_on(bound: socket.socket) -> bool:
    with suppress(OSError):  # it was closed
        return bool(bound.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def _meeting_place() -> tempfile.TemporaryDirectory[str]:
    """A folder for the sockets of all processes.

    Raises:
        StartupError: there is no place for temporary files, or its name is too long for a socket's.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="convmixer-")
    except OSError as error:
        raise StartupError(f"several processes need a folder for temporary files (TMPDIR): {error.strerror or error}") from error
    if len(os.fsencode(socket_path(Path(folder.name), _LARGEST_PID))) > _LONGEST_SOCKET_PATH:
        folder.cleanup()
        raise StartupError(f"{folder.name} has too long a name for sockets in it; set TMPDIR to a shorter one")
    return folder


def command_line() -> list[str]:
    """What starts this program once more."""
    return [sys.executable, "-P", "-m", "app.cli", *sys.argv[1:]]


def environment() -> dict[str, str]:
    """In which it finds this package, and not another `app` that lies in the working directory (hence `-P`)."""
    here = str(Path(__file__).resolve().parent.parent)
    if Path(sys.path[0]).resolve() != Path(here):  # it is installed
        return dict(os.environ)
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])}
