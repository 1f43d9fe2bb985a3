"""The `convmixer` command.

Exit codes: 0 done, 1 something failed, 2 wrong usage, 130 interrupted, 143 terminated; those of `serve` are `app.exit_codes`.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from pydantic import BaseModel

from app import __version__
from app.errors import StartupError
from app.exit_codes import ExitCode
from app.settings import Settings

if TYPE_CHECKING:
    from app.client import Client
    from app.service import Service

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

ModelOption = Annotated[
    str | None,
    typer.Option(
        help="A model that ships (`fast`, `fast-int8`, `accurate`) or an .onnx file. Default: CONVMIXER_MODEL or `fast`."
    ),
]

KeyOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="File with the API key; on the command line others could see it.")
]

_EXTRAS = {
    "onnxruntime": "cpu",  # or openvino, or cuda
    "httpx": "client",
    "pyarrow": "parquet",
}
"""What installs a package that the base does without."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"convmixer-serve {__version__}")
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Classify images with ConvMixer."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: CONVMIXER_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: CONVMIXER_PORT or 8000.")] = None,
    model: ModelOption = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="Listening socket of `app.processes`.")] = None,
    siblings: Annotated[Path | None, typer.Option(hidden=True, help="Folder of `app.processes`.")] = None,
    parent: Annotated[int | None, typer.Option(hidden=True, help="Process of `app.processes`.")] = None,
) -> None:
    """Answer HTTP until SIGTERM or Ctrl-C; open requests are finished first."""
    # uvicorn drains on SIGTERM and then raises the signal again; a drained stop is a success, as is one before the start is over
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    from app.telemetry.logs import configure_logging

    settings = _settings(host=host, port=port, model=model)
    configure_logging(settings.log_level, settings.log_format)
    if settings.processes > 1 and fd is None:
        raise SystemExit(_supervise(settings))
    _spare_the_start()
    from app.memory import return_large_buffers
    from app.service import open_session

    return_large_buffers()
    # beside the imports of what speaks HTTP, which take longer: onnxruntime needs a core, and not the interpreter
    loader = ThreadPoolExecutor(1, "load")
    opened = loader.submit(open_session, settings, settings.processes if siblings else 1)
    loader.shutdown(wait=False)
    from app.main import create_app
    from app.server import run, within_open_files

    gc.freeze()  # what is imported stays, so that no collection under load need look through it
    gc.enable()
    settings = within_open_files(settings)
    # the lifespan has said in one line why it does not start; Starlette would add its traceback
    logging.getLogger("uvicorn.error").addFilter(lambda record: "StartupError" not in record.getMessage())
    # a bad request is counted, and has its line in the access log, with its id and client; these have neither
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.getMessage() != "Invalid HTTP request received.")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    try:
        run(create_app(settings, siblings, opened), settings, None if fd is None else socket.socket(fileno=fd), parent)
    except StartupError as error:
        logging.getLogger(__name__).critical("the service does not start: %s", error)
        raise SystemExit(1) from error


def _spare_the_start() -> None:
    """Keeps the imports of a server, which has the process to itself, from work that nothing here uses."""
    # what is imported stays: collecting garbage among it, 180 times, took a tenth of the start
    gc.disable()
    # numpy's OpenBLAS would start a thread a core, and they spin for a while; its matrix products are not used
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # FastAPI refuses models of pydantic 1, and imports all of it to know them
    sys.modules["pydantic.v1"] = None  # type: ignore[assignment]
    # most models are FastAPI's, for OpenAPI documents: they are built when somebody asks for one
    BaseModel.model_config["defer_build"] = True


def _supervise(settings: Settings) -> int:
    from app.processes import Supervisor, command_line, environment

    try:
        return Supervisor(settings, command_line(), environment()).run()
    except StartupError as error:
        logging.getLogger(__name__).critical("the service does not start: %s", error)
        return ExitCode.STARTUP_FAILURE


