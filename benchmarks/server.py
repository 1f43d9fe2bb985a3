"""The real server as a process on a free port, for whoever wants one: tests, torture and benchmarks."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

REPOSITORY = Path(__file__).parent.parent
READY_TIMEOUT_S = 60


class ServerProcess:
    """`convmixer serve` with the given settings; as a context, it is stopped at the end, and must end well.

    One whose end was asked for before (`wait`, `stop`) may have ended in any way.

    Args:
        under: a command that starts it, e.g. `prlimit`.
        program: what Python runs.
        keep_settings: whether the caller's `CONVMIXER_*` hold, too.
        **settings: `CONVMIXER_*` without the prefix, in lower case.
    """

    def __init__(
        self,
        under: Sequence[str] = (),
        program: Sequence[str] = ("-m", "app.cli", "serve"),
        keep_settings: bool = False,
        **settings: object,
    ) -> None:
        environment = {name: value for name, value in os.environ.items() if keep_settings or not name.startswith("CONVMIXER_")}
        environment |= {"CONVMIXER_PORT": "0", **{f"CONVMIXER_{name.upper()}": str(value) for name, value in settings.items()}}
        command = [*under, sys.executable, *program]
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        self._lines: list[str] = []  # a text would be copied for each of a hundred thousand
        self._end_is_known = False
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self._lines.append(line)
            if "running on" in line:
                self._listening.set()
        self._listening.set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        end_was_known = self._end_is_known
        try:
            code = self.stop()
        finally:
            self.process.kill()  # nothing, if it has ended
        if failure is None and not end_was_known:
            assert code == 0, f"exit code {code}\n{self.log}"
            assert "Traceback" not in self.log, self.log

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return "".join(self._lines)

    @property
    def url(self) -> str:
        """Where it listens, once it does."""
        return f"http://{self._address()}"

    @property
    def port(self) -> int:
        """The one that it has chosen, once it listens."""
        return int(self._address().rpartition(":")[2])

    def _address(self) -> str:
        self._listening.wait(READY_TIMEOUT_S)
        found = re.search(r'running on http://([^\s"]+)', self.log)
        if not found:
            raise RuntimeError(f"the server did not start:\n{self.log}")
        return found[1]

    def wait_until_ready(self) -> str:
        """The base URL, once `/readyz` says yes."""
        address = self._address()
        give_up = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < give_up and self.process.poll() is None:
            with suppress(OSError):  # not yet, or a machine too busy to answer within 5 s
                urllib.request.urlopen(f"http://{address}/readyz", timeout=5).close()
                return f"http://{address}"
            time.sleep(0.02)
        raise RuntimeError(f"the server has ended, or was not ready within {READY_TIMEOUT_S} s:\n{self.log}")

    def memory_mib(self, which: str = "VmRSS") -> float:
        """Resident memory now (`VmRSS`) or at its highest (`VmHWM`)."""
        found = re.search(rf"{which}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1024 if found else float("nan")

    def log_has_ended(self, timeout_s: float) -> bool:
        """Whether none of its processes holds its standard error any more, after this time at the latest."""
        self._reader.join(timeout_s)
        return not self._reader.is_alive()

    def wait(self) -> int:
        """Exit code, once the process has ended."""
        code = self.process.wait(READY_TIMEOUT_S)
        self._end_is_known = True
        if self.log_has_ended(READY_TIMEOUT_S):
            assert self.process.stderr
            self.process.stderr.close()
        return code

    def stop(self) -> int:
        """Exit code after SIGTERM, or the one that it had ended with."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait()


def on_cores(cores: Iterable[int]) -> list[str]:
    """The command under which a process uses these cores alone."""
    return ["taskset", "--cpu-list", ",".join(map(str, sorted(cores)))]


def free_port() -> int:
    """A port that nobody listens on now, at any address, below those that Linux gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311 - no secret
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
