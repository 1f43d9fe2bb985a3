"""What a classification job has to do and what of it is done. All of its state is here, in files.

    OUTPUT/manifest.parquet                    the input's records in shards; written once, read by every run
    OUTPUT/classified/shard-000017.parquet     a shard's predictions
    OUTPUT/rejected/shard-000017.parquet       its records without one, and why
    OUTPUT/failures/shard-000017.….txt         why an engine failed over it in this run, one file a time
    OUTPUT/summary.json                        the last run's totals

A shard is done when its two files hold exactly as many rows as the manifest says, and name that manifest, so a job may be
killed at any moment, and a shard may be computed twice: both times the same files are written, each whole or not at all. Should
two drivers begin a job at once, the results of the one whose manifest was replaced do not count.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
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
from app.ray.place import UNFINISHED, Place, one_line
from app.text import printable

UNREADABLE = "unreadable"
"""Code of a record that could not be read."""

PASSING = {UNREADABLE, InferenceFailed.code}
"""Codes that say nothing of the record, which the next run tries again: storage was away, or a worker's accelerator broken."""

MANIFEST = "manifest.parquet"
SUMMARY = "summary.json"
_DESCRIPTION = b"convmixer"
"""Key of the job's description in the manifest's metadata."""

_IDENTITY = b"manifest"
"""Key, in the metadata of the manifest and of each result, of what tells this listing of the input from any other."""

_MANIFEST_SCHEMA = pa.schema([("path", pa.string()), ("row_group", pa.int32()), ("rows", pa.int64())])
_READERS = 32
"""Small files read at once."""


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


