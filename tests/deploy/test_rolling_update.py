"""deploy/rolling_update.py before an engine that does as it is told and statistics as HAProxy writes them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from deploy import rolling_update


def statistics(up: int, slots: int, asked: int = 0) -> bytes:
    """So many replicas in use of so many that there may be, of which some are being asked again whether they are well."""
    states = ["UP,* L7OK"] * asked + ["UP,L7OK"] * (up - asked) + ["MAINT (resolution),"] * (slots - up)
    rows = [f"replicas,replica{i},{state}" for i, state in enumerate(states, start=1)]
    return "\n".join(["# pxname,svname,status,check_status", "public,FRONTEND,OPEN,", *rows, "replicas,BACKEND,UP,"]).encode()


class Statistics(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answers = self.server.answers  # type: ignore[attr-defined]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer) or 1))  # nothing: it breaks off
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def answers(monkeypatch) -> Iterator[list[bytes | None]]:
    """What the statistics say, one after the other; the last one ever after. None: the connection is cut."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(rolling_update, "_POLL_S", 0)
    with HTTPServer(("127.0.0.1", 0), Statistics) as server:
        server.answers = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(rolling_update, "OPERATORS", f"127.0.0.1:{server.server_address[1]}")
        yield server.answers  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


@pytest.fixture
def commands(monkeypatch) -> list[str]:
    """What the engine was told to change; two replicas run."""
    told: list[str] = []
    running = ["a", "b"]

    def run(*command: str) -> str:
        if "ps" in command:
            return "\n".join(running)
        told.append(" ".join(command))
        if "up" in command:
            running.append(f"new{len(told)}")
        if "rm" in command and "compose" not in command:
            running.remove(command[-1])
        return ""

    monkeypatch.setattr(rolling_update, "_compose", lambda: ["compose"])
    monkeypatch.setattr(rolling_update, "_run", run)
    return told


UP = "compose up -d --no-recreate --scale replica=3 replica"


def test_one_more_is_in_use_before_an_old_one_is_stopped(answers, commands, capsys):
    two, three = statistics(2, 16), statistics(3, 16)
    answers += [two, None, statistics(2, 16, asked=1), None, b"", two, three, two, two, three]
    rolling_update.main()
    assert commands[1:] == [UP, "docker stop a", "docker rm a", UP, "docker stop b", "docker rm b"]
    assert capsys.readouterr().out.splitlines() == ["1 of 2 replaced", "2 of 2 replaced"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (statistics(2, 2), "has room for 2 replicas, and an update needs one more than the 2"),
        (None, "does not answer at 127"),
        (b"<html>another program</html>", "does not answer at 127.*no HAProxy"),
    ],
)
def test_nothing_is_changed_where_an_update_cannot_end(answers, commands, answer, message):
    answers.append(answer)
    with pytest.raises(SystemExit, match=message):
        rolling_update.main()
    assert commands == ["compose rm -f replica"]


def test_one_that_was_broken_at_the_begin_is_replaced_too(answers, commands):
    one, two = statistics(1, 16), statistics(2, 16)
    answers += [one, one, two, one, two]
    rolling_update.main()
    assert commands[1:] == [UP, "docker stop a", "docker rm a", UP, "docker stop b", "docker rm b"]


@pytest.mark.parametrize(("answer", "message"), [(statistics(2, 16), "sees 2 of 3 replicas"), (None, "does not answer at 127")])
def test_no_old_one_is_stopped_where_no_new_one_comes(answers, commands, monkeypatch, answer, message):
    monkeypatch.setattr(rolling_update, "TIMEOUT_S", 0.1)
    answers += [statistics(2, 16), statistics(2, 16), answer]
    with pytest.raises(SystemExit, match=rf"{message}.* after 0\.1 s: docker compose logs"):
        rolling_update.main()
    assert commands[1:] == [UP, "docker stop new2", "docker rm new2"]


def test_without_docker_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="docker is not on the PATH"):
        rolling_update.main()
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    with pytest.raises(SystemExit, match="docker has no plugin `compose`, and docker-compose is not on the PATH either"):
        rolling_update.main()
