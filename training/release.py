"""From a finished run to what the repository ships: artifact and model card, from checkpoint and evaluation."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from model.checkpoint import load_checkpoint
from model.errors import ExportError
from model.export import ParityReport, export, read_metadata
from training.config import TrainConfig
from training.data import ImageSet, load_images
from training.errors import DataError
from training.metrics import score

RESIZE_MODE = "crop"
"""How the service brings other shapes to the input size, with the filter of the training; `training.data` does the same.

Where all test pictures had to be enlarged for it, the service makes others as small first (`through`)."""

SCORE = "feature_similarity"
"""How the service tells pictures of none of the classes: the best of three, docs/training.md."""


def export_artifact(
    checkpoint_path: Path, output: Path, data_path: Path | None, *, name: str, version: str, command: str
) -> ParityReport:
    """Exports a checkpoint that was evaluated, checks parity on the test images, and writes the artifact.

    Args:
        checkpoint_path: a `model.safetensors` with `evaluation.json` beside it.
        output: the .onnx file.
        data_path: see `training.data.load_images`.
        name: of the model, for clients.
        version: of the model, for clients.
        command: what made the checkpoint.

    Raises:
        DataError: the evaluation is missing or of another checkpoint, or the data are other than it was made with.
        ExportError: the graph does not answer as the network does, or name or version fit in no address; nothing is written.
    """
    check_addressable(name=name, version=version)
    evaluation = load_evaluation(checkpoint_path)
    checkpoint = load_checkpoint(checkpoint_path)
    training = checkpoint.description["training"]
    config = TrainConfig.from_dict(training["config"])
    data = _evaluated_on(checkpoint_path, evaluation, data_path, config)
    resize: dict[str, Any] = {"mode": RESIZE_MODE, "filter": config.resample}
    if data.enlarged_from:
        resize["through"] = data.enlarged_from
    metadata = {
        "name": name,
        "version": version,
        "resize": resize,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "checkpoint_sha256": evaluation["checkpoint_sha256"],
        "command": command,
        "test": {
            key: evaluation[key]
            for key in ("images", "trained_with", "top1", "top5", "per_class", "calibrated", "uncalibrated")
            if key in evaluation
        },
        "training": {
            "epochs": round(training["config"]["epochs"] * training["steps"] / training["total_steps"], 2),
            "seconds": round(training["seconds"]),
            "hardware": training["hardware"],
        },
    }
    images = data.images.permute(0, 2, 3, 1).contiguous().numpy()
    return export(checkpoint, images, output, metadata, SCORE)


def write_card_for(checkpoint_path: Path, artifact_path: Path, data_path: Path | None, output: Path) -> None:
    """Writes the model card of a released artifact, and the same as HTML beside the artifact for the service to show.

    Args:
        checkpoint_path: a `model.safetensors` with `evaluation.json` beside it.
        artifact_path: the artifact exported from it.
        data_path: the data it was evaluated on, for the pictures it got wrong.
        output: the Markdown file.

    Raises:
        DataError: the evaluation is missing or of another checkpoint, or the data are other than it was made with.
        ExportError: the file is no artifact, or was not exported from this checkpoint.
        OSError: the artifact cannot be read or the card not written.
    """
    from training.report import render_card, write_card

    evaluation = load_evaluation(checkpoint_path)
    artifact = read_metadata(artifact_path)
    if artifact["checkpoint_sha256"] != evaluation["checkpoint_sha256"]:
        raise ExportError(f"{artifact_path} was exported from another checkpoint than {checkpoint_path}")
    checkpoint = load_checkpoint(checkpoint_path)
    config = TrainConfig.from_dict(checkpoint.description["training"]["config"])
    data = _evaluated_on(checkpoint_path, evaluation, data_path, config)
    if "quantized" in artifact:  # the evaluation is of the checkpoint, which these answers are not equal to
        from training.quantize import artifact_logits

        evaluation |= score(artifact_logits(artifact_path, data), data.labels, data.classes, artifact["temperature"])
    write_card(checkpoint, evaluation, artifact, data, output)
    artifact_path.with_suffix(".card.html").write_text(render_card(output), encoding="utf-8")


def check_addressable(**names: str) -> None:
    """Refuses what no address can hold: `/v2/models/NAME/versions/VERSION` has both as parts of its path.

    Args:
        names: what is checked, by what it is called.

    Raises:
        ExportError: one of them.
    """
    for what, text in names.items():
        if not text or "/" in text or not text.isprintable():
            raise ExportError(f"{what} {text!r} is empty, or holds a slash or a control character; no address could name it")


def _evaluated_on(checkpoint_path: Path, evaluation: dict[str, Any], data_path: Path | None, config: TrainConfig) -> ImageSet:
    data = load_images(data_path, "test", config.image_size, config.resample)
    if data.fingerprint() != evaluation["data_sha256"]:
        raise DataError(f"{data_path or 'CIFAR-10'} is not what {checkpoint_path} was evaluated on; give the same --data")
    return data


def load_evaluation(checkpoint_path: Path) -> dict[str, Any]:
    """The report of `convmixer-train evaluate` beside a checkpoint.

    Raises:
        DataError: there is none, or it is of other weights.
    """
    path = checkpoint_path.with_name("evaluation.json")
    if not path.is_file():
        raise DataError(f"{path} is missing; run `convmixer-train evaluate {checkpoint_path}` first")
    try:
        report: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged; run `convmixer-train evaluate {checkpoint_path}` again") from error
    if report.get("checkpoint_sha256") != hashlib.sha256(checkpoint_path.read_bytes()).hexdigest():
        raise DataError(f"{path} is of another checkpoint; run `convmixer-train evaluate {checkpoint_path}` again")
    return report
