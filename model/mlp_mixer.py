"""MLP-Mixer, as in "MLP-Mixer: An all-MLP Architecture for Vision" (Tolstikhin et al., 2021, arXiv 2105.01601), section 2.

The nearest relative of ConvMixer: the same patches and the same two kinds of mixing, each by a perceptron of two layers. Token
mixing has a weight for every pair of positions, so that the network takes images of one size only.

The state dict's names are timm's (`timm/models/mlp_mixer.py`): weights go there and back without conversion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from model.convmixer import require_positive_integers


@dataclass(frozen=True)
class MLPMixerConfig:
    """What an MLP-Mixer is, in the paper's symbols.

    Attributes:
        hidden_dim: C, channels of each token.
        depth: number of blocks.
        token_mlp_dim: D_S, hidden width of the perceptron over positions.
        channel_mlp_dim: D_C, hidden width of the perceptron over channels.
        patch_size: P, side and stride of the patch embedding.
        image_size: side of the images in pixels, a multiple of `patch_size`.
        num_classes: outputs of the head.
        in_channels: channels of the input image.
        architecture: tells this configuration from those of other networks (`model.architectures`).
    """

    hidden_dim: int = 128
    depth: int = 4
    token_mlp_dim: int = 64
    channel_mlp_dim: int = 512
    patch_size: int = 4
    image_size: int = 32
    num_classes: int = 10
    in_channels: int = 3
    architecture: Literal["mlp-mixer"] = "mlp-mixer"

    def __post_init__(self) -> None:
        require_positive_integers(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size} for an MLP-Mixer")

    @property
    def name(self) -> str:
        """E.g. `mlp-mixer-128-4-t64-c512-p4`: width, depth, the two hidden widths, patch size."""
        widths = f"t{self.token_mlp_dim}-c{self.channel_mlp_dim}"
        return f"mlp-mixer-{self.hidden_dim}-{self.depth}-{widths}-p{self.patch_size}"


class PatchEmbedding(nn.Module):
    """Cuts the image into p × p patches and projects each: float [N, 3, S, S] → tokens, float [N, T, h]."""

    def __init__(self, config: MLPMixerConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_dim, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).flatten(2).transpose(1, 2)  # [N, h, S/p, S/p] -> [N, T, h], T = (S/p)²
        return x


class MLP(nn.Module):
    """Two layers with a GELU between them, on the last axis."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x


class MixerBlock(nn.Module):
    """One layer: token mixing, then channel mixing, both normalised before and with a residual (section 2, equation 1)."""

    def __init__(self, config: MLPMixerConfig) -> None:
        super().__init__()
        tokens, h = (config.image_size // config.patch_size) ** 2, config.hidden_dim
        self.norm1 = nn.LayerNorm(h, eps=1e-6)
        self.mlp_tokens = MLP(tokens, config.token_mlp_dim)
        self.norm2 = nn.LayerNorm(h, eps=1e-6)
        self.mlp_channels = MLP(h, config.channel_mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # [N, h, T] inside
        x = x + self.mlp_channels(self.norm2(x))  # [N, T, h]
        return x


class MLPMixer(nn.Module):
    """The whole classifier: `stem` → `blocks` → `norm` → average over tokens → `head`.

    Args:
        config: widths, depth, patch and image size, classes and input channels.
    """

    def __init__(self, config: MLPMixerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = PatchEmbedding(config)
        self.blocks = nn.Sequential(*(MixerBlock(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.hidden_dim, eps=1e-6)
        self.head = nn.Linear(config.hidden_dim, config.num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens where they came from: float [N, 3, S, S] → float [N, h, S/p, S/p]."""
        side = self.config.image_size // self.config.patch_size
        x = self.norm(self.blocks(self.stem(x)))
        x = x.transpose(1, 2).unflatten(2, (side, side))  # [N, T, h] -> [N, h, S/p, S/p]
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Pools feature maps and classifies them: float [N, h, S/p, S/p] → logits, float [N, C]."""
        x = self.head(x.mean(dim=(2, 3)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (not probabilities) of normalised images: float [N, 3, S, S] → float [N, C]."""
        return self.forward_head(self.forward_features(x))
