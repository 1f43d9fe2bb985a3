"""Learning from a larger network's answers instead of from labels alone.

As arXiv 2106.05237 found for compression: the teacher sees exactly the pictures that the student sees (same crop, same
mixing), and the schedule is long. One made for larger pictures sees them enlarged. The distance is the Kullback-Leibler
divergence of arXiv 1503.02531.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import build_model, load_checkpoint
from model.convmixer import ConvMixer
from training.config import TrainConfig
from training.data import ImageSet, check_held_out
from training.errors import ConfigError
from training.fused import use_cpu_kernels


class Distillation:
    """A teacher, ready to be learnt from.

    Args:
        path: its released checkpoint.
        config: the student's run; the temperature is taken from it.
        data: the student's.
        device: where both compute.

    Attributes:
        teacher: name and SHA-256 of the checkpoint, for the student's own.

    Raises:
        CheckpointError: `path` is not a released checkpoint.
        ConfigError: the teacher knows other classes, or was trained on pixels normalised differently.
        DataError: the teacher has learnt images that this run holds out.
    """

    def __init__(self, path: Path, config: TrainConfig, data: ImageSet, device: torch.device) -> None:
        checkpoint = load_checkpoint(path)
        self._network = build_model(checkpoint).to(device).to(memory_format=torch.channels_last)
        self._temperature = config.distill_temperature
        if isinstance(self._network, ConvMixer) and device.type == "cpu":
            use_cpu_kernels(self._network, processes=1)
        found = checkpoint.description
        if found["classes"] != data.classes:
            raise ConfigError(f"the teacher {path} knows classes {found['classes']}, the data has {data.classes}")
        check_held_out(path, found, data, config.val_fraction)
        ours = [list(config.normalize_mean), list(config.normalize_std)]
        if [found["normalize_mean"], found["normalize_std"]] != ours:
            raise ConfigError(f"the teacher {path} was trained on pixels normalised differently; both must see the same")
        size = found["model"].get("image_size")
        if size and {size} != {config.image_size, config.start_size or config.image_size}:
            raise ConfigError(
                f"the teacher {path} takes images of {size} pixels only; set image_size to that, and start_size to 0"
            )
        self._enlarge = found["image_size"] / config.image_size
        self.teacher = {"name": found["name"], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def compile(self) -> None:
        """Runs the teacher through torch.compile."""
        self._network.compile()

    def __call__(self, pictures: Tensor, logits: Tensor) -> Tensor:
        """Mean divergence of the student's answers from the teacher's, in nats, times the squared temperature.

        Args:
            pictures: what the student saw, float [N, 3, S, S], normalised.
            logits: what it answered, float32 [N, C].
        """
        t = self._temperature
        with torch.no_grad():
            if self._enlarge != 1:
                size = round(pictures.shape[-1] * self._enlarge)
                pictures = F.interpolate(pictures, (size, size), mode="bilinear", antialias=True)
            target = F.log_softmax(self._network(pictures).float() / t, dim=1)
        return F.kl_div(F.log_softmax(logits / t, dim=1), target, reduction="batchmean", log_target=True) * t * t
