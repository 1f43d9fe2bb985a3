"""Checkpoint files: one safetensors file that also carries everything needed to rebuild what it holds.

The description (architecture, classes, normalisation, training configuration, metrics) sits in the safetensors header,
so one rename publishes weights and description together and a kill at any moment leaves the last good file. A copy of
the description lies beside it as `NAME.json`, for people and `jq`; nothing reads it back. Never pickle.
See docs/decisions/0002-one-checkpoint-file.md.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from model.architectures import Network, build_network, config_from_dict
from model.similarity import FeatureSimilarity

FORMAT = "convmixer-checkpoint/1"
SIMILARITY = "similarity."
"""Prefix of the tensors of `model.similarity`, which a released checkpoint has beside the network's."""

_CLASS_MEANS = "class_means"
"""What releases up to 1.9.0 had in their place."""


class CheckpointError(Exception):
    """The file is missing, damaged, or not a checkpoint of this project."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: by name; a training checkpoint has more than the model's (`model.`, `ema.`, `optimizer.` prefixes).
        description: plain JSON values.
        path: of the file it was read from, for messages.
    """

    tensors: dict[str, Tensor]
    description: dict[str, Any]
    path: Path | None = field(default=None, compare=False)


def save_checkpoint(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Writes a checkpoint atomically: temporary name, flush to disk, rename.

    A copy of the description that could not be written is no failure: standard error says so.

    Raises:
        OSError: it could not be written, e.g. the disk is full; an older file of that name is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "description": json.dumps(description)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, header)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _write_copy(path.with_suffix(".json"), description)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or of another kind.
    """
    try:
        # safe_open opens a name twice, header and tensors; a run that saves in between gives it halves of two files
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CheckpointError(f"no checkpoint at {path}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        tensors = load(data)  # checks the header's length and offsets
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
        if header.get("format") != FORMAT:
            raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of format {FORMAT}")
        return Checkpoint(tensors, json.loads(header["description"]), path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error


def build_model(checkpoint: Checkpoint) -> Network:
    """The network of a released checkpoint, in evaluation mode.

    Raises:
        CheckpointError: the description has no architecture or the weights do not fit it.
    """
    where = checkpoint.path or "the checkpoint"
    if "model" not in checkpoint.description:
        raise CheckpointError(f"{where} describes no network, as a run in training does not; give its model.safetensors")
    try:
        model = build_network(config_from_dict(checkpoint.description["model"]))
        model.load_state_dict(network_weights(checkpoint))
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{where} does not hold the network that it describes: {error}") from error
    return model.eval()


def network_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The state dict of a released checkpoint's network, without what calibration has added."""
    beside = (SIMILARITY, _CLASS_MEANS)
    return {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(beside)}


def build_similarity(checkpoint: Checkpoint) -> FeatureSimilarity:
    """The similarity of a released checkpoint.

    Raises:
        CheckpointError: it has none.
    """
    found = {name.removeprefix(SIMILARITY): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(SIMILARITY)}
    if not found:
        raise CheckpointError("the checkpoint does not say what its features are like; run `convmixer-train calibrate` on it")
    classes, width = found["class_means"].shape
    similarity = FeatureSimilarity(width, classes)
    similarity.load_state_dict(found)
    return similarity


def _write_copy(path: Path, description: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(description, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        print(f"{path} could not be written: {error.strerror}; the checkpoint is complete without it", file=sys.stderr)
        with suppress(OSError):
            path.unlink()  # it describes the checkpoint before this one
    finally:
        with suppress(OSError):
            temporary.unlink()
