"""What Dockerfile and docker-compose.yml promise, read from them. Only the last test needs an engine, and an image: IMAGE=tag."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
import yaml

from app.settings import ENV_PREFIX, Settings
from tests.ipv6 import needs_ipv6
from tests.memory import implied_mib
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
SERVICE = SERVICES["classifier"]
IMAGE = os.environ.get("IMAGE")
NOT_PASSED = {
    "provider": "the image has one, which its service names",
    "precision": "of OpenVINO, which no image has",
    "host": "the image's",
    "port": "PUBLISH is for that",
    "drain_timeout_s": "stop_grace_period has to be longer",
    "shutdown_delay_s": "likewise; replicas have theirs",
}
"""Settings that docker-compose.yml does not take from the environment in which it is called."""

HARDWARE_THREADS = 1024
"""Of a machine larger than any there is with two sockets; onnxruntime has a thread on each for lone requests."""

OURS = pytest.mark.parametrize("service", ["classifier", "replica", "gpu"])


def final_stage() -> list[str]:
    return DOCKERFILE.split("\nFROM ")[-1].replace("\\\n", " ").splitlines()


def settings(service: str) -> Settings:
    """As the service would read them, where none is set outside."""
    given = {name: value for name, value in SERVICES[service]["environment"].items() if value is not None}
    return Settings(**{name.removeprefix(ENV_PREFIX).lower(): default_of(str(value)) for name, value in given.items()})


def default_of(value: str) -> str:
    """What compose puts in the place of a variable that is not set."""
    return re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)


@pytest.mark.parametrize("service", ["classifier", "replica", "proxy", "gpu"])
def test_containers_can_do_little_but_answer(service):
    found = SERVICES[service]
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["mem_limit"]


@OURS
def test_memory_is_what_the_settings_imply(service):
    chosen = settings(service)
    number, unit = re.fullmatch(r"(\d+)([mg])", default_of(SERVICES[service]["mem_limit"])).groups()
    assert implied_mib(chosen) <= int(number) * {"m": 1, "g": 1024}[unit]
    assert chosen.max_body_bytes <= chosen.max_held_bytes


@OURS
def test_there_may_be_as_many_threads_as_a_large_machine_makes_useful(service):
    """anyio's 40 and asyncio's 32 at most are of each process, a dozen are uvicorn's, the log's and the libraries'."""
    processes = 16
    assert SERVICES[service]["pids_limit"] > HARDWARE_THREADS + processes * (settings(service).workers + 40 + 32 + 12)


@OURS
def test_every_setting_is_passed_but_for_those_with_a_reason(service):
    environment = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in SERVICES[service]["environment"].items()}
    passed = {n for n, value in environment.items() if value is None or str(value).startswith(f"${{{ENV_PREFIX}{n.upper()}:-")}
    assert passed == set(Settings.model_fields) - NOT_PASSED.keys()


def test_it_runs_as_a_user_that_kubernetes_can_tell_is_not_root():
    (user,) = (line.removeprefix("USER ") for line in final_stage() if line.startswith("USER "))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_it_is_published_on_this_machine_only_unless_asked():
    assert SERVICE["ports"] == SERVICES["gpu"]["ports"] == ["${PUBLISH:-127.0.0.1:8000}:8000"]
    assert SERVICES["replica"]["ports"] == []
    assert all(re.match(r"\$\{\w+:-127\.0\.0\.1:", port) for port in SERVICES["proxy"]["ports"])


