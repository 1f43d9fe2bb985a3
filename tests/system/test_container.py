"""What the container promises, read from its files: no engine is needed."""

import re
from pathlib import Path

import pytest
import yaml

import app
from app.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = (ROOT / "docker-compose.yml").read_text()
SERVICE = yaml.safe_load(COMPOSE)["services"]["classifier"]


def final_stage() -> list[str]:
    return DOCKERFILE.split("\nFROM ")[-1].replace("\\\n", " ").splitlines()


def test_the_container_can_do_little_but_answer():
    assert SERVICE["read_only"] is True
    assert SERVICE["cap_drop"] == ["ALL"]
    assert SERVICE["security_opt"] == ["no-new-privileges:true"]
    assert SERVICE["mem_limit"]
    assert SERVICE["pids_limit"] > 0


def test_it_runs_as_a_user_that_kubernetes_can_tell_is_not_root():
    (user,) = (line.removeprefix("USER ") for line in final_stage() if line.startswith("USER "))
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_it_is_published_on_this_machine_only_unless_asked():
    assert SERVICE["ports"] == ["${PUBLISH:-127.0.0.1:8000}:8000"]


def test_a_stop_waits_for_the_drain():
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_timeout_s"].default


def test_health_is_readiness_on_the_port_that_is_served():
    (check,) = re.findall(r"^HEALTHCHECK .*\n? *CMD .*", DOCKERFILE.replace("\\\n", " "), re.MULTILINE)
    assert "'/readyz'" in check
    assert str(Settings.model_fields["port"].default) in check


def test_every_setting_named_exists():
    named = set(re.findall(r"CONVMIXER_([A-Z_]+)", DOCKERFILE + COMPOSE))
    assert named
    assert {name.lower() for name in named} <= set(Settings.model_fields)


@pytest.mark.parametrize(
    ("label", "value"), [("title", "convmixer-serve"), ("version", app.__version__), ("licenses", "Apache-2.0")]
)
def test_labels_agree_with_the_package(label, value):
    assert f'org.opencontainers.image.{label}="{value}"' in DOCKERFILE


def test_only_what_is_copied_is_sent_to_the_engine():
    ignored, *allowed = (line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#"))
    assert ignored == "*"
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    assert {line.removeprefix("!") for line in allowed if line.startswith("!")} == set(" ".join(copied).split())


def test_onnxruntime_reports_nothing_to_its_maker():
    assert any("ORT_DISABLE_TELEMETRY=1" in line for line in final_stage())
