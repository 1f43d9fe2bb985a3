"""Two networks' answers to the same test images: which images only one has right, and whether that may be chance.

Two accuracies of 10,000 images are known to ± 0.4 points each, their difference to ± 0.5 if nothing else is known. But networks
that learnt alike are wrong on mostly the same images, and those on which they differ tell much more: ± 0.2.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from training.data import ImageSet
from training.errors import DataError

_KEY = "answers"
_Z = 1.96  # of a normal distribution: 95 % lie within so many standard errors


@dataclass(frozen=True)
class Answers:
    """What a network said of N test images.

    Attributes:
        predicted: int64 [N].
        labels: int64 [N].
        losses: float32 [N], negative log-likelihood in nats after the temperature.
        checkpoint_sha256: of the network.
        source_sha256: of the images' files, or of their pixels where they were read from nothing.
    """

    predicted: Tensor
    labels: Tensor
    losses: Tensor
    checkpoint_sha256: str
    source_sha256: str


@dataclass(frozen=True)
class Comparison:
    """Of a first and a second network; ± is half of a 95 % interval.

    Attributes:
        images: N.
        accuracies: of each, in [0, 1].
        losses: mean of each in nats.
        only_first: images that only the first has right.
        only_second: images that only the second has right.
        p: of McNemar's exact test, two-sided: how often networks that are equally good would differ by as much.
        accuracy_gain: second minus first, ±.
        loss_gain: second minus first, ±.
    """

    images: int
    accuracies: tuple[float, float]
    losses: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    accuracy_gain: tuple[float, float]
    loss_gain: tuple[float, float]


def answers_path(report: Path) -> Path:
    """Where the answers behind a report of `convmixer-train evaluate` lie."""
    return report.with_name(f"{report.stem}-answers.safetensors")


def write_answers(path: Path, logits: Tensor, data: ImageSet, temperature: float, checkpoint_sha256: str) -> None:
    """Writes what `read_answers` reads: 12 bytes an image.

    Args:
        path: of the file.
        logits: float [N, C].
        data: the N images.
        temperature: divides the logits.
        checkpoint_sha256: of the network.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {
        "predicted": logits.argmax(1).int(),
        "labels": data.labels.int(),
        "losses": F.cross_entropy(logits.double() / temperature, data.labels, reduction="none").float(),
    }
    origin = {"checkpoint_sha256": checkpoint_sha256, "source_sha256": data.source_sha256 or data.fingerprint()}
    path.write_bytes(save(tensors, {_KEY: json.dumps(origin)}))


def read_answers(path: Path) -> Answers:
    """The answers of a network.

    Args:
        path: the folder of an evaluated run, its report, or the file of answers itself.

    Raises:
        DataError: there are none, or the run's checkpoint is another by now.
    """
    report = path / "evaluation.json" if path.is_dir() else path
    file = answers_path(report) if report.suffix == ".json" else report
    if not file.is_file():
        raise DataError(f"{file} is missing; run `convmixer-train evaluate` again, which writes it beside its report")
    try:
        with safe_open(file, "pt") as found:
            if _KEY not in (found.metadata() or {}):
                raise DataError(f"{file} holds no answers to test images; give the folder of an evaluated run")
            origin = json.loads(found.metadata()[_KEY])
            tensors = {name: found.get_tensor(name) for name in ("predicted", "labels", "losses")}
    except SafetensorError as error:
        raise DataError(f"{file} is damaged ({error}); run `convmixer-train evaluate` again") from error
    released = path / "model.safetensors"
    if path.is_dir() and released.is_file() and hashlib.sha256(released.read_bytes()).hexdigest() != origin["checkpoint_sha256"]:
        raise DataError(f"{file} is of another checkpoint; run `convmixer-train evaluate {released}` again")
    return Answers(tensors["predicted"].long(), tensors["labels"].long(), tensors["losses"], **origin)


def compare(first: Answers, second: Answers) -> Comparison:
    """Compares two networks, image by image.

    Raises:
        DataError: they answered about other images.
    """
    if first.source_sha256 != second.source_sha256 or not torch.equal(first.labels, second.labels):
        raise DataError("these are answers about other images; evaluate both networks with the same --data")
    rights = [answers.predicted == answers.labels for answers in (first, second)]
    only_first, only_second = int((rights[0] & ~rights[1]).sum()), int((rights[1] & ~rights[0]).sum())
    return Comparison(
        len(first.labels),
        (float(rights[0].double().mean()), float(rights[1].double().mean())),
        (float(first.losses.double().mean()), float(second.losses.double().mean())),
        only_first,
        only_second,
        mcnemar_p(only_first, only_second),
        _mean_and_half_width(rights[1].double() - rights[0].double()),
        _mean_and_half_width(second.losses.double() - first.losses.double()),
    )


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: a fair coin for each image that one has right and the other has not.

    Args:
        only_first: images that only the first has right.
        only_second: images that only the second has right.
    """
    count = only_first + only_second
    term = total = 1
    for heads in range(1, min(only_first, only_second) + 1):
        term = term * (count - heads + 1) // heads
        total += term
    return min(1.0, 2 * total / (1 << count))


def _mean_and_half_width(differences: Tensor) -> tuple[float, float]:
    """Mean of float64 [N], and 1.96 standard errors of it."""
    spread = float(differences.std()) if len(differences) > 1 else math.inf
    return float(differences.mean()), _Z * spread / math.sqrt(len(differences))
