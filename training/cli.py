"""The `convmixer-train` command, from images to a served artifact.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 (Ctrl-C) and 143 (SIGTERM, the run's time is up) stopped with all saved.
"""

from __future__ import annotations

import math
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.errors import ConfigError, Stopped, TrainingError
from training.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from training.runtime import Runtime

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def describe() -> None:
    """Train, evaluate and export ConvMixer image classifiers."""


DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder with one sub-folder per class, or with train/ and test/. Default: CIFAR-10, downloaded."),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is one.")]

PrecisionOption = Annotated[
    str | None,
    typer.Option(help="float32, bf16 or fp16. Default: bf16 where the hardware has it, else fp16 on a GPU, float32 on a CPU."),
]


def _positive(minutes: float | None) -> float | None:
    if minutes is not None and not 0 < minutes < math.inf:
        raise typer.BadParameter(f"{minutes:g} is no number of minutes above 0")
    return minutes


@app.command()
def train(
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(PRESETS)}.")] = "small",
    data: DataOption = None,
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and logs.")] = Path("runs/train"),
    init: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of this released checkpoint, grown if it is narrower or has a smaller kernel; a new "
            "head if the classes differ."
        ),
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            help="Learn from the answers of this released checkpoint, usually a larger network's; repeatable: their mean."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output after a stop or a kill.")] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="Release what a stopped run in --output has come to, without more training.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Overrides the preset's number of epochs.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Overrides any setting, e.g. lr=0.005 or normalize_mean=0.5,0.5,0.5; repeatable. An unknown name lists all.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            callback=_positive, help="Stop after so many minutes, reading the data among them, with all saved; --resume goes on."
        ),
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    layout: Annotated[
        str | None, typer.Option(help="channels-last or channels-first: which is faster on a GPU depends on the kernel size.")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the network through torch.compile.")] = False,
) -> None:
    """Train a network; writes OUTPUT/model.safetensors."""
    from training.data import load_images
    from training.distributed import leads
    from training.train import train as run

    deadline = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    overrides = dict(_split_setting(text) for text in settings or [])
    if epochs is not None:
        overrides["epochs"] = str(epochs)
    config = get_preset(preset).config.override(overrides)
    runtime = _runtime(device, precision, layout, compile=compile)
    images = load_images(data, "train", config.image_size, config.resample)
    path = run(
        config,
        images,
        output,
        runtime,
        init=init,
        teachers=teacher or [],
        resume=resume or finish,
        finish=finish,
        deadline=deadline,
    )
    if leads():
        typer.echo(f"released {path}")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint, e.g. runs/train/model.safetensors.")],
    data: DataOption = None,
    output: Annotated[Path | None, typer.Option(help="JSON report. Default: evaluation.json beside the checkpoint.")] = None,
    device: DeviceOption = None,
) -> None:
    """Measure a checkpoint on the test set; nothing is chosen by it."""
    from training.evaluate import evaluate as run

    path = output or checkpoint.with_name("evaluation.json")
    report = run(checkpoint, data, path, _usable_device(device))
    if report["trained_with"]:
        typer.secho(
            "these are the images it was trained with: the accuracy says nothing about new ones; put some into test/",
            fg="yellow",
            err=True,
        )
    elif learnt := report["learnt"]:
        typer.secho(
            f"{learnt} of these {report['images']} images are files that lie in train/, too: the accuracy is too high for new "
            "ones; take them out of train/ or of test/",
            fg="yellow",
            err=True,
        )
    top5 = f"  top-5 {report['top5']:.2%}" if len(report["per_class"]) > 5 else ""
    typer.echo(f"top-1 {report['top1']:.2%}{top5}  ECE {report['calibrated']['ece']:.2%}  -> {path}")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluated run, or a report of `evaluate`.")],
    second: Annotated[Path, typer.Argument(help="The same of another network, on the same test images.")],
) -> None:
    """Tell whether two networks' test figures differ by more than chance, image by image."""
    from training.compare import compare as run
    from training.compare import read_answers

    found = run(read_answers(first), read_answers(second))
    for path, accuracy, loss, only in (
        (first, found.accuracies[0], found.losses[0], found.only_first),
        (second, found.accuracies[1], found.losses[1], found.only_second),
    ):
        typer.echo(f"{path}: {accuracy:.2%} of {found.images:,} right, loss {loss:.4f}; {only} right that the other has wrong")
    (points, about), (loss, about_loss) = found.accuracy_gain, found.loss_gain
    typer.echo(
        f"second - first: {100 * points:+.2f} ± {100 * about:.2f} points, exact McNemar p {found.p:.2g}; "
        f"loss {loss:+.4f} ± {about_loss:.4f} (95 %)"
    )


