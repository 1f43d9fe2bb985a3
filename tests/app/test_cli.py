"""The `convmixer` command as a process."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CONVMIXER_")}
    command = [sys.executable, "-m", "app.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_help_lists_the_commands():
    result = run("--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("serve", "classify", "info"))


def test_info_prints_the_metadata():
    result = run("info")
    assert result.returncode == 0
    assert json.loads(result.stdout)["contract"] == "convmixer-artifact/1"


def test_classify_a_folder_in_order_as_json(samples):
    folder = samples[120].path.parent
    result = run("classify", str(folder), "--format", "json", "--top-k", "2")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["filename"] for row in rows] == [str(p) for p in sorted(folder.iterdir())]
    assert sum(row["label"] == folder.name for row in rows) >= 14
    assert all(len(row["top_k"]) == 2 for row in rows)


def test_a_bad_file_is_reported_the_rest_is_classified_and_the_exit_code_says_so(samples, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    result = run("classify", str(samples[0].path), str(bad), "--format", "csv")
    assert result.returncode == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [bool(row["error"]) for row in rows] == [False, True]
    table = run("classify", str(samples[0].path), str(bad))
    assert table.returncode == 1
    assert str(samples[0].path) in table.stdout
    assert f"{bad}  not an image" in table.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify", "/nowhere"], 2, "does not exist"),
        (["classify", "."], 1, "no image"),
        (["info", "--model", "gone.onnx"], 1, "gone.onnx cannot be read"),
        (["fly"], 2, "No such command"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(arguments, code, message, tmp_path, monkeypatch, repository):
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
