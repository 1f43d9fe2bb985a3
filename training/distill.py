"""Learning from other networks' answers instead of from labels alone.

As arXiv 2106.05237 found for compression: the teacher sees exactly the pictures that the student sees (same crop, same
mixing), and the schedule is long. One made for pictures of another size sees them brought to that, in whole patches of its own:
what is left over of a size would not be seen. The distance is the Kullback-Leibler divergence of arXiv 1503.02531.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.architectures import Network
from model.checkpoint import build_model, load_checkpoint
from model.convmixer import ConvMixer
from training.config import TrainConfig
from training.data import ImageSet, check_held_out
from training.errors import ConfigError
from training.fused import use_cpu_kernels


class Distillation:
    """Teachers, ready to be learnt from.

    Args:
        paths: their released checkpoints; of several the mean of the probabilities is learnt.
        config: the student's run; the temperature is taken from it.
        data: the student's.
        device: where all compute.
        layout: of feature maps in memory.

    Attributes:
        teachers: name and SHA-256 of each checkpoint, for the student's own.

    Raises:
        CheckpointError: one of `paths` is not a released checkpoint.
        ConfigError: a teacher knows other classes, or was trained on pixels normalised differently.
        DataError: a teacher has learnt images that this run holds out.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        config: TrainConfig,
        data: ImageSet,
        device: torch.device,
        layout: torch.memory_format = torch.channels_last,
    ) -> None:
        self._temperature, self._resample = config.distill_temperature, config.resample
        self._networks: list[tuple[Network, float]] = []
        self.teachers: list[dict[str, str]] = []
        for path in paths:
            checkpoint = load_checkpoint(path)
            network = build_model(checkpoint).to(device).to(memory_format=layout)
            found = checkpoint.description
            _check_fits(path, found, config, data)
            if isinstance(network, ConvMixer) and device.type == "cpu":
                use_cpu_kernels(network, processes=1)
            theirs = TrainConfig.from_dict(found["training"]["config"])
            self._networks.append((network, theirs.largest_size / config.largest_size))
            self.teachers.append({"name": found["name"], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})

    def compile(self) -> None:
        """Runs the teachers through torch.compile."""
        for network, _ in self._networks:
            network.compile()

    def __call__(self, pictures: Tensor, logits: Tensor) -> Tensor:
        """Mean divergence of the student's answers from the teachers', in nats, times the squared temperature.

        Args:
            pictures: what the student saw, float [N, 3, S, S], normalised.
            logits: what it answered, float32 [N, C].
        """
        t = self._temperature
        with torch.no_grad():
            views = [(network, self._scaled(pictures, scale, network.config.patch_size)) for network, scale in self._networks]
            answers = [F.log_softmax(network(view).float() / t, dim=1) for network, view in views]
            target = torch.stack(answers).logsumexp(0) - math.log(len(answers))
        return F.kl_div(F.log_softmax(logits / t, dim=1), target, reduction="batchmean", log_target=True) * t * t

    def _scaled(self, pictures: Tensor, scale: float, patch: int) -> Tensor:
        size = max(1, int(pictures.shape[-1] * scale / patch + 0.5)) * patch
        if size == pictures.shape[-1]:
            return pictures
        return F.interpolate(pictures, (size, size), mode=self._resample, antialias=True)


def _check_fits(path: Path, found: dict[str, Any], config: TrainConfig, data: ImageSet) -> None:
    if found["classes"] != data.classes:
        raise ConfigError(f"the teacher {path} knows classes {found['classes']}, the data has {data.classes}")
    check_held_out(path, found, data, config.val_fraction)
    config.check_normalized_alike(path, found)
    size = found["model"].get("image_size")
    if size and config.start_size not in (0, config.largest_size):
        raise ConfigError(f"the teacher {path} takes images of {size} pixels only, those of this run grow; set start_size to 0")
