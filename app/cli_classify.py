"""`convmixer classify`: which images, who classifies them, how the answers are written.

Everything streams: files are found, read, classified and written with a bounded number of them in memory. A row is an entry
of `predictions` as in docs/api.md, whoever made it; `filename` is the path.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import typer

from app.cli_interrupt import Interruption
from app.errors import InferenceFailed, ServiceError, StartupError
from app.paths import find_files, printable
from app.telemetry.logs import visible
from pictures.files import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from app.client import Client
    from app.engine.outcome import Outcome
    from app.service import Service

Row: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[[Row], None]

STDIN = "-"
_WINDOW = 64
"""Images in flight at least: enough to keep every core busy, few enough to keep memory flat."""

_LOOK_S = 0.5
"""While an answer is awaited, so often is asked whether the engine is alive and whether a signal came."""

_ROWS_PER_GROUP = 4096
"""Rows that a Parquet file is written in."""


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
                if name := line.rstrip("\r\n"):
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


def classify_here(service: Service, files: Iterable[str], top_k: int, interruption: Interruption) -> Generator[Row, None, None]:
    """Rows in the order of `files`, made by this process on every core.

    Args:
        service: the running engine.
        files: paths.
        top_k: classes in a row.
        interruption: whose signals leave the engine's locks alone.

    Raises:
        StartupError: the engine has failed, and would on all that is left.
    """
    from app.schemas import item_error
    from app.verdict import judge

    scheduler, settings = service.scheduler, service.settings
    window = min(max(_WINDOW, 2 * scheduler.workers * scheduler.max_batch), settings.max_queue)
    in_flight: deque[tuple[int, str, int, Future[Outcome] | ServiceError]] = deque()
    held_bytes = 0

    def is_ready() -> bool:
        pending = in_flight[0][-1]
        with interruption.postponed():
            return isinstance(pending, ServiceError) or pending.done()

    def oldest() -> Row:
        nonlocal held_bytes
        index, path, size, pending = in_flight.popleft()
        held_bytes -= size
        try:
            outcome = _wait(service, pending, interruption)
        except ServiceError as error:
            return dict(item_error(index, path, error))
        return dict(judge(outcome, service.metadata, index=index, filename=path, top_k=top_k))

    try:
        for index, path in enumerate(files):
            data = _read(path, settings.max_body_bytes)
            size = len(data) if isinstance(data, bytes) else 0
            while in_flight and (len(in_flight) >= window or held_bytes + size > settings.max_held_bytes or is_ready()):
                yield oldest()
            held_bytes += size
            with interruption.postponed():
                in_flight.append((index, path, size, scheduler.submit([data])[0] if isinstance(data, bytes) else data))
        while in_flight:
            yield oldest()
    finally:
        if in_flight:  # nobody is left to be told
            service.drain_by = time.monotonic()
            for *_, pending in in_flight:
                if isinstance(pending, Future):
                    pending.cancel()


def classify_there(client: Client, files: Iterable[str], top_k: int, interruption: Interruption) -> Generator[Row, None, None]:
    """Rows in the order of `files`, made by a server.

    Args:
        client: of that server.
        files: paths.
        top_k: classes in a row.
        interruption: whose signals are not lost.
    """
    from app.client import Prediction

    images = (standard_input().read() if path == STDIN else path for path in files)
    for result in client.classify_many(images, top_k=top_k):
        interruption.check()
        name = {"index": result.index, "filename": result.filename or STDIN}
        if isinstance(result, Prediction):
            row = result.to_dict() | name
            del row["model"], row["request_id"]  # an entry as the server has it, and as `classify_here` makes it
            yield row
        else:
            yield name | {"error": {"code": result.code, "detail": result.detail}}


def _read(path: str, max_bytes: int) -> bytes | ServiceError:
    from app.errors import BodyTooLarge, UndecodableImage

    try:
        if path == STDIN:
            return standard_input().read()
        size = Path(path).stat().st_size
        if size > max_bytes:
            return BodyTooLarge(f"the file has {size:,} bytes; the limit is {max_bytes:,} (CONVMIXER_MAX_BODY_BYTES)")
        return Path(path).read_bytes()
    except OSError as error:
        return UndecodableImage(f"cannot be read: {error.strerror}")
    except ValueError as error:  # no name of a file
        return UndecodableImage(f"cannot be read: {error}")


def _wait(service: Service, pending: Future[Outcome] | ServiceError, interruption: Interruption) -> Outcome:
    if isinstance(pending, ServiceError):
        raise pending
    is_done = False
    while not is_done:
        with interruption.postponed():
            is_done = bool(wait([pending], _LOOK_S).done)
        if not is_done:
            _raise_if_failed(service)
    try:
        with interruption.postponed():
            return pending.result()
    except InferenceFailed:
        _raise_if_failed(service)
        raise


def _raise_if_failed(service: Service) -> None:
    if reason := service.scheduler.failure():
        service.drain_by = time.monotonic()  # what a failed engine has in hand is not waited for
        raise StartupError(f"{reason}; the rows so far are written")


@contextmanager
def open_writer(format_name: str, output: Path | None) -> Iterator[Write]:
    """A function that writes one row.

    Args:
        format_name: `table`, `json` (one object a line), `csv` or `parquet`.
        output: file; None: standard output.

    Raises:
        typer.BadParameter: the file cannot be opened.
        StartupError: it cannot be written any more.
    """
    called = output or "standard output"
    try:
        file: IO[Any] = output.open("wb") if output and format_name == "parquet" else _open_text(output)
    except OSError as error:
        raise typer.BadParameter(f"{output} cannot be written: {error.strerror}") from error
    # Failures of writing are renamed around each call: around the `yield` would be the caller's own, too. And not in the file
    # object: a signal that comes there, behind the system call, would have the buffer written again
    try:
        if format_name == "parquet":
            with _parquet(file, called) as write:
                yield write
        else:
            with _named(called):
                write = {"table": _table, "json": _json, "csv": _csv}[format_name](file)

            def write_row(row: Row) -> None:
                with _named(called):
                    write(row)

            yield write_row
    finally:
        with _named(called):
            file.close()


@contextmanager
def _named(called: Path | str) -> Iterator[None]:
    """Tells what cannot be written; a reader who has enough (BrokenPipeError) is no failure."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StartupError(f"{called} cannot be written: {error.strerror or error}") from error


