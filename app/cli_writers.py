"""How the rows of `convmixer classify` are written: a table for people, JSON lines, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias

import typer

from app.errors import StartupError
from app.text import printable, visible

Row: TypeAlias = dict[str, Any]
Write: TypeAlias = Callable[[Row], None]

_ROWS_PER_GROUP = 4096
"""Rows that a Parquet file is written in."""


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
