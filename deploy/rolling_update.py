#!/usr/bin/env python3
"""Replaces the replicas of docker-compose.yml one after the other, e.g. by a new image; no request is lost.

For each replica: start one more, wait until HAProxy sends it requests, stop the old one. It answers for
CONVMIXER_SHUTDOWN_DELAY_S more, and HAProxy sees within 1.25 s that it is no longer ready. Capacity never falls below
what it was. Standard library only; `docker compose` or `docker-compose` 1.29. COMPOSE_FILE and COMPOSE_PROJECT_NAME hold.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from http.client import HTTPException

OPERATORS = os.environ.get("PUBLISH_OPERATORS", "127.0.0.1:8404")
TIMEOUT_S = 120
_POLL_S = 0.2
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an http_proxy in the environment is not for this


def main() -> None:
    """Replaces them all."""
    compose = _compose()
    _run(*compose, "rm", "-f", "replica")  # stopped ones only: what an earlier run left would be started in place of a new one
    old = _run(*compose, "ps", "-q", "replica").split()
    if not old:
        sys.exit("no replica runs; start some: docker compose --profile scale up -d --scale replica=2 proxy")
    _check_room(len(old) + 1)
    for number, container in enumerate(old, start=1):
        # one of the old may be broken, which is a reason to replace it
        enough = _wait_until_up(0) + 1
        running = _run(*compose, "ps", "-q", "replica").split()
        _run(*compose, "up", "-d", "--no-recreate", "--scale", f"replica={len(old) + 1}", "replica")
        try:
            _wait_until_up(enough)
        except SystemExit:  # or each try would leave one more
            for started in set(_run(*compose, "ps", "-q", "replica").split()) - set(running):
                _remove(started)
            raise
        _remove(container)
        print(f"{number} of {len(old)} replaced", flush=True)


def _compose() -> list[str]:
    if not shutil.which("docker"):
        sys.exit("docker is not on the PATH")
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    if not has_plugin and not shutil.which("docker-compose"):
        sys.exit("docker has no plugin `compose`, and docker-compose is not on the PATH either")
    return [*(["docker", "compose"] if has_plugin else ["docker-compose"]), "--profile", "scale"]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _remove(container: str) -> None:
    _run("docker", "stop", container)  # waits as long as stop_grace_period says
    _run("docker", "rm", container)


def _check_room(count: int) -> None:
    """Ends the program, before any replica is touched, if HAProxy would not find so many replicas, or cannot be asked."""
    try:
        room = len(_replicas(OPERATORS))
    except OSError as error:
        sys.exit(f"HAProxy does not answer at {OPERATORS} (PUBLISH_OPERATORS): {error}")
    if room < count:
        sys.exit(
            f"HAProxy has room for {room} replicas, and an update needs one more than the {count - 1} that run: "
            "stop one, or raise the number of `server-template` in deploy/haproxy/haproxy.cfg"
        )


def _wait_until_up(count: int) -> int:
    """How many HAProxy sends requests to, once it says that they are so many."""
    give_up = time.monotonic() + TIMEOUT_S
    while True:
        try:
            found = replicas_up(OPERATORS)
        except OSError as error:  # it may be starting anew
            seen = f"HAProxy does not answer at {OPERATORS} ({error})"
        else:
            if found >= count:
                return found
            seen = f"HAProxy sees {found} of {count} replicas"
        if time.monotonic() > give_up:
            sys.exit(f"{seen} after {TIMEOUT_S} s: docker compose logs replica proxy")
        time.sleep(_POLL_S)


def replicas_up(operators: str) -> int:
    """Replicas that passed HAProxy's last check; UP alone would count those that the name server has just named.

    Args:
        operators: host and port of HAProxy's statistics.

    Raises:
        OSError: HAProxy does not answer, or not to the end.
    """
    # while the next check is under way there is a star before the last one's result
    return sum(row["status"] == "UP" and row["check_status"].removeprefix("* ") == "L7OK" for row in _replicas(operators))


def _replicas(operators: str) -> list[dict[str, str]]:
    """HAProxy's rows of all replicas that there may be (`server-template`)."""
    try:
        with _direct.open(f"http://{operators}/;csv", timeout=10) as answer:
            text = answer.read().decode()
    except HTTPException as error:
        raise ConnectionError(f"its answer broke off: {error!r}") from error
    rows = csv.DictReader(io.StringIO(text.removeprefix("# ")))
    if "pxname" not in (rows.fieldnames or ()):
        raise ConnectionError("what answers there is no HAProxy")
    return [row for row in rows if row["pxname"] == "replicas" and row["svname"] != "BACKEND"]


if __name__ == "__main__":
    main()
