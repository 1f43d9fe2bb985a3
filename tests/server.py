"""The real server as a process on a free port, for any test that wants one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time

import httpx

READY_TIMEOUT_S = 60


class ServerProcess:
    """`convmixer serve` with the given settings; `log` grows while it runs."""

    def __init__(self, **settings: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CONVMIXER_")}
        environment |= {"CONVMIXER_PORT": "0", **{f"CONVMIXER_{k.upper()}": v for k, v in settings.items()}}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "serve"], env=environment, stderr=subprocess.PIPE, text=True
        )
        self.log = ""
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log += line
            if "Uvicorn running on" in line:
                self._listening.set()
        self._listening.set()

    def wait_until_ready(self) -> str:
        """The base URL, once `/readyz` says yes."""
        self._listening.wait(READY_TIMEOUT_S)
        address = re.search(r"Uvicorn running on (http://[\d.:]+)", self.log)
        assert address, f"the server did not start:\n{self.log}"
        give_up = time.monotonic() + READY_TIMEOUT_S
        while httpx.get(f"{address[1]}/readyz").status_code != 200:
            assert time.monotonic() < give_up, self.log
        return address[1]

    def wait(self) -> int:
        """Exit code, once the process has ended."""
        code = self.process.wait(READY_TIMEOUT_S)
        self._reader.join(READY_TIMEOUT_S)
        assert self.process.stderr
        self.process.stderr.close()
        return code

    def stop(self) -> int:
        """Exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()
