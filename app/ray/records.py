"""One shard: read, classify, store. Runs on a Ray worker."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet

from app.engine.outcome import Outcome
from app.errors import BodyTooLarge, InferenceFailed, ServiceError, StartupError, UndecodableImage
from app.exit_codes import ExitCode
from app.ray.place import Place
from app.ray.shards import UNREADABLE, JobDescription, Piece, ShardResult, Shards, check_columns, id_kind
from app.service import Service
from app.settings import Settings
from app.verdict import judge

READERS = 32
"""Images read at once: what object storage needs to keep up, with tens of milliseconds an object."""

_LOOK_S = 5.0
"""While an answer is awaited, so often is asked whether the engine is alive."""

_ATTEMPTS = 10
"""Engines that may fail over a shard in a run. Ray would try for ever; so many on several nodes are no node's fault."""

T = TypeVar("T")

Record = tuple[Any, Callable[[], bytes]]
"""A record's id, and what reads its image."""


@functools.cache
def engine(settings: Settings, sha256: str) -> Service:
    """This process's engine. Ray runs one task after another in it, and the model stays loaded.

    Args:
        settings: all of them, `cores` being what a task reserves.
        sha256: of the artifact that the driver has.

    Raises:
        StartupError: the node's artifact is another one, or cannot be opened.
    """
    service = Service(settings)
    if service.sha256 != sha256:
        service.close()
        raise StartupError(f"this node's {settings.artifact_path()} is not the driver's: {service.sha256}, not {sha256}")
    return service


def compute_shards(
    batch: dict[str, NDArray[np.int64]], *, output: str, job: JobDescription, settings: Settings
) -> dict[str, NDArray[Any]]:
    """The function that Ray Data maps over the shards.

    Args:
        batch: `shard`, int64 [N]: their numbers.
        output: the job's folder.
        job: what it is.
        settings: of the engine.

    Returns:
        `rows`, int64 [N]: images in each; `failure`, str [N]: why there are none, empty if all is well. Ray would pass on no
        more of an exception than its trace.
    """
    numbers = batch["shard"]
    try:
        service = engine(settings, job.model_sha256)
        shards = Shards(Place(output))
        rows = [classify_shard(shards, job, int(shard), service).rows for shard in numbers]
    except (StartupError, OSError) as error:
        return {"rows": np.zeros(len(numbers), np.int64), "failure": np.array([str(error)] * len(numbers))}
    return {"rows": np.array(rows), "failure": np.array([""] * len(numbers))}


def classify_shard(shards: Shards, job: JobDescription, shard: int, service: Service) -> ShardResult:
    """Classifies a shard's images and stores the results. In memory are, at most, `READERS` images or one row group.

    Args:
        shards: of the job.
        job: what it is.
        shard: which.
        service: the engine.

    Raises:
        StartupError: the output cannot be written, or one engine after the other has failed over this shard.
    """
    place = Place(job.input)
    pieces = shards.pieces(shard)
    classified: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []
    id_type = _id_type(place, job, pieces)
    records = _records(place, job, pieces, id_type, service.settings.max_body_bytes)
    look = functools.partial(_end_if_failed, service, shards, shard)
    for identity, result in _results(service, records, look):
        if isinstance(result, Outcome):
            prediction = judge(result, service.metadata, index=0, filename=None, top_k=1)
            classified.append({"id": identity, **prediction})
        else:
            code = result.code if isinstance(result, ServiceError) else UNREADABLE
            rejected.append({"id": identity, "code": code, "detail": getattr(result, "detail", str(result))})
    shards.write(
        shard,
        pa.Table.from_pylist(
            classified,
            pa.schema(
                [
                    ("id", id_type),
                    ("label", pa.string()),
                    ("confidence", pa.float64()),
                    ("in_distribution", pa.bool_()),
                    ("in_distribution_score", pa.float64()),
                    ("warnings", pa.list_(pa.string())),
                ]
            ),
        ),
        pa.Table.from_pylist(rejected, pa.schema([("id", id_type), ("code", pa.string()), ("detail", pa.string())])),
    )
    return ShardResult(len(classified), Counter(row["code"] for row in rejected))


