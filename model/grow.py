"""A larger ConvMixer that answers as a smaller one does, so that training goes on where the smaller one stands.

Net2Net: Accelerating Learning via Knowledge Transfer (arXiv 1511.05641): a new channel is a copy of an old one, and whoever reads
both splits the old weight between them. Here it is split at random, anew for each reader, because equal shares would give
both channels equal gradients for ever. A larger kernel gets a border of zeros.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.convmixer import ConvMixerConfig

_READERS = ("pointwise.weight", "head.weight")  # [out, h, …]: they sum over the channels
_LEAST_SHARE = 0.5
"""Of a copy, before shares are scaled to sum to 1: between two copies a weight is split at most 1 to 3."""


def can_grow(small: ConvMixerConfig, large: ConvMixerConfig) -> bool:
    """Whether `grow` leads from one to the other: only width and kernel may differ, and nothing may shrink.

    A layer normalisation would see other means; a kernel can only grow on both sides alike.
    """
    added = large.kernel_size - small.kernel_size
    same = replace(large, hidden_dim=small.hidden_dim, kernel_size=small.kernel_size) == small
    return same and large.norm == "batchnorm" and large.hidden_dim >= small.hidden_dim and added >= 0 and added % 2 == 0


def grow(state: dict[str, Tensor], small: ConvMixerConfig, large: ConvMixerConfig, seed: int = 0) -> dict[str, Tensor]:
    """The state dict of the larger network.

    Args:
        state: of the smaller network.
        small: its configuration.
        large: the wanted one.
        seed: decides which channels are copied and how weights are split.

    Returns:
        Weights that give the same logits, to rounding.

    Raises:
        ValueError: one cannot grow into the other.
    """
    if not can_grow(small, large):
        raise ValueError(f"{small.name} cannot grow into {large.name}: width and kernel may grow, the kernel by an even number")
    generator = torch.Generator().manual_seed(seed)
    copies, left = divmod(large.hidden_dim, small.hidden_dim)
    parts = [torch.arange(small.hidden_dim)] * copies + [torch.randperm(small.hidden_dim, generator=generator)[:left]]
    origin = torch.cat(parts)  # [h_large], the channel that each is a copy of
    border = (large.kernel_size - small.kernel_size) // 2
    grown = {}
    for name, tensor in sorted(state.items()):  # a file's tensors come in any order, and each split draws its own numbers
        split = _split(tensor, origin, generator) if name.endswith(_READERS) else tensor
        whole = F.pad(split, (border,) * 4) if name.endswith("depthwise.weight") else split
        grown[name] = whole[origin] if whole.dim() and not name.startswith("head.") else whole.clone()
    return grown


def _split(weight: Tensor, origin: Tensor, generator: torch.Generator) -> Tensor:
    """Splits what is read from each channel between its copies: float [out, h, …] → float [out, h_large, …]."""
    shares = torch.rand(len(weight), len(origin), generator=generator) + _LEAST_SHARE
    totals = torch.zeros(weight.shape[:2]).index_add_(1, origin, shares)
    shares = (shares / totals[:, origin]).to(weight.dtype)
    return weight[:, origin] * shares.view(*shares.shape, *[1] * (weight.dim() - 2))
