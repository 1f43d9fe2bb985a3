"""One network from several of the same run's line: the mean of their weights.

Averaging Weights Leads to Wider Optima and Better Generalization (arXiv 1803.05407): the ends of successive learning-rate
cycles lie around a flat region, and their mean, with batch normalisation measured anew, is better than any of them.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from model.architectures import config_from_dict
from model.checkpoint import Checkpoint, build_model, load_checkpoint, network_weights, save_checkpoint
from model.convmixer import ConvMixerConfig
from model.grow import can_grow, grow
from training.augment import preprocessing
from training.calibrate import calibrate
from training.config import TrainConfig
from training.data import load_images, split_validation
from training.errors import ConfigError, DataError

BATCH_NORM_IMAGES = 5000
"""Training images from which batch normalisation takes its statistics."""
_BATCH_SIZE = 50
_SAME = ("classes", "image_size", "normalize_mean", "normalize_std")


def average(paths: list[Path], output: Path, data_path: Path | None, device: str) -> float:
    """Writes the mean of released checkpoints as a released checkpoint, calibrated; it is yet to be evaluated.

    A narrower network among them, or one with a smaller kernel, is grown first, as the last one's run grew it when it began with
    it (`--init`): only so do their channels belong together.

    Args:
        paths: two or more `model.safetensors`; settings and history are taken from the last.
        output: file to write.
        data_path: what they were trained with, see `training.data.load_images`.
        device: torch device.

    Returns:
        Accuracy on the held-out slice.

    Raises:
        CheckpointError: one of them cannot be read.
        ConfigError: fewer than two, they hold networks that do not grow into the last one's, or the output ends in .json or would
            overwrite one of them or a run.
        DataError: the data cannot be read, or one was trained with others or another held-out slice.
        OSError: the output cannot be written.
    """
    if len(paths) < 2:
        raise ConfigError("an average needs at least two checkpoints")
    if output.suffix == ".json":
        raise ConfigError(f"{output}: give another ending; a copy of the description to be read goes there")
    of_a_run = output.name == "model.safetensors" and output.with_name("last.safetensors").exists()
    if of_a_run or output.resolve() in [path.resolve() for path in paths]:
        raise ConfigError(f"{output} is of a run, or to be averaged, and would be overwritten; give another --output")
    checkpoints = [load_checkpoint(path) for path in paths]
    for checkpoint in checkpoints:
        build_model(checkpoint)  # one that is still in training has no description of a network
    last = checkpoints[-1].description
    config = TrainConfig.from_dict(last["training"]["config"])
    data = load_images(data_path, "train", config.image_size, config.resample)
    for path, checkpoint in zip(paths, checkpoints, strict=True):
        _check(path, checkpoint.description, last, data.fingerprint())
    states = [_as_large(checkpoint, config) for checkpoint in checkpoints]
    training, validation = split_validation(data, config.val_fraction)

    network = build_model(Checkpoint(_mean(states), last))
    network = network.to(device).to(memory_format=torch.channels_last)
    normalize = preprocessing(config)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(config.seed))[:BATCH_NORM_IMAGES]
    # of equal size but for one image, as each counts the same, however small
    batches = training.images[order].tensor_split(math.ceil(len(order) / _BATCH_SIZE))
    update_bn((normalize(batch.to(device)) for batch in batches), network)

    fitted = calibrate(network, training, validation, config, torch.device(device))
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    description = {
        **last,
        "calibration": fitted.figures,
        "training": {**last["training"], "averaged": {"sha256": parts}},
    }
    save_checkpoint(output, {**network.state_dict(), **fitted.tensors()}, description)
    accuracy: float = fitted.figures["accuracy"]
    return accuracy


def _check(path: Path, found: dict[str, Any], last: dict[str, Any], fingerprint: str) -> None:
    different = [key for key in _SAME if found[key] != last[key]]
    theirs, large = config_from_dict(found["model"]), config_from_dict(last["model"])
    if theirs != large and not (
        isinstance(theirs, ConvMixerConfig) and isinstance(large, ConvMixerConfig) and can_grow(theirs, large)
    ):
        different.append("networks")
    if different:
        raise ConfigError(f"{path} and the last checkpoint have different {', '.join(different)}; only equals can be averaged")
    if found["training"]["data_sha256"] != fingerprint:
        raise DataError(f"the data given are not what {path} was trained with; give the same --data")
    held_out = [of["training"]["config"]["val_fraction"] for of in (found, last)]
    if held_out[0] != held_out[1]:
        raise DataError(f"{path} held out {held_out[0]:g} of the images, the last checkpoint {held_out[1]:g}; give equals")


def _as_large(checkpoint: Checkpoint, config: TrainConfig) -> dict[str, Tensor]:
    """A checkpoint's weights in the size of the last one's network."""
    weights = network_weights(checkpoint)
    small, large = config_from_dict(checkpoint.description["model"]), config.model
    if isinstance(small, ConvMixerConfig) and isinstance(large, ConvMixerConfig) and small != large:
        return grow(weights, small, large, config.seed)
    return weights


def _mean(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[-1].items()
    }
