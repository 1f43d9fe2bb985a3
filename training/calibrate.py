"""What a finished network's answers are worth: fitted on the held-out slice, never on the test set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.architectures import Network
from model.checkpoint import SIMILARITY, build_model, load_checkpoint, network_weights, save_checkpoint
from model.similarity import FeatureSimilarity
from training.config import TrainConfig
from training.data import ImageSet, load_images, split_validation
from training.errors import DataError
from training.evaluate import compute_outputs
from training.metrics import (
    familiarity,
    fit_temperature,
    probability_scores,
    rejection_thresholds,
)

SIMILARITY_IMAGES = 10_000
"""Training images that it is measured with; of half as many it tells a little less."""


@dataclass(frozen=True)
class Calibration:
    """What a released checkpoint says of its answers.

    Attributes:
        figures: accuracy, temperature, rejection thresholds by score, and probability scores before and after; plain JSON values.
        similarity: of the network's features.
    """

    figures: dict[str, Any]
    similarity: FeatureSimilarity

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has of it beside the network's weights."""
        return {SIMILARITY + name: tensor for name, tensor in self.similarity.state_dict().items()}


def calibrate(
    network: Network,
    training: ImageSet,
    validation: ImageSet,
    config: TrainConfig,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> Calibration:
    """Fits temperature and rejection thresholds.

    Args:
        network: trained; is put in evaluation mode.
        training: images it was trained with, for what their features are like.
        validation: images held out.
        config: the run's, for the normalisation.
        device: where to compute.
        layout: of feature maps in memory.
    """
    each = max(1, SIMILARITY_IMAGES // len(training.classes))
    of_class = [(training.labels == number).nonzero().flatten() for number in range(len(training.classes))]
    chosen = torch.cat([indices[_spread(len(indices), each)] for indices in of_class])
    sample = ImageSet(training.images[chosen], training.labels[chosen], training.classes)
    _, features = compute_outputs(network, sample, config, device, layout=layout)
    similarity = FeatureSimilarity.fit(features, sample.labels, len(training.classes))
    logits, features = compute_outputs(network, validation, config, device, layout=layout)
    temperature = fit_temperature(logits, validation.labels)
    scores = familiarity(logits, temperature, similarity(features))
    return Calibration(
        {
            "accuracy": float((logits.argmax(1) == validation.labels).float().mean()),
            "temperature": temperature,
            "thresholds": rejection_thresholds(scores),
            "before": probability_scores(logits, validation.labels),
            "after": probability_scores(logits, validation.labels, temperature),
        },
        similarity,
    )


def _spread(count: int, wanted: int) -> Tensor:
    """So many indices below `count`, evenly apart; all if there are no more."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().long()


def recalibrate(checkpoint_path: Path, data_path: Path | None, device: str, view_size: int | None = None) -> dict[str, Any]:
    """Fits a released checkpoint anew and rewrites it; its evaluation must be made again.

    Args:
        checkpoint_path: a `model.safetensors`.
        data_path: what it was trained with, see `training.data.load_images`.
        device: torch device.
        view_size: side in pixels at which it looks at pictures from now on (arXiv 1906.06423), by default as before. If pictures
            were enlarged for its training, it takes them as they were and enlarges them itself.

    Returns:
        The figures, as in the checkpoint's description.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: it takes one size only.
        DataError: the data cannot be read, or are others than those it was trained with.
        OSError: the checkpoint cannot be written.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    network = build_model(checkpoint)
    description = checkpoint.description
    config = TrainConfig.from_dict(description["training"]["config"])
    data = load_images(data_path, "train", config.image_size, config.resample)
    if data.fingerprint() != description["training"]["data_sha256"]:
        raise DataError(f"{data_path or 'CIFAR-10'} is not what {checkpoint_path} was trained with; give the same --data")
    if view_size is not None:
        side = data.enlarged_from or config.image_size
        config = replace(config, image_size=side, train_size=config.largest_size, view_size=view_size)
        data = load_images(data_path, "train", config.image_size, config.resample)
    training, validation = split_validation(data, config.val_fraction)
    fitted = calibrate(network, training, validation, config, torch.device(device))
    described = {
        **description["training"],
        "config": config.to_dict(),
        "data_sha256": data.fingerprint(),
        "source_sha256": data.source_sha256,
        "pictures_sha256": data.pictures_sha256,
    }
    save_checkpoint(
        checkpoint_path,
        {**network_weights(checkpoint), **fitted.tensors()},
        {**description, **config.described_input(), "calibration": fitted.figures, "training": described},
    )
    return fitted.figures
