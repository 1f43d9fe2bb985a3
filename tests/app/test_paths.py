"""Which files lie below a folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.text import printable
from pictures.files import find_files


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("in/b/2", "in/b/1", "in/z/3", "in/0", "elsewhere/4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "in"


def names(folder: Path) -> list[str]:
    errors: list[OSError] = []
    found = [path.removeprefix(f"{folder}/") for path in find_files(str(folder), errors.append)]
    assert not errors
    return found


def test_files_come_in_order_and_those_behind_links_last(folder):
    (folder / "a").symlink_to(folder.parent / "elsewhere")
    assert names(folder) == ["0", "b/1", "b/2", "z/3", "a/4"]


def test_links_that_lead_back_or_twice_to_one_folder_repeat_nothing(folder):
    (folder / "loop").symlink_to(".")
    (folder / "b" / "up").symlink_to("../b")
    (folder / "a").symlink_to("z")  # the folder's own name is kept
    for name in ("x", "y"):
        (folder / name).symlink_to(folder.parent / "elsewhere")
    assert names(folder) == ["0", "b/1", "b/2", "z/3", "x/4"]


def test_what_is_hidden_is_passed_over_unless_it_is_asked_for(folder):
    for name in (".git/5", "b/._1", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    assert names(folder) == ["0", "b/1", "b/2", "z/3"]
    assert names(folder / ".git") == ["5"]


def test_names_that_are_no_utf8_come_as_python_has_them_and_can_be_printed(folder):
    (folder / os.fsdecode(b"caf\xe9")).touch()
    assert names(folder)[:2] == ["0", "caf\udce9"]
    assert printable("caf\udce9/é") == "caf\\xe9/é"


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path):
    errors: list[OSError] = []
    assert not list(find_files(str(tmp_path / "gone"), errors.append))
    assert [error.filename for error in errors] == [str(tmp_path / "gone")]
