"""Pictures shown larger than they are, as a part of the network: a client need not know how, and no provider lacks it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Enlarge(nn.Module):
    """Square pictures at another size, resampled as Pillow's filters do it, but not rounded.

    The filters are separable and linear, so this is one matrix product for each direction.

    Args:
        side: S, of the pictures given, in pixels.
        view: V, of the result.
        resample: `bilinear` or `bicubic`.
        white: the largest value of a pixel; a cubic overshoots at edges, and is clipped to 0..white.
    """

    matrix: Tensor

    def __init__(self, side: int, view: int, resample: str, white: float = 1.0) -> None:
        super().__init__()
        self.white = white
        # each source pixel's share in each pixel of the result, with Pillow's cubic (a = -0.5), which torch has under this name
        shares = F.interpolate(torch.eye(side)[None, None], (side, view), mode=resample, antialias=True)
        self.register_buffer("matrix", shares[0, 0].T.contiguous(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """float32 [..., S, S] in 0..white → float32 [..., V, V] in 0..white."""
        matrix = self.matrix.to(images.device)
        return (matrix @ images @ matrix.T).clamp(0.0, self.white)
