"""What a classification job has to do and what of it is done. All of its state is here, in files.

    OUTPUT/manifest.parquet                    the input's records in shards; written once, read by every run
    OUTPUT/classified/shard-000017.parquet     a shard's predictions
    OUTPUT/rejected/shard-000017.parquet       its records without one, and why
    OUTPUT/summary.json                        the last run's totals

A shard is done when its two files hold exactly as many rows as the manifest says, and name that manifest, so a job may be
killed at any moment, and a shard may be computed twice: both times the same files are written, each whole or not at all. Should
two drivers begin a job at once, the results of the one whose manifest was replaced do not count. Places are paths or URIs of
pyarrow (`file://`, `s3://`, `gs://`, …).
"""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs, parquet

from app.errors import InferenceFailed, StartupError
from app.paths import find_files, printable

UNREADABLE = "unreadable"
"""Code of a record that could not be read."""

PASSING = {UNREADABLE, InferenceFailed.code}
"""Codes that say nothing of the record, which the next run tries again: storage was away, or a worker's accelerator broken."""

MANIFEST = "manifest.parquet"
_DESCRIPTION = b"convmixer"
"""Key of the job's description in the manifest's metadata."""

_IDENTITY = b"manifest"
"""Key, in the metadata of the manifest and of each result, of what tells this listing of the input from any other."""

_MANIFEST_SCHEMA = pa.schema([("path", pa.string()), ("row_group", pa.int32()), ("rows", pa.int64())])
_READERS = 32
"""Small files read at once."""

_RENAMING_FILE_SYSTEMS = {"local", "hdfs"}
"""There a file grows before everyone's eyes, so it gets its name when it is whole; an object appears whole anyway."""


@dataclass(frozen=True)
class Piece:
    """A part of a shard: one image file, or one row group of a Parquet file.

    Attributes:
        path: relative to the input.
        row_group: its number; None for an image file.
        rows: images in it.
    """

    path: str
    row_group: int | None
    rows: int


@dataclass(frozen=True)
class ShardResult:
    """What a shard's files hold.

    Attributes:
        classified: images with a prediction.
        rejected: images without, by error code.
    """

    classified: int
    rejected: Counter[str]

    @property
    def rows(self) -> int:
        """All of them."""
        return self.classified + self.rejected.total()


