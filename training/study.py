"""A declared grid of training runs: one network a cell, several seeds, equal images, epochs and recipe (docs/study.md).

Runs of `training.train` one after the other, nothing else: each finished one is stored as `CELL/seed-N/result.json`, a stopped
one goes on from its own checkpoint. Seeds are the outer loop, so that a study that is stopped early is still a balanced one.
"""

from __future__ import annotations

import json
import sys
import time
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model.architectures import build_network, config_from_dict, count_macs
from model.checkpoint import load_checkpoint
from training import __version__
from training.calibrate import SIMILARITY_IMAGES
from training.config import TrainConfig
from training.data import ImageSet, load_images
from training.errors import ConfigError, ResumeError, Stopped
from training.evaluate import evaluate_images
from training.runtime import Runtime, autocast, hardware
from training.train import train

STUDIES = Path(__file__).parent / "studies"
"""The declared studies that come with the package."""

MEASURE_S = 2.0
"""How long a cell's speed is measured before the study begins."""

CLAIM_TESTS = ("better", "as-good", "no-matter")


@dataclass(frozen=True)
class Cell:
    """One run of the grid.

    Attributes:
        name: of the network among the study's.
        config: all settings, `seed` among them.
    """

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Claim:
    """A statement that the results decide.

    Attributes:
        text: the statement.
        paper: what the paper says of it.
        test: `better`, `as-good` or `no-matter`, as the study's file explains them.
        pairs: names of the cells compared.
        margin: percentage points that `as-good` and `no-matter` allow.
    """

    text: str
    paper: str
    test: str
    pairs: list[list[str]]
    margin: float = 0.0


@dataclass(frozen=True)
class Study:
    """A study at one budget.

    Attributes:
        title: for people.
        about: what its page says of the recipe.
        budget: name of the budget.
        reference: name of the cell that the others change in one factor.
        images: training images taken, the same share of each class; 0 takes all.
        cells: in the order in which they run.
        claims: what is to be decided.
    """

    title: str
    about: str
    budget: str
    reference: str
    images: int
    cells: list[Cell]
    claims: list[Claim]


def read_study(path: Path, budget: str) -> Study:
    """Reads a study's file.

    Raises:
        ConfigError: the file cannot be read, lacks the budget, or has a setting that does not exist or does not fit.
    """
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8"))
        if budget not in declared["budgets"]:
            raise ConfigError(f"{path} has no budget {budget!r}; known: {', '.join(declared['budgets'])}")
        chosen = declared["budgets"][budget]
        recipe = {**declared["recipe"], **chosen.get("recipe", {}), "epochs": chosen["epochs"]}
        models = {name: {**chosen["model"], **settings} for name, settings in declared["cells"].items()} | chosen["cells"]
        cells = [
            Cell(name, TrainConfig.from_dict({**recipe, "model": model, "seed": seed}))
            for seed in chosen["seeds"]
            for name, model in models.items()
        ]
        claims = [Claim(**claim) for claim in declared["claims"]]
        about = declared.get("about", "")
        study = Study(declared["title"], about, budget, declared["reference"], chosen["images"], cells, claims)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(what if str(path) in what else f"{path}: {what}") from error
    unknown = {name for claim in claims for pair in claim.pairs for name in pair} - set(models)
    if unknown or study.reference not in models:
        raise ConfigError(f"{path}: no cell is called {', '.join(sorted(unknown or {study.reference}))}")
    if any(claim.test not in CLAIM_TESTS for claim in claims):
        raise ConfigError(f"{path}: a claim's test must be one of {', '.join(CLAIM_TESTS)}")
    return study


def run_study(
    study: Study, data_path: Path | None, output: Path, runtime: Runtime, *, minutes: float | None = None
) -> dict[str, Any]:
    """Trains and evaluates the cells that are not finished yet.

    Args:
        study: what to run.
        data_path: see `training.data.load_images`; the test half is read once for each run, by its final weights.
        output: folder of the runs.
        runtime: device, precision and compilation.
        minutes: stop after so many, with the run in hand saved; None runs to the end.

    Returns:
        The results so far, plain values, as `training.study_report` takes them.

    Raises:
        ResumeError: `output` holds a run of other settings, data or code.
        Stopped: SIGTERM or SIGINT came; the run in hand was saved first.
    """
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    finished = {(c.name, c.config.seed): _load_result(output, c) for c in study.cells}
    size = (study.cells[0].config.image_size, study.cells[0].config.resample)
    training = balanced_subset(load_images(data_path, "train", *size), study.images)
    if any(result["data_sha256"] != training.fingerprint() for result in finished.values() if result):
        raise ResumeError(f"{output} holds runs on other images; choose another --output")
    if all(finished.values()):
        return collect(study, output)
    test = load_images(data_path, "test", *size)
    seconds = _estimate(study, training, len(test), output, runtime)
    here = [result for result in finished.values() if result and result["hardware"] == hardware(runtime)]
    if here:  # what runs took tells more than what was measured before them
        slower = sum(result["seconds"] for result in here) / sum(seconds[result["cell"]] for result in here)
        seconds = {name: slower * value for name, value in seconds.items()}
    total, done = (sum(seconds[c.name] for c in cells) for cells in (study.cells, _of(study, finished)))
    tqdm.write(
        f"{study.title} ({study.budget}): {len(study.cells)} runs, {len(_of(study, finished))} finished; "
        f"about {(total - done) / 60:.0f} minutes to go on {hardware(runtime)}",
        file=sys.stderr,
    )
    torch._dynamo.config.recompile_limit = 64  # the weight gradient is compiled for each kernel and size of the grid
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"
    with tqdm(total=total, initial=done, bar_format=layout, desc="study", mininterval=0) as bar:
        for number, cell in enumerate(study.cells, 1):
            if finished[cell.name, cell.config.seed]:
                continue
            bar.set_description_str(f"run {number}/{len(study.cells)}: {cell.name} seed {cell.config.seed}")
            if time.monotonic() > deadline or not _run(cell, training, test, output, runtime, deadline):
                break
            bar.update(seconds[cell.name])
    return collect(study, output)