class Shards:
    """A job's shards and their results.

    Args:
        output: folder of the job.

    Raises:
        StartupError: there is no manifest, or it is damaged.
    """

    def __init__(self, output: Place) -> None:
        self.output = output
        try:
            self._manifest = parquet.ParquetFile(output / MANIFEST, filesystem=output.fs)
        except (OSError, pa.ArrowException) as error:
            advice = "if it is damaged, delete it, and all is computed again"
            raise StartupError(f"{output / MANIFEST} cannot be read: {one_line(error)}; {advice}") from error
        self._metadata = self._manifest.schema_arrow.metadata or {}
        self._identity = {_IDENTITY: self._metadata.get(_IDENTITY, b"")}

    @functools.cached_property
    def rows(self) -> list[int]:
        """Images in each shard.

        Raises:
            StartupError: the manifest cannot be read any more.
        """
        shards = range(self._manifest.num_row_groups)
        with self._named():
            return [sum(self._manifest.read_row_group(shard, ["rows"])["rows"].to_pylist()) for shard in shards]

    @classmethod
    def open(cls, output: Place, job: JobDescription) -> Shards:
        """Opens the job in `output`, or begins it there by listing its input.

        Raises:
            StartupError: `output` has another job or cannot be used, or the input holds nothing or not what was said.
        """
        try:
            is_new = output.fs.get_file_info(output / MANIFEST).type == fs.FileType.NotFound
        except OSError as error:
            raise StartupError(f"{output.uri} cannot be looked into: {one_line(error)}") from error
        if is_new:
            _write_manifest(output, job)
        shards = cls(output)
        found = json.loads(shards._metadata.get(_DESCRIPTION, b"{}"))
        different = sorted(name for name, value in asdict(job).items() if found.get(name) != value)
        if different:
            was = ", ".join(f"{name}={found.get(name)!r}" for name in different)
            raise StartupError(f"{output.uri} holds another job ({was}); choose another --output, or the same options")
        return shards

    def pieces(self, shard: int) -> list[Piece]:
        """What a shard consists of, in order.

        Raises:
            StartupError: the manifest cannot be read any more.
        """
        with self._named():
            return [Piece(**row) for row in self._manifest.read_row_group(shard).to_pylist()]

    def results(self) -> dict[int, ShardResult]:
        """What the shards that are done have given: those whose files hold all of their records.

        Raises:
            StartupError: the output cannot be listed.
        """
        with self._named():
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
        """Stores a shard's results; what was there of them is replaced.

        Raises:
            StartupError: they cannot be written.
        """
        for kind, table in (("rejected", rejected), ("classified", classified)):
            self.output.write_table(f"{kind}/{_name(shard)}", table.replace_schema_metadata(self._identity))

    def note_failure(self, shard: int, reason: str) -> int:
        """Notes that an engine failed over a shard.

        Args:
            shard: which.
            reason: what the engine says.

        Returns:
            How many have in this run.

        Raises:
            StartupError: it cannot be noted.
        """
        number = Path(_name(shard)).stem
        self.output.write(f"failures/{number}.{uuid.uuid4().hex}.txt", reason.encode())
        with self._named():
            return sum(path.startswith(f"failures/{number}.") and path.endswith(".txt") for path in self.output.files("failures"))

    def forget_failures(self) -> None:
        """Begins to count anew.

        Raises:
            StartupError: the output cannot be listed, or nothing be deleted there.
        """
        with self._named():
            for path in self.output.files("failures"):
                self.output.fs.delete_file(self.output / path)

    def remove_unfinished(self) -> None:
        """Removes what killed workers and drivers left behind; only when none is at work.

        Raises:
            StartupError: as `forget_failures`.
        """
        with self._named():
            root = (path for path in self.output.files(deep=False) if path.startswith((f"{MANIFEST}.", f"{SUMMARY}.")))
            for path in itertools.chain(root, self.output.files("classified"), self.output.files("rejected")):
                if path.endswith(UNFINISHED):
                    self.output.fs.delete_file(self.output / path)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Says where storage fails, which pyarrow does not."""
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise StartupError(f"{self.output.uri} cannot be used: {one_line(error)}") from error

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


def _name(shard: int) -> str:
    return f"shard-{shard:06d}.parquet"


def _write_manifest(output: Place, job: JobDescription) -> None:
    place = Place(job.input)
    ending = "" if job.format == "images" else ".parquet"
    try:
        files = [path for path in place.files() if path.endswith(ending)]
    except OSError as error:
        raise StartupError(f"the folder {job.input} cannot be listed: {one_line(error)}") from error
    if not files:
        raise StartupError(f"{job.input} does not exist, or holds no {ending or 'image'} file")
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
    first: tuple[str, pa.DataType] | None = None
    for path in paths:
        try:
            file = parquet.ParquetFile(place / path, filesystem=place.fs)
        except (OSError, pa.ArrowException) as error:
            raise StartupError(f"{path} in {job.input} cannot be read, or is no Parquet file: {one_line(error)}") from error
        check_columns(path, file.schema_arrow, job)
        if job.id_column:
            kind = file.schema_arrow.field(job.id_column).type
            first = first or (path, kind)
            if id_kind(kind) != id_kind(first[1]):
                raise StartupError(
                    f"column {job.id_column!r} is {first[1]} in {first[0]} and {kind} in {path}; give ids one type"
                )
        for number in range(file.num_row_groups):
            yield Piece(path, number, file.metadata.row_group(number).num_rows)


def check_columns(path: str, schema: pa.Schema, job: JobDescription) -> None:
    """Whether a file has what the job reads.

    Args:
        path: of the file.
        schema: of the file.
        job: names the columns.

    Raises:
        StartupError: a column is missing, or holds no images.
    """
    for column in filter(None, (job.image_column, job.id_column)):
        if column not in schema.names:
            raise StartupError(f"{path} has no column {column!r}; it has {', '.join(schema.names)}")
    kind: Any = schema.field(job.image_column).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if id_kind(kind) != pa.binary():
        raise StartupError(f"{path}: column {job.image_column!r} must hold encoded images (binary); it is {kind}")


def id_kind(kind: pa.DataType) -> pa.DataType:
    """The same for types that may stand in one column: how a writer of Parquet held its text or bytes does not matter.

    Args:
        kind: of a file's ids, or images.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    return pa.binary() if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind) else kind


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
