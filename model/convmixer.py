"""ConvMixer, as in "Patches Are All You Need?" (Trockman & Kolter, 2022, arXiv 2201.09792), section 2 and appendix D.

An isotropic net: patches are embedded once, then `depth` equal blocks mix them, first over space (a depthwise
convolution, with a residual connection), then over channels (a pointwise convolution, without one). Activation before
normalisation, BatchNorm everywhere, as the paper's own code has it.

The names of the stages (`stem`, `blocks`, `head`) follow timm; `model.layouts` converts to and from other people's
state dicts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ConvMixerConfig:
    """What a ConvMixer is, in the paper's symbols.

    Attributes:
        hidden_dim: h, channels of every feature map.
        depth: d, number of blocks.
        kernel_size: k, side of the depthwise kernel. Even sizes are padded by one more on the right and bottom.
        patch_size: p, side and stride of the patch embedding.
        num_classes: C, outputs of the head.
        in_channels: channels of the input image.
    """

    hidden_dim: int = 256
    depth: int = 8
    kernel_size: int = 5
    patch_size: int = 2
    num_classes: int = 10
    in_channels: int = 3

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ConvMixerConfig.{name} must be a positive integer, not {value!r}")

    @property
    def name(self) -> str:
        """The paper's short name with kernel and patch size, e.g. `convmixer-256-8-k5-p2`."""
        return f"convmixer-{self.hidden_dim}-{self.depth}-k{self.kernel_size}-p{self.patch_size}"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConvMixerConfig:
        """Builds a configuration from plain values.

        Raises:
            ValueError: a key is unknown or a value is not a positive integer.
        """
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown ConvMixer settings: {', '.join(sorted(unknown))}")
        return cls(**values)


class PatchEmbedding(nn.Module):
    """Cuts the image into p × p patches and projects each to h channels (section 2, equation 1)."""

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.conv = nn.Conv2d(config.in_channels, config.hidden_dim, kernel_size=p, stride=p)
        self.norm = nn.BatchNorm2d(config.hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.conv(x)))  # [N, 3, H, W] -> [N, h, H/p, W/p]
        return x


class ConvMixerBlock(nn.Module):
    """One layer: spatial mixing with a residual, then channel mixing without one (section 2, equations 2 and 3)."""

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        h, k = config.hidden_dim, config.kernel_size
        self.depthwise = nn.Conv2d(h, h, kernel_size=k, groups=h, padding="same")
        self.depthwise_norm = nn.BatchNorm2d(h)
        self.pointwise = nn.Conv2d(h, h, kernel_size=1)
        self.pointwise_norm = nn.BatchNorm2d(h)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.depthwise_norm(F.gelu(self.depthwise(x)))  # mixes positions within a channel
        x = self.pointwise_norm(F.gelu(self.pointwise(x)))  # mixes channels within a position
        return x


class ConvMixer(nn.Module):
    """The whole classifier: `stem` → `blocks` → average pooling → `head`.

    Args:
        config: width, depth, kernel, patch, classes and input channels.
    """

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = PatchEmbedding(config)
        self.blocks = nn.Sequential(*(ConvMixerBlock(config) for _ in range(config.depth)))
        self.head = nn.Linear(config.hidden_dim, config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling: float [N, 3, H, W], normalised → float [N, h, H/p, W/p]."""
        x = self.blocks(self.stem(x))
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Pools feature maps and classifies them: float [N, h, H/p, W/p] → logits, float [N, C]."""
        x = self.head(x.mean(dim=(2, 3)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (not probabilities) of normalised images: float [N, 3, H, W] → float [N, C].

        H and W may be any size of at least one patch; a remainder smaller than a patch is not seen.
        """
        return self.forward_head(self.forward_features(x))


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars (the paper's "parameters"; BatchNorm statistics are not counted)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(config: ConvMixerConfig, image_size: int) -> int:
    """Multiply-accumulate operations of the convolutions and the head for one image_size × image_size image."""
    h, k, p = config.hidden_dim, config.kernel_size, config.patch_size
    positions = (image_size // p) ** 2
    stem = positions * h * config.in_channels * p * p
    block = positions * (h * k * k + h * h)
    return stem + config.depth * block + h * config.num_classes
