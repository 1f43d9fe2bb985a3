"""The `convmixer` command: serve, classify, info. Exit codes: 0 done, 1 something failed, 2 wrong usage."""

from __future__ import annotations

import csv
import json
import logging
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from app.errors import ServiceError, StartupError
from app.settings import Settings

if TYPE_CHECKING:
    from app.engine.scheduler import Outcome
    from app.schemas import Prediction
    from app.service import Service

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Classify images with ConvMixer.")

ModelOption = Annotated[
    str | None, typer.Option(help="Released artifact or path of an .onnx file. Default: CONVMIXER_MODEL or `fast`.")
]

_WINDOW = 64
"""Images in flight in `classify`: enough to keep every core busy, few enough to keep memory flat."""

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"}


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: CONVMIXER_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. Default: CONVMIXER_PORT or 8000.")] = None,
    model: ModelOption = None,
) -> None:
    """Answer HTTP until SIGTERM or Ctrl-C; open requests are finished first."""
    from app.main import create_app
    from app.server import run
    from app.telemetry.logs import configure_logging

    settings = _settings(host=host, port=port, model=model)
    configure_logging(settings.log_level, settings.log_format)
    # the lifespan has said in one line why it does not start; Starlette would add its traceback
    logging.getLogger("uvicorn.error").addFilter(lambda record: "StartupError" not in record.getMessage())
    # uvicorn drains on SIGTERM and then raises the signal again; a drained stop is a success
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
    try:
        run(create_app(settings), settings)
    except StartupError as error:
        logging.getLogger(__name__).critical("the service does not start: %s", error)
        raise SystemExit(1) from error


@app.command()
def classify(
    paths: Annotated[list[Path], typer.Argument(help="Image files and folders (searched recursively).", exists=True)],
    model: ModelOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes listed in JSON output.")] = 5,
    output: Annotated[Literal["table", "json", "csv"], typer.Option("--format", help="json: one object a line.")] = "table",
) -> None:
    """Classify files and folders on this machine, without a server. Exits with 1 if an image could not be read."""
    service = _open_service(model)
    files = list(_image_files(paths))
    if not files:
        raise StartupError(f"no image ({', '.join(sorted(_SUFFIXES))}) in {', '.join(map(str, paths))}")
    failed = 0
    writer = csv.writer(sys.stdout)
    if output == "csv":
        writer.writerow(["file", "label", "confidence", "in_distribution", "error"])
    with typer.progressbar(
        _predictions(service, files, top_k),
        length=len(files),
        label="classifying",
        file=sys.stderr,
        hidden=not sys.stderr.isatty(),
    ) as predictions:
        for path, prediction in predictions:
            error = prediction.get("error", {"code": "", "detail": ""})["detail"]
            failed += bool(error)
            if output == "json":
                typer.echo(json.dumps(prediction))
            elif output == "csv":
                values = [prediction.get(name) for name in ("label", "confidence", "in_distribution")]
                writer.writerow([path, *values, error])
            elif error:
                typer.secho(f"{path}  {error}", fg="red", err=True)
            else:
                unsure = "" if prediction.get("in_distribution", True) else "  (perhaps none of the classes)"
                typer.echo(f"{path}  {prediction['label']}  {prediction['confidence']:.1%}{unsure}")
    service.close()
    if failed:
        raise SystemExit(1)


@app.command()
def info(model: ModelOption = None) -> None:
    """Show what a model says of itself, as JSON."""
    service = _open_service(model)
    typer.echo(json.dumps({"sha256": service.sha256, **service.metadata.model_dump(mode="json")}, indent=2))
    service.close()


def main() -> None:
    """Runs the command line; a failure the user can mend becomes one line on standard error."""
    try:
        app()
    except StartupError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        typer.secho("error: onnxruntime is missing; install convmixer-serve[cpu] or convmixer-serve[cuda]", fg="red", err=True)
        raise SystemExit(1) from error


def _settings(**overrides: object) -> Settings:
    return Settings.load(**{name: value for name, value in overrides.items() if value is not None})


def _open_service(model: str | None) -> Service:
    from app.service import Service

    return Service(_settings(model=model))


def _image_files(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        else:
            yield path


def _predictions(service: Service, files: list[Path], top_k: int) -> Iterator[tuple[Path, Prediction]]:
    """Keeps `_WINDOW` images in flight and yields answers in the order of `files`."""
    remaining = iter(enumerate(files))
    in_flight: list[tuple[int, Path, Future[Outcome] | ServiceError]] = []
    while True:
        for index, path in islice(remaining, _WINDOW - len(in_flight)):
            in_flight.append((index, path, _submit(service, path)))
        if not in_flight:
            return
        index, path, pending = in_flight.pop(0)
        yield path, _prediction(service, index, path, pending, top_k)


def _submit(service: Service, path: Path) -> Future[Outcome] | ServiceError:
    from app.errors import UndecodableImage

    try:
        return service.scheduler.submit([path.read_bytes()])[0]
    except OSError as error:
        return UndecodableImage(f"cannot be read: {error.strerror}")


def _prediction(service: Service, index: int, path: Path, pending: Future[Outcome] | ServiceError, top_k: int) -> Prediction:
    from app.schemas import item_error
    from app.verdict import judge

    try:
        if isinstance(pending, ServiceError):
            raise pending
        outcome = pending.result()
    except ServiceError as error:
        return item_error(index, str(path), error)
    return judge(outcome, service.metadata, index=index, filename=str(path), top_k=top_k)


if __name__ == "__main__":
    main()
