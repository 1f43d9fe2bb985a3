"""Which images `convmixer classify` is to take: files, folders, globs, a list of paths, standard input."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import typer

from app.errors import StartupError
from pictures.files import IMAGE_SUFFIXES, find_files

STDIN = "-"


def expand(patterns: Iterable[str]) -> list[str]:
    """Files and folders that exist; globs replaced by what they match.

    Args:
        patterns: as typed. What exists is taken literally even if it has the characters of a glob.

    Raises:
        typer.BadParameter: one of them does not exist or matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        literal = pattern == STDIN or os.path.exists(pattern)  # noqa: PTH110 (Path.exists raises where one may not look)
        matches = [pattern] if literal else _glob(pattern)
        if not matches and _is_missing(pattern):
            raise typer.BadParameter(f"{pattern!r} does not exist, or matches nothing", param_hint="PATHS")
        found += matches or [pattern]
    return found


def _glob(pattern: str) -> list[str]:
    """What matches, without what lies in a folder that matches, too: `**` gives both, and folders are searched recursively."""
    matches = {Path(match): match for match in sorted(glob.glob(pattern, recursive=True))}  # noqa: PTH207 (absolute ones, too)
    folders = {path for path, match in matches.items() if os.path.isdir(match)}  # noqa: PTH112 (as in `find_images`)
    found = [match for path, match in matches.items() if folders.isdisjoint(path.parents)]
    return [f"./{match}" if match == STDIN else match for match in found]


def _is_missing(path: str) -> bool:
    """Whether nothing is there. What lies where one may not look, or has too long a name, gets a row that says so."""
    try:
        os.stat(path)  # noqa: PTH116 (Path("") is the working folder)
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def find_images(paths: Iterable[str]) -> Iterator[str]:
    """The files, and the images in the folders, recursively.

    Args:
        paths: from `expand`.
    """
    for path in paths:
        is_folder = path != STDIN and os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises where one may not look)
        yield from _in_folder(path) if is_folder else (path,)


def _in_folder(folder: str) -> Iterator[str]:
    unreadable: list[str] = []
    files = map(Path, find_files(folder, lambda error: unreadable.append(error.filename)))
    yield from (str(path) for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    yield from unreadable  # as if they were images: each gets a row that says why it was not looked into


def read_list(path: str) -> Iterator[str]:
    """The lines of a file, or of standard input for `-`. A line `-` is a file's name.

    Args:
        path: of the file.

    Raises:
        StartupError: it cannot be read.
    """
    source = standard_input().fileno() if path == STDIN else path
    try:
        with open(source, errors="surrogateescape", newline="\n", closefd=path != STDIN) as file:  # a name may hold "\r"
            for line in file:
                if (name := line.rstrip("\r\n")).strip():
                    yield f"./{name}" if name == STDIN else name
    except OSError as error:
        raise StartupError(f"--files-from: {path} cannot be read: {error.strerror}") from error


def standard_input() -> IO[bytes]:
    """What `-` stands for.

    Raises:
        StartupError: it was closed by whoever started this.
    """
    if sys.stdin is None:
        raise StartupError("standard input is closed")
    return sys.stdin.buffer
