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
import subprocess
import sys
import time
import urllib.request

OPERATORS = os.environ.get("PUBLISH_OPERATORS", "127.0.0.1:8404")
TIMEOUT_S = 120


def main() -> None:
    """Replaces them all."""
    compose = _compose()
    _run(*compose, "rm", "-f", "replica")  # stopped ones only: what an earlier run left would be started in place of a new one
    old = _run(*compose, "ps", "-q", "replica").split()
    if not old:
        sys.exit("no replica runs; start some: docker compose --profile scale up -d --scale replica=2 proxy")
    for number, container in enumerate(old, start=1):
        _run(*compose, "up", "-d", "--no-recreate", "--scale", f"replica={len(old) + 1}", "replica")
        _wait_until_up(len(old) + 1)
        _run("docker", "stop", container)  # waits as long as stop_grace_period says
        _run("docker", "rm", container)
        print(f"{number} of {len(old)} replaced", flush=True)


def _compose() -> list[str]:
    has_plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
    return [*(["docker", "compose"] if has_plugin else ["docker-compose"]), "--profile", "scale"]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def _wait_until_up(count: int) -> None:
    give_up = time.monotonic() + TIMEOUT_S
    while (found := replicas_up(OPERATORS)) < count:
        if time.monotonic() > give_up:
            sys.exit(f"HAProxy sees {found} of {count} replicas after {TIMEOUT_S} s: docker compose logs replica")
        time.sleep(0.2)


def replicas_up(operators: str) -> int:
    """Replicas that passed HAProxy's last check; UP alone would count those that the name server has just named.

    Args:
        operators: host and port of HAProxy's statistics.

    Raises:
        OSError: HAProxy does not answer.
    """
    with urllib.request.urlopen(f"http://{operators}/;csv", timeout=10) as answer:
        rows = csv.DictReader(io.StringIO(answer.read().decode().removeprefix("# ")))
    return sum(
        row["pxname"] == "replicas" and row["svname"] != "BACKEND" and row["status"] == "UP" and row["check_status"] == "L7OK"
        for row in rows
    )


if __name__ == "__main__":
    main()