def _results(
    service: Service, records: Iterator[Record], look: Callable[[], None]
) -> Iterator[tuple[Any, Outcome | ServiceError | OSError]]:
    """Each record's outcome or its own failure, in order; enough of them in flight to keep readers and engine busy."""
    scheduler = service.scheduler
    most = min(max(READERS, 2 * scheduler.workers * scheduler.max_batch), scheduler.admission.max_queue)
    in_flight: deque[tuple[Any, Future[Future[Outcome]]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for identity, read in records:
            in_flight.append((identity, pool.submit(_submit, service, read)))
            if len(in_flight) == most:
                yield _result(look, *in_flight.popleft())
        while in_flight:
            yield _result(look, *in_flight.popleft())


def _submit(service: Service, read: Callable[[], bytes]) -> Future[Outcome]:
    return service.scheduler.submit([read()])[0]


def _result(
    look: Callable[[], None], identity: Any, pending: Future[Future[Outcome]]
) -> tuple[Any, Outcome | ServiceError | OSError]:
    try:
        return identity, _answer(look, _answer(look, pending))
    except OSError as error:
        return identity, error
    except ServiceError as error:
        if not error.per_item and not isinstance(error, BodyTooLarge):
            raise  # not the record's fault
        if isinstance(error, InferenceFailed):
            look()
        return identity, error


def _answer(look: Callable[[], None], pending: Future[T]) -> T:
    while not wait([pending], _LOOK_S).done:
        look()
    return pending.result()


def _end_if_failed(service: Service, shards: Shards, shard: int) -> None:
    """Ends the process when its engine has failed: it would reject, in no time, most of what is left of the job.

    An exception would end the job; a dead worker's task is run again, in another process and perhaps on another node.
    """
    reason = service.scheduler.failure()
    if not reason:
        return
    failures = shards.note_failure(shard, reason)
    if failures >= _ATTEMPTS:
        raise StartupError(f"{failures} engines failed over shard {shard}, one after the other; the last: {reason}")
    print(f"error: {reason}; this worker ends, and Ray runs shard {shard} again", file=sys.stderr, flush=True)
    os._exit(ExitCode.ENGINE_FAILURE)  # threads that hang would keep any other end waiting


def _records(place: Place, job: JobDescription, pieces: list[Piece], id_type: pa.DataType, max_bytes: int) -> Iterator[Record]:
    for piece in pieces:
        if piece.row_group is None:
            yield piece.path, functools.partial(_read_file, place, piece.path, max_bytes)
        else:
            yield from _readable_rows(place, job, piece, piece.row_group, id_type)


def _readable_rows(place: Place, job: JobDescription, piece: Piece, row_group: int, id_type: pa.DataType) -> Iterator[Record]:
    """The row group's records; what a damaged or missing file does not give are records without an id that cannot be read."""
    given = 0
    try:
        for record in _rows(place, job, piece, row_group, id_type):
            yield record
            given += 1
    except (OSError, pa.ArrowException) as error:
        text = f"{piece.path}, row group {row_group}: {error}"
        for _ in range(piece.rows - given):
            yield None, functools.partial(_fail, text)


def _fail(text: str) -> bytes:
    raise OSError(text)


def _rows(place: Place, job: JobDescription, piece: Piece, row_group: int, id_type: pa.DataType) -> Iterator[Record]:
    file = parquet.ParquetFile(place / piece.path, filesystem=place.fs)
    if not _is_as_listed(file, job, piece, row_group, id_type):
        raise OSError("the file has changed since the job began; use a new --output")
    row = sum(file.metadata.row_group(number).num_rows for number in range(row_group))
    columns = [job.image_column, *filter(None, [job.id_column])]
    for batch in file.iter_batches(READERS, row_groups=[row_group], columns=columns):
        ids = _ids(batch[job.id_column]) if job.id_column else [f"{piece.path}#{row + i}" for i in range(len(batch))]
        row += len(batch)
        images = batch[job.image_column]
        if pa.types.is_struct(images.type):
            images = images.field("bytes")
        for identity, image in zip(ids, images.to_pylist(), strict=True):
            yield identity, functools.partial(_not_null, image)


def _is_as_listed(file: parquet.ParquetFile, job: JobDescription, piece: Piece, row_group: int, id_type: pa.DataType) -> bool:
    try:
        check_columns(piece.path, file.schema_arrow, job)
    except StartupError:
        return False
    if job.id_column and id_kind(file.schema_arrow.field(job.id_column).type) != id_kind(id_type):
        return False
    return row_group < file.num_row_groups and bool(file.metadata.row_group(row_group).num_rows == piece.rows)


def _ids(column: pa.Array) -> list[Any]:
    r"""The ids; text that is no UTF-8, which Parquet does not look at, has `\xe9` for such a byte."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        given = column.cast(pa.large_binary()).to_pylist()
        return [None if identity is None else identity.decode("utf-8", "backslashreplace") for identity in given]


def _not_null(image: bytes | None) -> bytes:
    if image is None:
        raise UndecodableImage("the record holds no image (null)")
    return image


def _read_file(place: Place, path: str, max_bytes: int) -> bytes:
    with place.fs.open_input_file(place / path) as file:
        if file.size() > max_bytes:
            raise BodyTooLarge(f"the file has {file.size():,} bytes; the limit is {max_bytes:,} (CONVMIXER_MAX_BODY_BYTES)")
        return file.read()  # type: ignore[no-any-return]


def _id_type(place: Place, job: JobDescription, pieces: list[Piece]) -> pa.DataType:
    if job.id_column is not None and job.format == "parquet":
        for path in dict.fromkeys(piece.path for piece in pieces):
            with contextlib.suppress(OSError, pa.ArrowException, KeyError):  # the last: the file has changed
                return parquet.read_schema(place / path, filesystem=place.fs).field(job.id_column).type
    return pa.string()  # also where no file can be read, and so no record has an id