@app.command()
def classify(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Files, folders (searched recursively), quoted globs; `-`: one image on standard input."),
    ] = None,
    files_from: Annotated[str | None, typer.Option(help="File with the paths, one a line; `-`: standard input.")] = None,
    url: Annotated[str | None, typer.Option(help="Ask the server there instead of computing here.")] = None,
    api_key_file: KeyOption = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="With --url: requests under way at once; 1 for a slow line. Default: 4.")
    ] = None,
    deadline_s: Annotated[
        float | None, typer.Option(min=0.001, max=3600, help="With --url: seconds for a request with its retries. Default: 60.")
    ] = None,
    model: ModelOption = None,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Classes listed in JSON and Parquet.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON lines: one object an image.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV; the default unless standard output is a terminal.")] = False,
    parquet: Annotated[Path | None, typer.Option(help="Write this Parquet file.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write JSON lines (.json, .jsonl) or CSV to this file instead of standard output."),
    ] = None,
) -> None:
    """Classify images, on this machine or by a server. Exits with 1 if one could not be classified.

    Images that cannot be read are reported on standard error, and in their row; the others are classified.
    """
    from app.cli_classify import classify_here, classify_there
    from app.cli_images import expand, find_images, read_list
    from app.cli_interrupt import Interruption
    from app.cli_writers import open_writer
    from app.text import printable, visible

    patterns = paths or []
    to_terminal = not (parquet or output) and _is_terminal(sys.stdout)
    format_name = "parquet" if parquet else _format(output, as_json=as_json, as_csv=as_csv, to_terminal=to_terminal)
    watched = _is_terminal(sys.stderr)
    _require(as_json + as_csv + bool(parquet) <= 1, "--json, --csv and --parquet exclude one another")
    _require(not (parquet and output), "--parquet names its own file; leave --output out")
    _require(not (url and model), "--model is for this machine; the server at --url has its own")
    _require(bool(url) or not api_key_file, "--api-key-file is for --url")
    _require(bool(url) or not (concurrency or deadline_s), "--concurrency and --deadline-s are for --url")
    _require_paths(patterns, files_from)
    roots = expand(patterns)
    _require_another_file(parquet or output, [*roots, *filter(None, [files_from])])
    if parquet:
        import pyarrow.parquet  # noqa: F401 (it may be missing, and that should be said before anything is done)

    def files() -> Iterator[str]:
        return read_list(files_from) if files_from else find_images(roots)

    # counted for the bar alone, by looking twice: a list of all files would be the one thing here that grows with their number
    shows_bar = watched and not to_terminal
    total = sum(1 for _ in files()) if shows_bar and not files_from else None
    begin, done, failed = time.monotonic(), 0, 0
    with Interruption() as interruption, ExitStack() as stack:
        if url:
            client = stack.enter_context(
                _open_client(url, _read_key(api_key_file), concurrency=concurrency, deadline_s=deadline_s)
            )
            client.model()  # a wrong address is known at once, not after the first image's deadline
            rows = classify_there(client, files(), top_k, interruption)
        else:
            service = _open_service(model)
            stack.callback(service.close)
            rows = classify_here(service, files(), top_k, interruption)
        stack.callback(rows.close)
        write = stack.enter_context(open_writer(format_name, parquet or output))
        bar = stack.enter_context(
            typer.progressbar(rows, length=total, label="classifying", file=sys.stderr, hidden=not shows_bar, show_pos=True)
        )
        for row in bar:
            write(row)
            done += 1
            if "error" in row:
                failed += 1
                typer.secho(visible(f"{printable(row['filename'])}  {row['error']['detail']}"), fg="red", err=True)
    if not done:
        raise StartupError(f"no image in {files_from or ', '.join(patterns)}")
    if watched:
        seconds = time.monotonic() - begin
        typer.echo(f"{done:,} images in {seconds:.1f} s, {done / seconds:.0f} a second; {failed:,} failed", err=True)
    if failed:
        raise SystemExit(1)


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="Of the running server, e.g. http://127.0.0.1:8000.")],
    clients: Annotated[list[int] | None, typer.Option(min=1, help="Clients at once; may be repeated. Default: 1, 8, 32.")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="Instead: requests a second at random times, answered or not.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each measurement.")] = 5,
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="Image to send; may be repeated. Default: a made one.")
    ] = None,
    api_key_file: KeyOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a running server: requests a second and latencies. Exits with 1 if a request was not answered."""
    from app.cli_bench import bench as measure

    _require(not (clients and rate), "--clients and --rate exclude one another")
    key = _read_key(api_key_file)
    with _open_client(url, key) as client:
        fine = measure(client, url, key, clients or [1, 8, 32], rate, seconds, image or [], as_json)
    if not fine:
        raise SystemExit(1)


@app.command()
def info(model: ModelOption = None) -> None:
    """Show what a model says of itself, how this machine would run it, and the versions of what runs it, as JSON."""
    import numpy
    import onnxruntime
    import PIL

    with closing(_open_service(model)) as service:
        engine = {
            "provider": service.session.provider,
            "workers": service.scheduler.workers,
            "max_batch": service.scheduler.max_batch,
            "images_per_second": {count: round(rate, 1) for count, rate in service.calibration.images_s.items()},
        }
        versions = {"convmixer-serve": __version__, "python": platform.python_version()}
        versions |= {module.__name__: module.__version__ for module in (onnxruntime, numpy, PIL)}
        card = {"sha256": service.sha256, **service.metadata.model_dump(mode="json"), "engine": engine, "versions": versions}
        typer.echo(json.dumps(card, indent=2))


def main() -> None:
    """Runs the command line; a failure the user can mend becomes one line on standard error."""
    try:
        app()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        install = f"pip install -c constraints.txt '.[{_EXTRAS[package]}]'"
        typer.secho(f"error: {package} is missing; in a clone: {install}", fg="red", err=True)
        raise SystemExit(1) from error
    except Exception as error:
        if not isinstance(error, StartupError) and not _is_client_error(error):
            raise
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error


def _is_client_error(error: Exception) -> bool:
    """Without importing the client where it was not used."""
    module = sys.modules.get("app.client")
    return module is not None and isinstance(error, module.ClientError)


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()  # None: closed by whoever started this


def _require(fits: bool, message: str) -> None:
    if not fits:
        raise typer.BadParameter(message)


def _format(output: Path | None, *, as_json: bool, as_csv: bool, to_terminal: bool) -> str:
    """What is written as text: `json`, `csv`, or a `table` for a person."""
    ending = output.suffix.lower() if output else ""
    _require(ending != ".parquet", "--output writes JSON lines or CSV; for Parquet give --parquet FILE")
    if as_json or (not as_csv and ending in {".json", ".jsonl", ".ndjson"}):
        return "json"
    return "table" if to_terminal and not as_csv else "csv"


def _require_paths(patterns: list[str], files_from: str | None) -> None:
    from app.cli_images import STDIN

    _require(bool(patterns) != bool(files_from), "give PATHS or --files-from, one of them")
    _require(patterns.count(STDIN) <= 1, "standard input holds one image; give `-` once")
    # not Path's, which raise where one may not look
    _require(files_from in {None, STDIN} or os.path.exists(files_from or ""), f"--files-from: {files_from} does not exist")  # noqa: PTH110
    _require(not files_from or not os.path.isdir(files_from), f"--files-from: {files_from} is a folder; give it as PATHS")  # noqa: PTH112


def _require_another_file(written: Path | None, read: list[str]) -> None:
    """Refuses to write onto a file that was named, and onto any image: it may be one of those in a folder or a list."""
    from pictures.files import IMAGE_SUFFIXES

    if written is None or not written.exists():
        return
    is_same = False
    for path in read:
        with suppress(OSError):  # it is missing, or may not be looked at
            is_same |= path != "-" and written.samefile(path)
    _require(not is_same, f"{written} is to be read, and would be overwritten; write to another file")
    _require(
        written.suffix.lower() not in IMAGE_SUFFIXES, f"{written} is an image, and would be overwritten; write to another file"
    )


def _read_key(path: Path | None) -> str | None:
    """The first key in the file, which may be the server's own with several."""
    if not path:
        return None
    lines = path.read_text("utf-8-sig", "replace").splitlines()  # the client refuses what is not ASCII
    key = next(filter(None, map(str.strip, lines)), "")
    _require(bool(key), f"--api-key-file: {path} holds no key")
    return key


def _open_client(url: str, api_key: str | None, **options: Any) -> Client:
    from app.client import Client

    try:
        return Client(url, api_key=api_key, **{name: value for name, value in options.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        raise StartupError(f"the certificates of SSL_CERT_FILE or SSL_CERT_DIR cannot be read: {error.strerror}") from error
    except ImportError as error:  # of what a SOCKS proxy in the environment takes
        raise StartupError(str(error)) from error


def _settings(**overrides: object) -> Settings:
    return Settings.load(**{name: value for name, value in overrides.items() if value is not None})


def _open_service(model: str | None) -> Service:
    from app.service import Service

    return Service(_settings(model=model))


if __name__ == "__main__":
    main()
