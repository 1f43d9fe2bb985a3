"""ResNet, as in "Deep Residual Learning for Image Recognition" (He et al., 2015, arXiv 1512.03385), of torchvision's blocks.

As for CIFAR-10 in the paper's section 4.2, stages of equally many blocks, each of half the resolution and twice the channels of
the one before. Two deviations: a patch embedding in place of the first 3 × 3 convolution, whose padding would keep preprocessing
from being folded into it (model/export.py), and blocks that begin as the identity (arXiv 1706.02677, section 5.1).

Its convolutions are dense, which is what processors with matrix units do best: the teacher for those (`cpu-teacher`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from model.convmixer import require_positive_integers


@dataclass(frozen=True)
class ResNetConfig:
    """What a ResNet is.

    Attributes:
        hidden_dim: channels of the first stage; every other has twice those of the one before.
        depth: blocks of each stage, of two 3 × 3 convolutions.
        stages: number of stages; every one but the first halves the resolution.
        patch_size: side and stride of the patch embedding.
        num_classes: outputs of the head.
        architecture: tells this configuration from those of other networks (`model.architectures`).
    """

    hidden_dim: int = 64
    depth: int = 2
    stages: int = 3
    patch_size: int = 1
    num_classes: int = 10
    architecture: Literal["resnet"] = "resnet"

    def __post_init__(self) -> None:
        require_positive_integers(self)

    @property
    def widths(self) -> list[int]:
        """Channels of each stage."""
        return [self.hidden_dim << stage for stage in range(self.stages)]

    @property
    def name(self) -> str:
        """E.g. `resnet-64-2-s3-p1`: width, blocks a stage, stages, patch size."""
        return f"resnet-{self.hidden_dim}-{self.depth}-s{self.stages}-p{self.patch_size}"


class ResNet(nn.Module):
    """The whole classifier: `stem` → `blocks` → average pooling → `head`.

    Args:
        config: width, blocks, stages, patch and classes.
    """

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        h, p = config.hidden_dim, config.patch_size
        self.stem = nn.Sequential(nn.Conv2d(3, h, kernel_size=p, stride=p), nn.BatchNorm2d(h), nn.ReLU(inplace=True))
        blocks = []
        for stage, width in enumerate(config.widths):
            first = _halving(width // 2, width) if stage else BasicBlock(width, width)
            blocks += [first, *(BasicBlock(width, width) for _ in range(config.depth - 1))]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(config.widths[-1], config.num_classes)
        for module in self.modules():  # as torchvision.models.ResNet(zero_init_residual=True)
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps before pooling: float [N, 3, H, W], normalised → float [N, F, H/s, W/s], s = p · 2^(stages - 1)."""
        x = self.blocks(self.stem(x))
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Pools feature maps and classifies them: float [N, F, H/s, W/s] → logits, float [N, C]."""
        x = self.head(x.mean(dim=(2, 3)))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Logits (not probabilities) of normalised images: float [N, 3, H, W] → float [N, C]."""
        return self.forward_head(self.forward_features(x))


def _halving(width_in: int, width: int) -> BasicBlock:
    shortcut = nn.Sequential(nn.Conv2d(width_in, width, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(width))
    return BasicBlock(width_in, width, stride=2, downsample=shortcut)