def collect(study: Study, output: Path) -> dict[str, Any]:
    """The results of the finished runs of a study, plain values.

    Raises:
        ResumeError: `output` holds a run of other settings or code.
    """
    runs = [result for cell in study.cells if (result := _load_result(output, cell))]
    return {
        "title": study.title,
        "about": study.about,
        "reference": study.reference,
        "declared_runs": len(study.cells),
        "claims": [vars(claim) for claim in study.claims],
        "runs": runs,
    }


def balanced_subset(data: ImageSet, count: int) -> ImageSet:
    """`count` images, the same number of each class, the same ones always; all of them when `count` is 0 or too large."""
    if not 0 < count < len(data):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    share = count // len(data.classes)
    chosen = torch.cat([order[data.labels[order] == label][:share] for label in range(len(data.classes))]).sort().values
    return ImageSet(data.images[chosen], data.labels[chosen], data.classes)


def measure_speed(config: TrainConfig, runtime: Runtime, seconds: float) -> tuple[float, float]:
    """Images per second of a training step and of a forward pass of a network, measured for so many seconds each."""
    device = torch.device(runtime.device)
    network = build_network(config.model).to(device).to(memory_format=runtime.memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    images = torch.randn(config.batch_size, 3, config.largest_size, config.largest_size, device=device)
    images = images.contiguous(memory_format=runtime.memory_format)
    labels = torch.zeros(config.batch_size, dtype=torch.long, device=device)

    def step() -> None:
        with autocast(device, runtime.precision):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    def forward() -> None:
        with torch.inference_mode():
            network(images)[0, 0].item()

    rates = []
    for work, share in ((step, 1.0), (forward, 0.25)):
        work()  # the first one allocates
        begun, steps = time.monotonic(), 0
        while time.monotonic() - begun < share * seconds:
            work()
            steps += 1
        rates.append(config.batch_size * steps / (time.monotonic() - begun))
        network.eval()
    return rates[0], rates[1]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a file that is either the old one or the whole new one, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(values, indent=1) + "\n")
    draft.replace(path)


def _of(study: Study, finished: dict[tuple[str, int], dict[str, Any] | None]) -> list[Cell]:
    return [cell for cell in study.cells if finished[cell.name, cell.config.seed]]


def _folder(output: Path, cell: Cell) -> Path:
    return output / cell.name / f"seed-{cell.config.seed}"


def _load_result(output: Path, cell: Cell) -> dict[str, Any] | None:
    path = _folder(output, cell) / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    if TrainConfig.from_dict(result["config"]) != cell.config or result["code_version"] != __version__:
        raise ResumeError(f"{path} is of other settings or another version; choose another --output or remove {path.parent}")
    return result


def _run(cell: Cell, training: ImageSet, test: ImageSet, output: Path, runtime: Runtime, deadline: float) -> bool:
    """Trains and evaluates one cell, from its checkpoint if it has one; False when the deadline came first."""
    folder = _folder(output, cell)
    checkpoint = folder / "model.safetensors"
    try:
        resume = (folder / "last.safetensors").exists()
        train(cell.config, training, folder, replace(runtime, tensorboard=False), resume=resume, deadline=deadline)
    except Stopped as stopped:
        if stopped.signal_number is None:
            return False
        raise
    report = evaluate_images(checkpoint, test, folder / "evaluation.json", runtime.device)
    description = load_checkpoint(checkpoint).description
    trained = description["training"]
    result = {
        "cell": cell.name,
        "seed": cell.config.seed,
        "network": description["name"],
        "parameters": description["parameters"],
        "macs": count_macs(config_from_dict(description["model"]), cell.config.seen_size),
        "test_top1": report["top1"],
        "validation_top1": trained["history"][-1]["val_accuracy"],
        "train_loss": trained["history"][-1]["train_loss"],
        "seconds": trained["seconds"],
        "epochs": cell.config.epochs,
        "images": trained["images"],
        "validation_images": trained["validation_images"],
        "test_images": report["images"],
        "hardware": trained["hardware"],
        "precision": trained["precision"],
        "torch": trained["torch"],
        "data_sha256": trained["data_sha256"],
        "checkpoint_sha256": report["checkpoint_sha256"],
        "code_version": __version__,
        "config": cell.config.to_dict(),
    }
    write_json(folder / "result.json", result)
    (folder / "last.safetensors").unlink(missing_ok=True)
    return True


def _estimate(study: Study, training: ImageSet, tests: int, output: Path, runtime: Runtime) -> dict[str, float]:
    """Seconds that one run of each cell takes, from a short measurement, which is kept for the next call."""
    path = output / "speed.json"
    on = f"{hardware(runtime)}, {runtime.precision}"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    speeds = known.get(on, {})
    for cell in tqdm({c.name: c for c in study.cells}.values(), desc="measuring", unit="cell", leave=False, disable=None):
        if cell.name not in speeds:
            speeds[cell.name] = measure_speed(cell.config, runtime, MEASURE_S)
    write_json(path, {**known, on: speeds})
    seconds = {}
    for cell in study.cells:
        step, forward = speeds[cell.name]
        held_out = len(training) * cell.config.val_fraction
        learnt = cell.config.epochs * (len(training) - held_out)
        looked_at = (cell.config.epochs + 1) * held_out + min(SIMILARITY_IMAGES, len(training)) + tests
        seconds[cell.name] = learnt / step + looked_at / forward
    return seconds