def _open_text(output: Path | None) -> IO[str]:
    """Names of files are bytes; those that are no UTF-8 come out as they went in."""
    if not output and sys.stdout is None:
        raise StartupError("standard output is closed; give --output")
    target = output or sys.stdout.fileno()
    return open(target, "w", encoding="utf-8", errors="surrogateescape", newline="", closefd=output is not None)


def _json(file: IO[str]) -> Write:
    """Strict readers refuse the lone surrogates of a name that is no UTF-8."""
    return lambda row: print(json.dumps(row | {"filename": printable(row["filename"])}), file=file)


def _csv(file: IO[str]) -> Write:
    def write_line(*values: object) -> None:
        line = io.StringIO()
        csv.writer(line).writerow(values)  # told to end lines with "\n", it would leave a bare "\r" unquoted (until Python 3.13)
        file.write(line.getvalue().removesuffix("\r\n") + "\n")

    write_line("file", "label", "confidence", "in_distribution", "error")
    return lambda row: write_line(
        row["filename"],
        *(row.get(name) for name in ("label", "confidence", "in_distribution")),
        row["error"]["detail"] if "error" in row else None,
    )


def _table(file: IO[str]) -> Write:
    """Lines as they come, aligned: ten thousand rows must not wait for the last. Errors are on standard error already."""
    print(f"{'label':14} {'confidence':>10}  file", file=file)

    def write(row: Row) -> None:
        if "error" not in row:
            unsure = "" if row.get("in_distribution", True) else "  (perhaps none of the classes)"
            line = f"{row['label']:14} {row['confidence']:10.1%}  {printable(row['filename'])}{unsure}"
            print(visible(line), file=file, flush=True)

    return write


@contextmanager
def _parquet(file: IO[bytes], called: Path | str) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "file": pa.string(),
            "label": pa.string(),
            "confidence": pa.float64(),
            "in_distribution": pa.bool_(),
            "in_distribution_score": pa.float64(),
            "top_k": pa.list_(pa.struct({"label": pa.string(), "probability": pa.float64()})),
            "warnings": pa.list_(pa.string()),
            "error_code": pa.string(),
            "error": pa.string(),
        }
    )
    rows: list[Row] = []

    def flush() -> None:
        group = pa.Table.from_pylist(rows, schema=schema)
        rows.clear()  # first: a signal while it is written must not have it written again
        table.write_table(group)

    def write(row: Row) -> None:
        error = row.get("error", {})
        # a Parquet string is UTF-8; the name of a file need not be
        rows.append(row | {"file": printable(row["filename"]), "error_code": error.get("code"), "error": error.get("detail")})
        if len(rows) >= _ROWS_PER_GROUP:
            with _named(called):
                flush()

    table = pq.ParquetWriter(file, schema)
    try:
        yield write
    finally:  # also when interrupted: what was classified can be read
        with _named(called), table:
            flush()
