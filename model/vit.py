"""Vision Transformer, as in "An Image is Worth 16x16 Words" (Dosovitskiy et al., 2021, arXiv 2010.11929): torchvision's.

One deviation: no class token. The head reads the average over the patches, as in "Better plain ViT baselines for ImageNet-1k"
(Beyer et al., 2022, arXiv 2205.01580), which found it no worse. The artifact's class maps are then exact (contract 2,
docs/architecture.md: logits = mean of the class maps + bias); from a class token there would be none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torchvision.models import VisionTransformer

from model.convmixer import require_positive_integers


@dataclass(frozen=True)
class ViTConfig:
    """What a ViT is, in the paper's symbols.

    Attributes:
        hidden_dim: D, channels of each token; a multiple of `heads`.
        depth: L, number of encoder blocks.
        heads: k, of the attention.
        mlp_dim: hidden width of each block's perceptron.
        patch_size: P, side and stride of the patch embedding.
        image_size: side of the images in pixels, a multiple of `patch_size`.
        num_classes: K, outputs of the head.
        architecture: tells this configuration from those of other networks (`model.architectures`).
    """

    hidden_dim: int = 128
    depth: int = 4
    heads: int = 4
    mlp_dim: int = 256
    patch_size: int = 4
    image_size: int = 32
    num_classes: int = 10
    architecture: Literal["vit"] = "vit"

    def __post_init__(self) -> None:
        require_positive_integers(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size} for a ViT")
        if self.hidden_dim % self.heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} must be a multiple of heads {self.heads} for a ViT")

    @property
    def name(self) -> str:
        """E.g. `vit-128-4-h4-m256-p4`: width, depth, heads, hidden width, patch size."""
        return f"vit-{self.hidden_dim}-{self.depth}-h{self.heads}-m{self.mlp_dim}-p{self.patch_size}"


class ViT(nn.Module):
    """The whole classifier, of torchvision's parts: `stem` → `encoder` → average over tokens → `head`.

    Args:
        config: widths, depth, heads, patch and image size, classes.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        parts = VisionTransformer(
            c.image_size, c.patch_size, c.depth, c.heads, c.hidden_dim, c.mlp_dim, num_classes=c.num_classes
        )
        self.stem = nn.Sequential(parts.conv_proj)
        self.encoder = parts.encoder  # adds the positions; normalises before each half block and at the end
        self.encoder.pos_embedding = nn.Parameter(
            parts.encoder.pos_embedding[:, 1:].detach().clone()
        )  # without the class token's
        self.head: nn.Linear = parts.heads.head

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised tokens where they came from: float [N, 3, S, S] → float [N, D, S/p, S/p]."""
        side = self.config.image_size // self.config.patch_size
        x = self.stem(x).flatten(2).transpose(1, 2)  # [N, T, D], T = (S/p)²
        x = self.encoder(x)
        x = x.transpose(1, 2).unflatten(2, (side, side))
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Pools feature maps and classifies them: float [N, D, S/p, S/p] → logits, float [N, C]."""
        x = self.head(x.mean(dim=(2, 3)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (not probabilities) of normalised images: float [N, 3, S, S] → float [N, C]."""
        return self.forward_head(self.forward_features(x))
