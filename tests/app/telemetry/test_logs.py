"""Log lines: what machines parse, what a terminal shows, and that a slow reader delays nobody."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator

import pytest

from app.telemetry.exchange import Exchange
from app.telemetry.logs import AccessLog, BackgroundHandler, JsonFormatter, TextFormatter
from tests.waiting import wait_until


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def record(message: str, *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    return logging.getLogger("app.test").makeRecord("app.test", level, __file__, 1, message, args, None, extra=extra)


def test_json_lines_are_one_line_whatever_is_in_them():
    try:
        raise ValueError("line 1\nline 2")
    except ValueError as error:
        entry = record("ü \n %s", "\udcff\x1b", request_id="abc")
        entry.exc_info = (ValueError, error, error.__traceback__)
    line = JsonFormatter().format(entry).encode(errors="backslashreplace")
    assert b"\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == "ü \n \udcff\x1b"
    assert parsed["request_id"] == "abc"
    assert parsed["level"] == "info"
    assert parsed["time"].endswith("Z")
    assert "ValueError: line 1\nline 2" in parsed["exception"]


def test_text_lines_cannot_move_the_cursor():
    line = TextFormatter().format(record("GET %s", "/\x1b[2J\n/forged line", request_id="abc"))
    assert line.endswith(r"INFO    app.test: GET /\x1b[2J\n/forged line request_id=abc")


def test_an_exception_cannot_move_the_cursor_either():
    entry = record("failed")
    entry.exc_info = (ValueError, ValueError("caf\x1b[2J\n\rforged"), None)
    entry.stack_info = "Stack\x07"
    first, *trace = TextFormatter().format(entry).split("\n")
    assert first.endswith("failed")
    assert trace == [r"ValueError: caf\x1b[2J", r"\rforged", r"Stack\x07"]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_stopped_reading_delays_nobody_and_is_told_what_it_missed(pipe, blocking):
    reading, writing = pipe
    handler = BackgroundHandler(writing, capacity=50)
    handler.setFormatter(JsonFormatter())
    os.set_blocking(writing, blocking)
    lines = 5000
    for number in range(lines):  # 600 kB, a pipe holds 64: a handler that writes itself would stop here for ever
        handler.handle(record("%d %s", number, "x" * 100))
    received = bytearray()

    def read() -> None:
        while piece := os.read(reading, 65536):
            received.extend(piece)
            if b'"the end"' in piece:
                return

    reader = threading.Thread(target=read)
    reader.start()
    wait_until(lambda: not handler._waiting)  # what was held is written now, then there is room again
    handler.handle(record("the end", level=logging.WARNING))
    reader.join(60)
    handler.close()
    entries = [json.loads(line) for line in received.decode().splitlines()]
    written = [entry for entry in entries if entry["logger"] == "app.test"]
    missed = [int(entry["message"].split()[0]) for entry in entries if "were lost" in entry["message"]]
    assert sum(missed) > 0
    assert len(written) - 1 + sum(missed) == lines


def test_lines_of_several_processes_stay_whole_where_the_reader_is_slow(pipe):
    reading, writing = pipe
    handlers = [BackgroundHandler(writing) for _ in range(3)]
    for handler in handlers:
        handler.setFormatter(JsonFormatter())
        for number in range(3000):
            handler.handle(record("%d %s", number, "x" * 100))
    received = bytearray()

    def has_all() -> bool:
        received.extend(os.read(reading, 1000))
        return received.count(b"\n") >= 9000

    while not has_all():
        pass
    for handler in handlers:
        handler.close()
    assert all(json.loads(line)["message"] for line in received.splitlines())


def test_lines_that_a_full_disk_did_not_take_are_counted(tmp_path):
    path, descriptor = tmp_path / "log", os.open("/dev/full", os.O_WRONLY)
    handler = BackgroundHandler(descriptor)
    for _ in range(3):
        handler.handle(record("lost", level=logging.WARNING))
    wait_until(lambda: not handler._waiting and handler._dropped >= 3)
    with path.open("wb") as file:
        os.dup2(file.fileno(), descriptor)  # there is room again
    handler.handle(record("kept", level=logging.WARNING))
    handler.close()
    os.close(descriptor)
    kept, lost = path.read_text().splitlines()
    assert kept == "kept"
    assert lost.startswith("3 log lines were lost")


def test_what_waits_at_the_end_is_written(pipe):
    reading, writing = pipe
    handler = BackgroundHandler(writing)
    handler.setFormatter(TextFormatter())
    handler.handle(record("last words"))
    handler.close()
    assert b"last words" in os.read(reading, 4096)


def test_a_wrong_format_string_does_not_end_the_log(pipe, capsys):
    reading, writing = pipe
    handler = BackgroundHandler(writing)
    handler.setFormatter(TextFormatter())
    handler.handle(record("%d", "no number"))
    handler.handle(record("still here"))
    handler.close()
    assert b"still here" in os.read(reading, 4096)
    assert "no number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "seconds", "told"),
    [(200, 0.01, False), (200, 1.5, True), (415, 0.01, True), (499, 0.01, True), (503, 0.01, False)],
)
def test_errors_are_what_somebody_should_look_at(caplog, status, seconds, told):
    exchange = Exchange("POST", "/classify", ("10.0.0.1", 1), ((b"authorization", b"Bearer key"),), "id", 0.0, status)
    exchange.seconds, exchange.code = seconds, "some_code" if status >= 400 else None
    log = AccessLog("errors")
    log(exchange)
    assert [entry.getMessage() for entry in caplog.records] == ([f"POST /classify {status}"] if told else [])
    AccessLog("all")(exchange)
    assert caplog.records[-1].request_id == "id"  # type: ignore[attr-defined]
    assert "key" not in JsonFormatter().format(caplog.records[-1])
