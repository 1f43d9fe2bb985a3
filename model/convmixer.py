"""ConvMixer, as in "Patches Are All You Need?" (Trockman & Kolter, 2022, arXiv 2201.09792), section 2 and appendix D.

An isotropic net: patches are embedded once, then `depth` equal blocks mix them, first over space (a depthwise
convolution, with a residual connection), then over channels (a pointwise convolution, without one). Activation before
normalisation, BatchNorm everywhere, as the paper's own code has it. The configuration can undo each of these choices, one at
a time, for the study of what it is worth (docs/study.md); its defaults are the paper's network.

The names of the stages (`stem`, `blocks`, `head`) follow timm; `model.layouts` converts to and from other people's
state dicts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
        residual: which mixing has a residual connection around it: `spatial`, as in the paper, `both` or `none`.
        norm: `batchnorm`, as in the paper, or `layernorm` over the channels of each position.
        activation: `gelu`, as in the paper, or `relu`.
        architecture: tells this configuration from those of other networks (`model.architectures`).
    """

    hidden_dim: int = 256
    depth: int = 8
    kernel_size: int = 5
    patch_size: int = 2
    num_classes: int = 10
    in_channels: int = 3
    residual: str = "spatial"
    norm: str = "batchnorm"
    activation: str = "gelu"
    architecture: Literal["convmixer"] = "convmixer"

    def __post_init__(self) -> None:
        require_positive_integers(self)
        for name, known in (("residual", RESIDUALS), ("norm", tuple(NORMS)), ("activation", tuple(ACTIVATIONS))):
            if getattr(self, name) not in known:
                raise ValueError(f"ConvMixerConfig.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    @property
    def name(self) -> str:
        """The paper's short name with kernel and patch size, e.g. `convmixer-256-8-k5-p2`, and what is not the paper's."""
        name = f"convmixer-{self.hidden_dim}-{self.depth}-k{self.kernel_size}-p{self.patch_size}"
        name += f"-residual-{self.residual}" if self.residual != "spatial" else ""
        name += f"-{self.norm}" if self.norm != "batchnorm" else ""
        return name + (f"-{self.activation}" if self.activation != "gelu" else "")


class PatchEmbedding(nn.Module):
    """Cuts the image into p × p patches and projects each to h channels (section 2, equation 1)."""

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.conv = nn.Conv2d(config.in_channels, config.hidden_dim, kernel_size=p, stride=p)
        self.norm = NORMS[config.norm](config.hidden_dim)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.act(self.conv(x)))  # [N, 3, H, W] -> [N, h, H/p, W/p]
        return x


class ConvMixerBlock(nn.Module):
    """One layer: spatial mixing with a residual, then channel mixing without one (section 2, equations 2 and 3)."""

    def __init__(self, config: ConvMixerConfig) -> None:
        super().__init__()
        h, k = config.hidden_dim, config.kernel_size
        self.depthwise = nn.Conv2d(h, h, kernel_size=k, groups=h, padding="same")
        self.depthwise_norm = NORMS[config.norm](h)
        self.pointwise = nn.Conv2d(h, h, kernel_size=1)
        self.pointwise_norm = NORMS[config.norm](h)
        self.act = ACTIVATIONS[config.activation]
        self.around_spatial = config.residual != "none"  # the paper's choice: around this one
        self.around_channels = config.residual == "both"  # and not around this one

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.depthwise_norm(self.act(self.depthwise(x)))  # mixes positions within a channel
        x = x + mixed if self.around_spatial else mixed
        mixed = self.pointwise_norm(self.act(self.pointwise(x)))  # mixes channels within a position
        x = x + mixed if self.around_channels else mixed
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


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each position, as in ViT and MLP-Mixer: float [N, h, H, W] → the same."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x


RESIDUALS = ("spatial", "both", "none")
NORMS: dict[str, Callable[[int], nn.Module]] = {"batchnorm": nn.BatchNorm2d, "layernorm": LayerNorm2d}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


def require_positive_integers(config: Any) -> None:
    """Checks every field of a network's configuration that is declared an integer.

    Raises:
        ValueError: one is not, or is smaller than 1.
    """
    for name, declared in config.__dataclass_fields__.items():
        value = getattr(config, name)
        if declared.type == "int" and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{type(config).__name__}.{name} must be a positive integer, not {value!r}")


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars (the paper's "parameters"; BatchNorm statistics are not counted)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
