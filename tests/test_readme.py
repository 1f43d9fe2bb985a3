"""The README's first answer is the server's; the commands, make targets and files it names exist."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from typer.testing import CliRunner

from app.cli import app as serving_cli
from training.cli import app as training_cli


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text()


def test_the_first_answer_is_the_servers(readme, repository, client):
    command = re.search(r"^curl .*$", readme, re.MULTILINE)[0]
    arguments = shlex.split(command)
    image = (repository / arguments[arguments.index("--data-binary") + 1].removeprefix("@")).read_bytes()
    name, _, value = arguments[arguments.index("-H") + 1].partition(": ")
    path = re.search(r"http://127\.0\.0\.1:8000(\S*)", arguments[-1])[1]
    found = client.post(path, content=image, headers={name: value}).json()
    said = json.loads(re.search(r"```json\n(.*?)```", readme, re.DOTALL)[1])
    assert said.keys() == found.keys()
    assert said["model"] == found["model"]
    (said_one,), (found_one,) = said["predictions"], found["predictions"]
    assert said_one.keys() == found_one.keys()
    assert said_one["label"] == found_one["label"] == "cat"
    assert said_one["in_distribution"] == found_one["in_distribution"]
    for one, other in zip(said_one["top_k"], found_one["top_k"], strict=True):
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-3)


def test_every_make_target_it_names_exists(readme, repository):
    targets = set(re.findall(r"^(\w+):", (repository / "Makefile").read_text(), re.MULTILINE))
    named = {word for line in re.findall(r"make ((?:[a-z]+ ?)+)", readme) for word in line.split()}
    assert {"serve", "test", "train", "evaluate", "export", "bench"} <= named <= targets


def test_every_subcommand_it_names_exists(readme):
    for name, app in (("convmixer", serving_cli), ("convmixer-train", training_cli)):
        commands = set(re.findall(rf"{name} ([a-z]+)\b", readme))
        assert commands, name
        for command in commands:
            assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, f"{name} {command}"


def test_links_lead_somewhere(readme, repository):
    targets = re.findall(r"\]\(((?!http)[^)#]+)\)", readme)
    assert targets
    for target in targets:
        assert (repository / target).exists(), target
