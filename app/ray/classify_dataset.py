"""Classifies a whole data set on a Ray cluster: `python -m app.ray.classify_dataset --input PLACE --output PLACE`.

Ray Data streams the shards that are not done through tasks on all nodes, and runs a task again elsewhere when its node
dies. Tasks and not a pool of actors: a task is bound to no worker, while calls to an actor whose node died wait until
that actor finds room again. The model stays loaded all the same, because Ray keeps a job's worker processes. Ray Data's
own checkpoints would read every image again to learn that it is done, and have no place for rejected records; what is
done is seen from the output instead (`app.ray.shards`).

Exit codes: 0 done, 1 the storage failed for some records or the job could not run (run it again), 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections import Counter
from typing import Annotated, Any, Literal

import typer

from app.engine.artifact import read_verified
from app.errors import StartupError
from app.ray.place import Place
from app.ray.shards import PASSING, SUMMARY, JobDescription, Shards
from app.settings import Settings

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local Ray would report to its makers

command = typer.Typer(pretty_exceptions_enable=False)


@command.command()
def classify_dataset(
    source: Annotated[str, typer.Option("--input", help="Folder or Parquet data set: path, file://, s3://, gs://, …")],
    output: Annotated[str, typer.Option(help="Folder for results, the same for all nodes; it holds the job's progress.")],
    data_format: Annotated[
        Literal["images", "parquet"], typer.Option("--format", help="images: every file is one. parquet: a column.")
    ] = "images",
    image_column: Annotated[str, typer.Option(help="Parquet: encoded images, or structs with a field `bytes`.")] = "image",
    id_column: Annotated[str | None, typer.Option(help="Parquet: ids. Default: PATH#ROW.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard: what is computed again after a kill.")] = 1000,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs of one worker; as many workers as the cluster has room for.")] = 1,
) -> None:
    """Classify every image of a data set. Run it again after any failure: what is done is not done again."""
    begin = time.monotonic()
    settings = Settings.load(cores=cpus)
    sha256 = read_verified(settings.artifact_path(), settings.model_sha256).sha256
    job = JobDescription(Place(source).uri, data_format, image_column, id_column, shard_size, sha256)
    shards = Shards.open(Place(output), job)
    done = {shard for shard, result in shards.results().items() if PASSING.isdisjoint(result.rejected)}
    missing = [shard for shard in range(len(shards.rows)) if shard not in done]
    if missing:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray's messages belong
            _compute(shards, job, missing, settings)
    shards.remove_unfinished()
    summary = _summary(shards, job, missing, time.monotonic() - begin)
    shards.output.write(SUMMARY, json.dumps(summary, indent=2).encode())
    typer.echo(json.dumps(summary, indent=2))
    if not PASSING.isdisjoint(summary["rejected"]):
        raise SystemExit("some records could not be read, or the model failed on them; run the same command again to try those")


def _compute(shards: Shards, job: JobDescription, missing: list[int], settings: Settings) -> None:
    """Computes shards on the cluster that RAY_ADDRESS names, or on one that begins and ends with this process."""
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        # Ray's own word for "this machine only": else it listens on every interface, and may run what anyone there sends it
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray.data

    from app.ray.records import compute_shards

    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that there is no bar
    ray.data.DataContext.get_current().enable_progress_bars = False  # they count shards, ours counts images
    shards.forget_failures()
    results = ray.data.from_items([{"shard": shard} for shard in missing], override_num_blocks=len(missing)).map_batches(
        compute_shards,
        batch_size=1,
        num_cpus=settings.cores,
        fn_kwargs={"output": shards.output.uri, "job": job, "settings": settings},
    )
    everything, left = sum(shards.rows), sum(shards.rows[shard] for shard in missing)
    with typer.progressbar(length=everything, label="classifying", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        bar.update(everything - left)
        for row in results.iter_rows():
            if row["failure"]:
                raise StartupError(f"a worker cannot go on: {row['failure']}; mend that and run the same command again")
            bar.update(int(row["rows"]))
    ray.shutdown()


def _summary(shards: Shards, job: JobDescription, computed: list[int], seconds: float) -> dict[str, Any]:
    """The job's totals, counted in its output."""
    results = shards.results()
    lost = len(shards.rows) - len(results)
    if lost:
        raise SystemExit(f"error: {lost} shards are not in {shards.output.uri}; is it the same folder on every node?")
    images = sum(shards.rows[shard] for shard in computed)
    return {
        "input": job.input,
        "model_sha256": job.model_sha256,
        "images": sum(shards.rows),
        "classified": sum(result.classified for result in results.values()),
        "rejected": dict(sum((result.rejected for result in results.values()), Counter())),
        "shards": len(shards.rows),
        "this_run": {
            "shards": len(computed),
            "images": images,
            "seconds": round(seconds, 3),
            "images_s": round(images / seconds, 1),
        },
    }


def main() -> None:
    """Runs the command line; a failure the user can mend becomes one line on standard error."""
    try:
        command()
    except StartupError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
