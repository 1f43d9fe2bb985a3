"""A released checkpoint on the test set → a JSON report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.architectures import Network
from model.checkpoint import build_model, load_checkpoint
from training.augment import preprocessing
from training.compare import answers_path, write_answers
from training.config import TrainConfig
from training.data import ImageSet, count_learnt, load_images
from training.errors import DataError
from training.kernels import keep_freed_memory
from training.metrics import score

BATCH_SIZE = 250
_SIDE = 52
"""Pixels a side up to which so many are taken at once; of larger ones fewer, so that their feature maps take no more memory."""


def evaluate(checkpoint_path: Path, data_path: Path | None, output: Path, device: str) -> dict[str, Any]:
    """Measures a released checkpoint on test images and writes the report.

    Args:
        checkpoint_path: a `model.safetensors`.
        data_path: see `training.data.load_images`.
        output: JSON file written: top-1, top-5, per class, confusion matrix (rows: true class), NLL, Brier, ECE, and the
            images it got wrong with the greatest confidence; and whether these are the images it was trained with, or how many
            of their files are among those of the training. Beside it the answer to each image, for `training.compare`.
        device: torch device.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        DataError: the data cannot be read or has other classes than the checkpoint.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    build_model(checkpoint)  # what is no model is refused before the images are read
    config = TrainConfig.from_dict(checkpoint.description["training"]["config"])
    data = load_images(data_path, "test", config.image_size, config.resample)
    return evaluate_images(checkpoint_path, data, output, device, learnt=count_learnt(data_path))


def evaluate_images(checkpoint_path: Path, data: ImageSet, output: Path, device: str, *, learnt: int = 0) -> dict[str, Any]:
    """As `evaluate`, on test images that are in memory already.

    Args:
        checkpoint_path: a released checkpoint.
        data: the test images.
        output: JSON file to write.
        device: where to compute.
        learnt: of the images, those whose files are among those of the training.

    Returns:
        What was written: accuracy, per-class figures, calibration, origin.

    Raises:
        CheckpointError: not a released checkpoint.
        DataError: the images are of other classes.
    """
    checkpoint = load_checkpoint(checkpoint_path)
    description = checkpoint.description
    model = build_model(checkpoint)
    if data.classes != description["classes"]:
        raise DataError(f"the data has classes {data.classes}, the checkpoint {description['classes']}")
    config = TrainConfig.from_dict(description["training"]["config"])
    logits = compute_logits(model, data, config, torch.device(device), progress=True)
    fingerprint, temperature = data.fingerprint(), description["calibration"]["temperature"]
    sha256 = hashlib.sha256(checkpoint_path.read_bytes()).hexdigest()
    report = {
        "checkpoint": checkpoint_path.name,
        "checkpoint_sha256": sha256,
        "data_sha256": fingerprint,
        "trained_with": fingerprint == description["training"]["data_sha256"],
        "learnt": learnt,
        **score(logits, data.labels, data.classes, temperature),
    }
    output.write_text(json.dumps(report, indent=2) + "\n")
    write_answers(answers_path(output), logits, data, temperature, sha256)
    return report


def compute_logits(
    model: Network,
    data: ImageSet,
    config: TrainConfig,
    device: torch.device,
    *,
    layout: torch.memory_format = torch.channels_last,
    progress: bool = False,
) -> Tensor:
    """Logits of every image as it is, computed in float32.

    Args:
        model: is put into evaluation mode, and on the device.
        data: N images.
        config: how pixels are normalised.
        device: where to compute.
        layout: of feature maps in memory; the model's weights have it afterwards.
        progress: show a bar.

    Returns:
        float32 [N, C] on the CPU.
    """
    return compute_outputs(model, data, config, device, layout=layout, progress=progress)[0]


def compute_outputs(
    model: Network,
    data: ImageSet,
    config: TrainConfig,
    device: torch.device,
    *,
    layout: torch.memory_format = torch.channels_last,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `compute_logits`, with the pooled features before the head: float32 [N, C], float32 [N, h]."""
    if device.type == "cpu":
        keep_freed_memory()  # else half of the time goes into fetching it anew for every batch
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # else a GPU's float32 has ten bits of mantissa in convolutions
    model.eval().to(device).to(memory_format=layout)  # not in inference mode: it may copy weights yet to be trained
    normalize = preprocessing(config)
    at_once = max(1, BATCH_SIZE * _SIDE**2 // max(_SIDE, config.seen_size) ** 2)
    batches = tqdm(data.images.split(at_once), desc="evaluating", unit="batch", leave=False, disable=None if progress else True)
    logits, pooled = [], []
    try:
        with torch.inference_mode():
            for batch in batches:
                features = model.forward_features(normalize(batch.to(device)).contiguous(memory_format=layout))
                logits.append(model.forward_head(features).float())
                pooled.append(features.mean((2, 3)).float())
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return torch.cat(logits).cpu(), torch.cat(pooled).cpu()  # at the end: a GPU does not wait for each batch
