"""A folder in any file system that pyarrow knows: paths, or URIs such as `file://`, `s3://` and `gs://`."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import fs, parquet

from app.errors import StartupError
from pictures.files import find_files

UNFINISHED = ".unfinished"
"""End of the name of a file that is not whole yet."""

_RENAMING_FILE_SYSTEMS = {"local", "hdfs"}
"""There a file grows before everyone's eyes, so it gets its name when it is whole; an object appears whole anyway."""


class Place:
    """A folder in some file system.

    Args:
        uri: path or URI.

    Raises:
        StartupError: no file system of pyarrow.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).absolute())
        try:
            self.fs, self.root = fs.FileSystem.from_uri(self.uri)
        except (ValueError, OSError) as error:  # ArrowInvalid, and a path that is not UTF-8, are ValueErrors
            raise StartupError(f"{uri!r} is no path or URI that pyarrow can open: {error}") from error

    def __truediv__(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def files(self, folder: str = "", *, deep: bool = True) -> Iterator[str]:
        """Paths, from here, of all files below, in any order; none if the folder does not exist.

        Args:
            folder: where to look.
            deep: also in the folders there.

        Raises:
            OSError: a folder cannot be looked into.
        """
        begin = (self / folder).rstrip("/")
        if self.fs.type_name == "local":  # Arrow would go round in links that lead back, and refuse names that are no UTF-8
            begin = begin or "/"
            found = find_files(begin, _raise_unless_gone) if deep else _entries(begin)
            paths = (path for path in found if os.path.isfile(path))  # noqa: PTH113 (never raises)
        else:
            selector = fs.FileSelector(begin, recursive=deep, allow_not_found=True)
            paths = (info.path for info in self.fs.get_file_info(selector) if info.is_file)
        return (path[len(self / "") :] for path in paths)

    def write(self, name: str, content: pa.Buffer | bytes) -> None:
        """Writes a whole file or none, over an older one of that name.

        Raises:
            StartupError: it cannot be written.
        """
        target = self / name
        try:
            if self.fs.type_name in _RENAMING_FILE_SYSTEMS:
                self._write_and_rename(target, content)
            else:
                self._write(target, content)
        except OSError as error:
            raise StartupError(f"{target} cannot be written: {one_line(error)}") from error

    def _write_and_rename(self, target: str, content: pa.Buffer | bytes) -> None:
        self.fs.create_dir(target.rpartition("/")[0])
        unfinished = f"{target}.{uuid.uuid4().hex}{UNFINISHED}"
        try:
            self._write(unfinished, content)
            if self.fs.type_name == "local":
                _sync(unfinished)
            self.fs.move(unfinished, target)
        except OSError:
            with contextlib.suppress(OSError):
                self.fs.delete_file(unfinished)
            raise

    def _write(self, path: str, content: pa.Buffer | bytes) -> None:
        with self.fs.open_output_stream(path) as stream:
            stream.write(content)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes one Parquet file whole or not at all.

        Raises:
            StartupError: it cannot be written.
        """
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        self.write(name, sink.getvalue())


def one_line(error: Exception) -> str:
    """What it says: pyarrow and cloud storage say it in several lines."""
    return " ".join(str(error).split())


def _sync(path: str) -> None:
    """Has the disk hold a file before it gets its name: else the name may outlive a power cut, and what it names not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: str) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(folder)]
    except FileNotFoundError:
        return []


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