@dataclass(frozen=True)
class JobDescription:
    """What makes two runs the same job.

    Attributes:
        input: folder or Parquet data set.
        format: what lies there.
        image_column: of encoded images, or of structs with a field `bytes`.
        id_column: None: `PATH#ROW`.
        shard_size: images in a shard, at least (a row group is never cut) or exactly (files).
        model_sha256: of the artifact.
    """

    input: str
    format: Literal["images", "parquet"]
    image_column: str
    id_column: str | None
    shard_size: int
    model_sha256: str


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

    def files(self, folder: str = "") -> Iterator[str]:
        """Paths, from here, of all files below, in any order; none if the folder does not exist.

        Raises:
            OSError: a folder cannot be looked into.
        """
        begin = (self / folder).rstrip("/")
        if self.fs.type_name == "local":  # Arrow would go round in links that lead back, and refuse names that are no UTF-8
            paths = (path for path in find_files(begin, _raise_unless_gone) if os.path.isfile(path))  # noqa: PTH113 (never raises)
        else:
            selector = fs.FileSelector(begin, recursive=True, allow_not_found=True)
            paths = (info.path for info in self.fs.get_file_info(selector) if info.is_file)
        return (path[len(self / "") :] for path in paths)

    def write(self, name: str, content: pa.Buffer | bytes) -> None:
        """Writes a whole file or none, over an older one of that name."""
        target = self / name
        if self.fs.type_name not in _RENAMING_FILE_SYSTEMS:
            with self.fs.open_output_stream(target) as stream:
                stream.write(content)
            return
        self.fs.create_dir(target.rpartition("/")[0])
        unfinished = f"{target}.{uuid.uuid4().hex}.unfinished"
        with self.fs.open_output_stream(unfinished) as stream:
            stream.write(content)
        self.fs.move(unfinished, target)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Writes one Parquet file whole or not at all."""
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink)
        self.write(name, sink.getvalue())


class Shards:
    """A job's shards and their results.

    Args:
        output: folder of the job.

    Raises:
        StartupError: there is no manifest.
    """

    def __init__(self, output: Place) -> None:
        self.output = output
        self._manifest = parquet.ParquetFile(output / MANIFEST, filesystem=output.fs)
        self._identity = {_IDENTITY: self._manifest.schema_arrow.metadata.get(_IDENTITY, b"")}

    @functools.cached_property
    def rows(self) -> list[int]:
        """Images in each shard."""
        shards = range(self._manifest.num_row_groups)
        return [sum(self._manifest.read_row_group(shard, ["rows"])["rows"].to_pylist()) for shard in shards]

    @classmethod
    def open(cls, output: Place, job: JobDescription) -> Shards:
        """Opens the job in `output`, or begins it there by listing its input.

        Raises:
            StartupError: `output` has another job, or the input holds nothing or not what was said.
        """
        if output.fs.get_file_info(output / MANIFEST).type == fs.FileType.NotFound:
            _write_manifest(output, job)
        metadata = parquet.read_schema(output / MANIFEST, filesystem=output.fs).metadata
        found = json.loads(metadata[_DESCRIPTION])
        different = sorted(name for name, value in asdict(job).items() if found.get(name) != value)
        if different:
            was = ", ".join(f"{name}={found.get(name)!r}" for name in different)
            raise StartupError(f"{output.uri} holds another job ({was}); choose another --output, or the same options")
        return cls(output)

    def pieces(self, shard: int) -> list[Piece]:
        """What a shard consists of, in order."""
        return [Piece(**row) for row in self._manifest.read_row_group(shard).to_pylist()]

    def results(self) -> dict[int, ShardResult]:
        """What the shards that are done have given: those whose files hold all of their records."""
        classified, rejected = (set(self.output.files(kind)) for kind in ("classified", "rejected"))
        written = [
            shard
            for shard in range(len(self.rows))
            if f"classified/{_name(shard)}" in classified and f"rejected/{_name(shard)}" in rejected
        ]
        with ThreadPoolExecutor(_READERS) as pool:
            found = zip(written, pool.map(self._result, written), strict=True)
            return {shard: result for shard, result in found if result and result.rows == self.rows[shard]}

    def write(self, shard: int, classified: pa.Table, rejected: pa.Table) -> None:
        """Stores a shard's results; what was there of them is replaced."""
        for kind, table in (("rejected", rejected), ("classified", classified)):
            self.output.write_table(f"{kind}/{_name(shard)}", table.replace_schema_metadata(self._identity))

    def remove_unfinished(self) -> None:
        """Removes what killed workers left behind; only when none is at work."""
        for kind in ("classified", "rejected"):
            for path in self.output.files(kind):
                if path.endswith(".unfinished"):
                    self.output.fs.delete_file(self.output / path)

    def _result(self, shard: int) -> ShardResult | None:
        """What a shard's two files hold; None if one is damaged, or of another driver's listing of the input."""
        name = _name(shard)
        try:
            classified = parquet.read_metadata(self.output / f"classified/{name}", filesystem=self.output.fs)
            codes = parquet.read_table(self.output / f"rejected/{name}", columns=["code"], filesystem=self.output.fs)
        except (OSError, pa.ArrowException):
            return None
        identities = [(found or {}).get(_IDENTITY, b"") for found in (classified.metadata, codes.schema.metadata)]
        if identities != [self._identity[_IDENTITY]] * 2:
            return None
        return ShardResult(classified.num_rows, Counter(codes["code"].to_pylist()))


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def _write_manifest(output: Place, job: JobDescription) -> None:
    place = Place(job.input)
    ending = "" if job.format == "images" else ".parquet"
    try:
        files = [path for path in place.files() if path.endswith(ending)]
    except OSError as error:
        raise StartupError(f"the folder {job.input} cannot be listed: {error}") from error
    if not files:
        raise StartupError(f"{job.input} holds no {ending or 'image'} file")
    odd = [path for path in files if printable(path) != path]
    if odd:
        example = f"{len(odd):,}, {printable(odd[0])} is one"
        raise StartupError(f"{job.input} holds files whose names are not UTF-8 ({example}); rename them: ids are text")
    paths = sorted(files)
    pieces = (Piece(path, None, 1) for path in paths) if job.format == "images" else _row_groups(place, paths, job)
    description = {_DESCRIPTION: json.dumps(asdict(job)).encode(), _IDENTITY: uuid.uuid4().hex.encode()}
    schema = _MANIFEST_SCHEMA.with_metadata(description)
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(sink, schema) as writer:
        for shard in _grouped(pieces, job.shard_size):
            writer.write_table(pa.Table.from_pylist([asdict(piece) for piece in shard], schema))
    output.write(MANIFEST, sink.getvalue())


def _row_groups(place: Place, paths: list[str], job: JobDescription) -> Iterator[Piece]:
    for path in paths:
        try:
            file = parquet.ParquetFile(place / path, filesystem=place.fs)
        except pa.ArrowInvalid as error:
            raise StartupError(f"{path} in {job.input} is no Parquet file: {error}") from error
        _check_columns(path, file.schema_arrow, job)
        for number in range(file.num_row_groups):
            yield Piece(path, number, file.metadata.row_group(number).num_rows)


def _check_columns(path: str, schema: pa.Schema, job: JobDescription) -> None:
    for column in filter(None, (job.image_column, job.id_column)):
        if column not in schema.names:
            raise StartupError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    kind: Any = schema.field(job.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise StartupError(f"{path}: column {job.image_column!r} must hold encoded images (binary); it is {kind}")


def _grouped(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Consecutive pieces with at least `size` images together; the last group may have fewer."""
    group: list[Piece] = []
    rows = 0
    for piece in pieces:
        group.append(piece)
        rows += piece.rows
        if rows >= size:
            yield group
            group, rows = [], 0
    if group:
        yield group
