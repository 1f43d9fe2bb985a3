"""Log lines: JSON for machines, text for a terminal, written by a thread of their own; and the access log."""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal

from app.telemetry.exchange import Exchange
from app.text import visible

access = logging.getLogger("app.access")

SLOW_S = 1.0
"""An answer that took longer is worth a line."""

_ORDINARY = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
_LONGEST_PATH = 256
_to_json = json.JSONEncoder(ensure_ascii=False, default=str).encode  # json.dumps would make an encoder for each line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339), level, logger, message, what the call gave as `extra`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        entry = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        entry |= extra(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _to_json(entry)


class TextFormatter(logging.Formatter):
    """Time, level, logger, message, `extra` as key=value, exception; nothing in it can move the cursor but the ends of lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's name
        """The first line."""
        line = " ".join([super().formatMessage(record), *(f"{key}={value}" for key, value in extra(record).items())])
        return visible(line)

    def formatException(self, ei: Any) -> str:  # noqa: N802 -- logging's name
        """The trace: lines that end where they did."""
        return "\n".join(map(visible, super().formatException(ei).split("\n")))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 -- logging's name
        """Likewise."""
        return "\n".join(map(visible, super().formatStack(stack_info).split("\n")))


def extra(record: logging.LogRecord) -> dict[str, Any]:
    """What the call gave as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _ORDINARY}


class BackgroundHandler(logging.Handler):
    """Hands records to a thread that formats and writes them, so that a slow reader of the log delays no request.

    Lines are gathered for a moment and written together: at 1,000 lines a second waking the thread for each would cost
    more than all else. A warning is written at once. When `capacity` records wait, further ones are dropped, and a line
    says how many were. A killed process loses its last moment's lines.

    Args:
        descriptor: where to write.
        capacity: most records that wait.
    """

    _GATHER_S = 0.05
    _STOP_S = 2.0

    def __init__(self, descriptor: int, capacity: int = 10_000) -> None:
        super().__init__()
        self.descriptor, self.capacity = descriptor, capacity
        self._waiting: deque[logging.LogRecord] = deque()
        self._dropped = 0
        self._some, self._urgent = threading.Event(), threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a record; never waits."""
        if len(self._waiting) >= self.capacity:
            self._dropped += 1
            return
        self._waiting.append(record)
        if record.levelno >= logging.WARNING:
            self._urgent.set()
        if not self._some.is_set():
            self._some.set()

    def close(self) -> None:
        """Writes what waits, if its reader takes it within two seconds (logging calls this when the process ends)."""
        self._closing = True
        self._urgent.set()
        self._some.set()
        self._thread.join(self._STOP_S)
        super().close()

    def _run(self) -> None:
        while not self._closing or self._waiting:
            self._some.wait()
            self._urgent.wait(self._GATHER_S)
            self._urgent.clear()
            self._some.clear()
            untold = self._dropped
            lines = self._lines()
            if not self._write("".join(lines).encode(errors="backslashreplace")):
                self._dropped += untold + len(lines) - bool(untold)

    def _lines(self) -> list[str]:
        lines = []
        dropped, self._dropped = self._dropped, 0
        for _ in range(len(self._waiting)):
            record = self._waiting.popleft()
            try:
                lines.append(self.format(record) + "\n")
            except Exception:  # a wrong format string must not end the log
                self.handleError(record)
        if dropped:
            text = "%d log lines were lost: what reads the log is slower than what writes it, or could not take them"
            lines.append(self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (dropped,), None)) + "\n")
        return lines

    def _write(self, data: bytes) -> bool:
        begin = 0
        while begin < len(data):
            # whole lines, as many as a pipe takes in one piece: other processes may write to it, too (pipe(7), PIPE_BUF)
            end = data.rfind(b"\n", begin, begin + select.PIPE_BUF) + 1 or data.find(b"\n", begin) + 1
            try:
                begin += os.write(self.descriptor, memoryview(data)[begin:end])
            except BlockingIOError:
                select.select((), (self.descriptor,), ())
            except OSError:  # nobody reads any more, or the disk is full, which may pass
                return False
        return True


class AccessLog:
    """One line for each request, of the logger `app.access`.

    Args:
        which: `all`, or `errors`: failures but no refusals, which come by thousands when there is no time for them and are
            counted in the metrics; and whatever took longer than `SLOW_S`.
    """

    def __init__(self, which: Literal["errors", "all"]) -> None:
        self.all = which == "all"
        access.setLevel(logging.INFO)

    def wants(self, status: int, seconds: float) -> bool:
        """Whether such an answer gets a line."""
        return self.all or (status >= 400 and status != 503) or seconds > SLOW_S

    def __call__(self, exchange: Exchange) -> None:
        """Tells of an answer."""
        if not self.wants(exchange.status, exchange.seconds):
            return
        line = access.makeRecord(access.name, logging.INFO, __file__, 0, "%s %s %d", _request_line(exchange), None)
        fields: dict[str, Any] = {
            "method": exchange.method,
            "path": exchange.path[:_LONGEST_PATH],
            "status": exchange.status,
            "bytes": exchange.sent_bytes,
            "ms": round(exchange.seconds * 1000, 2),
            "images": len(exchange.timings),
            "request_id": exchange.request_id,
            "client": exchange.client and exchange.client[0],
        }
        if exchange.code:
            fields["code"] = exchange.code
        if exchange.trace_id:
            fields["trace_id"] = exchange.trace_id
        vars(line).update(fields)
        access.handle(line)


def _request_line(exchange: Exchange) -> tuple[str, str, int]:
    return exchange.method or "-", exchange.path[:_LONGEST_PATH] or "-", exchange.status


def configure_logging(level: str, form: Literal["auto", "json", "text"] = "auto") -> None:
    """Sends all of the process' log to standard error, uvicorn's and uncaught exceptions too.

    Args:
        level: least severe messages.
        form: `auto` is text if standard error is a terminal, else JSON.
    """
    descriptor = sys.stderr.fileno()
    as_text = form == "text" or (form == "auto" and os.isatty(descriptor))
    handler = BackgroundHandler(descriptor)
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: logging.critical("uncaught exception", exc_info=(kind, error, trace))
    threading.excepthook = lambda caught: logging.critical(
        "uncaught exception in thread %s", caught.thread and caught.thread.name, exc_info=caught.exc_value
    )
