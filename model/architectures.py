"""The networks that this project trains and serves, told apart by the field `architecture` of their configurations.

Each has `config`, `stem` (whose one convolution is the patch embedding, without padding), `head` (a linear layer on the average
over positions), `forward_features` and `forward_head`; nothing else is asked of it by training, evaluation and export.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from model import convmixer, mlp_mixer, resnet, vit
from model.convmixer import ConvMixer, ConvMixerConfig
from model.mlp_mixer import MLPMixer, MLPMixerConfig
from model.resnet import ResNet, ResNetConfig
from model.vit import ViT, ViTConfig

ModelConfig = ConvMixerConfig | MLPMixerConfig | ResNetConfig | ViTConfig
Network = ConvMixer | MLPMixer | ResNet | ViT


class _Architecture(NamedTuple):
    config: type[ModelConfig]
    network: Callable[[Any], Network]
    macs: Callable[[Any, int], int]


_ARCHITECTURES = {
    "convmixer": _Architecture(ConvMixerConfig, ConvMixer, convmixer.count_macs),
    "mlp-mixer": _Architecture(MLPMixerConfig, MLPMixer, mlp_mixer.count_macs),
    "resnet": _Architecture(ResNetConfig, ResNet, resnet.count_macs),
    "vit": _Architecture(ViTConfig, ViT, vit.count_macs),
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
    return _ARCHITECTURES[config.architecture].macs(config, image_size)
