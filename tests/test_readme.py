"""The README's answer is the server's, its examples run; the commands, make targets and files that documents name exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import app as serving_cli
from training.cli import app as training_cli

ROOT = Path(__file__).parent.parent


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


@pytest.fixture
def examples(readme, base_url):
    """The code blocks under "Using it" by language, with the running server's address."""
    section = readme.partition("\n## Using it\n")[2].partition("\n## ")[0].replace("http://127.0.0.1:8000", base_url)
    return lambda language: re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_the_examples_in_python_run(examples, repository):
    (code,) = examples("python")
    result = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 200


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_examples_in_the_shell_run(examples, repository, convmixer_on_path, tmp_path):
    for name in ("docs", "tests", "README.md"):  # what the examples write stays out of the repository
        (tmp_path / name).symlink_to(repository / name)
    script = "\n".join(["set -euo pipefail", *examples("sh")]).replace(".venv/bin/convmixer", "convmixer")
    environment = convmixer_on_path | {"CONVMIXER_WORKERS": "2", "CONVMIXER_MAX_BATCH": "4"}
    result = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert '"unsupported_image"' in result.stdout, "of README.md"
    assert '"heat_map"' in result.stdout
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 201
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 200


def documents() -> list[Path]:
    return sorted(
        [*ROOT.glob("*.md"), *(path for part in ("app", "deploy", "docs", "tests") for path in (ROOT / part).rglob("*.md"))]
    )


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", prose(document)):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_there_are_documents_with_links_and_anchors():
    found = [target for path in documents() for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", prose(path))]
    assert len(found) > 50
    assert any("#" in target for target in found)