@app.command()
def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Released checkpoints of one network, e.g. ends of successive cycles.")
    ],
    output: Annotated[Path, typer.Option(help="Where to write the mean of their weights.")],
    data: DataOption = None,
    device: DeviceOption = None,
) -> None:
    """Average the weights of released checkpoints, and calibrate the result."""
    from training.average import average as run

    accuracy = run(checkpoints, output, data, _usable_device(device))
    typer.echo(f"validation {accuracy:.2%}  released {output}; evaluate it")


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint; it is rewritten.")],
    data: DataOption = None,
    view_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pixels a side at which it looks at pictures from now on, e.g. a few more than in training."),
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Measure anew what its features are like, and fit temperature and rejection thresholds; `train` does it once at its end."""
    from training.calibrate import recalibrate

    figures = recalibrate(checkpoint, data, _usable_device(device), view_size)
    typer.echo(
        f"validation {figures['accuracy']:.2%}, negative log-likelihood {figures['after']['nll']:.4f} at temperature "
        f"{figures['temperature']:.3f}; evaluate and export {checkpoint} again"
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint with evaluation.json beside it.")],
    output: Annotated[Path, typer.Argument(help="The .onnx file to write; its .sha256 is written beside it.")],
    data: DataOption = None,
    name: Annotated[str | None, typer.Option(help="Name the service answers with. Default: the file's.")] = None,
    version: Annotated[str, typer.Option(help="Version the service answers with.")] = "1.0.0",
    command: Annotated[str, typer.Option(help="Command that made the checkpoint, for the model card.")] = "",
) -> None:
    """Write the artifact the service loads, after checking that it answers exactly as the checkpoint does."""
    from training.release import export_artifact

    parity = export_artifact(checkpoint, output, data, name=name or output.stem, version=version, command=command)
    typer.echo(
        f"wrote {output}; top-1 equal to PyTorch on {parity.top1_equal} of {parity.images} images, "
        f"logits within {parity.max_logit_difference:.1e}"
    )


@app.command()
def quantize(
    artifact: Annotated[Path, typer.Argument(help="A released artifact in float32.")],
    output: Annotated[Path, typer.Argument(help="The .onnx file to write; its .sha256 is written beside it.")],
    data: DataOption = None,
    name: Annotated[str | None, typer.Option(help="Name the service answers with. Default: the file's.")] = None,
) -> None:
    """Write an artifact with 8-bit pointwise convolutions, if it loses no more than 0.1 points on the test set."""
    from training.quantize import quantize as quantize_artifact

    found = quantize_artifact(artifact, output, data, name=name or output.stem)
    typer.echo(
        f"wrote {output}; accuracy {found.top1:.2%}, in float32 {found.float32_top1:.2%}, "
        f"the same answer on {found.top1_equal} of {found.images} images"
    )


@app.command()
def card(
    checkpoint: Annotated[Path, typer.Argument(help="The released checkpoint, with evaluation.json beside it.")],
    artifact: Annotated[Path, typer.Argument(help="The artifact exported from it.")],
    data: DataOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Markdown file; pictures go to images/ beside it. Default: docs/models/ARTIFACT.md.")
    ] = None,
) -> None:
    """Write the model card with its pictures, and as HTML beside the artifact, where the service shows it."""
    from training.release import write_card_for

    output = output or Path("docs/models") / f"{artifact.stem}.md"
    write_card_for(checkpoint, artifact, data, output)
    typer.echo(f"wrote {output} and {artifact.with_suffix('.card.html')}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="The study's TOML file, or the name of one that ships here: paper.")] = Path(
        "paper"
    ),
    budget: Annotated[str, typer.Option(help="One of the file's budgets, e.g. default or full.")] = "default",
    data: DataOption = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the runs, one for each budget. Default: runs/study, for your FILE.toml runs/study-FILE."),
    ] = None,
    docs: Annotated[
        Path | None,
        typer.Option(help="Folder for study.json, study.md and images/study-*.png. Default: docs, for your own file OUTPUT."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(callback=_positive, help="Stop after so many minutes with all saved; the same command goes on."),
    ] = None,
    device: DeviceOption = None,
    precision: PrecisionOption = None,
) -> None:
    """Train a declared grid of networks, one after the other, and judge what was claimed of them."""
    from training.study import STUDIES, read_study, run_study
    from training.study_report import add_results, write_report

    ships = not file.suffix
    output = output or Path("runs/study" if ships else f"runs/study-{file.stem}")
    docs = docs or (Path("docs") if ships else output)
    declared = read_study(STUDIES / f"{file}.toml" if ships else file, budget)
    results = run_study(declared, data, output / budget, _runtime(device, precision), minutes=minutes)
    left = results["declared_runs"] - len(results["runs"])
    if results["runs"]:
        add_results(docs / "study.json", budget, results)
        write_report(docs / "study.json", docs / "study.md")
        typer.echo(f"wrote {docs / 'study.md'} from {len(results['runs'])} of {results['declared_runs']} runs")
    if left:
        typer.echo(f"time is up with {left} runs to go; give the same command again")


@app.command()
def presets() -> None:
    """List the presets with their source, cost and result."""
    for name, preset in PRESETS.items():
        typer.echo(f"{name}: {preset.config.model.name}, {preset.config.epochs} epochs")
        typer.echo(f"  source  {preset.source}\n  cost    {preset.cost}\n  result  {preset.result}")


def _split_setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes NAME=VALUE, not {text!r}")
    return name, value


def _runtime(device: str | None, precision: str | None, layout: str | None = None, *, compile: bool = False) -> Runtime:
    from training.runtime import LAYOUTS, Runtime

    runtime = Runtime.detect(_usable_device(device), compile=compile)
    if precision:
        if precision not in ("float32", "bf16", "fp16"):
            raise ConfigError(f"--precision must be float32, bf16 or fp16, not {precision!r}")
        runtime = replace(runtime, precision=precision)
    if layout:
        if layout not in LAYOUTS:
            raise ConfigError(f"--layout must be {' or '.join(LAYOUTS)}, not {layout!r}")
        runtime = replace(runtime, layout=layout)
    return runtime


def _usable_device(name: str | None) -> str:
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ConfigError(f"--device takes cpu, cuda or cuda:N, not {name}")
        torch.empty(0, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # whose name and precision are asked for later
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def main() -> None:
    """Runs the command line; a failure the user can mend becomes one line on standard error."""
    from model.checkpoint import CheckpointError
    from model.errors import ExportError

    try:
        app()
    except Stopped as stopped:
        from training.distributed import leads

        if leads():
            typer.echo(str(stopped), err=True)
        raise SystemExit(128 + (stopped.signal_number or signal.SIGTERM)) from stopped
    except ModuleNotFoundError as error:
        install = "in a clone: pip install -c constraints.txt '.[train]'"
        typer.secho(f"error: {error.name} is missing; {install}", fg="red", err=True)
        raise SystemExit(1) from error
    except (TrainingError, CheckpointError, ExportError, OSError) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
