"""The networks that this project trains and serves, told apart by the field `architecture` of their configurations.

Each has `config`, `stem` (whose one convolution is the patch embedding, without padding), `head` (a linear layer on the average
over positions), `forward_features` and `forward_head`; nothing else is asked of it by training, evaluation and export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.convmixer import ConvMixer, ConvMixerConfig
from model.mlp_mixer import MLPMixer, MLPMixerConfig
from model.resnet import ResNet, ResNetConfig
from model.vit import ViT, ViTConfig

ModelConfig = ConvMixerConfig | MLPMixerConfig | ResNetConfig | ViTConfig
Network = ConvMixer | MLPMixer | ResNet | ViT


class _Architecture(NamedTuple):
    config: type[ModelConfig]
    network: Callable[[Any], Network]


_ARCHITECTURES = {
    "convmixer": _Architecture(ConvMixerConfig, ConvMixer),
    "mlp-mixer": _Architecture(MLPMixerConfig, MLPMixer),
    "resnet": _Architecture(ResNetConfig, ResNet),
    "vit": _Architecture(ViTConfig, ViT),
}


def config_class(architecture: str) -> type[ModelConfig]:
    """The configuration's class of an architecture.

    Raises:
        ValueError: there is no such architecture.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}; known: {', '.join(_ARCHITECTURES)}")
    return _ARCHITECTURES[architecture].config


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """A configuration from plain values; without `architecture`, as in checkpoints of old, it is a ConvMixer's.

    Raises:
        ValueError: the architecture or a key is unknown, or a value does not fit.
    """
    architecture = values.get("architecture", "convmixer")
    kind = config_class(architecture)
    unknown = set(values) - set(kind.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown {architecture} settings: {', '.join(sorted(unknown))}")
    return kind(**values)


def build_network(config: ModelConfig) -> Network:
    """A new network with random weights."""
    return _ARCHITECTURES[config.architecture].network(config)


def count_macs(config: ModelConfig, image_size: int) -> int:
    """Multiply-accumulate operations of the convolutions and matrix products for one image_size × image_size image."""
    with torch.device("meta"):  # nothing is computed
        network = build_network(config).train()  # in evaluation, attention is one fused operator that is not counted
        images = torch.zeros(2, 3, image_size, image_size)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(images)
    return int(counter.get_total_flops()) // (2 * len(images))
