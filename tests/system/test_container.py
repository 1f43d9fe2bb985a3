"""What Dockerfile and docker-compose.yml promise, read from them. Only the last test needs an engine, and an image: IMAGE=tag."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from app.settings import ENV_PREFIX, Settings
from tests.memory import implied_mib

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
SERVICE = SERVICES["classifier"]
IMAGE = os.environ.get("IMAGE")
OURS = pytest.mark.parametrize("service", ["classifier", "replica", "gpu"])


def final_stage() -> list[str]:
    return DOCKERFILE.split("\nFROM ")[-1].replace("\\\n", " ").splitlines()


def settings(service: str) -> Settings:
    """As the service would read them."""
    values = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in SERVICES[service]["environment"].items()}
    return Settings(**{name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", str(value)) for name, value in values.items()})


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
    number, unit = re.fullmatch(r"(\d+)([mg])", SERVICES[service]["mem_limit"]).groups()
    assert implied_mib(chosen.workers, chosen.max_pixels, chosen.max_held_bytes) <= int(number) * {"m": 1, "g": 1024}[unit]
    assert chosen.max_body_bytes <= chosen.max_held_bytes
    assert SERVICES[service]["pids_limit"] > chosen.workers


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
    found = yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["services"]
    assert found.keys() >= {name for name, one in SERVICES.items() if profile in one.get("profiles", [profile])}


def test_health_is_readiness_on_the_port_that_is_served():
    (check,) = re.findall(r"^HEALTHCHECK .*\n? *CMD .*", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)
    assert "'/readyz'" in check
    assert str(Settings.model_fields["port"].default) in check


def test_every_setting_named_exists():
    named = set(re.findall(r"CONVMIXER_([A-Z_]+)", DOCKERFILE + COMPOSE))
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
        give_up = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                assert time.monotonic() < give_up, docker("logs", container)
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
