"""deploy/rolling_update.py before an engine that does as it is told and statistics as HAProxy writes them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "rolling_update.py"
IMPATIENT = "from deploy import rolling_update; rolling_update.TIMEOUT_S = 0.1; rolling_update.main()"
DOCKER = """#!/bin/sh
# an engine on which the containers of the file `running` run; what it is told to change is added to `told`
cd "$(dirname "$0")" || exit 1
case "$*" in
"compose version") exit 0 ;;
*" ps -q replica")
    cat running
    exit 0
    ;;
esac
echo "$*" >> told
case "$*" in
*" up "*) echo "new$(($(wc -l < told)))" >> running ;;
"rm "*) sed -i "/^$2\\$/d" running ;;
esac
"""


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
def answers() -> Iterator[list[bytes | None]]:
    """What the statistics say, one after the other; the last one ever after. None: the connection is cut."""
    with HTTPServer(("127.0.0.1", 0), Statistics) as server:
        server.answers = Answers()  # type: ignore[attr-defined]
        server.answers.address = f"127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.answers  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


class Answers(list[bytes | None]):
    """With where they are given."""

    address: str


class Engine:
    """Two replicas run, `a` and `b`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "running").write_text("a\nb\n")
        (folder / "docker").write_text(DOCKER)
        (folder / "docker").chmod(0o755)

    def update(self, operators: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What became of the script, or of Python with other arguments."""
        environment = os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "http_proxy": "http://127.0.0.1:1"}
        return subprocess.run(
            [sys.executable, *(arguments or (str(SCRIPT),))],
            env=environment | {"PUBLISH_OPERATORS": operators},
            cwd=SCRIPT.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def told(self) -> list[str]:
        """What it was told to change."""
        return (self.folder / "told").read_text().splitlines()


@pytest.fixture
def engine(tmp_path) -> Engine:
    return Engine(tmp_path)


REMOVE = "compose --profile scale rm -f replica"
UP = "compose --profile scale up -d --no-recreate --scale replica=3 replica"


def test_one_more_is_in_use_before_an_old_one_is_stopped(answers, engine):
    two, three = statistics(2, 16), statistics(3, 16)
    answers += [two, None, statistics(2, 16, asked=1), None, b"", two, three, two, two, three]
    ended = engine.update(answers.address)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert engine.told == [REMOVE, UP, "stop a", "rm a", UP, "stop b", "rm b"]
    assert ended.stdout.splitlines() == ["1 of 2 replaced", "2 of 2 replaced"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (statistics(2, 2), "has room for 2 replicas, and an update needs one more than the 2"),
        (None, "does not answer at 127"),
        (b"<html>another program</html>", "does not answer at 127.*no HAProxy"),
    ],
)
def test_nothing_is_changed_where_an_update_cannot_end(answers, engine, answer, message):
    answers.append(answer)
    ended = engine.update(answers.address)
    assert ended.returncode == 1
    assert re.search(message, ended.stderr)
    assert engine.told == [REMOVE]


def test_one_that_was_broken_at_the_begin_is_replaced_too(answers, engine):
    one, two = statistics(1, 16), statistics(2, 16)
    answers += [one, one, two, one, two]
    assert engine.update(answers.address).returncode == 0
    assert engine.told == [REMOVE, UP, "stop a", "rm a", UP, "stop b", "rm b"]


@pytest.mark.parametrize(("answer", "message"), [(statistics(2, 16), "sees 2 of 3 replicas"), (None, "does not answer at 127")])
def test_no_old_one_is_stopped_where_no_new_one_comes(answers, engine, answer, message):
    answers += [statistics(2, 16), statistics(2, 16), answer]
    ended = engine.update(answers.address, "-c", IMPATIENT)
    assert ended.returncode == 1
    assert re.search(rf"{message}.* after 0\.1 s: docker compose logs", ended.stderr)
    assert engine.told == [REMOVE, UP, "stop new2", "rm new2"]
    assert (engine.folder / "running").read_text() == "a\nb\n"


def test_without_docker_it_says_so(tmp_path):
    def update() -> str:
        return subprocess.run(
            [sys.executable, str(SCRIPT)], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
        ).stderr

    assert update() == "docker is not on the PATH\n"
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    assert update() == "docker has no plugin `compose`, and docker-compose is not on the PATH either\n"
