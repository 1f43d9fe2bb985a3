"""docs/api.md tells of every path there is, and its examples run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from playwright._impl._driver import compute_driver_executable

EXAMPLES = re.compile(r"^```(sh|python|javascript)\n(.*?)```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def document(repository) -> str:
    return (repository / "docs" / "api.md").read_text()


def test_every_path_is_told_of(document, client):
    found = client.get("/openapi.json").json()["paths"]
    offered = {f"{method.upper()} {path}" for path, methods in found.items() for method in methods}
    told = set()
    for method, path in re.findall(r"`(GET|POST) (/[^`?]*)`", document):
        plain = re.sub(r"\[.*?\]", "", path)
        told |= {f"{method} {plain}", f"{method} {path.replace('[', '').replace(']', '')}"}
    assert offered <= told
    assert {entry for entry in told if "/v2" in entry or entry.startswith("POST")} <= offered


@pytest.mark.parametrize("language", ["sh", "python", "javascript"])
def test_examples_run(document, base_url, repository, tmp_path, language):
    shutil.copy(repository / "docs" / "images" / "cat.png", tmp_path)
    blocks = [code for kind, code in EXAMPLES.findall(document) if kind == language]
    assert blocks
    for code in blocks:
        ready = code.replace("127.0.0.1:8000", base_url.removeprefix("http://"))
        # Node takes `import` only in a file of the right name: the one that readers are told
        name = re.search(r"JavaScript.*saved as `(\S+)`", document)[1] if language == "javascript" else f"example.{language}"
        script = tmp_path / name
        script.write_text(ready)
        node = shutil.which("node") or compute_driver_executable()[0]
        program = {"sh": ["bash", "-e"], "python": [sys.executable], "javascript": [node]}[language]
        done = subprocess.run([*program, script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if language != "python" or "predictions" in code:
            assert "cat" in done.stdout
        if language == "sh":
            assert done.stdout.count('"label":"cat","confidence"') == 3


def test_the_oldest_node_that_is_named_has_what_the_example_needs(document):
    (oldest,) = map(int, re.findall(r"Node (\d+) and newer", document))
    assert "openAsBlob" in document
    assert oldest >= 20  # `openAsBlob` came with 19.8