@OURS
def test_a_stop_waits_for_the_drain(service):
    chosen = settings(service)
    assert int(SERVICES[service]["stop_grace_period"].removesuffix("s")) > chosen.shutdown_delay_s + chosen.drain_timeout_s + 5


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="docker-compose is not installed")
@pytest.mark.parametrize("profile", ["", "scale", "gpu", "observability"])
def test_compose_understands_every_profile(profile):
    """docker-compose 1.29, the oldest that is meant to work; newer ones read the same specification."""
    command = ["docker-compose", "-f", str(ROOT / "docker-compose.yml"), "--profile", profile, "config"]
    environment = os.environ | {"CONVMIXER_API_KEYS": "secret", "MEM_LIMIT": "3g"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = yaml.safe_load(done.stdout)["services"]
    assert found.keys() >= {name for name, one in SERVICES.items() if profile in one.get("profiles", [profile])}
    for service in found.keys() & {"classifier", "replica", "gpu"}:
        assert found[service]["environment"]["CONVMIXER_API_KEYS"] == "secret"
        assert found[service]["environment"]["CONVMIXER_LOG_LEVEL"] is None  # then the container has none
        assert found[service]["mem_limit"] == "3g"


class Readiness(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(self.server.status if self.path == "/readyz" else 404)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Server6(HTTPServer):
    address_family = socket.AF_INET6


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1", pytest.param("::", marks=needs_ipv6)])  # noqa: S104
def test_health_is_readiness_where_it_is_served(host):
    (command,) = re.findall(r"^HEALTHCHECK .*\s+CMD (\[.*\])$", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)
    _, *arguments = json.loads(command)

    def check(**environment: str) -> int:
        return subprocess.run([sys.executable, *arguments], env=environment, stderr=subprocess.DEVNULL, check=False).returncode

    with (Server6 if ":" in host else HTTPServer)((host, 0), Readiness) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = {"CONVMIXER_HOST": host, "CONVMIXER_PORT": str(server.server_address[1]), "http_proxy": "http://127.0.0.1:1"}
        codes = []
        for server.status in (200, 503):  # type: ignore[attr-defined]
            codes.append(check(**address))
        server.shutdown()
        thread.join()
    assert codes == [0, 1]
    assert check(**address) == 1


def test_health_is_asked_for_at_the_default_port():
    assert f"'CONVMIXER_PORT', '{Settings.model_fields['port'].default}'" in DOCKERFILE


def test_what_is_asked_again_and_again_has_time_to_start():
    assert all(SERVICES[service]["healthcheck"]["start_period"] for service in ("classifier", "replica", "proxy", "gpu"))


def test_every_setting_named_exists():
    named = set(re.findall(r"CONVMIXER_([A-Z0-9_]+)", DOCKERFILE + COMPOSE))
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


def test_only_what_is_copied_is_sent_to_the_engine():
    ignored, *allowed = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#"))
    assert ignored == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert {line.removeprefix("!") for line in allowed if line.startswith("!")} == set(" ".join(copied).split())


def test_onnxruntime_reports_nothing_to_its_maker():
    assert any("ORT_DISABLE_TELEMETRY=1" in line for line in final_stage())


@pytest.mark.skipif(not IMAGE, reason="set IMAGE to the tag of a built image to start it")
def test_the_image_answers_and_stops():
    def docker(*arguments: str) -> str:
        return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    container = docker("run", "-d", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "-p", "127.0.0.1::8000", IMAGE)  # noqa: S108
    try:
        url = f"http://{docker('port', container, '8000/tcp')}"

        def is_ready() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{url}/readyz").status_code == 200
            return False

        wait_until(is_ready, lambda: docker("logs", container))
        image = (ROOT / "docs" / "images" / "cat.png").read_bytes()
        answer = httpx.post(f"{url}/classify", content=image, headers={"Content-Type": "image/png"})
        assert answer.json()["predictions"][0]["label"] == "cat"
        assert docker("exec", container, "cat", "/proc/1/comm") == "tini"
        assert docker("exec", container, "id", "-u") == "10001"
        docker("stop", container)
        (state,) = json.loads(docker("inspect", container))
        assert state["State"]["ExitCode"] == 0
        assert state["Config"]["Labels"]["org.opencontainers.image.version"]
    finally:
        docker("rm", "-f", container)
